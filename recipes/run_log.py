"""The log of a training run, ``log.jsonl``: one JSON object a line, without gaps or duplicates after any interruption.

A record has ``kind`` ("train" or "eval"), ``step``, ``tokens`` (of training, over all ranks), ``train_seconds``
(without evaluation, saves and the first compilation) and ``loss`` in nats a token; null stands for a value that is
not finite. Training records also have ``lr`` and ``grad_norm``.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe_error import RecipeError

LOG_FILE = "log.jsonl"


def finite_or_null(value: Any) -> Any:
    """Return ``value``, or None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run folder, in their order; a last line cut off by a killed process is left out.

    Raises:
        RecipeError: if there is no log, or a line before the last is not a record.
    """
    path = folder / LOG_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError as error:
        raise RecipeError(f"{folder} has no {LOG_FILE}: it is not the folder of a run that has trained") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line end was not written whole
        try:
            record = json.loads(line)
            record["kind"], record["step"], record["tokens"], record["train_seconds"], record["loss"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise RecipeError(f"{path}, line {number}, is not a record of a run: {line[:80]!r}") from error
        records.append(record)
    return records


class RunLog:
    """Writer of one run's log; only the first rank has one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_FILE

    def truncate(self, step: int) -> None:
        """Keep the records up to and including ``step``: that of the checkpoint to go on from, 0 for a new run.

        Raises:
            RecipeError: if the file that is there is not a log.
        """
        kept = []
        if step > 0 and self.path.exists():
            kept = [record for record in read_log(self.path.parent) if record["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and hand it to the operating system, so that it outlives the process."""
        line = json.dumps({name: finite_or_null(value) for name, value in record.items()}, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as log:
            log.write(line)
