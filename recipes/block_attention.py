"""Attention for batches of one known form, without a look at the data: ``full_block`` and ``padded_block``.

transformers' "sdpa" asks the GPU whether a mask is needed, which waits for it once a forward; where it cannot ask,
while torch.compile traces, it builds an explicit mask, and scaled_dot_product_attention then leaves its flash kernel.
Batches of pretraining have a form that is known beforehand, so their attention is registered under names of its own:

- ``full_block``: every position of every row holds a token. It has no mask function, so that transformers neither asks
  nor builds a mask; a causal model stays causal by the kernel's own flag.
- ``padded_block``: rows end in padding, and the mask that says so is always built.

The names select an implementation for a run. They are not saved: ``config.json`` of a trained model does not have
them.
"""

import functools
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FULL_BLOCK = "full_block"
PADDED_BLOCK = "padded_block"


def padding_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Build the boolean mask of transformers' "sdpa", (batch, 1, queries, keys), whether or not it is needed."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(*args, **kwargs)
    return mask


def register_block_attention() -> None:
    """Make both names known to transformers; it may be called again."""
    AttentionInterface.register(FULL_BLOCK, sdpa_attention_forward)
    AttentionInterface.register(PADDED_BLOCK, sdpa_attention_forward)
    AttentionMaskInterface.register(PADDED_BLOCK, padding_mask)


def refuse_padding(model: PreTrainedModel) -> None:
    """Make a model with ``full_block`` raise ValueError for an ``attention_mask``, which would have no effect."""
    forward = model.forward

    @functools.wraps(forward)
    def without_padding(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attention_mask") is not None and model.config._attn_implementation == FULL_BLOCK:
            raise ValueError(f"attention {FULL_BLOCK!r} is for blocks without padding: give no attention_mask")
        return forward(*args, **kwargs)

    model.forward = without_padding
