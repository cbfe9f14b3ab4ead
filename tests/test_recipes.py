"""The pretraining recipe through its command line: what it refuses, and that runs resume, repeat and save."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pretrain
import pytest
import qwen2_5
import torch
from recipe_arguments import parse_arguments
from recipe_error import RecipeError
from run_folder import clear_run, is_finished, read_run
from safetensors.torch import load_file
from tiny_recipe import ALICE, RECIPES, ROOT, TOKENIZER, assert_same_weights, contents, flags, losses, run, without
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "tiny2"], "has no preset tiny2; did you mean tiny?"),
        (["--lerning_rate", "1e-3"], "unknown argument --lerning_rate; did you mean --learning_rate?"),
        (["--max_tokens", "1e6"], "give only one of --max_steps, --max_tokens"),
        (["--dataset_name", "a/b"], "give only one of --train_data, --dataset_name"),
        (["--gradient_accumulation_steps", "2"], "give only one of --tokens_per_step, --gradient_accumulation_steps"),
        (["--train_data", "{text}/nothing.txt"], "nothing.txt does not exist"),
        (["--train_data", "{text}/*.parquet"], "*.parquet does not exist"),
        (["--train_data", "{bad}/empty.txt"], "empty.txt is empty"),
        (["--train_data", "{bad}/empty.jsonl.gz"], "empty.jsonl.gz is empty"),
        (["--validation_data", "{bad}/empty.txt"], "empty.txt is empty"),
        (["--train_data", "{bad}/blank.txt"], "has 0 tokens"),
        (["--train_data", "{bad}/binary.txt"], "cannot read"),
        (["--train_data", "{bad}/notes.pdf"], "notes.pdf is not a kind of file that is read here"),
        (["--train_data", "{bad}/rows.csv"], "no column 'text'; give --text_column one of number, words"),
        (["--train_data", "{bad}/rows.jsonl", "--text_column", "number"], "not text"),
        (["--train_data", "{text}/validation.txt"], "is in --train_data and in --validation_data"),
        (["--block_size", "1024", "--tokens_per_step", "1024", "--validation_data", "{text}/train.txt",
          "--train_data", "{text}/validation.txt"], "--block_size is 1,024"),
        (["--block_size", "2048"], "this model has 1,024 positions"),
        (["--block_size", "1"], "--block_size is 1; it must be at least 2"),
        (["--tokens_per_step", "100"], "no multiple of 1 devices x a block of 32 tokens"),
        (["--per_device_train_batch_size", "3"], "no multiple of --per_device_train_batch_size 3"),
        (["--tokenizer", "{bad}"], "cannot be loaded"),
        (["--tokenizer", "{bad}/nothing"], "nothing: no such folder"),
        (["--train_sampling_strategy", "group_by_length"], "the order is fixed here"),
        (["--optim", "mud", "--optim_args", "pases=2"], "--optim mud:"),
        (["--optim", "muon", "--learning_rate", "-1"], "--learning_rate is -1.0; it must be at least 0"),
        (["--optim", "muonn"], "--optim: invalid choice: 'muonn'; did you mean muon?"),
        (["--optim", "adamw_torch", "--optim_args", "passes=2"], "--optim adamw_torch reads no options; leave"),
        (["--optim", "mud", "--optim_args", "kernels=triton"], "kernels=triton was asked for, but the parameters are"),
        (["--optim", "mud", "--optim_args", "cuda_graph=true"], "cuda_graph=true was asked for, but the parameters"),
        (["--max_steps", "0"], "--max_steps is 0; it must be at least 1"),
        (["--max_steps", "-1"], "--max_steps is -1; it must be at least 1"),
        (["--num_train_epochs", "0"], "give only one of --max_steps, --num_train_epochs"),
        (["--per_device_train_batch_size", "-8"], "--per_device_train_batch_size is -8; it must be at least 1"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size is 0"),
        (["--weight_decay", "-1"], "--weight_decay is -1.0"),
        (["--learning_rate", "nan"], "--learning_rate is nan"),
        (["--seed", "-1"], "--seed is -1; it must be in [0, 2**32)"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers is -1"),
        (["--report_to", "wandbb"], "wandbb"),
        (["--logging_steps", "0"], "logging"),
        (["--warmup_steps", "-5"], "warmup_steps"),
        (["--deepspeed", "{bad}/nope.json"], "deepspeed"),
        (["--load_best_model_at_end", "true", "--save_steps", "3", "--eval_steps", "2", "--save_strategy", "steps",
          "--eval_strategy", "steps"], "load_best_model_at_end"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--adam_beta1", "2", "--optim", "adamw_torch"], "Invalid beta parameter"),
        (["--output_dir", "/proc/nothing/out"], "--output_dir /proc/nothing/out cannot be written to"),
        (["--optim", "adamuon", "--optim_args", "exclude=.*"], "--optim adamuon: nothing to orthogonalise"),
        (["--resume_from_checkpoint", "true"], "holds no whole checkpoint"),
        (["--resume_from_checkpoint", "{bad}"], "no whole checkpoint of a run there"),
        (["--schedule", "cosin"], "--schedule cosin: it is one of warmup_stable, cosine; did you mean cosine?"),
        (["--schedule", "cosine", "--lr_scheduler_type", "linear"], "give only one of --schedule, --lr_scheduler"),
        (["--decay", "0.2"], "--decay belongs to --schedule warmup_stable"),
        (["--schedule", "warmup_stable", "--floor", "0.1"], "--floor has no effect on --schedule warmup_stable"),
        (["--schedule", "warmup_stable", "--decay", "2", "--warmup_steps", "2"], "do not fit in 3 steps"),
        (["--floor", "1"], "--floor is 1.0; it must be in [0, 1)"),
        (["--clip", "adamw"], "--clip adamw: it is one of all, adamw_only"),
        (["--clip", "adamw_only", "--optim", "adamw_torch"], "--clip adamw_only: --optim adamw_torch has no matrices"),
        (["--clip", "adamw_only", "--optim", "mud", "--max_grad_norm", "0"], "has no effect with --max_grad_norm 0"),
        (["--stop_after", "0"], "--stop_after is 0; it must be at least 1"),
        (["--attention", "flash"], "the recipes' own are full_block and padded_block"),
        (["--label_smoothing_factor", "0.1"], "a language model is trained here without"),
        (["--streaming", "--dataloader_num_workers", "2"], "a stream keeps its place in the main process"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_and_writes_nothing(
    text: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.txt").touch()
    (bad / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (bad / "blank.txt").write_text(" \n\n \n")
    (bad / "binary.txt").write_bytes(bytes(range(128, 256)) * 8)
    (bad / "notes.pdf").write_text("words")
    (bad / "rows.jsonl").write_text('{"number": 1}')
    (bad / "rows.csv").write_text("number,words\n1,one\n2,two\n")
    output = tmp_path / "out"
    more = [flag.format(text=text, bad=bad) for flag in more]
    assert run(flags(text, cache, output, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not output.exists()


def test_a_holdout_of_less_than_a_block_is_refused(text: Path, cache: str, tmp_path: Path, capsys: Any) -> None:
    argv = flags(text, cache, tmp_path / "out", "--validation_fraction", "1e-9")
    assert run(without(argv, "--validation_data")) == 2
    assert "holds out none: raise it" in capsys.readouterr().err


def test_a_data_set_that_cannot_be_loaded_is_refused(text: Path, cache: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    argv = flags(text, cache, tmp_path / "out", "--dataset_name", str(tmp_path / "empty"))
    assert run(without(argv, "--train_data")) == 2
    assert "empty cannot be loaded" in capsys.readouterr().err
    assert run(flags(text, cache, tmp_path / "out", "--dataset_name", "digit", family="cifar10"), "cifar10") == 2
    assert "did you mean digits?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "key", "message"),
    [
        ("defaults", "lerning_rate", "there is no flag lerning_rate; did you mean learning_rate?"),
        ("model", "hiden_size", "Qwen2Config has no field hiden_size; did you mean hidden_size?"),
    ],
)
def test_misspelt_preset_keys_are_refused(tmp_path: Path, capsys: Any, part: str, key: str, message: str) -> None:
    tiny = qwen2_5.PRESETS["tiny"]
    presets = {"tiny": replace(tiny, **{part: {**getattr(tiny, part), key: 64}})}
    assert pretrain.main("qwen2_5", presets, ["--preset", "tiny", "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    tiny = qwen2_5.PRESETS["tiny"]
    presets = {"tiny": replace(tiny, model={**tiny.model, "vocab_size": 1024})}
    assert pretrain.main("qwen2_5", presets, ["--preset", "tiny", "--output_dir", str(tmp_path / "out")]) == 2
    assert "the tokenizer has 2,048 words, the model of this preset 1,024" in capsys.readouterr().err


def test_another_run_is_left_alone_unless_told(text: Path, cache: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    argv = flags(text, cache, output, "--optim", "adamw_torch", "--max_steps", "1", "--save_steps", "1")
    assert run(argv) == 0
    (output / "notes.txt").write_text("mine")
    before = contents(output)
    assert run([*argv, "--seed", "1"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert run([*argv, "--overwrite_output_dir", "--train_data", str(text / "nothing.txt")]) == 2
    assert run([*argv, "--resume_from_checkpoint", "true", "--overwrite_output_dir"]) == 2
    assert run([*argv, "--resume_from_checkpoint", "true", "--seed", "1"]) == 2
    assert "seed was 42 and is now 1" in capsys.readouterr().err
    assert contents(output) == before
    assert run([*argv, "--overwrite_output_dir", "--seed", "1", "--save_strategy", "no"]) == 0
    assert json.loads((output / "run.json").read_text())["identity"]["seed"] == 1
    assert not (output / "checkpoint-1").exists()
    assert (output / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def two_runs(text: Path, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, ``one`` and ``two``."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", "0"), ("two", "1")):
        argv = flags(text, cache, folder / name, "--optim", "adamw_torch", "--seed", seed, "--save_steps", "2")
        assert run([*argv, "--save_strategy", "steps"]) == 0
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--overwrite_output_dir", "--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--overwrite_output_dir", "--adam_beta1", "2"], "Invalid beta parameter"),
        (["--overwrite_output_dir", "--dataloader_prefetch_factor", "2"], "prefetch_factor"),
        (["--overwrite_output_dir", "--report_to", "wandbb"], "wandbb"),
        (["--overwrite_output_dir", "--learning_rate", "-1"], "--learning_rate is -1.0"),
        (["--resume_from_checkpoint", "{runs}/one"], "name a checkpoint-N inside the folder of its run"),
        (["--resume_from_checkpoint", "{runs}/two/checkpoint-2", "--seed", "1"], "one holds another run"),
        (["--resume_from_checkpoint", "{runs}/one/checkpoint-2", "--adam_beta1", "2"], "started differently"),
    ],
)
def test_a_refusal_leaves_the_old_run_as_it_was(
    text: Path, cache: str, two_runs: Path, capsys: Any, more: list[str], message: str
) -> None:
    before = contents(two_runs)
    more = [part.format(runs=two_runs) for part in more]
    more += [] if "--optim" in more else ["--optim", "adamw_torch"]
    assert run(flags(text, cache, two_runs / "one", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert contents(two_runs) == before


def test_a_checkpoint_of_another_folder_goes_on_in_a_new_one(text: Path, cache: str, two_runs: Path) -> None:
    """It goes on bit for bit, and in the place of another run only if told so."""
    before = contents(two_runs / "one")
    checkpoint = str(two_runs / "one" / "checkpoint-2")
    new = two_runs.parent / "new"
    argv = ["--optim", "adamw_torch", "--seed", "0", "--resume_from_checkpoint", checkpoint]
    assert run(flags(text, cache, new, *argv)) == 0
    assert losses(new) == losses(two_runs / "one")
    assert_same_weights(two_runs / "one", new)
    shutil.copytree(two_runs / "two", two_runs.parent / "two")
    assert run(flags(text, cache, two_runs.parent / "two", *argv, "--overwrite_output_dir")) == 0
    assert losses(two_runs.parent / "two") == losses(two_runs / "one")
    assert contents(two_runs / "one") == before


def test_an_interrupted_run_says_how_to_go_on(
    text: Path, cache: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    class Interruption(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "RunFlow", lambda stop_after: Interruption())
    assert run(flags(text, cache, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; --resume_from_checkpoint auto goes on")


def test_overwrite_does_not_reach_folders_of_others(text: Path, cache: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    before = contents(tmp_path)
    assert run(flags(text, cache, tmp_path, "--overwrite_output_dir")) == 2
    assert "holds files that no run of this program wrote" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_optimizers_see_the_same_weights_and_batches(text: Path, cache: str, tmp_path: Path) -> None:
    """At learning rate 0 the losses of the steps are a fingerprint of the initial weights and of each batch."""
    seen = []
    for optim in ("adamw_torch_fused", "adamuon", "mud"):
        output = tmp_path / optim
        assert run(flags(text, cache, output, "--optim", optim, "--learning_rate", "0", "--max_steps", "5")) == 0
        record = json.loads((output / "run.json").read_text())
        seen.append((losses(output), record["first_batch_sha256"], record["initial_weights_sha256"]))
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0][0])) == 5


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamuon"])
def test_resumed_equals_uninterrupted(text: Path, cache: str, tmp_path: Path, optim: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = (
        "--optim",
        optim,
        "--max_steps",
        "5",
        "--save_steps",
        "2",
        "--save_total_limit",
        "3",
        "--per_device_train_batch_size",
        "2",
    )
    assert run(flags(text, cache, whole, *more)) == 0
    resumed.mkdir()
    for name in ("run.json", "log.jsonl"):
        shutil.copy(whole / name, resumed)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    assert run(flags(text, cache, resumed, *more, "--resume_from_checkpoint", "true")) == 0
    assert losses(resumed) == losses(whole)
    before, after = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    record = json.loads((resumed / "run.json").read_text())
    assert record["resumed_from"] == str(resumed / "checkpoint-2")
    assert record["results"]["train_seconds"] > 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamuon"])
def test_the_command_line_trains_and_saves(text: Path, cache: str, tmp_path: Path, tokenizer: Any, optim: str) -> None:
    output = tmp_path / "out"
    command = [sys.executable, str(RECIPES / "qwen2_5.py"), *flags(text, cache, output, "--optim", optim)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((output / "run.json").read_text())
    assert record["results"]["steps"] == 3
    assert record["results"]["tokens"] == 3 * 128
    assert record["results"]["eval_perplexity"] == pytest.approx(np.exp(record["results"]["eval_loss"]))
    assert record["identity"]["optim"] == optim
    assert len(losses(output)) == 3
    assert losses(output)[2] < losses(output)[0]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.num_parameters() == record["parameters"]
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(output)(ALICE).input_ids == tokenizer(ALICE).input_ids


@pytest.mark.slow
def test_two_processes_equal_one(text: Path, cache: str, tmp_path: Path) -> None:
    records, curves = [], []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        more = ("--optim", "adamuon", "--ddp_backend", "gloo")
        command = [*launch, str(RECIPES / "qwen2_5.py"), *flags(text, cache, output, *more)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        records.append(json.loads((output / "run.json").read_text()))
        curves.append(losses(output))
    assert [record["world_size"] for record in records] == [1, 2]
    assert records[0]["first_batch_sha256"] == records[1]["first_batch_sha256"]
    assert records[0]["initial_weights_sha256"] == records[1]["initial_weights_sha256"]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_dry_run_shows_the_plan_and_writes_nothing(text: Path, cache: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    argv = without(flags(text, cache, output, "--dry_run", "--optim", "mud"), "--max_steps")
    assert run([*argv, "--max_tokens", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "1,247,360 parameters; 7 steps of 128 tokens = 896 tokens" in shown
    assert '"optim": "mud"' in shown
    assert "q_proj" in shown
    assert run([*argv, "--num_train_epochs", "2"]) == 0
    assert "steps a pass over the data" in capsys.readouterr().out
    assert not output.exists()


def test_dry_run_of_a_large_preset_needs_no_network(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = ["--preset", "small", "--max_steps", "1000", "--tokenizer", str(tmp_path / "nothing"), "--dry_run"]
    assert run([*argv, "--use_cpu", "true", "--optim", "mud", "--output_dir", str(tmp_path / "out")], "gpt2") == 0
    shown = capsys.readouterr()
    assert "123,606,528 parameters; 1,000 steps of 491,520 tokens = 491,520,000 tokens" in shown.out
    assert "8.55e+08 FLOPs for one of the tokens, 4.2e+17 in all: 0.295 hours of one H100 at 40%" in shown.out
    assert "nothing: no such folder" in shown.err
    assert run([*argv[:-1], "--output_dir", str(tmp_path / "out")], "gpt2") == 2
    assert not (tmp_path / "out").exists()


def test_several_gpus_in_one_process_are_refused(text: Path, cache: str, tmp_path: Path) -> None:
    argv = flags(text, cache, tmp_path / "out")
    preset, arguments, training, given = parse_arguments("qwen2_5", qwen2_5.PRESETS, argv)
    assert training.n_gpu == 0
    training._n_gpu = 4  # what TrainingArguments counts
    with pytest.raises(RecipeError, match="one process sees 4 GPUs: start one for each"):
        pretrain.pretrain("qwen2_5", preset, arguments, training, given)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_cleared_without_a_moment_in_which_it_looks_finished(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-best", "mine"):
        (tmp_path / name).mkdir()
    for name in ("run.json", "log.jsonl", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    clear_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-best", "mine", "notes.txt", "run.json"]
    assert read_run(tmp_path) == {"identity": {}}
    assert not is_finished(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "log.jsonl").write_text("not of a run")
    clear_run(tmp_path)
    assert (tmp_path / "log.jsonl").exists()
