"""The presets of the recipe, and the tables and the picture of the demo and its sweep."""

import datetime
import math
from pathlib import Path
from typing import Any

import pretrain
import pytest
import qwen2_5
import torch
from demo import CONTENDERS, Contender, Curves, draw_curves, results_table, steps_to_reach
from step_plan import Plan, plan_steps
from sweep import sweep_table
from tiny_recipe import RECIPES, TOKENIZER
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize(("name", "parameters"), [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("tiny", 1_247_360)])
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = pretrain.build_config(qwen2_5.PRESETS[name], tokenizer, block_size=1024)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.rms_norm_eps == 1e-6


@pytest.mark.parametrize("name", qwen2_5.PRESETS)
def test_presets_parse(name: str) -> None:
    _, arguments, training, given = pretrain.parse_arguments("qwen2_5", qwen2_5.PRESETS, ["--preset", name])
    plan = plan_steps(arguments, training, given, blocks=10**9)
    assert given == {"preset"}
    assert plan.tokens_per_step == qwen2_5.PRESETS[name].defaults["tokens_per_step"]
    if arguments.max_tokens is not None:
        assert 0.999 < plan.steps * plan.tokens_per_step / arguments.max_tokens <= 1


def test_what_is_typed_replaces_the_preset() -> None:
    argv = ["--preset", "1.5b", "--max_steps", "7", "--train_data", "a.txt", "--gradient_accumulation_steps", "4"]
    _, arguments, training, given = pretrain.parse_arguments("qwen2_5", qwen2_5.PRESETS, argv)
    assert (arguments.dataset_name, arguments.dataset_config, arguments.max_tokens) == (None, None, None)
    assert plan_steps(arguments, training, given, None) == Plan(
        tokens_per_step=4 * 8192,
        sequences_per_step=4,
        sequences_per_device=1,
        gradient_accumulation_steps=4,
        steps=7,
        steps_per_pass=None,
    )
    assert training.output_dir == "out/qwen2_5-1.5b-adamw_torch_fused-seed42"


def test_steps_to_reach_is_linear_between_evaluations() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)]
    assert steps_to_reach(curve, 4.5) == 15
    assert steps_to_reach(curve, 5.5) == 10
    assert steps_to_reach(curve, 3.0) == 40
    assert steps_to_reach(curve, 2.9) is None


def finished_run(optim: str, learning_rate: float, loss: float) -> dict[str, Any]:
    return {
        "identity": {"optim": optim, "seed": 0},
        "training_arguments": {"learning_rate": learning_rate},
        "plan": {"steps": 20, "tokens_per_step": 1000, "steps_per_pass": 10},
        "results": {
            "eval_loss": loss,
            "eval_perplexity": math.exp(loss),
            "train_seconds": 2.0,
            "tokens_per_second": 1e4,
        },
        "versions": {"python": "3", "torch": "2", "transformers": "5"},
        "hardware": {"cpu": "cpu", "torch_threads": 2, "gpus": []},
        "parameters": 1,
    }


def curves(label: str, losses: tuple[float, float]) -> Curves:
    contender = Contender(label, label.lower(), 2e-3)
    validation = [(10, losses[0]), (20, losses[1])]
    return Curves(contender, [(5, 6.0), (20, losses[1])], validation, finished_run(contender.optim, 2e-3, losses[1]))


def test_demo_table_and_picture(tmp_path: Path) -> None:
    runs = [curves("AdamW", (5.0, 4.0)), curves("MUD", (4.5, 3.5)), curves("Muon", (5.5, 4.5))]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table(runs).splitlines()[2:]]
    assert [row[4] for row in rows] == ["20", "15", "not reached"]
    assert rows[1] == ["MUD", "0.002", "3.500", "33.1", "15", "2", "10,000"]
    draw_curves(runs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_table_marks_the_best_and_whether_it_is_bracketed() -> None:
    points = [("muon", 1e-3, 5.0), ("muon", 2e-3, 4.5), ("muon", 4e-3, 4.75), ("mud", 1e-3, 5.0), ("mud", 2e-3, 4.0)]
    page = sweep_table([finished_run(*point) for point in points], datetime.date(2026, 1, 2))
    assert "| muon | 5.000 | **4.500** | 4.750 | 0.002 | yes |" in page
    assert "| mud | 5.000 | **4.000** |  | 0.002 | no, at an end |" in page
    assert "2026-01-02, seed 0" in page


def test_demo_has_every_optimizer_at_its_best_rate_of_the_sweep() -> None:
    optimizers = ["adamw_torch_fused", "muon", "adamuon", "adamuon_v1", "mud"]
    assert [contender.optim for contender in CONTENDERS] == optimizers
    table = (RECIPES / "results" / "demo_sweep.md").read_text(encoding="utf-8")
    for contender in CONTENDERS:
        row = next(line for line in table.splitlines() if line.startswith(f"| {contender.optim} |"))
        assert row.split("|")[-3].strip() == f"{contender.learning_rate:g}"
        assert row.split("|")[-2].strip() == "yes"
