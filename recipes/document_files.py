"""Documents in local files, read by the standard library (Parquet by pyarrow): text, FASTA and tables."""

import bz2
import csv
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from recipe_error import RecipeError

OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
SECTION_CHARACTERS = 8192
READ_CHARACTERS = 2**22
ROWS_AT_ONCE = 1024


class Piece(NamedTuple):
    """A document, or a section of one; ``place`` says where it was read, for messages."""

    text: str
    ends_document: bool
    place: str


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file holds, in lower case: ``.jsonl`` of ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what may go wrong in reading a file into one error that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"cannot read {path}: it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, csv.Error, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"cannot read {path}: {error or type(error).__name__}") from error


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, through its compression if it has one."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """Open a file for reading UTF-8 text, through its compression if it has one."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline=newline)


def sections(parts: Iterable[str], size: int = SECTION_CHARACTERS) -> Iterator[str]:
    """Cut a long text, given in parts, into pieces of at most ``size`` characters whose concatenation is the text.

    Cuts fall after a line end that no white space follows (byte-level tokenizers never join tokens across one), in a
    longer line before a space, in a longer word anywhere.
    """
    text = ""
    for part in parts:
        text += part
        start = 0
        while len(text) - start > size:
            cut = text.rfind("\n", start, start + size) + 1
            while cut > start and text[cut].isspace():
                cut = text.rfind("\n", start, cut - 1) + 1
            if cut <= start:
                cut = text.rfind(" ", start + 1, start + size)
            if cut <= start:
                cut = start + size
            yield text[start:cut]
            start = cut
        text = text[start:]
    yield text


def read_plain_text(path: Path) -> Iterator[Piece]:
    """Read a text file as one document in sections; blank sections at its start are left out."""
    with open_text(path) as stream:
        waiting = None
        for section in sections(iter(lambda: stream.read(READ_CHARACTERS), "")):
            if "\0" in section:
                raise RecipeError(f"cannot read {path}: it holds NUL bytes, so it is not text")
            if waiting is not None:
                yield Piece(waiting, False, str(path))
            if waiting is not None or section.strip():
                waiting = section
        if waiting is not None:
            yield Piece(waiting, True, str(path))


def read_fasta(path: Path) -> Iterator[Piece]:
    """Read a FASTA file: ``>name ...`` lines, each followed by the lines of its sequence."""
    name, lines = "", []
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.startswith(">"):
                if name:
                    yield Piece("".join(lines), True, f"{path}, record {name}")
                name, lines = line[1:].split(maxsplit=1)[0] if line[1:].strip() else f"at line {number}", []
            elif content := line.strip():
                if not name:
                    raise RecipeError(f"{path} is not FASTA: line {number} comes before the first line with '>'")
                lines.append(content)
    yield Piece("".join(lines), True, f"{path}, record {name}")


def rows_of(path: Path, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table and their numbers: lines of JSON and CSV files, otherwise rows, from 1."""
    match suffix_of(path):
        case ".csv":
            csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
            with open_text(path, newline="") as stream:
                reader = csv.DictReader(stream)
                yield from ((reader.line_num, row) for row in reader)
        case ".parquet":
            yield from enumerate(parquet_rows(path, column), start=1)
        case suffix:
            with open_text(path) as stream:
                start = next((line for line in stream if line.strip()), "")
                stream.seek(0)
                if suffix == ".json" and start.lstrip().startswith("["):
                    yield from enumerate(json.load(stream), start=1)
                    return
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        try:
                            yield number, json.loads(line)
                        except json.JSONDecodeError as error:
                            raise RecipeError(f"{path}, line {number}, is not JSON: {error}") from error


def parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one column of a Parquet file; of all columns if it lacks that one."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RecipeError(f"{path}: reading .parquet needs the package pyarrow") from error
    with pyarrow.parquet.ParquetFile(path) as table:
        columns = [column] if column in table.schema_arrow.names else None
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()


def document_of(row: Any, column: str, place: str) -> str | None:
    """Return a row's document, None if it is null.

    Raises:
        RecipeError: if the row has no such column or holds something else there.
    """
    if not isinstance(row, dict):
        raise RecipeError(f"{place}: a row must be an object with a field {column!r}, this is {type(row).__name__}")
    if column not in row:
        names = ", ".join(str(name) for name in row)
        raise RecipeError(f"{place}: no column {column!r}; give --text_column one of {names}")
    document = row[column]
    if document is not None and not isinstance(document, str):
        raise RecipeError(f"{place}: column {column!r} holds {document!r:.40}, not text")
    return document


def read_table(path: Path, column: str) -> Iterator[Piece]:
    """Read a table, a document a row; rows without one are left out."""
    for number, row in rows_of(path, column):
        place = f"{path}, {'row' if suffix_of(path) == '.parquet' else 'line'} {number}"
        if document := document_of(row, column, place):
            yield Piece(document, True, place)


def read_file(path: Path, column: str) -> Iterator[Piece]:
    """Read the documents of one file.

    Raises:
        RecipeError: if it does not hold what its name says, naming the file and the place.
    """
    with reading(path):
        match suffix_of(path):
            case ".txt":
                yield from read_plain_text(path)
            case ".fasta" | ".fa" | ".faa":
                yield from read_fasta(path)
            case _:
                yield from read_table(path, column)
