"""Whole runs of the recipes: resuming, killing, ranks and accumulation, and each tiny preset on its own sample."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpt2
import numpy as np
import pytest
from no_questions import NoQuestions
from recipe_arguments import parse_arguments
from run_log import read_log
from step_plan import apply_plan, apply_schedule, plan_steps
from task import initial_model
from tasks import CausalLanguageModeling
from tiny_recipe import (
    ALICE,
    ENVIRONMENT,
    FAMILIES,
    RECIPES,
    ROOT,
    assert_same_weights,
    contents,
    flags,
    losses,
    record,
    run,
    run_process,
    untimed_log,
    without,
)
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainerCallback
from transformers import trainer as trainer_module

# A rule for each family, so that every one of them is resumed, cut and split somewhere.
OPTIMIZER_OF = {"qwen2_5": "adamuon", "gpt2": "mud", "esm2": "muon", "cifar10": "adamw_torch"}


@pytest.mark.parametrize("family", FAMILIES)
def test_stopped_and_resumed_with_workers_equals_uninterrupted(
    text: Path, cache: str, tmp_path: Path, family: str
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = ("--optim", OPTIMIZER_OF[family], "--max_steps", "5", "--eval_steps", "2", "--save_steps", "2")
    more += ("--eval_strategy", "steps", "--logging_steps", "3")
    assert run(flags(text, cache, whole, *more, family=family), family) == 0
    argv = flags(text, cache, resumed, *more, "--dataloader_num_workers", "2", family=family)
    assert run([*argv, "--stop_after", "3"], family) == 0
    assert "results" not in record(resumed)
    assert run([*argv, "--resume_from_checkpoint", "auto"], family) == 0
    assert record(resumed)["resumed_from"] == str(resumed / "checkpoint-3")
    assert_same_weights(whole, resumed)
    logged = untimed_log(resumed)
    assert [(entry["kind"], entry["step"]) for entry in logged] == [
        *(("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4), ("train", 5)),
        *((("eval", 5),) if ("eval", 5) in [(entry["kind"], entry["step"]) for entry in logged] else ()),
    ]
    assert [entry for entry in logged if entry["step"] != 3 or entry["kind"] != "train"] == [
        entry for entry in untimed_log(whole) if entry["step"] != 3 or entry["kind"] != "train"
    ]
    assert record(resumed)["results"]["timed_steps"] == 5
    assert record(resumed)["results"]["eval_loss"] == record(whole)["results"]["eval_loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_optimizers_start_from_the_same_weights_and_batch(text: Path, cache: str, tmp_path: Path, family: str) -> None:
    seen = []
    for optim in ("adamw_torch_fused", "muon", "adamuon", "adamuon_v1", "mud"):
        more = ("--optim", optim, "--max_steps", "1", "--save_strategy", "no")
        argv = flags(text, cache, tmp_path / optim, *more, family=family)
        assert run(argv, family) == 0
        run_record = record(tmp_path / optim)
        hashes = run_record["first_batch_sha256"], run_record["initial_weights_sha256"]
        seen.append((*hashes, losses(tmp_path / optim)))
    assert all(each == seen[0] for each in seen)
    argv = flags(text, cache, tmp_path / "seed", "--seed", "7", *more[2:], family=family)
    assert run(argv, family) == 0
    other = record(tmp_path / "seed")
    assert other["first_batch_sha256"] != seen[0][0]
    assert other["initial_weights_sha256"] != seen[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "esm2"])
def test_ranks_and_accumulation_do_not_change_a_run(text: Path, cache: str, tmp_path: Path, family: str) -> None:
    """AdamW and MUD, whose steps do not turn a rounding into another path as a sign does."""
    optim = {"gpt2": "mud", "esm2": "adamw_torch"}[family]
    more = ("--optim", optim, "--max_steps", "3", "--learning_rate", "1e-3", "--save_strategy", "no")
    cuts = {
        "whole": ("--per_device_train_batch_size", "4"),
        "accumulated": ("--per_device_train_batch_size", "1"),
        "two ranks": ("--per_device_train_batch_size", "1", "--ddp_backend", "gloo"),
    }
    for name, cut in cuts.items():
        argv = flags(text, cache, tmp_path / name, *more, *cut, family=family)
        if name == "two ranks":
            launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
            done = run_process(argv, family, *launch, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        else:
            assert run(argv, family) == 0
    records = {name: record(tmp_path / name) for name in cuts}
    assert [each["plan"]["gradient_accumulation_steps"] for each in records.values()] == [1, 4, 2]
    assert [each["world_size"] for each in records.values()] == [1, 1, 2]
    assert len({each["first_batch_sha256"] for each in records.values()}) == 1
    assert len({each["initial_weights_sha256"] for each in records.values()}) == 1
    for name in ("accumulated", "two ranks"):
        for kind in ("train", "eval"):
            wanted = losses(tmp_path / "whole", kind)
            assert losses(tmp_path / name, kind) == pytest.approx(wanted, rel=1e-6), (name, kind)
        norms = [[entry["grad_norm"] for entry in read_log(tmp_path / run)[:1]] for run in ("whole", name)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def check_log(output: Path, uninterrupted: Path) -> None:
    """The log of a killed run, line by line, is that of one that was left alone."""
    assert untimed_log(output) == untimed_log(uninterrupted)
    steps = [entry["step"] for entry in read_log(output) if entry["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    seconds = [entry["train_seconds"] for entry in read_log(output)]
    assert seconds == sorted(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["_save_optimizer_and_scheduler", "save_to_json"])
def test_killed_while_saving_goes_on_from_the_last_whole_checkpoint(
    text: Path, cache: str, tmp_path: Path, place: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--max_steps", "5", "--save_steps", "2", "--optim", "mud")
    assert run(flags(text, cache, whole, *more, family="gpt2"), "gpt2") == 0
    argv = flags(text, cache, killed, *more, "--resume_from_checkpoint", "auto", family="gpt2")
    script = [sys.executable, str(ROOT / "tests" / "scripts" / "killed_while_saving.py"), "4", place, "gpt2", *argv]
    done = subprocess.run(script, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (killed / "checkpoint-4").is_dir()
    assert max(entry["step"] for entry in read_log(killed)) == 4
    assert run(argv, "gpt2") == 0
    assert record(killed)["resumed_from"] == str(killed / "checkpoint-2")
    check_log(killed, whole)
    assert_same_weights(whole, killed)


@pytest.mark.slow
def test_killed_while_training_goes_on_without_gaps(text: Path, cache: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--max_steps", "12", "--save_steps", "4", "--optim", "muon", "--tokens_per_step", "1024")
    argv = flags(text, cache, whole, *more)
    assert run(argv) == 0
    argv[argv.index("--output_dir") + 1] = str(killed)
    argv += ["--resume_from_checkpoint", "auto"]
    command = [sys.executable, str(RECIPES / "qwen2_5.py"), *argv]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    log = killed / "log.jsonl"
    deadline = time.monotonic() + 120
    while (not log.exists() or log.read_text().count('"train"') < 6) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    with log.open("a") as stream:
        stream.write('{"kind": "tra')  # as if it had been killed in the middle of a line
    assert run(argv) == 0
    assert record(killed)["resumed_from"] is not None
    check_log(killed, whole)
    assert_same_weights(whole, killed)


def test_auto_starts_goes_on_and_leaves_a_finished_run_alone(
    text: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    argv = flags(text, cache, output, "--optim", "adamw_torch", "--resume_from_checkpoint", "auto")
    argv += ["--max_steps", "2", "--save_steps", "1"]
    assert run([*argv, "--stop_after", "1"]) == 0
    assert "stopped after step 1 of 2" in capsys.readouterr().out
    (output / "checkpoint-1" / "trainer_state.json").write_text("{")
    assert run(argv) == 0  # no whole checkpoint: from the start
    assert record(output)["resumed_from"] is None
    before = contents(output)
    assert run(argv) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert run([*argv, "--seed", "1"]) == 2
    assert "seed was 42 and is now 1" in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--learning_rate", "1e-5"), "learning_rate was 0.004 and is now 1e-05"),
        (("--schedule", "warmup_stable"), "schedule.lr_scheduler_type was 'cosine"),
        (("--max_steps", "4"), "started differently: schedule.steps was 3 and is now 4. Resume"),
        (("--tokens_per_step", "256"), "tokens_per_step was 128 and is now 256"),
        (("--block_size", "64"), "block_size was 32 and is now 64"),
        (("--optim", "muon"), "optim was 'adamw_torch' and is now 'muon'"),
        (("--weight_decay", "0.5"), "weight_decay was 0.1 and is now 0.5"),
        (("--train_data", "{text}/validation.txt", "--validation_data", "{text}/train.txt"), "data was"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(
    text: Path,
    cache: str,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, ...],
    message: str,
) -> None:
    output = tmp_path_factory.getbasetemp() / "stopped"
    argv = flags(text, cache, output, "--optim", "adamw_torch")
    if not output.exists():
        assert run([*argv, "--stop_after", "1"]) == 0
    before = contents(output)
    changed = [flag.format(text=text) for flag in change]
    assert run([*argv, *changed, "--resume_from_checkpoint", "auto"]) == 2
    assert message in capsys.readouterr().err
    assert contents(output) == before


def test_gradients_of_matrices_can_be_left_unclipped(
    text: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        "--optim",
        "muon",
        "--max_steps",
        "4",
        "--max_grad_norm",
        "0.01",
        "--logging_steps",
        "1",
        "--save_steps",
        "2",
    )
    argv = flags(text, cache, tmp_path / "all", *more)
    assert run(argv) == 0
    clipping = (*more, "--clip", "adamw_only")
    argv = flags(text, cache, tmp_path / "adamw_only", *clipping)
    assert run([*argv, "--stop_after", "2"]) == 0
    assert (
        run([*argv[: argv.index("--clip")], *argv[argv.index("--clip") + 2 :], "--resume_from_checkpoint", "auto"])
        == 2
    )
    assert "clip was 'adamw_only' and is now None" in capsys.readouterr().err
    assert run([*argv, "--resume_from_checkpoint", "auto"]) == 0
    every, adamw_only = losses(tmp_path / "all"), losses(tmp_path / "adamw_only")
    assert every[0] == adamw_only[0]
    assert every[-1] != pytest.approx(adamw_only[-1], abs=1e-5)
    whole = flags(text, cache, tmp_path / "whole", *clipping)
    assert run(whole) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "adamw_only")


def test_a_constant_rate_can_be_trained_longer(text: Path, cache: str, tmp_path: Path) -> None:
    argv = flags(text, cache, tmp_path / "out", "--optim", "mud", "--schedule", "warmup_stable", "--save_steps", "3")
    assert run(argv) == 0
    assert run([*argv, "--max_steps", "5", "--resume_from_checkpoint", "auto"]) == 0
    assert run([*argv, "--max_steps", "5", "--output_dir", str(tmp_path / "whole")]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_auto_does_not_replace_a_finished_run_that_cannot_go_on(
    text: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(text, cache, tmp_path / "out", "--optim", "mud", "--schedule", "warmup_stable")
    argv += ["--save_strategy", "no", "--resume_from_checkpoint", "auto"]
    assert run(argv) == 0
    before = contents(tmp_path / "out")
    assert run([*argv, "--max_steps", "5"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_stream_goes_on_where_it_was(text: Path, cache: str, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in ALICE.splitlines()[:300] if line))
    more = ("--streaming", "--max_steps", "5", "--optim", "mud", "--train_data", str(rows))
    argv = without(flags(text, cache, whole, *more), "--validation_data")
    argv += ["--validation_fraction", "0.2"]
    assert run(argv) == 0
    argv[argv.index("--output_dir") + 1] = str(resumed)
    assert run([*argv, "--stop_after", "2"]) == 0
    assert run([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert_same_weights(whole, resumed)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 5


def test_a_protein_with_a_bad_letter_is_refused(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.fasta").write_text(">good\nMKV\n>second\nMK7V\n")
    argv = ["--preset", "tiny", "--train_data", str(tmp_path / "bad.fasta"), "--cache_dir", cache, "--use_cpu", "true"]
    assert run([*argv, "--output_dir", str(tmp_path / "out")], "esm2") == 2
    error = capsys.readouterr().err
    assert "second" in error
    assert "'7' at position 3 is no amino acid" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("esm2", ("--tokenizer", "gpt2"), "proteins are read with ESM-2's own vocabulary"),
        ("esm2", ("--attention", "full_block"), "proteins are padded to one length"),
        ("esm2", ("--block_size", "1025"), "this model has 1,024 positions"),
        ("cifar10", ("--block_size", "2"), "--block_size is 2; of images it is 1"),
        ("cifar10", ("--train_data", "x.txt"), "images are read by --dataset_name"),
        ("cifar10", ("--attention", "sdpa"), "a convolutional network has none"),
        (
            "cifar10",
            ("--preset", "8-passes", "--dataset_name", "digits"),
            "the model of this preset reads (3, 32, 32)",
        ),
    ],
)
def test_what_a_family_cannot_do_is_refused(
    text: Path,
    cache: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    argv = ["--preset", "tiny", "--use_cpu", "true", "--cache_dir", cache, "--output_dir", str(tmp_path / "out")]
    assert run([*argv, *more], family) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Steps of the tiny presets here, and the validation loss they are below; a guess among all is at 7.6, 3.5 and 2.3.
SHORT = {
    "qwen2_5": (25, 7.0),
    "gpt2": (25, 7.0),
    "esm2": (25, 3.0),
    "cifar10": (60, 2.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_preset_trains_on_its_sample(cache: str, tmp_path: Path, family: str) -> None:
    steps, bound = SHORT[family]
    argv = ["--preset", "tiny", "--optim", "mud", "--max_steps", str(steps), "--cache_dir", cache]
    argv += ["--output_dir", "out", "--use_cpu", "true", "--disable_tqdm", "true"]
    start = time.monotonic()
    done = run_process(argv, family, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 120
    output = tmp_path / "out"
    run_record: dict[str, Any] = record(output)
    results = run_record["results"]
    assert results["steps"] == steps
    assert results["tokens"] == steps * run_record["plan"]["tokens_per_step"]
    assert results["eval_loss"] < bound
    assert losses(output)[-1] < losses(output)[0]
    assert run_record["parameters"] > 10_000
    if family == "esm2":
        assert AutoModelForMaskedLM.from_pretrained(output).num_parameters() == run_record["parameters"]
        assert AutoTokenizer.from_pretrained(output)("MKV").input_ids == [0, 20, 15, 7, 2]
    elif family != "cifar10":
        entropy = run_record["data"]["train"]["unigram_entropy"]
        assert 5 < entropy < 7
        assert AutoModelForCausalLM.from_pretrained(output).num_parameters() == run_record["parameters"]
    else:
        assert results["eval_accuracy"] > 0.8
        assert "eval_perplexity" not in results


@pytest.mark.slow
def test_prepared_tokens_are_trained_on_without_the_package_datasets(cache: str, tmp_path: Path) -> None:
    """As on a machine with no more than torch, transformers and accelerate, from nanoGPT's files."""
    tokens = np.random.default_rng(0).integers(2048, size=5000).astype("<u2")
    tokens[:4000].tofile(tmp_path / "train.bin")
    tokens[4000:].tofile(tmp_path / "val.bin")
    argv = ["--preset", "tiny", "--train_data", str(tmp_path), "--max_steps", "3", "--block_size", "32"]
    argv += ["--tokens_per_step", "128", "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    script = [sys.executable, str(ROOT / "tests" / "scripts" / "without_datasets.py"), "gpt2", *argv]
    done = subprocess.run(script, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path / "out")["results"]["steps"] == 3


class Inquirer(TrainerCallback):
    """Lets the third to the fifth step ask for no tensor's value, but for the optimizer's own count on the CPU."""

    def __init__(self) -> None:
        self.modes: list[NoQuestions] = []

    def enter(self, state: Any) -> None:
        if 2 <= state.global_step < 5:
            self.modes.append(NoQuestions())
            self.modes[-1].__enter__()

    def leave(self) -> None:
        if self.modes:
            self.modes.pop().__exit__(None, None, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.enter(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.leave()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.enter(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.leave()


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_between_logs_ask_for_no_value(
    text: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """What a CPU can show of steps that never wait; tests/test_gpu_recipes.py shows the rest."""
    callbacks = [*trainer_module.DEFAULT_CALLBACKS, Inquirer]
    monkeypatch.setattr(trainer_module, "DEFAULT_CALLBACKS", callbacks)
    more = ("--optim", "mud", "--max_steps", "6", "--logging_steps", "6", "--eval_strategy", "no")
    argv = flags(text, cache, tmp_path / "out", *more, "--save_strategy", "no", family=family)
    assert run(argv, family) == 0
    assert len(losses(tmp_path / "out")) == 1


def test_stock_trainer_trains_the_same_model_on_the_same_data(text: Path, cache: str, tmp_path: Path) -> None:
    argv = flags(text, cache, tmp_path / "ours", "--optim", "mud", family="gpt2")
    assert run(argv, "gpt2") == 0
    preset, arguments, training, given = parse_arguments("gpt2", gpt2.PRESETS, argv)
    task = CausalLanguageModeling()
    tokenizer = task.load_tokenizer(arguments)
    config = task.build_config(preset, tokenizer, arguments)
    data = task.prepare(arguments, training, tokenizer, config)
    plan = plan_steps(arguments, training, given, data.samples_a_pass)
    apply_schedule(arguments, training, plan.steps)
    apply_plan(plan, training, has_validation=True, is_stream=False, given=given)
    training.output_dir = str(tmp_path / "stock")
    model = initial_model(task, preset, config, training.seed, "sdpa")
    samples = data.training(training.seed, plan.steps * plan.sequences_per_step)
    trainer = Trainer(model, training, data_collator=data.collate, train_dataset=samples, eval_dataset=data.validation)
    trainer.train()
    curve = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert curve == pytest.approx(losses(tmp_path / "ours"), rel=1e-6)
