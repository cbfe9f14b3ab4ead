"""Where documents come from: local files, read by the standard library, and data sets on the Hub."""

import bz2
import csv
import glob
import gzip
import hashlib
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from recipe_error import RecipeError

Kind = Literal["text", "proteins"]

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "text": (".txt", *TABLE_SUFFIXES),
    "proteins": (".fasta", ".fa", ".faa", *TABLE_SUFFIXES),
}
COLUMNS: dict[Kind, str] = {"text": "text", "proteins": "sequence"}
OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
TOKEN_SUFFIX = ".bin"
PREPARED_TRAIN, PREPARED_VALIDATION = "train.bin", ("validation.bin", "val.bin")
SECTION_CHARACTERS = 8192
READ_CHARACTERS = 2**22
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Corpus:
    """What is known of a data set on the Hub.

    Attributes:
        column: the column with the documents.
        config: its configuration, if it has several.
        validation_split: the split that its publishers hold out.
        rows_are_lines: a row is a line of a longer document, which starts at a `` = Title = `` line.
    """

    column: str
    config: str | None = None
    validation_split: str | None = None
    rows_are_lines: bool = False


KNOWN_CORPORA = {
    "Skylion007/openwebtext": Corpus("text"),
    "Salesforce/wikitext": Corpus("text", "wikitext-103-raw-v1", "validation", rows_are_lines=True),
    "HuggingFaceFW/fineweb-edu": Corpus("text", "sample-10BT"),
    "tattabio/OMG_prot50": Corpus("sequence"),
}


@dataclass(frozen=True)
class DataSource:
    """Local files in the order they are read, or a data set on the Hub (or a folder that ``datasets`` can load).

    Attributes:
        column: the column with the documents; None is ``text`` for text, ``sequence`` for proteins. Plain text, FASTA
            and token files have no columns.
    """

    files: tuple[Path, ...] = ()
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    column: str | None = None

    @property
    def holds_tokens(self) -> bool:
        """Whether the files are tokens already."""
        return bool(self.files) and self.files[0].suffix == TOKEN_SUFFIX


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


def find_files(patterns: Sequence[str], kind: Kind) -> tuple[Path, ...]:
    """Resolve files, folders (searched below) and globs to files, each pattern's matches in sorted order.

    A folder with a ``train.bin`` stands for that file. Token files (``.bin``) and others are not read together.

    Raises:
        RecipeError: if a pattern matches nothing, a file is empty, or its kind is not read.
    """
    kinds = f"{' '.join(SUFFIXES[kind])}, also with {' '.join(OPENERS)}, or {TOKEN_SUFFIX}"
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            if suffix_of(path) not in (*SUFFIXES[kind], TOKEN_SUFFIX):
                raise RecipeError(f"{path} is not a kind of file that is read here for {kind} ({kinds})")
            found = [path]
        elif (path / PREPARED_TRAIN).is_file():
            found = [path / PREPARED_TRAIN]
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file) in SUFFIXES[kind])
            if not found:
                raise RecipeError(f"the folder {path} holds no file that is read here for {kind} ({kinds})")
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            found = sorted(
                file for file in matches if file.is_file() and suffix_of(file) in (*SUFFIXES[kind], TOKEN_SUFFIX)
            )
            if not found:
                raise RecipeError(f"{pattern} does not exist and as a pattern matches no file that is read here")
        files.update(dict.fromkeys(file.resolve() for file in found))
    for file in files:
        with reading(file), open_binary(file) as stream:
            if not stream.read(1):
                raise RecipeError(f"{file} is empty: name files that hold {kind}")
    if len({file.suffix == TOKEN_SUFFIX for file in files}) > 1:
        raise RecipeError(
            f"{' and '.join(patterns)}: token files ({TOKEN_SUFFIX}) cannot be read together with others"
        )
    return tuple(files)


def data_sources(
    kind: Kind,
    *,
    train_data: Sequence[str] | None,
    validation_data: Sequence[str] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    column: str | None = None,
) -> tuple[DataSource, DataSource | None]:
    """Resolve the training and the validation source; None for validation where nothing names or implies one.

    Raises:
        RecipeError: for files that are missing, empty, of a kind that is not read, or on both sides.
    """
    validation: DataSource | None = None
    if dataset_name is not None:
        corpus = KNOWN_CORPORA.get(dataset_name, Corpus(COLUMNS[kind]))
        config = dataset_config or corpus.config
        train = DataSource((), dataset_name, config, dataset_split or "train", column or corpus.column)
        if corpus.validation_split is not None:
            validation = DataSource((), dataset_name, config, corpus.validation_split, train.column)
    else:
        train = DataSource(find_files(train_data or (), kind), column=column)
        if train.holds_tokens and train.files[0].name == PREPARED_TRAIN:
            beside = (train.files[0].with_name(name) for name in PREPARED_VALIDATION)
            if held_out := next((file for file in beside if file.is_file()), None):
                validation = DataSource((held_out,))
    if validation_data is not None:
        validation = DataSource(find_files(validation_data, kind), column=column)
    if validation is not None and (both := set(train.files) & set(validation.files)):
        raise RecipeError(f"{min(both)} is in --train_data and in --validation_data")
    return train, validation


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


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of WikiText to articles: a new one starts at a `` = Title = `` line after an empty line."""
    article: list[str] = []
    after_empty_line = True
    for line in lines:
        if after_empty_line and re.fullmatch(r" = [^=].* = \n?", line) and any(map(str.strip, article)):
            yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") else f"{line}\n")
        after_empty_line = not line.strip()
    if article:
        yield "".join(article)


def load_hub_dataset(source: DataSource, *, streaming: bool) -> Any:
    """Load a data set by name with ``datasets``, its one column of documents.

    Raises:
        RecipeError: if it cannot be loaded, lacks the column, or ``datasets`` is not installed.
    """
    name, column = source.dataset_name, source.column
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"--dataset_name {name}: needs the package datasets (pip install datasets), or give --train_data"
        ) from error
    try:
        loaded = datasets.load_dataset(name, source.dataset_config, split=source.dataset_split, streaming=streaming)
    except Exception as error:  # the Hub's client, fsspec and the builders each have their own
        raise RecipeError(f"--dataset_name {name} cannot be loaded: {error}") from error
    names = loaded.column_names
    if names is not None and column not in names:
        raise RecipeError(f"{name}: no column {column!r}; give --text_column one of {', '.join(names)}")
    return loaded.select_columns([column])


def read_documents(
    source: DataSource, kind: Kind, *, streaming: bool = False, progress: Any = None
) -> Iterator[Piece]:
    """Read all documents of a source in its order; empty ones are left out.

    Args:
        source: of documents, not of tokens.
        kind: "text" or "proteins".
        streaming: read a data set on the Hub as it comes, without keeping a copy.
        progress: a tqdm bar to tell which file is read, or how many documents there are.

    Raises:
        RecipeError: if a source cannot be read, naming the file and the place.
    """
    if source.dataset_name is None:
        for number, path in enumerate(source.files, start=1):
            if progress is not None:
                progress.set_postfix_str(f"file {number} of {len(source.files)}")
            yield from (piece for piece in read_file(path, source.column or COLUMNS[kind]) if piece.text)
        return
    loaded = load_hub_dataset(source, streaming=streaming)
    documents = (row for batch in loaded.iter(batch_size=ROWS_AT_ONCE) for row in batch[source.column])
    if KNOWN_CORPORA.get(source.dataset_name, Corpus("")).rows_are_lines:
        documents = articles(documents)
    elif progress is not None and not streaming:
        progress.reset(total=len(loaded))
    for number, document in enumerate(documents):
        place = f"{source.dataset_name} {source.dataset_split}, document {number}"
        if text := document_of({source.column: document}, str(source.column), place):
            yield Piece(text, True, place)


def is_held_out(text: str, validation_fraction: float) -> bool:
    """Decide by a fixed hash of the text alone whether a document belongs to the validation part."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64
