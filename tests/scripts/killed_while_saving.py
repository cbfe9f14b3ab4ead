"""Runs a recipe whose process is killed in the middle of a checkpoint: ``STEP PLACE RECIPE FLAGS...``.

PLACE is a method that writes part of a checkpoint; at STEP the process dies in its place and leaves half a file.
"""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import pretrain
import recipe_trainer
from transformers import TrainerState

FILES = {"_save_optimizer_and_scheduler": "optimizer.pt", "save_to_json": "trainer_state.json"}


def main(step: str, place: str, recipe: str, *flags: str) -> int:
    owner: Any = TrainerState if place == "save_to_json" else recipe_trainer.PretrainingTrainer
    original = getattr(owner, place)

    def die(self: Any, target: str, *arguments: Any) -> None:
        folder = Path(target).parent if place == "save_to_json" else Path(target)
        if folder.name != f"checkpoint-{step}":
            original(self, target, *arguments)
            return
        (folder / FILES[place]).write_text('{"global_step": ')
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, place, die)
    return pretrain.main(recipe, importlib.import_module(recipe).PRESETS, flags)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
