"""One JSON file for each checkpoint and benchmark: written whole or not at all, kept while its key holds."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval_error import EvalError

FORMAT = 1


def result_path(output: Path, checkpoint_stem: str, benchmark: str) -> Path:
    """Return where the result of a benchmark on a checkpoint lies."""
    return output / checkpoint_stem / f"{benchmark}.json"


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a result, or None if there is none or the file is not a whole one."""
    try:
        return parse_result(path)
    except (FileNotFoundError, ValueError):
        return None


def parse_result(path: Path) -> dict[str, Any] | None:
    """Return a result, or None if the file holds other JSON; ValueError if it holds none."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if isinstance(result, dict) and result.get("format") == FORMAT else None


def is_done(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether a file holds the result of exactly this key."""
    result = read_result(path)
    return result is not None and result["key"] == json.loads(json.dumps(key))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old contents or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result."""
    write_text(path, json.dumps({"format": FORMAT, **result}, ensure_ascii=False, allow_nan=False) + "\n")


def check_writable(folder: Path, flag: str = "--output") -> None:
    """Refuse a folder that cannot be written to or made, before hours of work; makes none.

    Raises:
        EvalError: naming the flag and the folder.
    """
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise EvalError(f"{flag} {folder} cannot be written to: {error.strerror}; give another folder") from error


def read_results(folders: list[Path]) -> list[dict[str, Any]]:
    """Read every result below the folders, sorted by path.

    Raises:
        EvalError: if a folder is not there or holds no result, or a file in it is damaged.
    """
    results = []
    for folder in folders:
        if not folder.is_dir():
            raise EvalError(f"{folder}: no such folder")
        benchmarks = []
        for path in sorted(folder.rglob("*.json")):
            try:
                result = parse_result(path)
            except (OSError, ValueError) as error:
                raise EvalError(f"{path} cannot be read ({error}); run that benchmark again, or delete it") from error
            if result is not None and "benchmark" in result:
                benchmarks.append(result)
        if not benchmarks:
            raise EvalError(f"{folder} holds no result of `run`")
        results += benchmarks
    return results
