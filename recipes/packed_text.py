"""Text files or a Hub data set to packed blocks of tokens, in an order that depends on the seed alone.

Documents are tokenized, closed by the end-of-text token, joined in their order into one stream of tokens and cut into
blocks of equal size; what is left at the end of the stream, less than a block, is dropped. Each step is a ``datasets``
map whose cache is named by everything its result depends on, so several processes and later runs share it.
"""

import glob
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from recipe_error import RecipeError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSIONS = (".gz", ".xz", ".bz2")
SECTION_CHARACTERS = 8192
PACKING_RULE = "packed text 1"  # part of every cache name: change it when the tokens of the same text change


@dataclass(frozen=True)
class TextSource:
    """Where the documents come from: local files, or a data set on the Hub.

    Attributes:
        files: local files in the order they are read; empty for a Hub data set.
        dataset_name: name on the Hub (or a folder ``datasets`` can load), with its configuration and split.
        text_column: the column that holds the text. Plain text files have only ``text``.
    """

    files: tuple[Path, ...] = ()
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"


@dataclass(frozen=True)
class PackedText:
    """Blocks of (block_size,) int32 token ids, and the hash of all they depend on."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    fingerprint: str


def loader_of(path: Path) -> str | None:
    """Return the ``datasets`` loader for a file name, or None for a kind that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return LOADERS.get(suffixes[-1]) if suffixes else None


def find_text_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Resolve files, folders (searched below) and globs to files, each pattern's matches in sorted order.

    Raises:
        RecipeError: if a pattern matches nothing, a file is empty, or its kind is not read.
    """
    kinds = f"{' '.join(LOADERS)}, also with {' '.join(COMPRESSIONS)}"
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            if loader_of(path) is None:
                raise RecipeError(f"{path} is not a kind of file that is read here ({kinds})")
            found = [path]
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and loader_of(file))
            if not found:
                raise RecipeError(f"the folder {path} holds no file that is read here ({kinds})")
        else:
            matches = map(Path, glob.glob(str(path), recursive=True))
            found = sorted(file for file in matches if file.is_file() and loader_of(file))
            if not found:
                raise RecipeError(f"{pattern} does not exist and as a pattern matches no file that is read here")
        files.update(dict.fromkeys(file.resolve() for file in found))
    for file in files:
        if is_empty(file):
            raise RecipeError(f"{file} is empty: name files that hold text")
    return tuple(files)


def is_empty(file: Path) -> bool:
    """Tell whether a file holds no bytes, read through gzip where it is compressed so."""
    if file.stat().st_size == 0:
        return True
    if file.suffix.lower() == ".gz":
        with gzip.open(file) as stream:
            try:
                return not stream.read(1)
            except (OSError, EOFError) as error:
                raise RecipeError(f"{file} is not a whole gzip file: {error}") from error
    return False


def sections(text: str, size: int = SECTION_CHARACTERS) -> Iterator[str]:
    """Cut a long text into pieces of at most ``size`` characters whose concatenation is the text.

    Cuts fall after a line end that no white space follows (byte-level tokenizers never join tokens across one), in a
    longer line before a space, in a longer word anywhere.
    """
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
    yield text[start:]


def is_held_out(text: str, validation_fraction: float) -> bool:
    """Decide by a fixed hash of the text alone whether a document belongs to the validation part."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64


def tokenize(
    batch: Mapping[str, Sequence[str | None]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    in_sections: bool,
    validation_fraction: float,
) -> dict[str, list[Any]]:
    """Tokenize documents and mark those held out for validation; documents without text are left out.

    With ``in_sections`` each text is cut by `sections` and each section is held out or not by itself; the end-of-text
    token closes the last section, and a section whose successor is on the other side.
    """
    texts: list[str] = []
    held_out: list[bool] = []
    closed: list[bool] = []
    for document in batch[text_column]:
        if document is None or not document.strip():
            continue
        pieces = list(sections(document)) if in_sections else [document]
        sides = [is_held_out(piece, validation_fraction) for piece in pieces]
        texts += pieces
        held_out += sides
        closed += [*(side != following for side, following in pairwise(sides)), True]
    if not texts:
        return {"input_ids": [], "held_out": []}
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return {
        "input_ids": [ids + end if close else ids for ids, close in zip(encoded, closed, strict=True)],
        "held_out": held_out,
    }


class BlockPacker:
    """Join documents of one side of the split and cut blocks; what is left over waits for the next documents."""

    def __init__(self, block_size: int, held_out: bool) -> None:
        self.block_size = block_size
        self.held_out = held_out
        self.left_over = np.empty(0, dtype=np.int32)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        documents = [ids for ids, held_out in zip(*batch.values(), strict=True) if held_out == self.held_out]
        stream = np.concatenate([self.left_over, *(np.asarray(ids, dtype=np.int32) for ids in documents)])
        end = len(stream) // self.block_size * self.block_size
        self.left_over = stream[end:]
        return {"input_ids": stream[:end].reshape(-1, self.block_size)}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids of a text: the fast tokenizer's whole definition, else the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {definition}".encode()).hexdigest()


def cache_name(*parts: object) -> str:
    """Hash the parts of a cached result's identity into a ``datasets`` fingerprint."""
    return hashlib.sha256(json.dumps([PACKING_RULE, *map(str, parts)]).encode()).hexdigest()[:32]


def load_documents(source: TextSource, cache_dir: str | None) -> list[tuple[datasets.Dataset, bool]]:
    """Load a source; returns pairs of a data set and whether its texts are whole plain text files.

    Raises:
        RecipeError: if a file cannot be read as what its name says, or the text column is missing or holds no text.
    """
    loaded: list[tuple[datasets.Dataset, bool]] = []
    if source.dataset_name is not None:
        name, config, split = source.dataset_name, source.dataset_config, source.dataset_split
        try:
            documents = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
        except (OSError, ValueError) as error:
            raise RecipeError(f"--dataset_name {name} cannot be loaded: {error}") from error
        loaded.append((documents, False))
    for kind in dict.fromkeys(map(loader_of, source.files)):
        files = [str(file) for file in source.files if loader_of(file) == kind]
        options = {"sample_by": "document"} if kind == "text" else {}
        try:
            documents = datasets.load_dataset(
                kind, data_files={"train": files}, split="train", cache_dir=cache_dir, **options
            )
        except DatasetGenerationError as error:
            shown = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else files[0]
            raise RecipeError(f"cannot read {shown} as {kind}: {error.__cause__ or error}") from error
        loaded.append((documents, kind == "text"))
    for documents, is_plain_text in loaded:
        column = "text" if is_plain_text else source.text_column
        if column not in documents.column_names:
            raise RecipeError(f"no column {column!r}; give --text_column one of {', '.join(documents.column_names)}")
        if getattr(documents.features[column], "dtype", None) not in ("string", "large_string"):
            raise RecipeError(f"column {column!r} holds {documents.features[column]}, not text")
    return loaded


def tokenize_source(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    validation_fraction: float,
    *,
    workers: int,
    cache_dir: str | None,
) -> datasets.Dataset:
    """Load and tokenize a source; columns ``input_ids`` (a document or section) and ``held_out``."""
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "held_out": datasets.Value("bool")}
    )
    tokens = []
    for documents, is_plain_text in load_documents(source, cache_dir):
        column = "text" if is_plain_text else source.text_column
        tokens.append(
            documents.map(
                tokenize,
                batched=True,
                batch_size=16 if is_plain_text else 512,
                fn_kwargs={
                    "tokenizer": tokenizer,
                    "text_column": column,
                    "in_sections": is_plain_text,
                    "validation_fraction": validation_fraction,
                },
                remove_columns=documents.column_names,
                features=features,
                num_proc=workers if workers > 1 else None,
                new_fingerprint=cache_name(
                    documents._fingerprint,
                    tokenizer_fingerprint(tokenizer),
                    column,
                    is_plain_text,
                    validation_fraction,
                ),
                desc="Tokenizing",
            )
        )
    return datasets.concatenate_datasets(tokens) if len(tokens) > 1 else tokens[0]


def pack(tokens: datasets.Dataset, block_size: int, *, held_out: bool = False) -> datasets.Dataset:
    """Cut one side of tokenized documents into blocks; column ``input_ids`` of (block_size,) int32."""
    packed = tokens.map(
        BlockPacker(block_size, held_out),
        batched=True,
        remove_columns=tokens.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=block_size)}),
        new_fingerprint=cache_name(tokens._fingerprint, block_size, held_out),
        desc="Packing",
    )
    return packed.with_format("numpy")


def packed_text(
    train: TextSource,
    validation: TextSource | None,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    validation_fraction: float,
    *,
    workers: int = 1,
    cache_dir: str | None = None,
) -> PackedText:
    """Prepare training and validation blocks.

    Args:
        train: the source of training text.
        validation: the source of validation text, or None to hold out part of the training documents.
        tokenizer: must have an end-of-text token.
        block_size: tokens in a block.
        validation_fraction: 0 (no validation) to below 1; the part of the documents held out, by a hash of each.
        workers: processes that tokenize.
        cache_dir: folder for prepared data; None is the one ``datasets`` uses.

    Raises:
        RecipeError: if a source cannot be read, or a side has less text than one block.
    """
    options: dict[str, Any] = {"workers": workers, "cache_dir": cache_dir}
    held_out_fraction = 0.0 if validation is not None else validation_fraction
    train_tokens = tokenize_source(train, tokenizer, held_out_fraction, **options)
    train_blocks = pack(train_tokens, block_size)
    if len(train_blocks) == 0:
        count = sum(map(len, train_tokens["input_ids"]))
        raise RecipeError(
            f"the training text has {count:,} tokens, less than one block: --block_size is {block_size:,}. "
            "Give more text or a smaller block"
        )
    validation_blocks = None
    if validation is not None:
        validation_blocks = pack(tokenize_source(validation, tokenizer, 0.0, **options), block_size)
        if len(validation_blocks) == 0:
            raise RecipeError(
                f"the validation text has less than one block: --block_size is {block_size:,}. Give more"
            )
    elif validation_fraction > 0:
        validation_blocks = pack(train_tokens, block_size, held_out=True)
        if len(validation_blocks) == 0:
            raise RecipeError(
                f"--validation_fraction {validation_fraction} of {len(train_tokens):,} documents holds out less than "
                f"one block of {block_size:,} tokens: raise it, give --validation_data, or 0 for no validation"
            )
    parts = [train_blocks] if validation_blocks is None else [train_blocks, validation_blocks]
    return PackedText(train_blocks, validation_blocks, cache_name(*(part._fingerprint for part in parts)))


class OrderedBlocks(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """The samples of a whole run in order: pass after pass over the blocks, each pass in its own random order.

    Sample i depends on the blocks, ``seed`` and i alone. So every optimizer sees the same batches, whatever the number
    of workers, ranks and accumulation steps, and a resumed run skips to its place without reading what came before.
    """

    def __init__(self, blocks: datasets.Dataset, seed: int, length: int) -> None:
        self.blocks = blocks
        self.seed = seed
        self.length = length
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of a run of {self.length}")
        epoch, position = divmod(index, len(self.blocks))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        return self.blocks[int(self._order[1][position])]


def collate_blocks(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack blocks into ``input_ids`` and equal ``labels``, (batch, block_size) int64; the model shifts the labels."""
    input_ids = torch.from_numpy(np.stack([np.asarray(sample["input_ids"], dtype=np.int64) for sample in samples]))
    return {"input_ids": input_ids, "labels": input_ids.clone()}
