"""Documents to tokens, each marked with the side of the split it is on."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from data_sources import Piece, is_held_out
from masked_proteins import encode_residues
from recipe_error import RecipeError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

BATCH_CHARACTERS = 2**20  # tokenized at once
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model")  # with none of these transformers makes an empty one


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can close documents, from a folder or by its name on the Hub.

    Raises:
        RecipeError: if it cannot be loaded or has no end-of-text token.
    """
    # a name on the Hub has one slash, inside
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise RecipeError(f"--tokenizer {name}: no such folder; give the folder of a tokenizer or its name on the Hub")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--tokenizer {name} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"--tokenizer {name} has no eos token, which closes each document")
    return tokenizer


def saved_tokenizer(name: str, flag: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model, by the class it was saved as.

    ``AutoTokenizer`` goes by the model's type instead: beside a Qwen2 configuration it reads a custom tokenizer with
    Qwen's pre-tokenizer, and the ids are not those of pretraining.

    Raises:
        RecipeError: if there is none, or it cannot be loaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise RecipeError(f"{flag} {name} holds no tokenizer; save one beside it (tokenizer.save_pretrained)")
    try:
        saved_class = getattr(transformers, str(get_tokenizer_config(name).get("tokenizer_class")), AutoTokenizer)
        tokenizer: PreTrainedTokenizerBase = saved_class.from_pretrained(name)
    except Exception as error:  # tokenizers raises plain Exception
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{flag} {name}: its tokenizer cannot be loaded ({reason}); save one beside it") from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids of a text: the fast tokenizer's whole definition, else the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {definition}".encode()).hexdigest()


def words_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id that a tokenizer gives."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


class EncodedDocument(NamedTuple):
    """A document or section as tokens, and the side of the split it is on."""

    tokens: np.ndarray
    held_out: bool


def split_pieces(pieces: Iterable[Piece], validation_fraction: float) -> Iterator[tuple[Piece, bool, bool]]:
    """Yield each piece, whether it is held out, and whether the end-of-text token closes it.

    It closes the last section of a document, and a section whose successor is on the other side.
    """
    waiting: tuple[Piece, bool] | None = None
    for piece in pieces:
        held_out = is_held_out(piece.text, validation_fraction)
        if waiting is not None:
            yield *waiting, waiting[0].ends_document or waiting[1] != held_out
        waiting = piece, held_out
    if waiting is not None:
        yield *waiting, True


def batches(pieces: Iterable[tuple[Piece, bool, bool]]) -> Iterator[list[tuple[str, bool, bool]]]:
    """Gather pieces of text to about ``BATCH_CHARACTERS``; pieces of only white space are left out if whole."""
    batch: list[tuple[str, bool, bool]] = []
    characters = 0
    for piece, held_out, closed in pieces:
        if piece.ends_document and not piece.text.strip():
            continue
        batch.append((piece.text, held_out, closed))
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer: PreTrainedTokenizerBase, batch: Sequence[tuple[str, bool, bool]]) -> list[EncodedDocument]:
    """Tokenize a batch and close its documents."""
    texts = [text for text, _, _ in batch]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [
        EncodedDocument(np.array(ids + end if closed else ids, dtype=np.uint32), held_out)
        for ids, (_, held_out, closed) in zip(encoded, batch, strict=True)
    ]


_worker_tokenizer: PreTrainedTokenizerBase | None = None


def start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the tokenizer in a process that tokenizes."""
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def encode_in_worker(batch: Sequence[tuple[str, bool, bool]]) -> list[EncodedDocument]:
    """Tokenize a batch in a process of its own."""
    assert _worker_tokenizer is not None
    return encode_batch(_worker_tokenizer, batch)


def encode_text(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, validation_fraction: float, workers: int = 1
) -> Iterator[EncodedDocument]:
    """Tokenize documents in their order, with ``workers`` processes if more than one."""
    parts = batches(split_pieces(pieces, validation_fraction))
    if workers <= 1:
        for part in parts:
            yield from encode_batch(tokenizer, part)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (tokenizer,)) as pool:
        waiting: deque[Future[list[EncodedDocument]]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(encode_in_worker, part))
                if len(waiting) > 2 * workers:  # so that reading does not run away from tokenizing
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def encode_proteins(pieces: Iterable[Piece], validation_fraction: float) -> Iterator[EncodedDocument]:
    """Turn sequences into residues; empty ones are left out."""
    for piece in pieces:
        if len(residues := encode_residues(piece.text, piece.place)):
            yield EncodedDocument(residues, is_held_out(piece.text, validation_fraction))
