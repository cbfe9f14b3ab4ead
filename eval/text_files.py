"""Held-out text in local files: UTF-8 text, read as it is, and JSON Lines, each also compressed."""

import bz2
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from eval_error import EvalError

OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def unpacked_name(path: Path) -> str:
    """Return a file's name without the suffix of a compression."""
    return path.stem if path.suffix.lower() in OPENERS else path.name


def stem_of(path: Path) -> str:
    """Return a file's name without the suffixes of its format: ``wiki.valid`` of ``wiki.valid.tokens.xz``."""
    return Path(unpacked_name(path)).stem


def read_documents(path: Path) -> list[str]:
    """Return the documents of a file: one for each line of a ``.jsonl``, in its column ``text``, else the whole file.

    Line ends are left as they are; a byte order mark at the start is not part of the text.

    Raises:
        EvalError: naming the file, for one that is not there, is no UTF-8 text, or holds no text.
    """
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            whole = stream.read()
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise EvalError(f"--text {path} is not UTF-8 text ({place}); convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise EvalError(f"--text {path} cannot be read: {error}") from error
    if "\0" in whole:
        raise EvalError(f"--text {path} holds NUL bytes, so it is not text")
    is_json = unpacked_name(path).lower().endswith(".jsonl")
    documents = json_documents(path, whole) if is_json else [whole]
    if not any(map(str.strip, documents)):
        raise EvalError(f"--text {path} holds no text")
    return [document for document in documents if document]


def json_documents(path: Path, lines: str) -> list[str]:
    """Return column ``text`` of JSON Lines; blank lines are left out."""
    documents = []
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvalError(f"--text {path}: line {number} is not JSON: {error}") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise EvalError(f"--text {path}: line {number} has no column 'text' that holds text: {line.strip():.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EvalError(f"--text {path}: line {number} has half a surrogate pair, which is no text") from error
        documents.append(text)
    return documents


def first_words(documents: Sequence[str], limit: int | None) -> list[str]:
    """Return documents up to the end of so many words (separated by white space); all of them if None."""
    if limit is None:
        return list(documents)
    kept = []
    for document in documents:
        parts = document.split(maxsplit=limit)
        if len(parts) > limit:
            return [*kept, document[: len(document) - len(parts[limit])].rstrip()]
        kept.append(document)
        limit -= len(parts)
        if not limit:
            break
    return kept


def text_hash(documents: Sequence[str]) -> str:
    """Return the SHA-256 of documents and of where they end, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()
