"""What the tests of the recipes share: a few kilobytes of text, and the command line of a run of a few steps."""

import json
from collections.abc import Sequence
from pathlib import Path

import pretrain
import qwen2_5

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
NOVELS = RECIPES / "data" / "novels"
TOKENIZER = RECIPES / "data" / "tokenizer"
ALICE = (NOVELS / "train" / "alices_adventures_in_wonderland.txt").read_text(encoding="utf-8")
THURSDAY = (NOVELS / "validation" / "the_man_who_was_thursday.txt").read_text(encoding="utf-8")


def write_text(folder: Path) -> Path:
    """Write the short texts that `flags` trains on."""
    (folder / "train.txt").write_text(ALICE[:12_000], encoding="utf-8")
    (folder / "validation.txt").write_text(THURSDAY[:2_000], encoding="utf-8")
    return folder


def flags(text: Path, cache: str, output: Path, *more: str) -> list[str]:
    return [
        *("--preset", "tiny", "--output_dir", str(output), "--cache_dir", cache, "--disable_tqdm", "true"),
        *("--train_data", str(text / "train.txt"), "--validation_data", str(text / "validation.txt")),
        *("--block_size", "32", "--tokens_per_step", "128", "--warmup_steps", "0", "--logging_steps", "1"),
        *("--max_steps", "3", "--use_cpu", "true", *more),
    ]


def without(argv: list[str], flag: str) -> list[str]:
    index = argv.index(flag)
    return argv[:index] + argv[index + 2 :]


def run(argv: Sequence[str]) -> int:
    return pretrain.main("qwen2_5", qwen2_5.PRESETS, argv)


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
