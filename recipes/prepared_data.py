"""Documents to flat files of tokens, once; every later run maps them into memory.

A prepared folder holds ``train.bin`` and, unless nothing is held out, ``validation.bin``: the tokens of all documents
one after the other, little-endian, 16 bits each below 65,536 words and 32 bits otherwise, as nanoGPT writes them.
Proteins have 8 bits each and ``*.starts.bin``, the (sequences + 1) uint64 places where they start and end.
``meta.json`` says what they were made of. A folder appears under its name only when all of it is written.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from data_sources import PREPARED_TRAIN, PREPARED_VALIDATION, TOKEN_SUFFIX, DataSource, Kind
from document_tokens import tokenizer_fingerprint, words_of
from filelock import FileLock
from preparation import FORMAT, META_FILE, NAMES, PREPARING_RULE, SIDES, Preparation, write_folder
from recipe_error import RecipeError
from token_files import ProteinFile, Segment, TokenFile, starts_path
from transformers import PreTrainedTokenizerBase

DEFAULT_CACHE = Path("~/.cache/hf-matrix-optim")
# Files of 256 int32 before the tokens, as llm.c and modded-nanogpt write them: this number, a version, the count.
HEADER_MAGIC, HEADER_BYTES = 20240520, 1024


@dataclass(frozen=True)
class PreparedData:
    """The two sides of the data, and the hash of all their tokens, the same on every machine."""

    train: TokenFile | ProteinFile
    validation: TokenFile | ProteinFile | None
    fingerprint: str
    meta: Mapping[str, Any] = field(repr=False)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return a prepared folder's ``meta.json``; None if there is none of ours."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def open_folder(folder: Path, meta: Mapping[str, Any], sides: Sequence[str] = SIDES) -> PreparedData:
    """Map a prepared folder.

    Raises:
        RecipeError: if a file is not as long as ``meta.json`` says.
    """
    opened: dict[str, TokenFile | ProteinFile | None] = dict.fromkeys(SIDES)
    for side in sides:
        path, tokens = folder / f"{side}{TOKEN_SUFFIX}", meta[side]["tokens"]
        if not tokens:
            continue
        expected = {path: tokens * np.dtype(meta["dtype"]).itemsize}
        if meta["kind"] == "proteins":
            expected[starts_path(path)] = 8 * (meta[side]["documents"] + 1)
        for file, size in expected.items():
            if not file.is_file() or file.stat().st_size != size:
                raise RecipeError(
                    f"{file} is not as {META_FILE} says ({size:,} bytes): remove {folder} and prepare it again"
                )
        if meta["kind"] == "proteins":
            opened[side] = ProteinFile(path, NAMES[side])
        else:
            opened[side] = TokenFile([Segment(path, meta["dtype"], 0, 0, tokens)], NAMES[side])
    hashes = [meta[side]["sha256"] for side in sides]
    train = opened["train"] if opened["train"] is not None else opened["validation"]
    assert train is not None
    return PreparedData(train, opened["validation"], combined_hash(hashes), meta)


def combined_hash(parts: Sequence[object]) -> str:
    """Hash the parts of the data's identity."""
    return hashlib.sha256(json.dumps([PREPARING_RULE, *map(str, parts)]).encode()).hexdigest()


def open_token_files(source: DataSource, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[TokenFile, str]:
    """Map token files that others wrote, or one side of a prepared folder; returns the stream and its hash.

    Without a ``meta.json`` of ours the tokens have 16 bits, as nanoGPT's, or what the header of llm.c's says. The hash
    is of the files' sizes and of pieces spread over them.

    Raises:
        RecipeError: if the tokenizer does not fit, or a file holds half a token.
    """
    segments, hashes = [], []
    words = words_of(tokenizer)
    for path in source.files:
        meta = read_meta(path.parent)
        if meta is not None and path.name in (PREPARED_TRAIN, PREPARED_VALIDATION[0]):
            check_prepared(path, meta, "text", tokenizer)
            opened = open_folder(path.parent, meta, [path.stem])
            assert isinstance(opened.train, TokenFile)
            segments += opened.train.segments
            hashes.append(meta[path.stem]["sha256"])
            continue
        with path.open("rb") as stream:
            start = stream.read(HEADER_BYTES)
        header = np.frombuffer(start, dtype="<i4") if len(start) == HEADER_BYTES else np.zeros(3, dtype="<i4")
        offset = HEADER_BYTES if header[0] == HEADER_MAGIC else 0
        if words > 2**16:
            raise RecipeError(
                f"{path} holds tokens of 16 bits, the tokenizer has {words:,} words: give the tokenizer that made them"
            )
        tokens, left_over = divmod(path.stat().st_size - offset, 2)
        if left_over or tokens < 1 or (offset and header[2] != tokens):
            raise RecipeError(f"{path} is no whole file of 16-bit tokens: it has {path.stat().st_size:,} bytes")
        segment = Segment(path, "<u2", offset, 0, tokens)
        segments.append(segment)
        stream_of_one = TokenFile([segment], name)
        places = np.linspace(0, max(0, tokens - 2**15), 64, dtype=np.int64)
        digest = hashlib.sha256(str(tokens).encode())
        for place in places:
            sample = stream_of_one[int(place) : int(place) + 2**15]
            if (largest := int(sample.max())) >= words:
                raise RecipeError(
                    f"{path} holds token {largest:,}, the tokenizer has {words:,} words: give the one that made it"
                )
            digest.update(sample.tobytes())
        hashes.append(digest.hexdigest())
    return TokenFile(segments, name), combined_hash(hashes) if len(hashes) > 1 else hashes[0]


def check_prepared(path: Path, meta: Mapping[str, Any], kind: Kind, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse prepared data of another kind or another tokenizer.

    Raises:
        RecipeError: naming both.
    """
    if meta["kind"] != kind:
        raise RecipeError(f"{path} holds {meta['kind']}, not {kind}")
    if tokenizer is not None and meta["tokenizer_sha256"] != tokenizer_fingerprint(tokenizer):
        raise RecipeError(
            f"{path} was prepared with another tokenizer ({meta['tokenizer']}) than --tokenizer "
            f"{tokenizer.name_or_path}: give that one, or prepare the text again"
        )


def use_token_files(
    train: DataSource, validation: DataSource | None, tokenizer: PreTrainedTokenizerBase, fraction: float
) -> PreparedData:
    """Use token files as they are; without others for validation, the end of the stream is held out.

    Raises:
        RecipeError: as `open_token_files`, or if validation is of documents.
    """
    if validation is not None and not validation.holds_tokens:
        raise RecipeError(f"--train_data {train.files[0]} holds tokens, --validation_data does not: give both alike")
    tokens, fingerprint = open_token_files(train, tokenizer, "training")
    meta = read_meta(train.files[0].parent) or {"format": None, "kind": "text", "train": {"unigram_entropy": None}}
    if validation is not None:
        held_out, other = open_token_files(validation, tokenizer, "validation")
        return PreparedData(tokens, held_out, combined_hash([fingerprint, other]), meta)
    end = len(tokens) - math.ceil(fraction * len(tokens))
    fingerprint = combined_hash([fingerprint, end])
    if fraction == 0:
        return PreparedData(tokens, None, fingerprint, meta)
    return PreparedData(
        tokens.part(0, end, "training"), tokens.part(end, len(tokens), "validation"), fingerprint, meta
    )


def prepare(
    preparation: Preparation,
    *,
    workers: int = 1,
    cache_dir: str | Path | None = None,
    output_dir: Path | None = None,
    show_progress: bool = True,
) -> PreparedData:
    """Prepare documents, or find what an earlier run or another process prepared of the same.

    Args:
        preparation: what to prepare.
        workers: processes that tokenize.
        cache_dir: folder of prepared folders, each named by all it depends on; None is ``~/.cache/hf-matrix-optim``.
        output_dir: instead: the folder to write; it must not exist.
        show_progress: show a bar.

    Raises:
        RecipeError: for sources that cannot be read or hold nothing, and if there is no room.
    """
    folder = output_dir or Path(cache_dir or DEFAULT_CACHE).expanduser() / preparation.folder_name()
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if output_dir is None:
                stack.enter_context(FileLock(folder.with_name(f".{folder.name}.lock")))
        except OSError as error:
            raise RecipeError(f"cannot prepare the data in {folder.parent}: {error}") from error
        if output_dir is not None and folder.exists():
            raise RecipeError(f"--output_dir {folder} exists: name a new folder")
        if read_meta(folder) is None:
            if folder.exists():
                raise RecipeError(f"{folder} has no {META_FILE} of this program: remove it and prepare the data again")
            write_folder(preparation, folder, workers, show_progress)
    meta = read_meta(folder)
    assert meta is not None
    return open_folder(folder, meta)


def prepare_text(
    train: DataSource,
    validation: DataSource | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    validation_fraction: float = 0.0,
    max_tokens: int | None = None,
    workers: int = 1,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> PreparedData:
    """Prepare text, or map it if the sources are token files; see `prepare`.

    Args:
        train: the training documents or tokens.
        validation: those of validation; None holds out part of the training documents, by a hash of each, or the end
            of training tokens.
        tokenizer: with an end-of-text token, which closes each document.
        validation_fraction: 0 (no validation) to below 1.
        max_tokens: prepare only so many training tokens, to the end of a document.
    """
    if train.holds_tokens:
        return use_token_files(train, validation, tokenizer, validation_fraction)
    if validation is not None and validation.holds_tokens:
        raise RecipeError(
            f"--validation_data {validation.files[0]} holds tokens, --train_data does not: give both alike"
        )
    fraction = 0.0 if validation is not None else validation_fraction
    preparation = Preparation("text", train, validation, tokenizer, fraction, max_tokens)
    return prepare(preparation, workers=workers, cache_dir=cache_dir, show_progress=show_progress)


def prepare_proteins(
    train: DataSource,
    validation: DataSource | None,
    *,
    validation_fraction: float = 0.0,
    max_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> PreparedData:
    """Prepare protein sequences for ESM-2, or map a prepared folder; as `prepare_text`, with residues for tokens."""
    if train.holds_tokens:
        path = train.files[0]
        meta = read_meta(path.parent)
        if (
            meta is None
            or path.name != PREPARED_TRAIN
            or validation not in (None, DataSource((path.with_name(PREPARED_VALIDATION[0]),)))
        ):
            raise RecipeError(f"{path}: proteins as tokens are read from a whole folder that recipes/prepare.py wrote")
        check_prepared(path, meta, "proteins", None)
        return open_folder(path.parent, meta)
    fraction = 0.0 if validation is not None else validation_fraction
    preparation = Preparation("proteins", train, validation, None, fraction, max_tokens)
    return prepare(preparation, cache_dir=cache_dir, show_progress=show_progress)


def prepare_held_out(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase | None,
    validation_fraction: float,
    *,
    max_documents: int,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> TokenFile | ProteinFile:
    """Prepare the first ``max_documents`` held-out documents of a source that is streamed for training.

    Args:
        source: the training source.
        tokenizer: None for proteins.
        validation_fraction: above 0; the same as the stream's, which leaves these documents out.
        max_documents: of .txt files sections count.
    """
    kind: Kind = "proteins" if tokenizer is None else "text"
    preparation = Preparation(kind, source, None, tokenizer, validation_fraction, None, max_documents)
    held_out = prepare(preparation, cache_dir=cache_dir, show_progress=show_progress).validation
    assert held_out is not None
    return held_out
