"""The benchmark of several ranks runs end to end on two of gloo; the model of messages agrees with counts by hand."""

import itertools
import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import communication
import distributed_step
from communication import (
    ASSUMED,
    LARGE_MODELS,
    SCHEMES,
    Curve,
    cost_of,
    curves_of,
    large_config,
    plan_of,
    with_measured,
)
from contenders import fresh
from distributed_contenders import CLASSES, ENGINES, SeededMatrices, contenders_of, largest_error, with_params
from distributed_results import check_training, left_to_run, new_or_saved
from optimizer_step import meta_groups
from process_group import FailedOnAllRanksError, OutOfStepError, Processes

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TRAINING = ["--trainer", "--trainer_model", "demo", "--trainer_optimizers", "adamw,mud", "--batch", "2"]


def groups_of(shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"params": [torch.empty(shape, device="meta") for shape in shapes], "role": "matrix"}]


# ---- two ranks, through the command line ----


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, Any]:
    """What a run of everything writes, with its tables under "stdout"."""
    folder = tmp_path_factory.mktemp("distributed")
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.save_pretrained(folder)
    return {**run_everything(folder, folder / "run.json"), "folder": folder}


def run_everything(folder: Path, path: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--device", "cpu", "--models", str(folder), "--layers", "1", "--link_mib", "1,2", "--timeout", "60"]
    short = ["--steps", "3", "--warmup", "1", "--context", "16", "--window_steps", "2", "--windows", "1"]
    script = str(ROOT / "benchmarks" / "distributed_step.py")
    done = subprocess.run(
        [*command, script, *arguments, *short, *TRAINING, "--json", str(path), *more],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads(path.read_text()), "stdout": done.stdout, "stderr": done.stderr}


def test_every_contender_is_in_the_file_and_right(ran):
    (result,) = ran["steps"]
    ours = [(engine, scheme, rule) for engine, scheme in (
        ("ddp", "ddp_redundant"), ("ddp", "ddp_share"), ("fsdp2", "fsdp2_full_tensor"), ("fsdp2", "fsdp2_all_to_all")
    ) for rule in ("muon", "adamuon", "mud")]  # fmt: skip
    others = [("ddp", "adamw", "adamw"), ("fsdp2", "adamw", "adamw"), ("fsdp2", "torch_muon", "muon")]
    runs = {(run["engine"], run["scheme"], run["rule"]): run for run in result["runs"]}
    assert {*runs} == {*ours, *others}
    assert len(result["runs"]) == len(runs)
    for key, run in runs.items():
        assert len(run["milliseconds"]) == 3
        assert [max(step) for step in zip(*run["rank_milliseconds"], strict=True)] == run["milliseconds"]
        assert min(run["milliseconds"]) > 0
        assert run["is_right"]
        assert (run["max_relative_error"] == 0) == (key in ours or key[1] == "adamw"), key
        assert run["extra_peak_bytes"] is None  # of GPUs
    assert (result["matrices"], result["elements"]) == (7, 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    for (engine, _, rule), run in runs.items():
        moments = {"muon": 1, "mud": 1}.get(rule, 2)
        held = 4 * moments * result["elements"] // (2 if engine == "fsdp2" else 1)
        assert 0 <= run["state_bytes"] - held <= 40 * 7  # counters of steps and of skipped matrices


def test_messages_are_those_of_the_model(ran):
    """Recorded on the ranks, and by the formula; the down projection has no partner, so DDP pads."""
    (result,) = ran["steps"]
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    for run in result["runs"]:
        if run["scheme"] not in ("ddp_share", "fsdp2_all_to_all"):
            assert run["busiest_messages"] == []
            assert "estimate_milliseconds" not in run
            continue
        plan = plan_of(groups_of(shapes), *((2, 1) if run["engine"] == "fsdp2" else (1, 2)))
        optimizer = CLASSES[run["rule"]]([torch.nn.Parameter(torch.zeros(2, 2))])
        wire = optimizer.wire_dtypes(optimizer.param_groups[0], torch.float32, CPU)
        sizes = [dtype.itemsize for dtype in wire]
        assert sorted(map(tuple, run["busiest_messages"])) == sorted(plan.busiest_messages(*sizes))
        if run["engine"] == "fsdp2":
            assert run["mean_sent_bytes"] == plan.mean_bytes(*sizes)
        assert run["mean_sent_bytes"] >= plan.mean_bytes(*sizes)
        assert {*run["estimate_milliseconds"]} == {"elementwise", "map", "messages"}
        assert run["estimate_milliseconds"]["messages"] > 0


def test_links_and_settings(ran):
    assert [(link["collective"], link["mib"], link["sent_bytes"]) for link in ran["links"]] == [
        (collective, mib, mib * 2**19) for collective in ("all_to_all_single", "all_gather") for mib in (1, 2)
    ]
    assert all(len(link["milliseconds"]) == 10 and min(link["milliseconds"]) > 0 for link in ran["links"])
    settings = ran["settings"]
    assert (settings["world_size"], settings["backend"], settings["kernels"]) == (2, "gloo", "auto")
    assert settings["nvlink_multicast"] == "off (NCCL_NVLS_ENABLE=0)"


def test_trainer_speed(ran):
    trainer = ran["trainer"]
    assert (trainer["engine"], trainer["batch"], trainer["context"]) == ("ddp", 2, 16)
    assert [run["optimizer"] for run in trainer["runs"]] == ["adamw", "mud"]
    for run in trainer["runs"]:
        (seconds,), (speed,) = run["window_seconds"], run["tokens_per_second_a_rank"]
        assert speed == 2 * 16 * 2 / seconds
        assert run["optimizer_milliseconds"] > 0
        assert 0 < run["mean_loss"] < 20


def test_resume_measures_what_the_file_lacks_and_keeps_the_rest(ran, tmp_path):
    parts = ("settings", "links", "steps", "trainer")
    saved = json.loads(json.dumps({key: ran[key] for key in parts}))
    del saved["links"][1], saved["trainer"]["runs"][1]
    runs = saved["steps"][0]["runs"]
    (gone,) = (run for run in runs if (run["scheme"], run["rule"]) == ("fsdp2_all_to_all", "mud"))
    runs.remove(gone)
    runs[0] = {key: runs[0][key] for key in ("engine", "scheme", "rule", "label")} | {"error": "out of memory"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(saved))
    found = run_everything(ran["folder"], path, "--resume")
    assert found["settings"].pop("resumed") == [found["settings"]["date"]]
    assert found["settings"] == ran["settings"]
    key = ("engine", "scheme", "rule")
    before, after = ({tuple(run[k] for k in key): run for run in each["steps"][0]["runs"]} for each in (ran, found))
    assert before.keys() == after.keys()
    anew = {name for name in after if after[name] != before[name]}
    assert anew == {("fsdp2", "fsdp2_all_to_all", "mud"), ("ddp", "adamw", "adamw")}
    assert all(after[name]["is_right"] for name in anew)
    assert [link for link in found["links"] if link in ran["links"]] == saved["links"]
    assert len(found["links"]) == len(ran["links"])
    assert found["trainer"]["runs"][0] == ran["trainer"]["runs"][0]
    assert [run["optimizer"] for run in found["trainer"]["runs"]] == ["adamw", "mud"]
    assert found["stderr"].count("FSDP2, all-to-all, m") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no file of distributed_step.py --json"),
        ("{}", "is no file of distributed_step.py --json"),
        ('{"settings": [], "links": [], "steps": [], "trainer": null}', "its settings are no object"),
        ('{"settings": {}, "links": [{}], "steps": [], "trainer": null}', "its links lack collective, mib"),
        ('{"settings": {}, "links": [], "steps": [{}], "trainer": null}', "its steps lack model, layers"),
        ('{"settings": {}, "links": 3, "steps": [], "trainer": null}', "is no file of distributed_step.py --json"),
        ('{"settings": {}, "links": [], "steps": [], "trainer": {}}', "its trainer lack model, runs"),
        ('{"settings": {"steps": 3}, "links": [], "steps": [], "trainer": null}', "has steps=3, and this is 10"),
    ],
)
def test_a_file_that_cannot_be_gone_on_with_is_left_alone(text, message, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(text)
    alone = Processes(0, 1, CPU, torch.distributed.HashStore())
    with pytest.raises(OutOfStepError, match=message):
        new_or_saved(path, {"steps": 10, "date": "today"}, alone, resume=True)
    assert path.read_text() == text


def test_trainers_runs_of_other_settings_are_not_lost():
    saved = {"trainer": {"model": "demo", "batch": 2, "runs": [{"optimizer": "mud"}]}}
    check_training(saved, {"model": "demo", "batch": 2, "runs": []})
    check_training({"trainer": None}, {"model": "demo", "batch": 2, "runs": []})
    with pytest.raises(OutOfStepError, match="with batch=2, not 4"):
        check_training(saved, {"model": "demo", "batch": 4, "runs": []})


def test_only_failures_that_are_tried_again_are_taken_out():
    runs = [{"name": "a"}, {"name": "b", "error": "no memory"}, {"name": "c", "error": "no memory"}]
    assert left_to_run(runs, {("a",): 1, ("b",): 2, ("d",): 4}, ("name",)) == [2, 4]
    assert runs == [{"name": "a"}, {"name": "c", "error": "no memory"}]


def test_one_rank_speaks(ran):
    assert ran["stdout"].count("| ranks hold | optimizer |") == 1
    assert ran["stdout"].count("| FSDP2, all-to-all | muon |") == 1
    assert ran["stderr"].count("FSDP2, all-to-all, muon:") == 1
    assert "WRONG" not in ran["stdout"]
    assert "Failed" not in ran["stdout"]


def test_the_file_is_input_to_the_model(ran, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({key: ran[key] for key in ("settings", "links", "steps", "trainer")}))
    assert communication.main(["--models", "demo", "--gpus", "2,16", "--measured", str(path)]) == 0
    out = capsys.readouterr().out
    assert "- links in a node: measured: all_to_all_single, all_gather on 2 x" in out
    assert "- network: assumed: 50 GB/s" in out
    assert out.count("| 16 | HSDP") == 1
    assert "| 2 | HSDP" not in out


# ---- what is refused, and what fails ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt2-larg"], "none of qwen2.5-7b, llama-13b, llama-70b, and model 'gpt2-larg' is not one of"),
        (["--models", "demo", "--layers", "5"], "demo has 4 layers: it cannot be shortened to 5"),
        (["--schemes", "ddp_share,ddp"], "--schemes: unknown 'ddp': choose from ddp_redundant, ddp_share"),
        (["--optimizers", "nadam"], "--optimizers: unknown 'nadam'"),
        (["--link_mib", "1,x"], "--link_mib: 'x' is no whole number above 0"),
        (["--link_mib", "0"], "--link_mib: '0' is no whole number above 0"),
        (["--steps", "1"], "--steps 1: it must be at least 2"),
        (["--timeout", "0"], "--timeout 0.0: it must be above 0"),
        (["--trainer", "--engine", "fsdp2"], "--engine fsdp2: accelerate cuts models on GPUs alone"),
        (["--trainer", "--trainer_optimizers", "sgd"], "unknown optimizer 'sgd'"),
        (["--trainer", "--trainer_model", "qwen"], "model 'qwen' is not one of demo"),
        (["--json", "no_such_folder/x.json"], "--json no_such_folder/x.json"),
        (["--json", str(ROOT / "pyproject.toml")], "pyproject.toml exists: add --resume to go on with it"),
        (["--resume"], "--resume goes on with a file of results: name it with --json"),
        (["--cuda_graph"], "--cuda_graph is for the GPU kernels: leave it out, or use --device cuda"),
        (["--step", "2"], "unrecognized arguments: --step 2"),
    ],
)
def test_distributed_step_refuses_in_one_line(arguments, message, capsys, monkeypatch):
    for name, value in RANK_0.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        distributed_step.parse_arguments(["--device", "cpu", *arguments])
    printed = capsys.readouterr().err
    assert printed.startswith(f"{Path(sys.argv[0]).name}: error: ")
    assert message in printed
    assert printed.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        distributed_step.parse_arguments(["--device", "cpu", *arguments])
    assert capsys.readouterr().err == ""


def test_without_torchrun_it_says_how_to_start_it(capsys, monkeypatch):
    for name in RANK_0:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="2"):
        distributed_step.main(["--device", "cpu"])
    assert "MASTER_PORT not set: start it by torchrun --nproc_per_node N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8,12"], "--gpus: 12 is no multiple of the 8 GPUs of a node"),
        (["--gpus", "8,"], "--gpus: '' is no whole number"),
        (["--models", "llama"], "--models: none of qwen2.5-7b"),
        (["--wire_bytes", "2"], "--wire_bytes 2: give two numbers"),
        (["--network_gb_per_second", "-1"], "--network_gb_per_second -1.0: it must be above 0"),
        (["--measured", "no_such.json"], "--measured no_such.json is no file of distributed_step.py --json"),
        (["--measured", "pyproject.toml"], "--measured pyproject.toml is no file of distributed_step.py --json"),
        (["--schemes", "zero"], "--schemes: unknown 'zero'"),
    ],
)
def test_communication_refuses_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        communication.main(arguments)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def of_two(other: dict[str, Any] | None) -> Processes:
    """This process as the first of two, of which the second has already answered."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    if other is not None:
        store.set("1/1", json.dumps(other))
    return Processes(0, 2, CPU, store)


def out_of_memory() -> None:
    raise RuntimeError("out of memory: 3.5 GiB on GPU 0\nand more")


def test_results_of_all_ranks():
    assert of_two({"result": 5}).together(lambda: 4) == [4, 5]


def test_the_same_failure_on_all_ranks_leaves_them_in_step():
    with pytest.raises(FailedOnAllRanksError, match=r"^RuntimeError: out of memory: 3.5 GiB on GPU 0$"):
        of_two({"error": "RuntimeError: out of memory: 3.25 GiB on GPU 1"}).together(out_of_memory)


@pytest.mark.parametrize(
    ("other", "work", "message"),
    [
        ({"result": 5}, out_of_memory, "rank 0: RuntimeError: out of memory"),
        ({"error": "ValueError: bad"}, lambda: 4, "rank 1: ValueError: bad"),
        ({"error": "ValueError: bad"}, out_of_memory, "rank 0: RuntimeError: .*; rank 1: ValueError: bad"),
        (None, lambda: 4, "rank 1 has not answered rank 0 in time"),
        (None, out_of_memory, "rank 1 has not answered rank 0 in time; here: RuntimeError: out of memory"),
    ],
)
def test_ranks_out_of_step_end_the_run(other, work, message):
    with pytest.raises(OutOfStepError, match=message) as caught:
        of_two(other).together(work)
    assert caught.value.is_known_to_all == (other is not None)


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_wrong_result_is_noticed(alone, engine):
    """The check compares with one process: the same steps agree, one step more or another gradient do not."""
    groups = groups_of([(8, 6), (4, 12)])
    matrices = SeededMatrices([torch.Size((8, 6)), torch.Size((4, 12))], CPU)
    scheme = {"ddp": "ddp_share", "fsdp2": "fsdp2_all_to_all"}[engine]
    contender = next(each for each in contenders_of([scheme], ["mud"]) if each.rule == "mud")
    held = ENGINES[engine](matrices)
    for steps, is_right in ((2, True), (3, False)):
        held.reset()
        optimizer = contender.build(with_params(groups, held.params))
        for _ in range(steps):
            optimizer.step()
        assert (largest_error(contender, held, groups, matrices) <= contender.tolerance(CPU)) == is_right
    with torch.no_grad():
        held.params[1].fill_(float("nan"))
    assert largest_error(contender, held, groups, matrices) == float("inf")


# ---- the model, by hand ----


def test_elements_of_the_large_models():
    elements = {
        "qwen2.5-7b": 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18944),
        "llama-13b": 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824),
        "llama-70b": 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672),
    }
    assert {*elements} == {*LARGE_MODELS}
    for name, expected in elements.items():
        groups = meta_groups(large_config(name), "matrices")
        assert plan_of(fresh(groups), 1, 8).elements == expected


def test_bytes_of_four_matrices_on_two_by_two_ranks():
    """P = 4 x 32 elements; into 4, out 2 bytes; each rank owns one matrix."""
    groups = groups_of([(8, 4)] * 4)
    ddp, fsdp, hsdp = plan_of(groups, 1, 4), plan_of(groups, 4, 1), plan_of(groups, 2, 2)
    assert ddp.mean_bytes(4, 2) == 3 / 4 * 128 * 2
    assert fsdp.mean_bytes(4, 2) == 3 / 4 * 128 / 4 * 6
    assert hsdp.mean_bytes(4, 2) == 1 / 2 * 128 / 4 * 6 + 1 / 2 * 64 * 2
    assert ddp.busiest_messages(4, 2) == [("all_gather", 3 * 32 * 2)]
    assert fsdp.busiest_messages(4, 2) == [("all_to_all_single", 24 * 4), ("all_to_all_single", 24 * 2)]
    assert hsdp.busiest_messages(4, 2) == [
        ("all_to_all_single", 16 * 4), ("all_to_all_single", 16 * 2), ("all_gather", 1 * 2 * 16 * 2),
    ]  # fmt: skip
    for plan in (ddp, fsdp, hsdp):
        assert plan.largest_share("muon") == 1 / 4
        assert sum(sent for _, sent in plan.busiest_messages(4, 2)) == plan.mean_bytes(4, 2)


def test_a_matrix_without_partner_costs_its_owner_and_is_padded():
    """Three equal matrices on two ranks: one owns two."""
    groups = groups_of([(8, 4)] * 3)
    ddp, fsdp = plan_of(groups, 1, 2), plan_of(groups, 2, 1)
    assert ddp.largest_share("mud") == pytest.approx(2 / 3)
    assert fsdp.mean_bytes(2, 2) == 1 / 2 * 96 / 2 * 4
    assert fsdp.busiest_messages(2, 2) == [("all_to_all_single", 2 * 16 * 2)] * 2
    assert ddp.mean_bytes(2, 2) == 1 / 2 * 96 * 2
    assert ddp.busiest_messages(2, 2) == [("all_gather", 2 * 32 * 2)]


def test_buffers_by_hand():
    """One round of 3 matrices of 32 elements; the stages of a lone round follow one another."""
    groups = groups_of([(8, 4)] * 3)
    # two ranks of FSDP2: 48 elements here, 64 owned, 48 in all directions; 4 bytes into, 2 out of the map
    assert plan_of(groups, 2, 1).buffer_bytes(4, 2) == max(48 * 4, 48 * 4 + 64 * 4, 64 * 2 + 48 * 2, 48 * 2)
    # DDP: all 96, then the 64 owned; two replicas send 64 each, padded, and keep what they send until it has arrived
    assert plan_of(groups, 1, 2).buffer_bytes(4, 2) == max(96 * 4, 64 * 4, 64 * 2, 3 * 64 * 2, 2 * 64 * 2 + 96 * 2)
    # two rounds, a stage apart
    two = plan_of(groups_of([(8, 4)] * 3 + [(2, 2)]), 1, 2)
    assert [sum(map(sum, each.counts)) for each in two.rounds] == [3, 1]
    stages = [(96 * 4, 4 * 4), (64 * 4, 4 * 4), (64 * 2, 4 * 2), (3 * 64 * 2, 3 * 4 * 2)]
    stages += [(2 * 64 * 2 + 96 * 2, 2 * 4 * 2 + 4 * 2)]
    assert two.buffer_bytes(4, 2) == max(ahead[0] + behind[1] for behind, ahead in itertools.pairwise(stages))


def test_time_of_a_message():
    curve = Curve(((100.0, 1.0), (300.0, 2.0)))
    assert [curve.seconds(sent) for sent in (0, 50, 100, 200, 300, 600)] == [0, 1, 1, 1.5, 2, 4]
    links = [
        {"collective": "all_gather", "sent_bytes": sent, "milliseconds": [2e3, ms, 0]}
        for sent, ms in ((300, 2e3), (100, 1e3))
    ]
    assert curves_of(links) == {"all_gather": curve}


def test_messages_between_nodes():
    """350 GB/s in a node of 8, 50 GB/s a GPU between nodes."""
    assert ASSUMED.seconds("all_to_all_single", 350e9, 8) == pytest.approx(1)
    # of 16 ranks, 8 of the 15 others are elsewhere
    assert ASSUMED.seconds("all_to_all_single", 150e9, 16) == pytest.approx(150 * 8 / 15 / 50)
    # what enters a node is shared by its 8 adapters: 350 GB/s inside are slower than 8 x 50 from outside
    assert ASSUMED.seconds("all_gather", 350e9, 16) == pytest.approx(1)
    assert ASSUMED.seconds("all_gather", 100e9, 4, in_one_node=False) == pytest.approx(2)
    assert ASSUMED.seconds("all_gather", 0, 1) == 0


def test_cost_of_a_step_by_hand():
    groups = groups_of([(8, 4)] * 8)
    flops = 3 * 4 * 4 * 8 + 17 * 4**3
    share = cost_of(groups, "muon", SCHEMES["fsdp2_all_to_all"], 8, ASSUMED)
    assert share.map_seconds == pytest.approx(flops / 387e12)
    assert share.mean_bytes == 7 / 8 * 256 / 8 * 4
    assert share.link_seconds == pytest.approx(share.mean_bytes / 350e9)
    assert share.state_bytes == 4 * 256 / 8
    off = cost_of(groups, "adamuon", SCHEMES["fsdp2_full_tensor"], 8, ASSUMED)
    assert off.map_seconds == pytest.approx(8 * flops / 402e12)
    assert off.mean_bytes == off.busiest_bytes == 7 / 8 * 256 * 16
    assert (off.state_bytes, off.buffer_bytes) == (8 * 256 / 8, 16 * 32)
    ddp = cost_of(groups, "muon", SCHEMES["ddp_redundant"], 8, ASSUMED)
    assert (ddp.link_seconds, ddp.mean_bytes, ddp.state_bytes) == (0, 0, 4 * 256)


def test_measured_values_replace_assumed_ones():
    """A step of 30 ms over 1e9 elements at 3 TB/s: 24 bytes each are 8 ms, so the map takes 22."""
    run = {"scheme": "ddp_redundant", "rule": "muon", "milliseconds": [30.0]}
    measured = {
        "settings": {"world_size": 2, "device": "GPU", "date": "today"},
        "links": [{"collective": "all_to_all_single", "sent_bytes": 10**6, "milliseconds": [1.0]}],
        "steps": [{
            "elements": 10**9, "flops": {"muon": 11e12, "mud": 1e12}, "runs": [run],
            "peaks": {"copy_bytes_per_second": 3e12},
        }],
    }  # fmt: skip
    inputs = with_measured(ASSUMED, measured)
    assert inputs.flops_per_second["muon"] == pytest.approx(11e12 / 22e-3)
    assert inputs.flops_per_second["mud"] == ASSUMED.flops_per_second["mud"]
    assert inputs.sources["rate of the map"].startswith(
        "measured: 500 (muon) TFLOP/s on 2 x GPU, today; adamuon, mud:"
    )
    assert inputs.all_to_all.seconds(2e6) == pytest.approx(2e-3)
    assert inputs.all_gather == ASSUMED.all_gather
    assert inputs.sources["links in a node"] == "measured: all_to_all_single on 2 x GPU, today"
    assert inputs.sources["network"].startswith("assumed")


def test_the_page_is_what_the_program_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "benchmarks" / "README.md").read_text()
    (command,) = re.findall(r"^python benchmarks/communication.py (.*--schemes .*)$", text, re.MULTILINE)
    assert communication.main(command.split()) == 0
    printed = capsys.readouterr().out.strip()
    rows = [line for line in printed.splitlines() if line]
    assert len(rows) > 30
    for line in rows:
        assert line in text, line
