"""The preparation of documents: to a folder of token files that appears only when it is whole."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data_sources import TOKEN_SUFFIX, DataSource, Kind, read_documents
from document_tokens import EncodedDocument, encode_proteins, encode_text, tokenizer_fingerprint, words_of
from masked_proteins import ESM_VOCABULARY
from recipe_error import RecipeError
from token_files import starts_path, token_dtype
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

PREPARING_RULE = 1  # part of every folder's name: change it when the same documents give other tokens
META_FILE = "meta.json"
FORMAT = "hf-matrix-optim tokens"
SIDES = ("train", "validation")
NAMES = {"train": "training", "validation": "validation"}
WRITE_BYTES = 2**24
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SideWriter:
    """Writes one side's tokens, and counts and hashes them on the way."""

    def __init__(self, folder: Path, side: str, dtype: str, words: int, *, with_starts: bool) -> None:
        path = folder / f"{side}{TOKEN_SUFFIX}"
        self.dtype = dtype
        self.stream = path.open("xb", buffering=WRITE_BYTES)
        self.starts = starts_path(path).open("xb", buffering=WRITE_BYTES) if with_starts else None
        if self.starts is not None:
            self.starts.write(np.uint64(0).tobytes())
        self.tokens = self.documents = 0
        self.counts = np.zeros(words, dtype=np.int64)
        self.digest = hashlib.sha256()

    def write(self, tokens: np.ndarray) -> None:
        content = tokens.astype(self.dtype).tobytes()
        self.stream.write(content)
        self.digest.update(content)
        self.tokens += len(tokens)
        self.documents += 1
        np.add.at(self.counts, tokens, 1)
        if self.starts is not None:
            self.starts.write(np.array(self.tokens, dtype="<u8").tobytes())
            self.digest.update(len(tokens).to_bytes(8, "little"))

    def close(self) -> dict[str, Any]:
        """Write what is left and return the side's part of ``meta.json``."""
        for stream in (self.stream, self.starts):
            if stream is not None:
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self.digest.hexdigest(),
            "unigram_entropy": entropy(self.counts) if self.tokens else None,
        }

    def abandon(self) -> None:
        """Close the files without a second attempt to write what could not be written."""
        for stream in (self.stream, self.starts):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of a distribution given by counts, in nats: the loss of a model that knows only them."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def source_identity(source: DataSource | None) -> Any:
    """Describe a source by what changes with it: names, and sizes and times of local files."""
    if source is None:
        return None
    folder = Path(source.dataset_name) if source.dataset_name is not None else None
    files = source.files if folder is None else sorted(file for file in folder.rglob("*") if file.is_file())
    times = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [source.dataset_name, source.dataset_config, source.dataset_split, source.column, times]


@dataclass(frozen=True)
class Preparation:
    """All that a prepared folder depends on.

    Attributes:
        tokenizer: None for proteins.
        max_tokens: stop once training has so many; None for all.
        max_held_out: stop once so many documents are held out, and keep no training tokens; None prepares both sides.
    """

    kind: Kind
    train: DataSource
    validation: DataSource | None
    tokenizer: PreTrainedTokenizerBase | None
    validation_fraction: float
    max_tokens: int | None = None
    max_held_out: int | None = None

    @property
    def words(self) -> int:
        return len(ESM_VOCABULARY) if self.tokenizer is None else words_of(self.tokenizer)

    @property
    def vocabulary_hash(self) -> str | None:
        return None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)

    def folder_name(self) -> str:
        """Return a name to read, with a hash of everything the tokens depend on."""
        parts = [PREPARING_RULE, self.kind, self.vocabulary_hash, self.validation_fraction]
        parts += [self.max_tokens, self.max_held_out, source_identity(self.train), source_identity(self.validation)]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        named = self.train.dataset_name or self.train.files[0].name
        return f"{re.sub('[^A-Za-z0-9]+', '-', Path(named).name).strip('-')}-{key}"

    def encoded(self, source: DataSource, fraction: float, workers: int, progress: Any) -> Iterator[EncodedDocument]:
        """Read and encode a source's documents, moving a progress bar by one for each piece."""
        partly = self.max_tokens is not None or self.max_held_out is not None
        pieces = read_documents(source, self.kind, streaming=partly, progress=progress)
        counted = (piece for piece in pieces if progress.update() or True)
        if self.tokenizer is None:
            return encode_proteins(counted, fraction)
        return encode_text(counted, self.tokenizer, fraction, workers)

    def write(self, folder: Path, workers: int, show_progress: bool) -> None:
        """Write the token files and ``meta.json`` into an existing folder."""
        dtype = "u1" if self.kind == "proteins" else token_dtype(self.words)
        writers = {
            side: SideWriter(folder, side, dtype, self.words, with_starts=self.kind == "proteins") for side in SIDES
        }
        try:
            self.fill(writers, workers, show_progress)
            sides = {side: writer.close() for side, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.abandon()
        self.check(sides)
        if not sides["validation"]["tokens"]:
            (folder / f"validation{TOKEN_SUFFIX}").unlink()
            starts_path(folder / f"validation{TOKEN_SUFFIX}").unlink(missing_ok=True)
        meta = {
            "format": FORMAT,
            "rule": PREPARING_RULE,
            "kind": self.kind,
            "dtype": dtype,
            "words": self.words,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.name_or_path,
            "tokenizer_sha256": self.vocabulary_hash,
            "end_of_text": None if self.tokenizer is None else self.tokenizer.eos_token_id,
            "source": source_identity(self.train),
            "validation_source": source_identity(self.validation),
            "split": f"hash of the document below {self.validation_fraction}"
            if self.validation is None
            else "a source of its own",
            **sides,
        }
        with (folder / META_FILE).open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(meta, indent=2) + "\n")

    def fill(self, writers: Mapping[str, SideWriter], workers: int, show_progress: bool) -> None:
        """Read, encode and write all documents that are wanted."""
        fraction = self.validation_fraction if self.validation is None else 0.0
        for source, side in ((self.train, "train"), (self.validation, "validation")):
            if source is None:
                continue
            unit = " sequences" if self.kind == "proteins" else " pieces"
            description = f"Preparing {NAMES[side]} {self.kind}"
            with tqdm(desc=description, unit=unit, disable=not show_progress) as progress:
                for number, document in enumerate(self.encoded(source, fraction, workers, progress)):
                    target = writers["validation" if document.held_out else side]
                    if self.max_held_out is None or document.held_out:
                        target.write(document.tokens)
                    if number % 1000 == 0:
                        progress.set_description_str(f"{description}: {writers[side].tokens:,} tokens", refresh=False)
                    if self.max_tokens is not None and side == "train" and writers[side].tokens >= self.max_tokens:
                        break
                    if self.max_held_out is not None and writers["validation"].documents >= self.max_held_out:
                        break
                progress.set_description_str(f"{description}: {writers[side].tokens:,} tokens")

    def check(self, sides: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse an empty side.

        Raises:
            RecipeError: naming the remedy.
        """
        if self.max_held_out is None and not sides["train"]["tokens"] and sides["validation"]["tokens"]:
            raise RecipeError(
                "the training data has 0 tokens, for all of its documents are held out: give more documents, a "
                "smaller --validation_fraction, or --validation_data"
            )
        if self.max_held_out is None and not sides["train"]["tokens"]:
            raise RecipeError(f"the training data has 0 tokens: give files or a data set that hold {self.kind}")
        if sides["validation"]["tokens"]:
            return
        if self.validation is not None:
            raise RecipeError("the validation data has 0 tokens: give others in --validation_data")
        if self.validation_fraction > 0:
            raise RecipeError(
                f"--validation_fraction {self.validation_fraction} of {sides['train']['documents']:,} documents holds "
                "out none: raise it, give --validation_data, or 0 for no validation"
            )


def write_folder(preparation: Preparation, folder: Path, workers: int, show_progress: bool) -> None:
    """Write a prepared folder under another name and rename it once it is whole.

    Raises:
        RecipeError: if the source cannot be read or there is no room; nothing is left then.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        preparation.write(partial, workers, show_progress)
        os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise RecipeError(
                f"no room to prepare the data in {folder.parent}: {error.strerror}. Nothing is kept of it; free some "
                "space or name another folder"
            ) from error
        if isinstance(error, OSError):
            raise RecipeError(f"cannot prepare the data in {folder.parent}: {error}") from error
        raise
