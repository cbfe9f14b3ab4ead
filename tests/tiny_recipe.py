"""What the tests of the recipes share: a few kilobytes of text, and the command lines of runs of a few steps."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pretrain
import torch
from run_log import read_log
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
NOVELS = RECIPES / "data" / "novels"
TOKENIZER = RECIPES / "data" / "tokenizer"
ALICE = (NOVELS / "train" / "alices_adventures_in_wonderland.txt").read_text(encoding="utf-8")
THURSDAY = (NOVELS / "validation" / "the_man_who_was_thursday.txt").read_text(encoding="utf-8")
FAMILIES = ("qwen2_5", "gpt2", "esm2", "cifar10")
# With the threads of this process: a run that goes on with another number of them rounds otherwise.
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": str(torch.get_num_threads()),
    "TOKENIZERS_PARALLELISM": "false",
}
# Small enough for a step of milliseconds; the proteins and the digits are those of the repository.
SMALL = {
    "qwen2_5": ("--block_size", "32", "--tokens_per_step", "128"),
    "gpt2": ("--block_size", "32", "--tokens_per_step", "128"),
    "esm2": ("--block_size", "48", "--tokens_per_step", "192", "--validation_samples", "16"),
    "cifar10": ("--tokens_per_step", "32", "--validation_samples", "16"),
}


def write_text(folder: Path) -> Path:
    """Write the short texts that `flags` trains on."""
    (folder / "train.txt").write_text(ALICE[:12_000], encoding="utf-8")
    (folder / "validation.txt").write_text(THURSDAY[:2_000], encoding="utf-8")
    return folder


def flags(text: Path, cache: str, output: Path, *more: str, family: str = "qwen2_5") -> list[str]:
    """Command line of three steps of a family's tiny preset."""
    data = ("--train_data", str(text / "train.txt"), "--validation_data", str(text / "validation.txt"))
    return [
        *("--preset", "tiny", "--output_dir", str(output), "--cache_dir", cache, "--disable_tqdm", "true"),
        *(data if family in ("qwen2_5", "gpt2") else ()),
        *SMALL[family],
        *("--warmup_steps", "0", "--logging_steps", "1", "--max_steps", "3", "--use_cpu", "true", *more),
    ]


def without(argv: list[str], flag: str) -> list[str]:
    index = argv.index(flag)
    return argv[:index] + argv[index + 2 :]


def run(argv: Sequence[str], family: str = "qwen2_5") -> int:
    """Run a recipe in this process; returns its exit status."""
    return pretrain.main(family, importlib.import_module(family).PRESETS, argv)


def run_process(argv: Sequence[str], family: str, *launch: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a recipe as a person does, or below a launcher."""
    command = [sys.executable, *launch, str(RECIPES / f"{family}.py"), *argv]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def record(output: Path) -> dict[str, Any]:
    """Contents of a run's ``run.json``."""
    contents: dict[str, Any] = json.loads((output / "run.json").read_text())
    return contents


def losses(output: Path, kind: str = "train") -> list[float]:
    return [entry["loss"] for entry in read_log(output) if entry["kind"] == kind]


def untimed_log(output: Path) -> list[dict[str, Any]]:
    """A run's log without what depends on the clock."""
    timed = ("train_seconds", "tokens_per_second", "optimizer_seconds", "mfu")
    return [{key: value for key, value in entry.items() if key not in timed} for entry in read_log(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
