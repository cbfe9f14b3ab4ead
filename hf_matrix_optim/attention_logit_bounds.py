"""How large an attention logit could be: bounds by the query and key weights of each head and the norm before them."""

from collections.abc import Callable
from dataclasses import dataclass

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
        query = _largest_norm(self.projections.query, self.input_norm, self.query_norm, whole)
        key = _largest_norm(self.projections.key, self.input_norm, self.key_norm, whole)
        bound: Tensor = query * self.scaling * key.repeat_interleave(len(query) // len(key))
        return bound


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


def _largest_norm(part: HeadRows, input_norm: nn.Module, head_norm: nn.Module | None, whole: Whole) -> Tensor:
    """Largest length of a query or key, (heads,)."""
    heads, head_dim = part.rows.shape
    if head_norm is not None:
        length: Tensor = head_dim**0.5 * _wide(whole(_weight_of(head_norm))).abs().max()
        return length.expand(heads)
    weight, bias = _rows_of(part, whole)
    gain: Tensor | None = getattr(input_norm, "weight", None)
    shift: Tensor | None = getattr(input_norm, "bias", None)
    offset = torch.zeros_like(weight[..., 0]) if bias is None else bias
    if shift is not None:
        offset = offset + weight @ _wide(whole(shift.detach()))
    if gain is not None:
        weight = weight * _wide(whole(gain.detach()))
    if isinstance(input_norm, nn.LayerNorm):
        weight = weight - weight.mean(-1, keepdim=True)
    largest: Tensor = spectral_norm_bound(weight) * weight.size(-1) ** 0.5
    largest = largest + torch.linalg.vector_norm(offset, dim=-1)
    return largest


def _rows_of(part: HeadRows, whole: Whole) -> tuple[Tensor, Tensor | None]:
    """The weight as (heads, head_dim, fan_in) and the bias as (heads, head_dim), in float32 or wider."""
    weight = whole(_weight_of(part.owner))
    rows = part.rows.to(weight.device, non_blocking=True)  # few; waiting for a GPU would show in the step
    bias = part.owner.bias
    of_bias = _wide(whole(bias.detach())[rows]) if isinstance(bias, Tensor) else None
    return _wide((weight.mT if part.output_axis else weight)[rows]), of_bias


def _weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_rms_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.RMSNorm) or next(iter(transformers_class_names(norm)), "") in _RMS_NORMS


def _is_known(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) or _is_rms_norm(norm)
