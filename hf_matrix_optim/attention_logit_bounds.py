"""How large an attention logit could be: bounds by the query and key weights of each head and the norm before them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_matrix_optim.attention_projections import (
    AttentionProjections,
    HeadRows,
    UnknownAttentionError,
    attention_modules,
    projections_of,
)
from hf_matrix_optim.fused_layouts import transformers_class_names
from hf_matrix_optim.spectral_norm import spectral_norm_bound

# Where the forward of a class takes its input from: the attribute of the layer around it that is the norm.
_NORM_OF_THE_LAYER = {
    "LlamaAttention": "input_layernorm",
    "MistralAttention": "input_layernorm",
    "MixtralAttention": "input_layernorm",
    "Qwen2Attention": "input_layernorm",
    "Qwen2MoeAttention": "input_layernorm",
    "Qwen3Attention": "input_layernorm",
    "Qwen3MoeAttention": "input_layernorm",
    "GPT2Attention": "ln_1",
    "EsmSelfAttention": "LayerNorm",
}
# Classes that read the LayerNorm of the layer before (post-norm).
_POST_NORM = {"BertSelfAttention", "RobertaSelfAttention"}
# Norms that return weight * x / RMS(x).
_RMS_NORMS = {
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "MixtralRMSNorm",
    "Qwen2RMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen3RMSNorm",
    "Qwen3MoeRMSNorm",
}

Whole = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitBound:
    """What bounds the attention logits of one module.

    Attributes:
        projections: its queries and keys.
        scaling: factor of the logits, that of rotary embeddings included.
        input_norm: the norm whose output both projections read.
        query_norm, key_norm: norms over ``head_dim`` of each head (QK-norm); None if there are none.
    """

    projections: AttentionProjections
    scaling: float
    input_norm: nn.Module
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None

    def of_heads(self, whole: Whole = lambda tensor: tensor) -> Tensor:
        """Largest absolute attention logit that any input could give, for each query head.

        ``scaling max|q| max|k|``. The input is g * x + b with ||x|| <= sqrt(d) (g, b: weight and bias of the norm), so
        ``max|q| = sqrt(d) sigma(W_q diag(g)) + ||W_q b + bias||``, with the mean taken out of the rows where a
        LayerNorm takes it out of x; sigma by ``spectral_norm_bound``. Rotary embeddings turn queries and keys and
        keep their lengths. With QK-norm ``max|q| = sqrt(head_dim) max|g_q|``. Masks, additive position terms and
        dropout are not in it.

        Args:
            whole: gathers a sharded tensor.

        Returns:
            (heads,) in float32 or wider.
        """
        return _bounds_of_heads([self], whole)[0]


@torch.no_grad()
def largest_logits(bounds: list[LogitBound], whole: Whole = lambda tensor: tensor, *, max_bytes: int) -> Tensor:
    """The largest of ``LogitBound.of_heads`` of each module; those of one form are computed together.

    Args:
        bounds: at least one.
        whole: gathers a sharded tensor; called in an order that follows from ``bounds`` alone.
        max_bytes: of the query rows, or key rows, that are stacked at a time, in bytes; a stack has those of one
            module at least, and some three copies.

    Returns:
        (len(bounds),) in float32 or wider, on the device of the first module.
    """
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, bound in enumerate(bounds):
        alike[_form_of(bound)].append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        query = bounds[members[0]].projections.query  # keys have at most as many rows
        weight = _weight_of(query.owner)
        elements = query.rows.numel() * weight.size(1 - query.output_axis)
        count = max(1, max_bytes // (elements * _wide_dtype(weight).itemsize))
        for start in range(0, len(members), count):
            some = members[start : start + count]
            largest = _bounds_of_heads([bounds[i] for i in some], whole).amax(-1)
            found.update(zip(some, largest.unbind(), strict=True))
    return torch.stack([found[i].to(found[0].device) for i in range(len(bounds))])


def find_logit_bounds(model: nn.Module) -> tuple[list[LogitBound], dict[str, str]]:
    """Find what bounds the logits of every attention module of a model.

    Args:
        model: any module; its parameters are not read.

    Returns:
        What is known, in the order of ``named_modules``, and for each class of attention that is left out, why.
    """
    modules = dict(model.named_modules())
    rope = max([1.0, *(float(getattr(module, "attention_scaling", 1.0)) for module in modules.values())])
    norm_before: dict[str, nn.Module | None] = {}  # of post-norm layers
    latest: nn.Module | None = None
    for name, module in modules.items():
        if type(module).__name__.endswith(("Embeddings", "Output")):
            latest = getattr(module, "LayerNorm", None)
        norm_before[name] = latest
    found: list[LogitBound] = []
    left_out: dict[str, str] = {}
    for name, module in attention_modules(model):
        try:
            projections = projections_of(name, module)
            layer = modules.get(name.rpartition(".")[0], model)
            found.append(_bound_of(projections, layer, norm_before[name], rope))
        except UnknownAttentionError as reason:
            left_out.setdefault(type(module).__name__, str(reason))
    return found, left_out


def _bound_of(
    projections: AttentionProjections, layer: nn.Module, norm_before: nn.Module | None, rope: float
) -> LogitBound:
    module = projections.module
    class_name = next(iter(transformers_class_names(module)), "")
    for part in (projections.query, projections.key):
        if type(part.owner) is not nn.Linear and type(part.owner).__name__ != "Conv1D":
            raise UnknownAttentionError(f"{part.name} is a {type(part.owner).__name__}, not a linear layer alone")
    if class_name in _NORM_OF_THE_LAYER:
        input_norm = getattr(layer, _NORM_OF_THE_LAYER[class_name], None)
    elif class_name in _POST_NORM and not projections.name.endswith("crossattention.self"):
        input_norm = norm_before
    else:
        raise UnknownAttentionError(
            f"the norm before {projections.name} ({class_name or type(module).__name__}) is not in the table of "
            "attention_logit_bounds"
        )
    if input_norm is None or not _is_known(input_norm):
        raise UnknownAttentionError(f"the norm before {projections.name} is not known ({type(input_norm).__name__})")
    norms = [getattr(module, attribute, None) for attribute in ("q_norm", "k_norm")]
    for norm in norms:
        if norm is not None and (not _is_rms_norm(norm) or _weight_of(norm).numel() != projections.head_dim):
            raise UnknownAttentionError(f"{projections.name} has an unknown norm of queries and keys: {norm}")
    scaling = projections.scaling * (rope**2 if hasattr(module, "q_proj") else 1)
    return LogitBound(projections, scaling, input_norm, *norms)


def _form_of(bound: LogitBound) -> tuple[Any, ...]:
    """Equal for modules whose tensors can be stacked and are treated the same."""
    parts = (bound.projections.query, bound.projections.key)
    norms = (bound.input_norm, bound.query_norm, bound.key_norm)
    tensors = [getattr(m, name, None) for m in (*(p.owner for p in parts), *norms) for name in ("weight", "bias")]
    return (
        bound.scaling,
        isinstance(bound.input_norm, nn.LayerNorm),
        *((part.rows.shape, part.span, part.output_axis) for part in parts),
        *((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else None for t in tensors),
    )


@torch.no_grad()
def _bounds_of_heads(bounds: list[LogitBound], whole: Whole) -> Tensor:
    """``LogitBound.of_heads`` of modules of one form, (modules, heads)."""
    inputs = [bound.input_norm for bound in bounds]
    query = _largest_norms([b.projections.query for b in bounds], inputs, [b.query_norm for b in bounds], whole)
    key = _largest_norms([b.projections.key for b in bounds], inputs, [b.key_norm for b in bounds], whole)
    bound: Tensor = query * bounds[0].scaling * key.repeat_interleave(query.size(1) // key.size(1), dim=1)
    return bound


def _largest_norms(
    parts: list[HeadRows], input_norms: list[nn.Module], head_norms: Sequence[nn.Module | None], whole: Whole
) -> Tensor:
    """Largest length of a query or key of modules of one form, (modules, heads)."""
    first = parts[0]
    heads, head_dim = first.rows.shape
    if head_norms[0] is not None:
        gains = _stacked([_weight_of(norm) for norm in head_norms if norm is not None], whole)
        length: Tensor = head_dim**0.5 * gains.abs().amax(-1, keepdim=True)
        return length.expand(-1, heads)
    weights = _stacked([_weight_of(part.owner) for part in parts], whole, first, first.output_axis)
    rows = weights.mT if first.output_axis else weights  # (modules, heads * head_dim, fan_in)
    offsets = []  # (modules, heads * head_dim) each
    if first.owner.bias is not None:
        offsets.append(_stacked([part.owner.bias for part in parts], whole, first))
    if getattr(input_norms[0], "bias", None) is not None:
        offsets.append((rows @ _stacked([norm.bias for norm in input_norms], whole).unsqueeze(-1)).squeeze(-1))
    if getattr(input_norms[0], "weight", None) is not None:
        rows.mul_(_stacked([norm.weight for norm in input_norms], whole).unsqueeze(1))
    if isinstance(input_norms[0], nn.LayerNorm):
        rows.sub_(rows.mean(-1, keepdim=True))
    fan_in = rows.size(-1)
    stack = rows.reshape(-1, head_dim, fan_in)
    del weights, rows  # a copy was made of transposed ones
    largest: Tensor = spectral_norm_bound(stack).view(len(parts), heads) * fan_in**0.5
    if offsets:
        offset = torch.stack(offsets).sum(0).view(len(parts), heads, head_dim)
        largest = largest + torch.linalg.vector_norm(offset, dim=-1)
    return largest


def _stacked(tensors: Sequence[Any], whole: Whole, rows: HeadRows | None = None, axis: int = 0) -> Tensor:
    """A new stack of tensors of one shape, or of their rows along ``axis``, (tensors, ...), in float32 or wider."""
    pieces = []
    for tensor in tensors:
        gathered = whole(tensor)
        piece = gathered if rows is None else rows.cut(gathered, axis)
        pieces.append(piece.clone() if gathered is not tensor else piece)  # lets go of the rest of what was gathered
    stack = torch.stack(pieces)
    return stack.to(_wide_dtype(stack))


def _weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _is_rms_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.RMSNorm) or next(iter(transformers_class_names(norm)), "") in _RMS_NORMS


def _is_known(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) or _is_rms_norm(norm)
