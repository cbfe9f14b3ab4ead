"""Conversations, and prompts with their completions, as tokens of which the model is to predict a part.

A row of a table has one of two forms, those of Hugging Face's chat data sets:

- ``messages``: a list of ``{"role": ..., "content": ...}``, with ``tools`` beside it if the template takes them. The
  model learns what the assistant says.
- ``prompt`` and ``completion``: two texts, or two lists of messages. The model learns the completion.

Messages become text by the tokenizer's chat template, by ``PLAIN_TEMPLATE`` if it has none.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from data_sources import COLUMNS, DataSource, fraction_of_short, split_hash
from document_files import reading, rows_of, suffix_of
from recipe_error import RecipeError
from recipe_trainer import IGNORED
from sample_order import SampleOrder
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
TEXT_COLUMN = COLUMNS["text"]
# A line "Role: text" a turn; the end-of-text token closes what the assistant says.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)


class Span(NamedTuple):
    """A part of a row's text, and whether the model is to predict it."""

    text: str
    is_target: bool


class Example(NamedTuple):
    """Tokens of a row, (length,) int32, and which of them are to be predicted, (length,) bool."""

    tokens: np.ndarray
    is_target: np.ndarray


class Examples(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Examples in the order of a seed, or in their own; sample i is a function of (examples, seed, i) alone.

    Args:
        examples: of at least two tokens each.
        seed: of the order; None for evaluation, in the order of the file.
        length: samples of a whole run; without a seed the number of examples.
    """

    def __init__(self, examples: Sequence[Example], *, seed: int | None = None, length: int = 0) -> None:
        self.examples = examples
        self.order: Sequence[int] = range(len(examples)) if seed is None else SampleOrder(len(examples), seed, length)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, is_target = self.examples[self.order[index]]
        ids = tokens.astype(np.int64)
        return {"input_ids": ids[:-1], "targets": np.where(is_target[1:], ids[1:], IGNORED)}


def collate(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack samples, padded at their ends to the longest; a mask only where one is padded.

    Args:
        samples: ``input_ids`` and ``targets``, the token that follows each or -100, (length,) int64 each.

    Returns:
        input_ids, labels (the targets, aligned with the logits) and attention_mask, each (batch, length) int64.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    size = (len(samples), max(lengths))
    # Any token does for padding: it is masked, and no label asks for what follows it.
    batch = {name: torch.full(size, fill) for name, fill in (("input_ids", 0), ("labels", IGNORED))}
    for row, sample in enumerate(samples):
        batch["input_ids"][row, : lengths[row]] = torch.from_numpy(sample["input_ids"])
        batch["labels"][row, : lengths[row]] = torch.from_numpy(sample["targets"])
    if min(lengths) < size[1]:
        batch["attention_mask"] = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    return batch


def holds_chats(source: DataSource) -> bool:
    """Tell whether the first row of a source's first file is of one of the two forms; a plain text is not.

    Raises:
        RecipeError: if it is neither of them nor has a text.
    """
    if source.holds_tokens or suffix_of(source.files[0]) == ".txt":
        return False
    with reading(source.files[0]):
        row = next((row for _, row in rows_of(source.files[0], "")), None)
    is_chat = isinstance(row, dict) and ("messages" in row or {"prompt", "completion"} <= row.keys())
    if isinstance(row, dict) and not is_chat and TEXT_COLUMN not in row:
        raise RecipeError(
            f"{source.files[0]}: a row has messages, or prompt and completion, or {TEXT_COLUMN}; its first row has "
            f"{', '.join(map(str, row))}: rename its columns, or name that of the texts with --text_column"
        )
    return is_chat


def read_examples(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    validation_fraction: float = 0.0,
    show_progress: bool = True,
) -> tuple[list[Example], list[Example]]:
    """Read the rows of all files of a source; a row is cut to ``block_size`` + 1 tokens.

    Args:
        source: of local tables.
        tokenizer: without a chat template it is given ``PLAIN_TEMPLATE``, which is then saved with it.
        block_size: tokens that the model sees of a row, at most.
        validation_fraction: part of the rows that is held out, by a fixed hash of each, in [0, 1).
        show_progress: show a bar.

    Returns:
        The rows to train on and those held out. Rows that lose all of their targets by the cut are left out, and
        said to be.

    Raises:
        RecipeError: for a row that is of neither form, naming its place.
    """
    if tokenizer.chat_template is None:
        end_of_text(tokenizer)
        tokenizer.chat_template = ("{{ bos_token }}" if opening(tokenizer) else "") + PLAIN_TEMPLATE
    examples: list[tuple[Example, int]] = []
    left_out = 0
    rows = ((path, number, row) for path in source.files for number, row in rows_at(path))
    for path, number, row in tqdm(rows, desc="tokenizing", unit=" rows", disable=not show_progress):
        place = f"{path}, {'row' if suffix_of(path) == '.parquet' else 'line'} {number}"
        example = encode(spans_of(row, place, tokenizer), tokenizer, block_size + 1)
        if example.is_target[1:].any():
            examples.append((example, split_hash(json.dumps(row, sort_keys=True, default=str))))
        else:
            left_out += 1
    if left_out:
        print(
            f"{left_out:,} rows left out: nothing to predict in their first {block_size + 1:,} tokens (--block_size)"
        )
    fraction = fraction_of_short([place for _, place in examples], validation_fraction)
    kept: tuple[list[Example], list[Example]] = ([], [])
    for example, place in examples:
        kept[place < fraction * 2**64].append(example)
    return kept


def rows_at(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield a table's rows and their numbers."""
    with reading(path):
        yield from rows_of(path, "")


def spans_of(row: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Cut a row's text into what is given and what is to be predicted.

    Raises:
        RecipeError: if the row is of neither form, or its template does not render turn after turn.
    """
    if isinstance(row, dict) and "messages" in row:
        return spans_of_messages(checked_messages(row["messages"], place), 0, row.get("tools"), place, tokenizer)
    if not (isinstance(row, dict) and {"prompt", "completion"} <= row.keys()):
        names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise RecipeError(
            f"{place}: a row has messages, or prompt and completion, as the first row has; this: {names}"
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Span(opening(tokenizer) + prompt, False), Span(completion + end_of_text(tokenizer), True)]
    prompt, completion = checked_messages(prompt, place), checked_messages(completion, place)
    return spans_of_messages([*prompt, *completion], len(prompt), row.get("tools"), place, tokenizer)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end-of-text token.

    Raises:
        RecipeError: if there is none.
    """
    if tokenizer.eos_token is None:
        raise RecipeError(
            "the tokenizer of --model has no eos token, which closes what the model learns to say: set one and save "
            "it, or give the tokenizer a chat template and the rows as messages"
        )
    return str(tokenizer.eos_token)


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the beginning-of-text token where the tokenizer puts one before a text, else nothing."""
    return str(tokenizer.bos_token) if getattr(tokenizer, "add_bos_token", False) else ""


def checked_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    """Return ``messages`` if they are a list of roles with text.

    Raises:
        RecipeError: naming the message that is not.
    """
    if not isinstance(messages, list) or not messages:
        raise RecipeError(f"{place}: messages are a list of objects with role and content, not {messages!r:.60}")
    for number, message in enumerate(messages, start=1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise RecipeError(f"{place}, message {number} has no role: {message!r:.60}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise RecipeError(f"{place}, message {number}: content is {message.get('content')!r:.40}, not text")
    return messages


def spans_of_messages(
    messages: list[dict[str, Any]], first: int, tools: Any, place: str, tokenizer: PreTrainedTokenizerBase
) -> list[Span]:
    """Render messages and find what the assistant says from message ``first`` on, with what closes it.

    A turn's text is what the template adds to the conversation before it, opened for the assistant.
    """

    def render(count: int, *, opened: bool = False) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages[:count],
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=opened,
                )
            )
        except Exception as error:  # jinja2's own, and whatever a template raises
            raise RecipeError(f"{place}: the chat template refuses these messages: {error}") from error

    whole, spans, end = render(len(messages)), [], 0
    for index in range(first, len(messages)):
        if messages[index]["role"] != ASSISTANT:
            continue
        before, after = render(index, opened=True), render(index + 1)
        if not (after.startswith(before) and whole.startswith(after) and end <= len(before) < len(after)):
            raise RecipeError(
                f"{place}, message {index + 1}: the chat template renders this turn in another way once others "
                "follow, or without the assistant's opening. Give the turns before it as prompt and the turn as "
                "completion, both lists of messages, in a row of its own"
            )
        spans += [Span(whole[end : len(before)], False), Span(whole[len(before) : len(after)], True)]
        end = len(after)
    if not spans:
        raise RecipeError(f"{place}: no message of the role {ASSISTANT!r} to learn from")
    return spans  # what follows the last of them is never asked for


def encode(spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase, length: int) -> Example:
    """Tokenize each span by itself, as a prompt and an answer are in use, and cut the row to ``length`` tokens.

    Special tokens are those that the text names.
    """
    parts = [tokenizer(span.text, add_special_tokens=False)["input_ids"] for span in spans]
    flags = [np.full(len(part), span.is_target) for part, span in zip(parts, spans, strict=True)]
    return Example(np.concatenate([*parts, []]).astype(np.int32)[:length], np.concatenate(flags)[:length])


def examples_fingerprint(*sides: Sequence[Example]) -> str:
    """Hash the tokens and targets of all examples."""
    digest = hashlib.sha256()
    for side in sides:
        digest.update(str(len(side)).encode())
        for example in side:
            digest.update(example.tokens.tobytes() + b"|" + example.is_target.tobytes())
    return digest.hexdigest()
