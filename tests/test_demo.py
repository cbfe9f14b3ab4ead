"""The tables and the pictures of the demo and of the sweep of its learning rates."""

import datetime
import math
from pathlib import Path
from typing import Any

import demo
import pytest
import sweep
from demo import MODELS, OPTIMIZERS, Curves, draw_curves, read_curves, results_page, results_table, steps_to_reach
from run_log import RunLog
from sweep import sweep_page, sweep_table
from tiny_recipe import RECIPES

QWEN2_5, ESM2 = MODELS


def test_steps_to_reach_is_linear_between_evaluations() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)]
    assert steps_to_reach(curve, 4.5) == 15
    assert steps_to_reach(curve, 5.5) == 10
    assert steps_to_reach(curve, 3.0) == 40
    assert steps_to_reach(curve, 2.9) is None


def finished_run(optim: str, learning_rate: float, loss: float | None) -> dict[str, Any]:
    return {
        "identity": {"optim": optim, "seed": 0, "recipe": "qwen2_5"},
        "training_arguments": {"learning_rate": learning_rate},
        "plan": {"steps": 20, "tokens_per_step": 1000, "steps_per_pass": 10},
        "results": {
            "eval_loss": loss,
            "eval_perplexity": None if loss is None else math.exp(loss),
            "train_seconds": 2.0,
            "tokens_per_second": 1e4,
        },
        "versions": {"python": "3", "torch": "2", "transformers": "5"},
        "hardware": {"cpu": "cpu", "torch_threads": 2, "gpus": []},
        "parameters": 1,
    }


def curves(optim: str, losses: tuple[float, float]) -> Curves:
    validation = [(10, losses[0]), (20, losses[1])]
    return Curves(optim, 2e-3, [(5, 6.0), (20, losses[1])], validation, finished_run(optim, 2e-3, losses[1]))


def test_curves_are_read_from_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for kind, step, loss in (("train", 1, 3.0), ("train", 2, math.nan), ("eval", 2, 2.5)):
        log.append({"kind": kind, "step": step, "tokens": step, "train_seconds": 1.0, "loss": loss})
    found = read_curves("mud", 1e-3, tmp_path, {})
    assert (found.train, found.validation, found.label) == ([(1, 3.0)], [(2, 2.5)], "MUD")


def test_demo_tables_and_picture(tmp_path: Path) -> None:
    runs = [curves("adamw_torch_fused", (5.0, 4.0)), curves("mud", (4.5, 3.5)), curves("muon", (5.5, 4.5))]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table(runs).splitlines()[2:]]
    assert [row[4] for row in rows] == ["20", "15", "not reached"]
    assert rows[1] == ["MUD", "0.002", "3.500", "33.12", "15", "2", "10,000"]
    draw_curves({QWEN2_5: runs, ESM2: runs}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = results_page({QWEN2_5: runs, ESM2: runs}, 12.0)
    assert page.index("## Qwen2.5") < page.index("## ESM-2")
    assert page.count("| MUD | 0.002 |") == 2


@pytest.mark.parametrize("flags", [["--output_dir", "{folder}"], ["--output_dir", "/proc/nothing"]])
def test_demo_leaves_files_of_others_alone(tmp_path: Path, capsys: Any, flags: list[str]) -> None:
    (tmp_path / "results.md").write_text("mine")
    assert demo.main([flag.format(folder=tmp_path) for flag in flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --output_dir ")
    assert "give another folder" in error
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "qwen2_5,esm"], "--model esm: it is of qwen2_5, esm2; did you mean esm2?"),
        (["--optim", "muon,mudd"], "--optim mudd: it is of"),
        (["--learning_rate", "1e-3,fast"], "--learning_rate 1e-3,fast: 'fast' is no number"),
        (["--learning_rate", "-1"], "--learning_rate -1: -1 must be above 0"),
        (["--table", "{folder}"], "is a folder; name a file in it"),
        (["--table", "{folder}/notes.txt/table.md"], "notes.txt is a file"),
        (["--output_dir", "/proc/nothing"], "--output_dir /proc/nothing cannot be written to"),
    ],
)
def test_sweep_refuses_before_its_first_run(tmp_path: Path, capsys: Any, flags: list[str], message: str) -> None:
    (tmp_path / "notes.txt").touch()
    argv = ["--output_dir", str(tmp_path / "out"), *(flag.format(folder=tmp_path) for flag in flags)]
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_sweep_table_marks_the_best_and_whether_it_is_bracketed() -> None:
    points = [("muon", 1e-3, 5.0), ("muon", 2e-3, 4.5), ("muon", 4e-3, None), ("mud", 1e-3, 5.0), ("mud", 2e-3, 4.0)]
    table = sweep_table([finished_run(*point) for point in points])
    assert "| muon | 5.000 | **4.500** | inf | 0.002 | yes |" in table
    assert "| mud | 5.000 | **4.000** |  | 0.002 | no, at an end |" in table
    page = sweep_page({QWEN2_5: [finished_run(*point) for point in points]}, datetime.date(2026, 1, 2))
    assert table in page
    assert "2026-01-02, seed 0" in page


def test_demo_has_every_optimizer_at_its_best_rate_of_the_sweep() -> None:
    assert list(OPTIMIZERS) == ["adamw_torch_fused", "muon", "adamuon", "adamuon_v1", "mud"]
    page = (RECIPES / "results" / "demo_sweep.md").read_text(encoding="utf-8")
    for model in MODELS:
        assert list(model.learning_rates) == list(OPTIMIZERS)
        section = page.split(f"## {model.label}\n", 1)[1].split("\n## ")[0]
        assert f"{model.steps} steps" in section
        for optim, rate in model.learning_rates.items():
            row = next(line for line in section.splitlines() if line.startswith(f"| {optim} |"))
            assert row.split("|")[-3].strip() == f"{rate:g}"
            assert row.split("|")[-2].strip() == "yes"
