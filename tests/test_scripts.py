"""Scripts that never heard of this package, in processes of their own, with each optimizer."""

import json
import math
from pathlib import Path

import pytest
import torch
from interpreters import SCRIPTS, output_of, run_python, scratch_environment

from hf_matrix_optim.options import OPTIMIZER_NAMES

LAUNCHER = ("-m", "hf_matrix_optim")
SCRIPT = str(SCRIPTS / "train_language_model.py")
STEPS = 6


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.\n" * 40)
    return path


def training_arguments(text_file: Path) -> list[str]:
    return [
        f"--train_file={text_file}", f"--max_steps={STEPS}", f"--save_steps={STEPS}", "--learning_rate=1e-2",
        "--logging_steps=1", "--use_cpu", "--report_to=none", "--disable_tqdm=true", "--lr_scheduler_type=constant",
    ]  # fmt: skip


def check_run(folder: Path, name: str) -> None:
    """The run in ``folder`` was one of ``STEPS`` steps with the optimizer ``name``, and learnt something."""
    checkpoint = folder / f"checkpoint-{STEPS}"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {group["algorithm"] for group in state["param_groups"]} == {"adamw", name}
    steps = {float(parameter_state["step"]) for parameter_state in state["state"].values()}
    assert steps == {float(STEPS)}
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.1
    args = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (type(args.optim), args.optim) == (str, name)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_below_the_launcher(name: str, text_file: Path, tmp_path: Path) -> None:
    output_of(*LAUNCHER, SCRIPT, "--optim", name, "--output_dir", "out", *training_arguments(text_file), cwd=tmp_path)
    check_run(tmp_path / "out", name)


def test_two_gloo_processes_below_torchrun(text_file: Path, tmp_path: Path) -> None:
    names = ",".join(OPTIMIZER_NAMES)
    output_of(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *LAUNCHER,
        SCRIPTS / "train_each.py", names, tmp_path, *training_arguments(text_file), cwd=tmp_path,
    )  # fmt: skip
    for name in OPTIMIZER_NAMES:
        check_run(tmp_path / name, name)
        for rank in range(2):
            assert (tmp_path / f"{name}.rank{rank}").read_text() == "2 True", "the ranks' weights differ"


def test_below_accelerate_launch(text_file: Path, tmp_path: Path) -> None:
    output_of(
        "-m", "accelerate.commands.launch", "--cpu", *LAUNCHER,
        SCRIPT, "--optim", "mud", "--output_dir", "out", *training_arguments(text_file),
        cwd=tmp_path, HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    check_run(tmp_path / "out", "mud")


def test_a_module_with_a_spawned_child_that_trains(text_file: Path, tmp_path: Path) -> None:
    """``-m``, the current folder on the path, and a child that is given the parent's arguments and parses its own."""
    for name in ("train_in_a_child.py", "train_language_model.py"):
        (tmp_path / name).write_text((SCRIPTS / name).read_text())
    output = output_of(
        *LAUNCHER, "-m", "train_in_a_child",
        "--optim", "adamuon", "--output_dir", "out", *training_arguments(text_file), cwd=tmp_path,
    )  # fmt: skip
    assert "in the child: str adamuon" in output
    check_run(tmp_path / "out", "adamuon")


def test_plain_python_after_enable_and_not_without(text_file: Path, tmp_path: Path) -> None:
    python = scratch_environment(tmp_path / "venv")
    arguments = [SCRIPT, "--optim", "muon", "--output_dir", "out", *training_arguments(text_file)]
    output_of(*LAUNCHER, "enable", cwd=tmp_path, executable=python)

    off = run_python(*arguments, cwd=tmp_path, executable=python, HF_MATRIX_OPTIM="0")
    assert off.returncode == 2
    last_line = off.stderr.strip().splitlines()[-1]
    assert last_line.startswith(
        "train_language_model.py: error: argument --optim: invalid choice: 'muon' (choose from"
    )
    assert "hf_matrix_optim" not in off.stderr
    assert not (tmp_path / "out").exists()
    doctor = run_python(*LAUNCHER, "doctor", cwd=tmp_path, executable=python, HF_MATRIX_OPTIM="0")
    assert "by a plain python script: no. HF_MATRIX_OPTIM=0 is set in the environment: unset it" in doctor.stdout

    output_of(*arguments, cwd=tmp_path, executable=python)
    check_run(tmp_path / "out", "muon")


def test_a_mistake_in_optim_args_ends_in_one_clear_error(text_file: Path, tmp_path: Path) -> None:
    mistake = ["--optim", "muon", "--optim_args", "ns_step=6", "--output_dir", "out"]
    result = run_python(*LAUNCHER, SCRIPT, *mistake, *training_arguments(text_file), cwd=tmp_path)
    assert result.returncode == 1
    assert "has no key 'ns_step'; did you mean 'ns_steps'?" in result.stderr.strip().splitlines()[-1]
