"""The study: what it measures on curves with known answers, which runs it makes, and what it writes."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
import study
import torch
from matplotlib import image
from matplotlib.figure import Figure
from recipe_error import RecipeError
from run_log import LOG_FILE, RunLog, read_log
from study_comparison import Sweep
from study_comparison import compare as compare_runs
from study_curves import draw_curves
from study_metrics import (
    Curve,
    first_reached,
    group_runs,
    load_run,
    rolling_mean,
    speedup,
    spread_of,
    token_saving,
)
from study_report import sweep_table
from tiny_recipe import write_text

TOKENS_PER_STEP = 100


def write_run(
    folder: Path,
    optim: str,
    losses: list[float | None],
    *,
    seed: int = 0,
    rate: float = 1e-3,
    seconds_per_step: float = 1.0,
    finished: bool = True,
    **identity: Any,
) -> Path:
    """Write the folder of a run that logged a loss every 10 steps and evaluated to the same loss every 20."""
    folder.mkdir(parents=True)
    record: dict[str, Any] = {
        "identity": {
            "recipe": "toy", "preset": "small", "optim": optim, "optim_args": None, "seed": seed, "model": {},
            "schedule": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "steps": None}, **identity,
        },
        "training_arguments": {"learning_rate": rate},
        "plan": {"steps": 10 * len(losses), "tokens_per_step": TOKENS_PER_STEP},
        "parameters": 1234,
        "initial_weights_sha256": f"weights {seed}",
        "first_batch_sha256": f"batch {seed}",
        "versions": {"torch": "2"},
        "hardware": {"cpu": "cpu", "torch_threads": 1, "gpus": []},
        "data": {"train": {"unigram_entropy": 6.0}},
    }  # fmt: skip
    if finished:
        record["results"] = {"steps": 10 * len(losses), "mfu": 0.4, "peak_memory_bytes": 3 * 2**30}
    (folder / "run.json").write_text(json.dumps(record))
    log = RunLog(folder)
    for index, loss in enumerate(losses, start=1):
        step = 10 * index
        common = {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "train_seconds": step * seconds_per_step,
            "loss": loss,
        }
        log.append({"kind": "train", **common, "lr": rate, "grad_norm": 1.0, "optimizer_seconds": 0.1 * step})
        if index % 2 == 0:
            log.append({"kind": "eval", **common, "perplexity": None if loss is None else math.exp(loss)})
    return folder


def line(start: float, end: float, count: int = 21) -> list[float]:
    return np.linspace(start, end, count).tolist()


def test_rolling_mean_is_of_the_last_seven() -> None:
    assert rolling_mean([1, 2, 3], 2) == (1.0, 1.5, 2.5)
    values = np.random.default_rng(0).normal(size=30)
    assert rolling_mean(values.tolist())[6:] == pytest.approx(np.convolve(values, np.ones(7) / 7, "valid"))
    assert rolling_mean([]) == ()


@pytest.mark.parametrize(
    ("target", "reached"), [(5.0, 1.0), (4.0, 2.0), (3.5, 2.5), (3.0, 3.0), (1.0, 9.0), (0.5, None)]
)
def test_reaching_is_linear_between_points_and_not_reached_is_none(target: float, reached: float | None) -> None:
    curve = Curve((1.0, 2.0, 3.0, 5.0, 9.0), (5.0, 4.0, 3.0, 3.5, 1.0))
    assert first_reached(curve, target) == reached
    assert first_reached(Curve((), ()), target) is None
    assert first_reached(Curve((1.0, 2.0), (math.inf, 1.0)), 3.0) == 2.0


def test_spread_counts_what_has_no_value() -> None:
    assert spread_of([1.0, None, 3.0]) == (2.0, pytest.approx(math.sqrt(2)), 2, 3)
    assert spread_of([None, None]) == (None, None, 0, 2)
    assert spread_of([4.0]) == (4.0, None, 1, 1)


def test_token_saving_and_speedup_have_their_closed_form(tmp_path: Path) -> None:
    """Straight losses from 5: the baseline falls 2 in 210 steps, the other 4, and in half the time a step."""
    adamw = load_run(write_run(tmp_path / "a", "adamw_torch", line(5, 3)))
    fast = load_run(write_run(tmp_path / "b", "mud", line(5, 1), seconds_per_step=0.5))
    smoothed = adamw.training()
    assert smoothed.y[-1] == pytest.approx(3.3)  # mean of the last seven: three steps of 0.1 behind
    needed, saving = token_saving(fast, adamw)
    # smoothed, the fast run is at 5 - 0.2 (n - 4) after n logs; 3.3 at n = 12.5
    assert needed == pytest.approx(12.5 * 10 * TOKENS_PER_STEP)
    assert saving == pytest.approx((21 - 12.5) / 21)
    assert token_saving(adamw, adamw)[1] == 0
    assert token_saving(adamw, fast) == (None, None)
    # the baseline's last validation is at log 20, 3.1; the fast run's loss is 5 - 0.2 (n - 1): 3.1 at n = 10.5
    needed, saving = token_saving(fast, adamw, "eval")
    assert needed == pytest.approx(10.5 * 10 * TOKENS_PER_STEP)
    assert saving == pytest.approx((20 - 10.5) / 20)
    # validation at steps 20, 40, ...: perplexity e^4 at the baseline's log 11 (between 10 and 12) and the other's 6
    target = math.exp(4.0)
    low, high = math.exp(5 - 0.1 * 9), math.exp(5 - 0.1 * 11)
    expected = 100 + 20 * (low - target) / (low - high)
    seconds, factor = speedup(fast, adamw, target, perplexity=True)
    assert seconds == pytest.approx(30)
    assert factor == pytest.approx(expected / 30)
    assert speedup(adamw, fast, math.exp(2.0), perplexity=True) == (None, None)


def test_a_run_that_diverged_reaches_nothing_from_there_on(tmp_path: Path) -> None:
    adamw = write_run(tmp_path / "a", "adamw_torch", line(5, 3))
    nan = write_run(tmp_path / "b", "muon", [*line(5, 4, 10), None, *line(1, 1, 10)])
    run = load_run(nan)
    assert run.diverged_at == 110
    assert run.final_training_loss() is None
    assert run.final_validation_loss() is None
    assert max(run.training("step").x) == 100
    assert token_saving(run, load_run(adamw)) == (None, None)
    comparison = compare_runs([load_run(adamw), run])
    page = compare.report(comparison)
    assert "muon, seed 0: diverged, the loss was not finite at step 110." in page
    row = next(row for row in page.splitlines() if row.startswith("| muon |"))
    assert "diverged" in row
    assert "not reached" in row


@pytest.mark.parametrize(("steps_per_pass", "said"), [(84, "2.5 times"), (210, None), (None, None)])
def test_several_passes_are_said(tmp_path: Path, steps_per_pass: int | None, said: str | None) -> None:
    folder = write_run(tmp_path / "a", "adamw_torch", line(5, 3))
    record = json.loads((folder / "run.json").read_text())
    record["plan"]["steps_per_pass"] = steps_per_pass
    (folder / "run.json").write_text(json.dumps(record))
    page = compare.report(compare_runs([load_run(folder)]))
    assert (f"pass over their data {said}" in page) if said else ("pass over their data" not in page)


def test_runs_are_paired_by_seed(tmp_path: Path) -> None:
    runs = []
    for seed, end in ((0, 3.0), (1, 2.5), (2, 2.0)):
        runs.append(load_run(write_run(tmp_path / f"a{seed}", "adamw_torch", line(5, end), seed=seed)))
        if seed < 2:
            faster = line(5, 5 - 2 * (5 - end))
            runs.append(load_run(write_run(tmp_path / f"m{seed}", "mud", faster, seed=seed, seconds_per_step=2.0)))
    comparison = compare_runs(runs)
    measured = {group["label"]: group for group in comparison.measured}
    saving = measured["mud"]["token_saving"]
    assert (saving["count"], saving["runs"]) == (2, 2)
    assert saving["mean"] == pytest.approx((21 - 12.5) / 21)
    assert saving["deviation"] == pytest.approx(0, abs=1e-12)
    assert measured["adamw_torch"]["seeds"] == [0, 1, 2]
    difference = measured["mud"]["validation_loss_difference"]
    assert (difference["mean"], difference["count"]) == (pytest.approx(-np.mean([0.1, 0.125]) * 19), 2)
    assert measured["mud"]["tokens_per_second"]["mean"] == pytest.approx(50)
    assert measured["mud"]["optimizer_ms_per_step"]["mean"] == pytest.approx(100)
    assert measured["mud"]["optimizer_share"]["mean"] == pytest.approx(0.05)
    assert measured["mud"]["validation_loss"]["mean"] == pytest.approx(np.mean([5 - 0.2 * 19, 5 - 0.25 * 19]))
    # the last target is one that every seed of the baseline reaches
    assert comparison.targets[-1] == pytest.approx(math.exp(5 - 0.1 * 19))
    assert measured["mud"]["time_to"][-1]["speedup"]["count"] == 2


def test_unsteady_seconds_are_doubted(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"{optim}{seed}", optim, line(5, 3), seed=seed, seconds_per_step=seconds))
        for optim, factor in (("adamw_torch", 1.05), ("mud", 1.5))
        for seed, seconds in ((0, 1.0), (1, factor))
    ]
    page = compare.report(compare_runs(runs))
    assert "mud: tokens a second vary by 28% between seeds" in page
    assert "adamw_torch: tokens a second vary" not in page


def test_what_else_differs_is_said(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", "adamw_torch", line(5, 3))
    two = write_run(tmp_path / "b", "mud", line(5, 2), tokenizer="another")
    record = json.loads((two / "run.json").read_text())
    record["first_batch_sha256"] = "other"
    (two / "run.json").write_text(json.dumps(record))
    page = compare.report(compare_runs([load_run(one), load_run(two)]))
    assert "Not the same in all runs: tokenizer: None / another." in page
    assert "Not the same in all runs: first batch: not the same for seed 0." in page
    assert "initial weights: not" not in page
    assert "measurements of runs, not a comparison of optimizers" in page
    assert "has a horizon" not in page


def test_learning_rates_are_groups_and_the_baseline_is_the_best_adamw(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"{optim}{rate}", optim, line(5, end), rate=rate))
        for optim, rate, end in (("mud", 1e-3, 2), ("adamw_torch", 1e-3, 3), ("adamw_torch", 2e-3, 2.5))
    ]
    comparison = compare_runs(runs)
    assert [group.label for group in comparison.groups] == ["mud", "adamw_torch, 0.001", "adamw_torch, 0.002"]
    assert comparison.baseline.label == "adamw_torch, 0.002"
    assert compare_runs(runs, baseline="mud").baseline.label == "mud"
    with pytest.raises(RecipeError, match="--baseline sgd: there are mud, adamw_torch, 0.001"):
        compare_runs(runs, baseline="sgd")
    again = load_run(write_run(tmp_path / "again", "mud", line(5, 2)))
    with pytest.raises(RecipeError, match="with the same seed: name one of them"):
        group_runs([*runs, again])


def test_the_picture_names_each_learning_rate_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    rates = (1e-3, 2e-3)
    draw_curves(
        compare_runs([load_run(write_run(tmp_path / str(rate), "mud", line(5, 2), rate=rate)) for rate in rates]),
        tmp_path / "curves.png",
    )
    for axes in drawn[0].axes:
        assert axes.get_legend_handles_labels()[1][:2] == ["mud (lr 0.001)", "mud (lr 0.002)"]


def test_compare_writes_the_report_the_picture_and_the_metrics(tmp_path: Path, capsys: Any) -> None:
    folders = [
        write_run(tmp_path / f"{optim}{seed}", optim, line(5 + seed / 10, end), seed=seed, finished=optim != "mud")
        for optim, end in (("adamw_torch", 3), ("mud", 2.5))
        for seed in (0, 1, 2)
    ]
    output = tmp_path / "out"
    argv = [*map(str, folders), "--output_dir", str(output), "--targets", "40,1"]
    assert compare.main(argv) == 0
    assert sorted(file.name for file in output.iterdir()) == ["curves.png", "metrics.json", "report.md"]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["targets"] == [40, 1]
    times = {group["label"]: group["time_to"] for group in metrics["optimizers"]}
    assert times["mud"][0]["speedup"]["mean"] > 1
    assert times["mud"][1]["seconds"] == {"mean": None, "deviation": None, "count": 0, "runs": 3}
    page = (output / "report.md").read_text()
    assert page in capsys.readouterr().out
    assert "seconds to perplexity 40" in page
    assert "| peak GiB |" in page
    assert "| 3.00 ± 0.00 |" in page
    assert "| mud | not reached |" not in page
    assert "mud: not finished, seed 0, 1, 2." in page
    picture = image.imread(output / "curves.png")
    assert picture.shape[1] > 3 * picture.shape[0] * 0.8
    thirds = np.array_split(picture[..., :3], 3, axis=1)
    assert all(len(np.unique(third.reshape(-1, 3), axis=0)) > 50 for third in thirds)  # something is drawn in each


def test_compare_reads_sweeps_off_their_runs(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", "mud", line(5, 3), rate=2e-3)
    ends = {4e-3: [*line(5, 4, 9), None], 1e-3: line(5, 4, 10), 2e-3: line(5, 3.5, 10)}
    swept = [write_run(tmp_path / f"{rate}", "mud", losses, rate=rate) for rate, losses in ends.items()]
    argv = [str(run), "--sweep", *map(str, swept), "--output_dir", str(tmp_path / "out")]
    assert compare.main(argv) == 0
    page = capsys.readouterr().out
    assert "| mud | 4.0000 | **3.5000** | diverged | 0.002 | yes |" in page
    assert "Learning rates are the best of runs of 100 steps" in page
    assert "Not every optimizer has its learning rate" not in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"losses": line(5, 3)}, "the runs of the sweep have 100, 210 steps"),
        ({"finished": False}, "is not finished"),
        ({"weight_decay": 0.3}, "are not alike: weight_decay: 0.3 / None"),
        ({"seed": 1}, "the sweep of mud has not the same seeds at all learning rates"),
    ],
)
def test_runs_that_are_no_sweep_are_refused(tmp_path: Path, capsys: Any, more: dict[str, Any], message: str) -> None:
    run = write_run(tmp_path / "run", "mud", line(5, 3), rate=2e-3)
    swept = [write_run(tmp_path / f"{rate}", "mud", line(5, 4, 10), rate=rate) for rate in (1e-3, 2e-3)]
    swept.append(write_run(tmp_path / "other", "mud", **{"losses": line(5, 4, 10), "rate": 4e-3, **more}))
    argv = [str(run), "--sweep", *map(str, swept), "--output_dir", str(tmp_path / "out")]
    assert compare.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rate_that_is_not_the_sweeps_best_is_not_tuned(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", "mud", line(5, 3), rate=1e-3)
    ends = {1e-3: 4.0, 2e-3: 3.5, 4e-3: 4.5}
    swept = [write_run(tmp_path / f"{rate}", "mud", line(5, end, 10), rate=rate) for rate, end in ends.items()]
    assert compare.main([str(run), "--sweep", *map(str, swept), "--output_dir", str(tmp_path / "out")]) == 0
    assert "Not every optimizer has its learning rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["{folder}/nothing"], "nothing has no run.json: it is not the folder of a run"),
        (["{folder}/run/run.json"], "run.json has no run.json: it is not the folder of a run"),
        (["{folder}/untrained"], "untrained has no log.jsonl"),
        (["{folder}/damaged"], "log.jsonl, line 1, is not a record of a run"),
        (["{folder}/run", "--targets", "3,x"], "--targets 3,x: 'x' is no number"),
        (["{folder}/run", "--targets", "-3"], "--targets -3: -3 must be above 0"),
        (["{folder}/run", "--output_dir", "{folder}/run/run.json"], "run.json is a file"),
        (["{folder}/run", "--output_dir", "{folder}/run"], "run holds files that no comparison wrote"),
        (["{folder}/run", "--output_dir", "/proc/nothing"], "--output_dir /proc/nothing cannot be written to"),
    ],
)
def test_compare_refuses_what_is_no_run(tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    write_run(tmp_path / "run", "mud", line(5, 3))
    (write_run(tmp_path / "untrained", "mud", line(5, 3)) / LOG_FILE).unlink()
    (write_run(tmp_path / "damaged", "mud", line(5, 3)) / LOG_FILE).write_text("words\nwords\n")
    output = tmp_path / "out"
    argv = ["--output_dir", str(output), *(part.format(folder=tmp_path) for part in more)]
    assert compare.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not output.exists()


def test_the_log_has_no_gaps_or_duplicates_after_a_resume(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.truncate(0)
    records = [
        {"kind": kind, "step": step, "tokens": step, "train_seconds": step / 2, "loss": 1.0}
        for step in range(1, 6)
        for kind in ("train", "eval")
    ]
    for record in records:
        log.append(record)
    with log.path.open("a") as stream:
        stream.write('{"kind": "train", "step": 6, "tok')  # killed here
    assert read_log(tmp_path / "run") == records
    log.truncate(3)
    assert read_log(tmp_path / "run") == records[:6]
    log.append({**records[6], "loss": math.nan, "grad_norm": math.inf})
    assert read_log(tmp_path / "run")[-1] == {**records[6], "loss": None, "grad_norm": None}
    log.truncate(0)
    assert read_log(tmp_path / "run") == []


def test_sweep_table_marks_the_best_and_whether_it_is_bracketed() -> None:
    sweeps = [
        Sweep("adamw_torch", {1e-3: 3.0, 2e-3: 2.5, 4e-3: math.inf}),
        Sweep("mud", {2e-3: 2.0, 4e-3: 1.9}),
    ]
    assert sweep_table(sweeps).splitlines()[2:] == [
        "| adamw_torch | 3.0000 | **2.5000** | diverged | 0.002 | yes |",
        "| mud |  | 2.0000 | **1.9000** | 0.004 | no, at an end |",
    ]


TOY = '''
"""A recipe whose loss is a formula: best at a learning rate of its own for each optimizer."""
import argparse, json, math, os, sys
from pathlib import Path

def small():
    from recipe_arguments import Preset
    from transformers import GPT2Config
    return Preset(GPT2Config, {}, {"learning_rate": 1e-3, "train_data": ["toy.txt"], "tokenizer": "toy"})

PRESETS = {} if __name__ == "__main__" else {"small": small()}
BEST = {"adamw_torch_fused": 1e-3, "muon": 8e-3, "mud": 1e-3}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    names = "preset optim optim_args output_dir run_name resume_from_checkpoint report_to"
    for name in names.split():
        parser.add_argument("--" + name)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max_steps", type=int, default=200)
    a, unknown = parser.parse_known_args()
    if unknown:
        print("error: unknown argument", unknown[0], file=sys.stderr)
        sys.exit(2)
    folder = Path(a.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "started.txt", "a") as started:
        started.write(json.dumps([a.optim, a.learning_rate, a.seed, a.run_name, a.report_to, a.max_steps]) + "\\n")
    run = {
        "identity": {"recipe": "toy", **{k: getattr(a, k) for k in ("preset", "optim", "optim_args", "seed")}},
        "training_arguments": {"learning_rate": a.learning_rate},
        "plan": {"steps": a.max_steps, "tokens_per_step": 10}, "versions": {}, "hardware": {"cpu": "cpu"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    if os.environ.get("TOY_FAILS") == a.optim:
        sys.exit(1)
    off = abs(math.log2(a.learning_rate / BEST[a.optim]))
    with open(folder / "log.jsonl", "w") as log:
        for step in range(10, a.max_steps + 1, 10):
            loss = None if off > 4.5 else 3 + off / 10 + 2 * math.exp(-step / 50) - (a.optim == "muon") * step / 1000
            for kind in ("train", "eval"):
                record = {"kind": kind, "step": step, "tokens": 10 * step, "train_seconds": step / 10, "loss": loss}
                log.write(json.dumps(record) + "\\n")
    run["results"] = {}
    (folder / "run.json").write_text(json.dumps(run))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes with only the toy, and the place of its study."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "toy.py").write_text(TOY)
    monkeypatch.setattr(study, "RECIPES", recipes)
    monkeypatch.syspath_prepend(str(recipes))
    sys.modules.pop("toy", None)
    return tmp_path / "out"


def started(folder: Path) -> list[list[Any]]:
    return [json.loads(row) for row in (folder / "started.txt").read_text().splitlines()]


def test_a_study_makes_its_runs_alternating_and_only_once(toy: Path, capsys: Any) -> None:
    argv = ["--recipe", "toy-small", "--optim", "adamw_torch_fused,mud", "--seeds", "0,1,2", "--output_dir", str(toy)]
    argv += ["--lr", "mud=0.002", "--report_to", "none", "--max_steps", "100"]
    assert study.main(argv) == 0
    order = [(optim, seed) for optim, _, seed, *_ in started(toy)]
    adamw, mud = "adamw_torch_fused", "mud"
    assert order == [(adamw, 0), (mud, 0), (mud, 1), (adamw, 1), (adamw, 2), (mud, 2)]
    assert started(toy)[1] == ["mud", 0.002, 0, "toy-small-mud-lr0.002-seed0", "none", 100]
    assert study.main(argv) == 0
    assert len(started(toy)) == 6
    assert {"report.md", "curves.png", "metrics.json", "mud-lr0.002-seed2"} <= {file.name for file in toy.iterdir()}
    # one more optimizer, with options of its own, joins the same study
    argv[3] += ",mud:passes=2+momentum=0.9"
    assert study.main(argv) == 0
    assert len(started(toy)) == 9
    metrics = json.loads((toy / "metrics.json").read_text())
    assert [group["label"] for group in metrics["optimizers"]] == [
        "adamw_torch_fused",
        "mud",
        "mud (passes=2,momentum=0.9)",
    ]
    assert not metrics["tuned"]
    capsys.readouterr()
    assert study.main([*argv, "--warmup_steps", "5"]) == 2
    assert "holds another study (toy-small --report_to none --max_steps 100)" in capsys.readouterr().err


def test_a_sweep_goes_on_until_the_best_is_between_two_worse(toy: Path) -> None:
    argv = ["--recipe", "toy-small", "--optim", "adamw_torch_fused,muon", "--output_dir", str(toy), "--sweep-lr"]
    assert study.main(argv) == 0
    rates: dict[str, list[float]] = {}
    for optim, rate, *_ in started(toy):
        rates.setdefault(optim, []).append(rate)
    assert rates["adamw_torch_fused"] == [1e-3, 5e-4, 2e-3]
    assert rates["muon"] == [1e-3, 5e-4, 2e-3, 4e-3, 8e-3, 1.6e-2]
    metrics = json.loads((toy / "metrics.json").read_text())
    assert metrics["tuned"]
    assert {name: sweep["best"] for name, sweep in metrics["sweeps"].items()} == {
        "adamw_torch_fused": 1e-3,
        "muon": 8e-3,
    }
    assert [group["learning_rate"] for group in metrics["optimizers"]] == [1e-3, 8e-3]
    saving = metrics["optimizers"][1]["token_saving"]
    assert saving["mean"] > 0.2
    assert "not a comparison of optimizers" not in (toy / "report.md").read_text()


def test_a_sweep_of_shorter_runs_has_folders_of_its_own(toy: Path) -> None:
    argv = ["--recipe", "toy-small", "--optim", "mud", "--output_dir", str(toy), "--max_steps", "100"]
    assert study.main([*argv, "--sweep_lr", "--sweep_steps", "50"]) == 0
    assert [row[-1] for row in started(toy)] == [50, 50, 50, 100]
    assert (toy / "mud-lr0.001-seed0-50steps").is_dir()
    assert json.loads((toy / "metrics.json").read_text())["baseline"] == "mud"
    assert "Learning rates are the best of runs of 50 steps" in (toy / "report.md").read_text()


def test_a_sweep_begins_with_the_rates_given(toy: Path) -> None:
    argv = ["--recipe", "toy-small", "--optim", "adamw_torch_fused,muon", "--output_dir", str(toy)]
    assert study.main([*argv, "--sweep_lr", "5e-4,1e-3,2e-3,4e-3"]) == 0
    rates = [rate for optim, rate, *_ in started(toy) if optim == "muon"]
    assert rates == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert len(started(toy)) == 4 + 6


def test_runs_share_gpus_out_and_wait_for_them(toy: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    busy: set[str] = set()
    together = []
    real_run = subprocess.run

    def watched(command: list[str], **keywords: Any) -> Any:
        gpu = keywords["env"]["CUDA_VISIBLE_DEVICES"]
        assert gpu not in busy
        busy.add(gpu)
        together.append(len(busy))
        try:
            return real_run(command, **keywords)
        finally:
            busy.remove(gpu)

    monkeypatch.setattr(subprocess, "run", watched)
    argv = ["--recipe", "toy-small", "--optim", "adamw_torch_fused,muon", "--output_dir", str(toy)]
    assert study.main([*argv, "--sweep_lr", "--gpus", "1,3", "--seeds", "0,1"]) == 0
    assert len(started(toy)) == len(together) == 3 + 1 + 6 + 1
    assert max(together) == 2
    assert json.loads((toy / "metrics.json").read_text())["tuned"]
    assert (toy / "muon-lr0.008-seed1.log").is_file()
    monkeypatch.setenv("TOY_FAILS", "muon")
    capsys.readouterr()
    assert study.main([*argv, "--gpus", "1,3", "--seeds", "2"]) == 1
    error = capsys.readouterr()
    assert "toy-small-muon-lr0.001-seed2 ended with exit status 1" in error.err
    assert f"see {toy / 'muon-lr0.001-seed2.log'}" in error.out
    assert study.main([*argv, "--gpus", "1,3", "--seeds", "2", "--sweep_lr", "--lr", "muon=0.5"]) == 2


def test_learning_rates_that_all_diverge_are_an_error(toy: Path, capsys: Any) -> None:
    argv = ["--recipe", "toy-small", "--optim", "mud", "--lr", "mud=1", "--output_dir", str(toy), "--sweep_lr"]
    assert study.main(argv) == 2
    assert "error: mud: all of the learning rates 1.0, 0.5, 2.0 diverged" in capsys.readouterr().err


def test_a_failed_run_is_named_and_made_again(toy: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--recipe", "toy-small", "--optim", "muon,adamw_torch_fused", "--output_dir", str(toy)]
    monkeypatch.setenv("TOY_FAILS", "muon")
    assert study.main(argv) == 1
    assert "toy-small-muon-lr0.001-seed0 ended with exit status 1" in capsys.readouterr().err.splitlines()[-1]
    assert [group["label"] for group in json.loads((toy / "metrics.json").read_text())["optimizers"]] == [
        "adamw_torch_fused"
    ]
    monkeypatch.delenv("TOY_FAILS")
    assert study.main(argv) == 0
    assert [row[0] for row in started(toy)] == ["muon", "adamw_torch_fused", "muon"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "toy-large"], "toy has no preset large; it has small"),
        (["--recipe", "gpt9-small"], "the recipes are toy"),
        (["--seeds", "0,x"], "--seeds 0,x: write whole numbers"),
        (["--seeds", "1,1"], "names a seed twice"),
        (["--optim", "mud,mud"], "names an optimizer twice"),
        (["--lr", "muon=1e-3"], "--lr muon=1e-3: --optim has mud; write name=rate"),
        (["--lr", "mud=fast"], "--lr mud fast: 'fast' is no number"),
        (["--learning_rate", "1"], "--learning_rate is set by the study"),
        (["--output-dir=x"], "--output-dir is set by the study"),
        (["--targets", "x"], "--targets x: 'x' is no number"),
        (["--sweep_steps", "0"], "--sweep_steps is 0"),
        (["--sweep_lr", "1e-3,x"], "--sweep_lr 1e-3,x: 'x' is no number"),
        (["--gpus", "0,9999"], "--gpus 0,9999: "),
        (["--gpus", ""], "is no number of a GPU"),
        (["--output_dir", "{folder}/mine"], "holds files that no study wrote"),
        (["--max_stepz", "3"], "unknown argument --max_stepz; did you mean --max_steps?"),
        (["--optim", "adamw_torch_fused,mudd"], "--optim: invalid choice: 'mudd'; did you mean mud?"),
        (["--optim", "adamw_torch_fused,mud:pases=2"], "--optim mud: "),
        (["--optim", "adamw_torch_fused:passes=2"], "--optim adamw_torch_fused reads no options"),
        (["--baseline", "mudd"], "--baseline mudd: --optim has mud; did you mean mud?"),
        (["--max_steps", "0"], "--max_steps is 0"),
        (["--seeds", "0,-1"], "--seed is -1"),
        (["--launcher", "torchrunn --nproc_per_node 2"], "there is no program torchrunn"),
        (["--launcher", "'torchrun"], "No closing quotation"),
        (["--output_dir", "/proc/nothing"], "--output_dir /proc/nothing cannot be written to"),
    ],
)
def test_a_study_that_cannot_be_made_is_one_error(
    toy: Path, tmp_path: Path, capsys: Any, more: list[str], message: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    argv = ["--recipe", "toy-small", "--optim", "mud", "--output_dir", str(toy)]
    assert study.main([*argv, *(part.format(folder=tmp_path) for part in more)]) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not toy.exists()


def test_a_study_whose_first_run_was_refused_can_be_corrected(toy: Path, capsys: Any) -> None:
    argv = ["--recipe", "toy-small", "--optim", "mud", "--output_dir", str(toy)]
    assert study.main([*argv, "--warmup_steps", "5"]) == 1  # the toy does not know it, Trainer does
    assert "was refused" in capsys.readouterr().err
    assert study.main(argv) == 0
    assert study.main([*argv, "--max_steps", "50"]) == 2
    assert "holds another study (toy-small )" in capsys.readouterr().err


def test_a_study_of_a_real_recipe_measures_everything(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    argv = ["--recipe", "gpt2-tiny", "--optim", "adamw_torch,mud", "--output_dir", str(tmp_path / "out")]
    argv += ["--train_data", str(text / "train.txt"), "--validation_data", str(text / "validation.txt")]
    argv += ["--block_size", "32", "--tokens_per_step", "128", "--max_steps", "6", "--eval_steps", "2"]
    argv += ["--logging_steps", "1", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert study.main([*argv, "--cache_dir", str(tmp_path / "cache"), "--report_to", "none"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["target_is_perplexity"]
    assert metrics["baseline"] == "adamw_torch"
    assert metrics["differences"] == []
    for group in metrics["optimizers"]:
        keys = ("training_loss", "validation_loss", "accuracy", "tokens_per_second", "optimizer_ms_per_step")
        assert [group[key]["count"] for key in keys] == [1] * 5
        assert 0 < group["optimizer_share"]["mean"] < 1
        assert group["unfinished"] == []
        assert group["diverged"] == {}
        run = load_run(Path(group["folders"][0]))
        assert run.curve("train", "tokens").x == tuple(128.0 * step for step in range(1, 7))
        assert run.curve("eval", "step").x == (2.0, 4.0, 6.0)
        assert run.final_validation_loss() == pytest.approx(run.record["results"]["eval_loss"])
        assert run.record["training_arguments"]["run_name"] == f"gpt2-tiny-{run.folder.name}"
    assert metrics["optimizers"][0]["time_to"][-1]["speedup"]["mean"] == 1


@pytest.mark.parametrize("program", [study, compare])
def test_help_says_what_is_written(program: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    assert "report.md" in capsys.readouterr().out
