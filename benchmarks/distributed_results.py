"""The file that ``distributed_step.py --json`` writes after every run, and that ``--resume`` goes on from."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from process_group import OutOfStepError, Processes

#: Of the settings: what may be another when a file is gone on with.
MAY_DIFFER = ("date", "resumed")


def new_or_saved(path: Path | None, settings: dict[str, Any], ranks: Processes, *, resume: bool) -> dict[str, Any]:
    """What there is to begin with, the same on all ranks: nothing yet, or what the first rank finds in the file.

    Raises:
        OutOfStepError: on all ranks, if the file is damaged or of other settings.
    """
    new: dict[str, Any] = {"settings": settings, "links": [], "steps": [], "trainer": None}
    if path is None or not resume:
        return new
    found = ranks.together(lambda: _read(path, settings) if ranks.rank == 0 else {})[0]
    if "problem" in found:
        raise OutOfStepError(f"--resume: {path} {found['problem']}", is_known_to_all=True)
    return {**new, **found}


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is in the file; {} if there is none yet, and {"problem": ...} if it cannot be gone on with."""
    if not path.exists():
        return {}
    try:
        everything = json.loads(path.read_text(encoding="utf-8"))
        saved = everything["settings"]
        assert {"links", "steps", "trainer"} <= everything.keys()
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        return {"problem": f"is no file of distributed_step.py --json ({type(error).__name__}): give another name"}
    for key in (settings.keys() | saved.keys()) - {*MAY_DIFFER}:
        if saved.get(key) != settings.get(key):
            return {"problem": f"has {key}={saved.get(key)}, and this is {settings.get(key)}: give another name"}
    saved["resumed"] = [*saved.get("resumed", []), settings["date"]]
    return {key: everything[key] for key in ("settings", "links", "steps", "trainer")}


def saved_steps(everything: dict[str, Any], model: str, layers: int | None) -> dict[str, Any] | None:
    """The results of a model, without what failed; taken out of ``everything``."""
    for index, result in enumerate(everything["steps"]):
        if (result["model"], result["layers"]) == (model, layers):
            return {**everything["steps"].pop(index), "runs": _finished(result)}
    return None


def saved_training(everything: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A result of Trainer that is to be filled: with the runs of the same settings that there are.

    Raises:
        OutOfStepError: if those that there are have others; they would be lost.
    """
    saved = everything["trainer"]
    if saved is None:
        return result
    for key in result.keys() - {"runs"}:
        if saved[key] != result[key]:
            message = f"--resume: the file has Trainer's runs with {key}={saved[key]}, not {result[key]}: give another"
            raise OutOfStepError(message, is_known_to_all=True)
    return {**result, "runs": _finished(saved)}


def _finished(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in result["runs"] if "error" not in run]


def check_resume(parser: argparse.ArgumentParser, path: Path | None, resume: bool) -> None:
    """Stop the program where there is no file to go on with, or one would be overwritten."""
    if resume and path is None:
        parser.error("--resume goes on with a file of results: name it with --json")
    if path is not None and path.exists() and not resume:
        parser.error(f"--json {path} exists: add --resume to go on with it, or give another name")


def write(path: Path, everything: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
