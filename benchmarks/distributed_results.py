"""The file that ``distributed_step.py --json`` writes after every run, and that ``--resume`` goes on from."""

import argparse
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from device_timing import first_line
from process_group import OutOfStepError, Processes

Each = TypeVar("Each")
PARTS = ("settings", "links", "steps", "trainer")
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
        check_form(everything)
    except (OSError, ValueError, TypeError) as error:
        return {"problem": f"is no file of distributed_step.py --json ({first_line(error)}): give another name"}
    saved = everything["settings"]
    for key in sorted((settings.keys() | saved.keys()) - {*MAY_DIFFER}):
        if saved.get(key) != settings.get(key):
            return {"problem": f"has {key}={saved.get(key)}, and this is {settings.get(key)}: give another name"}
    saved["resumed"] = [*saved.get("resumed", []), settings["date"]]
    return {key: everything[key] for key in PARTS}


def check_form(everything: Any) -> None:
    """Raise ValueError if it is not what ``write_results`` has written, as far as it is read here."""
    if not isinstance(everything, dict) or not {*PARTS} <= everything.keys():
        raise ValueError(f"it must have {', '.join(PARTS)}")
    entries = [
        *((link, "links", ("collective", "mib", "sent_bytes", "milliseconds")) for link in everything["links"]),
        *((result, "steps", ("model", "layers", "peaks", "runs")) for result in everything["steps"]),
        *(((everything["trainer"], "trainer", ("model", "runs")),) if everything["trainer"] is not None else ()),
        (everything["settings"], "settings", ()),
    ]
    for entry, part, keys in entries:
        if not isinstance(entry, dict) or not {*keys} <= entry.keys():
            raise ValueError(f"its {part} lack {', '.join(keys)}" if keys else f"its {part} are no object")


def saved_steps(everything: dict[str, Any], model: str, layers: int | None) -> dict[str, Any] | None:
    """The results of a model, taken out of ``everything``."""
    for index, result in enumerate(everything["steps"]):
        if (result["model"], result["layers"]) == (model, layers):
            found: dict[str, Any] = everything["steps"].pop(index)
            return found
    return None


def check_training(everything: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to add to runs of Trainer with other settings, which would be lost.

    Raises:
        OutOfStepError: on all ranks, naming the setting.
    """
    saved = everything["trainer"] or asked
    for key in asked.keys() - {"runs"}:
        if saved.get(key) != asked[key]:
            message = (
                f"--resume: the file has Trainer's runs with {key}={saved.get(key)}, not {asked[key]}: give another"
            )
            raise OutOfStepError(message, is_known_to_all=True)


def left_to_run(runs: list[dict[str, Any]], asked: dict[tuple[Any, ...], Each], key: tuple[str, ...]) -> list[Each]:
    """What is asked for and has not been measured; what had failed of it is taken out of ``runs``."""
    done = {tuple(run[name] for name in key) for run in runs if "error" not in run}
    left = {name: each for name, each in asked.items() if name not in done}
    runs[:] = [run for run in runs if "error" not in run or tuple(run[name] for name in key) not in left]
    return list(left.values())


def check_resume(parser: argparse.ArgumentParser, path: Path | None, resume: bool) -> None:
    """Stop the program where there is no file to go on with, or one would be overwritten."""
    if resume and path is None:
        parser.error("--resume goes on with a file of results: name it with --json")
    if path is not None and path.exists() and not resume:
        parser.error(f"--json {path} exists: add --resume to go on with it, or give another name")


def write_results(path: Path, everything: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
