"""The benchmarks run end to end, count what they say they count, and refuse what they cannot do."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import diagnostics_overhead
import optimizer_step
import train_throughput
from contenders import OPTIMIZERS, Contender
from optimizer_step import MODELS
from step_floor import Peaks, matrix_shapes, step_bytes, step_counts, step_flops
from train_throughput import WORKLOADS
from training_loops import (
    OptimizerChoice,
    TokenRows,
    WindowClock,
    build_config,
    build_model,
    flops_per_token,
    novel_tokens,
    read_tokens,
)

CPU = torch.device("cpu")
STEPS = ["--warmup", "1", "--steps", "1", "--rounds", "2"]
TRAINING = ["--device", "cpu", "--dtype", "float32", "--warmup", "1", "--rounds", "1"]


# ---- diagnostics_overhead.py ----


def test_diagnostics_overhead_end_to_end(tmp_path, capsys):
    path = tmp_path / "diagnostics.json"
    small = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--steps",
        "1",
        "--warmup",
        "1",
        "--batch",
        "1",
        "--context",
        "16",
    ]
    assert diagnostics_overhead.main([*small, "--every", "10", "--optimizers", "mud", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert result["matrices"] == 28
    measuring, training = result["measuring_milliseconds"], result["training_milliseconds"]
    assert result["share"] == pytest.approx(measuring / (10 * training + measuring))
    assert f"{result['share']:.2%}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        diagnostics_overhead.main([*small, "--optimizers", "adamw"])
    assert "adamw has no diagnostics" in capsys.readouterr().err


# ---- optimizer_step.py ----


def test_bytes_of_a_step_by_hand():
    # gradient read, parameter and state read and written, 2 bytes out and in for each half-precision hand-over
    assert step_bytes("adamw", 10, 40, 80) == 10 * (4 + 8 + 16) == 280
    assert step_bytes("muon", 10, 40, 40) == step_bytes("mud", 10, 40, 40) == 10 * (4 + 8 + 8 + 4) == 240
    assert step_bytes("adamuon", 10, 40, 80) == 10 * (4 + 8 + 16 + 8) == 360
    assert step_bytes("mud", 10, 20, 40) == 10 * (2 + 4 + 8 + 4)  # bfloat16 parameters, float32 momentum


def test_operations_of_a_step_by_hand():
    assert step_flops("adamw", 2, 3) == 0
    assert step_flops("mud", 2, 3) == pytest.approx(12 + 8 / 3 + 12)
    assert step_flops("mud", 2, 3, 2) == pytest.approx(2 * (24 + 8 / 3))
    assert step_flops("muon", 2, 3) == step_flops("adamuon", 2, 3) == 12 + 17 * 8 + 24


def test_the_floor_is_time_to_copy_plus_time_to_multiply():
    peaks = Peaks(copy_bytes_per_second=100.0, product_flops_per_second=25.0, product="")
    assert peaks.floor_milliseconds({"bytes": 1000, "flops": 50}) == pytest.approx(1e3 * (10 + 2))


def tiny_groups() -> list[dict[str, Any]]:
    """A fused projection of three 4 x 4 matrices stored as (fan_in, fan_out), a 6 x 2 matrix and a vector of 5."""

    def parameter(*shape: int) -> torch.nn.Parameter:
        p = torch.nn.Parameter(torch.ones(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return p

    return [
        {"params": [parameter(5)], "role": "adamw"},
        {"params": [parameter(4, 12)], "role": "matrix", "output_axis": 1, "split_sizes": (4, 4, 4)},
        {"params": [parameter(6, 2)], "role": "matrix"},
    ]


def test_shapes_of_the_matrices_as_they_are_read():
    assert matrix_shapes(tiny_groups(), split=True) == [(4, 4)] * 3 + [(2, 6)]
    assert matrix_shapes(tiny_groups(), split=False) == [(4, 12), (2, 6)]


@pytest.mark.parametrize(
    ("name", "bytes_an_element", "flops"),
    [
        ("adamw", 28, 0),
        ("torch_muon", 24, step_flops("muon", 4, 12) + step_flops("muon", 2, 6)),
        ("muon", 24, 3 * step_flops("muon", 4, 4) + step_flops("muon", 2, 6)),
        ("adamuon", 36, 3 * step_flops("adamuon", 4, 4) + step_flops("adamuon", 2, 6)),
        ("mud_2_passes", 24, 3 * step_flops("mud", 4, 4, 2) + step_flops("mud", 2, 6, 2)),
        ("pytorch_optimizer_muon", 24, step_flops("muon", 4, 12) + step_flops("muon", 2, 6)),
        ("pytorch_optimizer_adamuon", 36, step_flops("adamuon", 4, 12) + step_flops("adamuon", 2, 6)),
    ],
)
def test_counts_of_a_real_optimizer(name, bytes_an_element, flops):
    groups = tiny_groups()
    before = [p.detach().clone() for group in groups for p in group["params"]]
    optimizer = OPTIMIZERS[name](optimizer_step.fresh(groups))
    optimizer.step()
    after = [p.detach() for group in groups for p in group["params"]]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))  # AdamW's vector too
    counts = step_counts(OPTIMIZERS[name], optimizer, groups)
    assert counts == {"bytes": (48 + 12) * bytes_an_element + 5 * 28, "flops": pytest.approx(flops)}


def test_optimizer_step_end_to_end(tmp_path, capsys):
    path = tmp_path / "steps.json"
    names = ["adamw", "torch_muon", "muon", "adamuon", "mud"]
    assert optimizer_step.main([*STEPS, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert list(result["milliseconds"]) == list(result["counts"]) == names
    assert all(len(times) == 2 and min(times) > 0 for times in result["milliseconds"].values())
    assert result["matrices"] == result["matrix_parameters"] == 28
    per_element = {name: counts["bytes"] / result["parameters"] for name, counts in result["counts"].items()}
    assert per_element == {"adamw": 28, "torch_muon": 24, "muon": 24, "adamuon": 36, "mud": 24}
    for counts in result["counts"].values():
        peaks = Peaks(**result["peaks"])
        assert counts["floor_milliseconds"] == pytest.approx(peaks.floor_milliseconds(counts))
    assert result["host_milliseconds"] == result["workspace_bytes"] == {}  # of GPUs
    assert result["absent"] == result["failed"] == {}
    printed = capsys.readouterr().out
    assert all(f"| {OPTIMIZERS[name].label or name} |" in printed for name in names)
    assert "Measured peaks: copy" in printed


def test_one_optimizer_that_fails_does_not_cost_the_others(tmp_path, capsys, monkeypatch):
    def broken(groups: Any) -> Any:
        raise RuntimeError("no memory left\nand more")

    monkeypatch.setitem(OPTIMIZERS, "broken", Contender("muon", broken))
    path = tmp_path / "steps.json"
    assert optimizer_step.main([*STEPS, "--optimizers", "broken,mud", "--scope", "all", "--json", str(path)]) == 1
    result = json.loads(path.read_text())
    assert result["failed"] == {"broken": "RuntimeError: no memory left"}
    assert list(result["milliseconds"]) == ["mud"]
    assert "Failed: broken: RuntimeError: no memory left" in capsys.readouterr().out


def test_all_leaves_out_what_cannot_run_and_says_why(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "elsewhere", Contender("muon", list, package="no_such_package"))
    args = optimizer_step.parse_arguments(["--optimizers", "all"])
    assert {*args.optimizers, *args.absent} == {*OPTIMIZERS}
    assert not {*args.optimizers} & {*args.absent}
    assert "no_such_package is not installed" in args.absent["elsewhere"]
    assert {"mud_graph", "muon_graph", "adamuon_graph"} <= {*args.absent}  # there is no GPU in device=cpu
    assert {"adamw", "torch_muon", "muon", "adamuon", "mud", "pytorch_optimizer_muon"} <= {*args.optimizers}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adamw,nadam"], "unknown optimizer 'nadam'"),
        (["--optimizers", "elsewhere"], "'elsewhere' cannot run: the package no_such_package is not installed"),
        (["--optimizers", "mud_graph"], "'mud_graph' cannot run"),
        (["--model", "gpt2-larg"], "'gpt2-larg' is not one of demo"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--steps", "0"], "--steps 0: it must be at least 1"),
        (["--warmup", "0"], "--warmup 0: it must be at least 1"),
        (["--steps", "1", "--rounds", "1"], "--steps 1 --rounds 1: one of them must be at least 2"),
        (["--json", "no_such_folder/steps.json"], "--json no_such_folder/steps.json"),
    ],
)
def test_optimizer_step_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "elsewhere", Contender("muon", list, package="no_such_package"))
    with pytest.raises(SystemExit, match="2"):
        optimizer_step.main(arguments)
    assert message in capsys.readouterr().err


# ---- train_throughput.py ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """What a run of all optimizers under both loops writes; one of them cannot be built."""
    path = tmp_path_factory.mktemp("throughput") / "train.json"
    optimizers = "adamw,muon,adamuon,mud,mud:kernels=torch:passes=2,mud:momentum=2"
    shape = ["--batch", "2", "--context", "32", "--steps", "2", "--windows", "2"]
    assert train_throughput.main([*TRAINING, *shape, "--optimizers", optimizers, "--json", str(path)]) == 1
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_every_run_is_in_the_file(trained):
    (result,) = trained["results"]
    assert (result["model"], result["batch"], result["context"]) == ("demo", 2, 32)
    done = [run for run in result["runs"] if "error" not in run]
    names = ["adamw", "muon", "adamuon", "mud", "mud:kernels=torch:passes=2"]
    assert [(run["optimizer"], run["loop"]) for run in done] == [
        (n, loop) for n in names for loop in ("trainer", "bare")
    ]
    for run in done:
        assert len(run["window_seconds"]) == 2
        assert len(run["optimizer_milliseconds"]) == 2 * 2  # windows x steps
        assert min(*run["window_seconds"], *run["optimizer_milliseconds"]) > 0
        assert run["round"] == 1
        assert run["peak_memory_bytes"] is None  # of GPUs
    assert trained["settings"]["precision"] == "float32"
    assert {"torch", "transformers", "python"} == {*trained["settings"]["versions"]}


def test_both_loops_train_the_same_and_optimizers_do_not(trained):
    losses = {(run["optimizer"], run["loop"]): run.get("mean_loss") for run in trained["results"][0]["runs"]}
    bare = {name: loss for (name, loop), loss in losses.items() if loop == "bare" and loss is not None}
    assert {name: losses[name, "trainer"] for name in bare} == pytest.approx(bare, rel=1e-6)
    assert len({round(loss, 6) for loss in bare.values()}) == len(bare) == 5


def test_a_run_that_fails_is_named_and_the_others_go_on(trained):
    failed = [run for run in trained["results"][0]["runs"] if "error" in run]
    assert [(run["optimizer"], run["loop"]) for run in failed] == [
        ("mud:momentum=2", "trainer"),
        ("mud:momentum=2", "bare"),
    ]
    assert all("momentum=2.0 is not allowed" in run["error"] for run in failed)


def test_summary_is_the_medians_of_the_windows(trained):
    (result,) = trained["results"]
    rows = {(row["optimizer"], row["loop"]): row for row in result["summary"]}
    assert len(rows) == 10
    for run in result["runs"]:
        if "error" in run:
            continue
        row = rows[run["optimizer"], run["loop"]]
        speeds = [2 * 32 * 2 / seconds for seconds in run["window_seconds"]]
        assert row["tokens_per_second"] == pytest.approx(statistics.median(speeds))
        assert row["lowest_tokens_per_second"] == pytest.approx(min(speeds))
        assert row["highest_tokens_per_second"] == pytest.approx(max(speeds))
        assert row["step_milliseconds"] == pytest.approx(1e3 * 2 * 32 / row["tokens_per_second"])
        assert row["optimizer_milliseconds"] == pytest.approx(statistics.median(run["optimizer_milliseconds"]))
        adamw, bare = rows["adamw", run["loop"]], rows[run["optimizer"], "bare"]
        assert row["ratio_to_adamw"] == pytest.approx(row["tokens_per_second"] / adamw["tokens_per_second"])
        ratio_to_bare = row["tokens_per_second"] / bare["tokens_per_second"]
        assert row["ratio_to_bare"] == (pytest.approx(ratio_to_bare) if run["loop"] == "trainer" else None)


def test_a_masked_model_its_own_tokens_and_one_loop(tmp_path, capsys):
    tokens = tmp_path / "proteins.bin"
    np.random.default_rng(0).integers(4, 24, 300).astype(np.uint16).tofile(tokens)
    path = tmp_path / "train.json"
    shape = ["--models", "esm2-150m", "--batch", "1", "--context", "16", "--steps", "1", "--windows", "1"]
    choice = ["--optimizers", "adamw", "--loop", "bare", "--tokens", str(tokens), "--peak_tflops", "2"]
    assert train_throughput.main([*TRAINING, *shape, *choice, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    (row,) = result["results"][0]["summary"]
    expected = row["tokens_per_second"] * result["results"][0]["flops_per_token"] / 2e12
    assert row["model_flops_utilization"] == pytest.approx(expected)
    assert 2 < row["mean_loss"] < 5  # log 33 = 3.5
    assert result["settings"]["tokens"] == "proteins.bin"
    assert "| adamw | bare |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "demo,gpt2-larg"], "unknown model 'gpt2-larg'"),
        (["--optimizers", "adamw,nadam"], "unknown optimizer 'nadam'"),
        (["--optimizers", "mud:passess=2"], "did you mean 'passes'?"),
        (["--optimizers", "mud:passes"], "'passes' is not key=value"),
        (["--optimizers", "adamw:eps=1"], "adamw takes no options"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--context", "64,many"], "--context 64,many"),
        (["--rounds", "0"], "--rounds 0"),
        (["--device", "cpu", "--attention", "flash"], "--attention flash: demo: Specified"),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1.0"),
        (["--peak_tflops", "0"], "--peak_tflops 0.0"),
        (["--tokens", "no_such_file.npy"], "no_such_file.npy does not exist"),
        (["--json", "no_such_folder/train.json"], "--json no_such_folder/train.json"),
    ],
)
def test_train_throughput_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_throughput.main(arguments)
    assert message in capsys.readouterr().err


def test_tokens_are_read_from_both_kinds_of_file(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(70_000))
    np.arange(60_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    assert read_tokens(tmp_path / "tokens.npy").tolist() == list(range(70_000))
    assert read_tokens(tmp_path / "tokens.bin").tolist() == list(range(60_000))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("floats.npy", np.ones(8), "holds float64 of shape"),
        ("rows.npy", np.ones((2, 4), dtype=int), "of shape .2, 4., not a flat array"),
        ("objects.npy", np.array([{}], dtype=object), "cannot be read as .npy"),
        ("text.npy", b"words", "cannot be read as .npy"),
        ("odd.bin", b"odd", "not a file of unsigned 16-bit numbers: it has 3 bytes"),
        ("empty.bin", b"", "it has 0 bytes"),
        ("tokens.pt", b"x", "neither .npy"),
    ],
)
def test_tokens_of_another_kind_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_tokens(path)


def test_rows_follow_the_tokens_and_begin_again():
    rows = TokenRows(np.arange(2000), build_config("demo", 4), 4, 1000, from_novels=False)
    assert len(rows) == 1000
    assert rows[1]["input_ids"].tolist() == [4, 5, 6, 7]
    assert rows[1]["labels"].tolist() == [-100, 5, 6, 7]
    assert torch.equal(rows[501]["input_ids"], rows[1]["input_ids"])


def test_rows_of_a_masked_model_have_labels_where_they_are_masked():
    config = build_config("esm2-150m", 50)
    rows = TokenRows(novel_tokens(), config, 50, 100, from_novels=True)
    masked = rows.input_ids == config.mask_token_id
    assert masked.float().mean().item() == pytest.approx(0.15, abs=0.03)
    assert torch.equal(masked, rows.labels != -100)
    assert {*rows.labels[masked].tolist()} == {*range(4, 24)}  # the 20 amino acids
    assert int(rows.input_ids[~masked].max()) < 24


@pytest.mark.parametrize(
    ("tokens", "message"), [(np.array([1, 2, 2048, 3]), "token 2048"), (np.array([1, -2, 3, 4]), "token -2")]
)
def test_tokens_of_another_vocabulary_are_refused(tokens, message):
    with pytest.raises(ValueError, match=f"{message} is not in the vocabulary of 2048"):
        TokenRows(tokens, build_config("demo", 4), 4, 1, from_novels=False)


def test_less_tokens_than_a_row_are_refused():
    with pytest.raises(ValueError, match="there are 3 tokens, less than one row of 4"):
        TokenRows(np.arange(3), build_config("demo", 4), 4, 1, from_novels=False)


def test_windows_begin_after_the_warm_up():
    clock = WindowClock(CPU, warmup=3, steps=2)
    seen = []
    for _ in range(3 + 2 * 2 + 1):
        clock.on_pre_optimizer_step()
        clock.on_optimizer_step()
        clock.on_step_end()
        seen.append(len(clock.window_seconds))
    assert seen == [0, 0, 0, 0, 1, 1, 2, 2]
    assert len(clock.optimizer_milliseconds()) == 5


def test_every_model_has_a_batch_and_a_context_it_can_take():
    assert {*WORKLOADS} == {*MODELS}
    for name, (batch, contexts) in WORKLOADS.items():
        assert batch > 0
        for context in contexts:
            config = build_config(name, context)
            assert config.max_position_embeddings >= context
            assert not config.use_cache
    assert build_config("gpt2-large", 2048).max_position_embeddings == 2048
    assert WORKLOADS["gpt2-large"] == (8, (2048, 1024))
    assert WORKLOADS["esm2-150m"] == (8, (512,))


def test_operations_of_a_token_by_hand():
    config = build_config("demo", 32)
    model = build_model(config, torch.device("meta"), "sdpa", seed=0)
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512  # q and o, k and v of two heads of 32, the gated MLP
    weights = 4 * layer + 128 * 2048
    assert flops_per_token(model, 32) == 6 * weights + 12 * 4 * 128 * 32


def test_an_optimizer_with_options_is_the_same_for_both_loops():
    choice = OptimizerChoice("mud:kernels=torch:passes=2")
    assert (choice.name, choice.optim_args, choice.trainer_name) == ("mud", "kernels=torch,passes=2", "mud")
    optimizer = choice.build(build_model(build_config("demo", 8), CPU, "sdpa", seed=0), 1e-3)
    assert {group["passes"] for group in optimizer.param_groups if group["role"] == "matrix"} == {2}
