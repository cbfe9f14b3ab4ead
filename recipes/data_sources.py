"""Where documents come from: local files and data sets on the Hub, by what the flags name."""

import glob
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from document_files import OPENERS, ROWS_AT_ONCE, Piece, document_of, open_binary, read_file, reading, suffix_of
from recipe_error import RecipeError

Kind = Literal["text", "proteins"]

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "text": (".txt", *TABLE_SUFFIXES),
    "proteins": (".fasta", ".fa", ".faa", *TABLE_SUFFIXES),
}
COLUMNS: dict[Kind, str] = {"text": "text", "proteins": "sequence"}
TOKEN_SUFFIX = ".bin"
PREPARED_TRAIN, PREPARED_VALIDATION = "train.bin", ("validation.bin", "val.bin")


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
    return split_hash(text) < validation_fraction * 2**64


def split_hash(text: str) -> int:
    """Return a fixed hash of a document, evenly spread over [0, 2^64)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def fraction_of_short(hashes: Sequence[int], validation_fraction: float) -> float:
    """Return the fraction, or the smallest that holds out one of several documents where it would hold out none."""
    if validation_fraction == 0 or len(hashes) < 2 or min(hashes) < validation_fraction * 2**64:
        return validation_fraction
    return math.nextafter((min(hashes) + 1) / 2**64, 1.0)
