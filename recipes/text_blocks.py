"""Blocks of a token stream, each with as many targets as inputs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from recipe_error import RecipeError
from sample_order import SampleOrder, spread
from torch import Tensor

if TYPE_CHECKING:
    from prepared_data import TokenFile


def block_sample(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Split (block_size + 1,) tokens into inputs and the token that follows each, (block_size,) int64."""
    tokens = tokens.astype(np.int64)
    return {"input_ids": tokens[:-1], "targets": tokens[1:]}


class TextBlocks(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Blocks of ``block_size`` tokens with their targets; sample i is a function of (tokens, seed, i) alone.

    The stream is cut every ``block_size`` tokens; a block's last target is the next one's first token, so none is lost
    but what is left, less than a block, at the end.

    Args:
        tokens: the stream.
        block_size: inputs in a block, at least 1.
        seed: of the order; None for evaluation, in the order of the text.
        length: samples of a whole run (steps x sequences a step), which pass over the blocks as often as needed. For
            evaluation the number of blocks, evenly spread over the text, or None for all.
        vocab_size: words of the model; a token beyond it is an error instead of a crash on the device.

    Raises:
        RecipeError: if the text is less than one block.
    """

    def __init__(
        self,
        tokens: "TokenFile",
        block_size: int,
        *,
        seed: int | None,
        length: int | None,
        vocab_size: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.blocks = (len(tokens) - 1) // block_size
        if self.blocks < 1:
            raise RecipeError(
                f"the {tokens.name} text has {len(tokens):,} tokens, less than one block and its last target: "
                f"--block_size is {block_size:,}. Give more text, hold out "
                f"{'less' if tokens.name == 'training' else 'more'} of it, or use a smaller block"
            )
        if seed is None:
            self.order: SampleOrder | np.ndarray = spread(self.blocks, length)
        else:
            assert length is not None
            self.order = SampleOrder(self.blocks, seed, length)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(self.order[index]) * self.block_size
        tokens = self.tokens[start : start + self.block_size + 1]
        if self.vocab_size is not None and (largest := int(tokens.max())) >= self.vocab_size:
            raise RecipeError(
                f"{self.tokens} holds token {largest:,}, the model has {self.vocab_size:,} words: these tokens are of "
                "another tokenizer"
            )
        return block_sample(tokens)


def collate_text(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack blocks into input_ids, labels and shift_labels, each (batch, block_size) int64.

    ``shift_labels`` are the targets as they are, so that the model does not shift them and lose one a block;
    ``labels``, the same tensor, only tells the model and Trainer that there is a loss to compute.
    """
    input_ids, targets = (
        torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in ("input_ids", "targets")
    )
    return {"input_ids": input_ids, "labels": targets, "shift_labels": targets}
