"""The largest attention logits of a model's heads, seen while it trains.

transformers' attention classes ask ``AttentionInterface.get_interface`` for the function that attends and call it with
queries and keys as they are multiplied, after rotary embeddings. While a model is watched, that method returns the
same function behind a look at its arguments.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_matrix_optim.attention_projections import AttentionProjections

#: Bound of the logits that are in memory at once while the largest is looked for; one query row at least.
MAX_LOGITS_BYTES = 2**27
#: Where a watched attention module keeps its watch.
_WATCH = "_qk_clip_watch"
REMEDY = "leave qk_clip out"


@dataclass
class LogitWatch:
    """What is seen of one attention module.

    Attributes:
        projections: its query and key rows.
        max_logits: (heads,), the largest finite logit of each head since the last clip; -inf before the first.
    """

    projections: AttentionProjections
    max_logits: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, or a pickle of it, has None here: it is not watched, and needs no class of ours."""
        return type(None), ()


def watch(watches: Sequence[LogitWatch]) -> None:
    """Look at the logits of these modules from now on."""
    for each in watches:
        setattr(each.projections.module, _WATCH, each)
    _watch_attention()


def unwatch(watches: Sequence[LogitWatch]) -> None:
    """Undo ``watch``."""
    for each in watches:
        if getattr(each.projections.module, _WATCH, None) is each:
            delattr(each.projections.module, _WATCH)
    unwatch_attention()


def refuse_implementation(projections: AttentionProjections) -> None:
    """Raise if the function that attends is not one whose mask is known."""
    implementation = getattr(getattr(projections.module, "config", None), "_attn_implementation", None)
    if implementation in (None, "eager"):
        return
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is not sdpa_attention_forward:
        raise ValueError(
            f"qk_clip knows the masks of 'sdpa' and 'eager', and {projections.name} has {implementation!r}: "
            "use --attn_implementation sdpa (attn_implementation='sdpa' in from_pretrained or from_config), or "
            f"{REMEDY}"
        )


_original_get_interface: Callable[..., Any] | None = None
_watchers = 0


def _watch_attention() -> None:
    """Look at the arguments of attention in this process, from the first watcher on."""
    global _original_get_interface, _watchers
    _watchers += 1
    if _original_get_interface is not None:
        return
    original = _original_get_interface = AttentionInterface.get_interface

    @functools.wraps(original)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        return _looked_at(original(self, attn_implementation, default), attn_implementation)

    AttentionInterface.get_interface = get_interface


def unwatch_attention() -> None:
    """Undo one ``watch``, but for what its modules keep."""
    global _original_get_interface, _watchers
    _watchers -= 1
    if _watchers == 0 and _original_get_interface is not None:
        AttentionInterface.get_interface = _original_get_interface
        _original_get_interface = None


def _looked_at(function: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    """Return ``function`` behind a look at the queries and keys of watched modules."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        watch: LogitWatch | None = getattr(module, _WATCH, None)
        if watch is not None and module.training:
            is_sdpa = function is sdpa_attention_forward
            if not is_sdpa and implementation not in (None, "eager"):
                refuse_implementation(watch.projections)
            _look(watch, query, key, attention_mask, is_sdpa=is_sdpa, **kwargs)
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _look(
    watch: LogitWatch,
    query: Tensor,
    key: Tensor,
    mask: Any,
    *,
    is_sdpa: bool,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> None:
    """Take the logits of one call into account, with the mask that the function itself will apply."""
    projections = watch.projections
    if softcap is not None:
        raise ValueError(
            f"qk_clip cannot be used with this model: the logits of {projections.name} are capped already"
        )
    if query.shape[1] != projections.heads or key.shape[1] not in (projections.heads, projections.kv_heads):
        raise RuntimeError(
            f"qk_clip expects {projections.heads} query and {projections.kv_heads} key heads in "
            f"{projections.name}, and sees {query.shape[1]} and {key.shape[1]}: heads that are spread over ranks are "
            f"not supported; {REMEDY}"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        raise ValueError(
            f"qk_clip does not know the attention mask of {projections.name}, {type(mask).__name__}"
            f"{tuple(getattr(mask, 'shape', ()))}: it should be (batch, heads or 1, queries, keys); {REMEDY}"
        )
    if is_causal is None:
        is_causal = bool(getattr(projections.module, "is_causal", True))
    # As sdpa_attention_forward does; eager attention masks what its mask says and nothing else.
    causal = is_sdpa and mask is None and query.shape[2] > 1 and is_causal
    if watch.max_logits.device != query.device:
        watch.max_logits = watch.max_logits.to(query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    raise_to_largest_logits(
        watch.max_logits, query.detach(), key.detach(), None if mask is None else mask.detach(), scaling, causal
    )


@torch.library.custom_op("hf_matrix_optim::raise_to_largest_logits", mutates_args=("max_logits",))
def raise_to_largest_logits(
    max_logits: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, causal: bool
) -> None:
    """Raise ``max_logits`` in place to the largest logits of attention, without waiting for a device.

    An operator of torch's, so that torch.compile leaves it as it is.

    Args:
        max_logits: (heads,). A head with a logit that is not finite keeps its value.
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim), kv_heads a divisor of heads.
        mask: (batch or 1, heads or 1, queries or 1, keys), True or above half of the dtype's lowest number where
            attended; None attends to all.
        scaling: factor of the logits, above 0.
        causal: query i attends to keys 0 to i.

    float16 is multiplied in float32, others in their dtype; at most ``MAX_LOGITS_BYTES`` of logits are in memory.
    """
    with torch.autocast(query.device.type, enabled=False):
        if query.dtype == torch.float16:
            query, key = query.float(), key.float()
        found = _largest_logits(query, key.to(query.dtype), mask, causal).to(max_logits.dtype) * scaling
    max_logits.copy_(torch.where(found.isfinite(), torch.maximum(max_logits, found), max_logits))


@raise_to_largest_logits.register_fake
def _(max_logits: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> None:
    return None


def _largest_logits(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Largest product of an unmasked pair for each query head, (heads,); -inf where all is masked."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if causal:
        keys = min(keys, queries)
    if mask is not None:
        mask = mask[..., :keys]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    groups = heads // kv_heads
    row_bytes = max(1, max(batch, key.shape[0]) * heads * keys * query.element_size())
    rows = max(1, MAX_LOGITS_BYTES // row_bytes)
    if causal:  # a chunk stops at its last key, so that of four chunks 5/8 of the products are made
        rows = min(rows, max(128, -(-queries // 4)))
    largest = query.new_full((kv_heads, groups), -torch.inf)
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        last = min(keys, stop) if causal else keys
        chunk = query[:, :, start:stop].reshape(batch, kv_heads, groups * (stop - start), head_dim)
        logits = chunk @ key[:, :, :last].mT
        logits = logits.view(logits.shape[0], kv_heads, groups, stop - start, last)
        if causal:
            after = torch.ones(stop - start, max(0, last - start), dtype=torch.bool, device=query.device).triu(1)
            logits[..., start:].masked_fill_(after, -torch.inf)
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, start:stop]
            by_head = (kv_heads, groups) if mask.shape[1] == heads else (1, 1)
            part = part.reshape(part.shape[0], *by_head, *part.shape[2:])
            logits = logits.masked_fill(~part, -torch.inf)
        largest = torch.maximum(largest, logits.amax(dim=(0, 3, 4)))
    return largest.flatten()
