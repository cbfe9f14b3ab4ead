"""Which parameters make the queries and keys of an attention module, head by head: read off the models' forwards."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_matrix_optim.fused_layouts import transformers_class_names
from hf_matrix_optim.spectral_norm import spectral_norm_bound

#: Classes with ``q_proj``, ``k_proj``, perhaps ``q_norm``, ``k_norm``, below a layer with ``input_layernorm``.
_LLAMA_LIKE = {
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Qwen2Attention",
    "Qwen2MoeAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
}
#: Classes with ``query`` and ``key`` that read the LayerNorm of the layer before (post-norm).
_BERT_LIKE = {"BertSelfAttention", "RobertaSelfAttention"}
#: Norms that return weight * x / RMS(x).
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
class Projection:
    """The rows of one weight that make the queries, or the keys, of all heads.

    Attributes:
        weight: (fan_out, fan_in), or (fan_in, fan_out) with ``output_axis`` 1.
        bias: (fan_out,) or None.
        start: first row.
        heads: heads of ``head_dim`` rows each, one after the other.
        head_dim: rows of a head.
        output_axis: axis of the rows.
    """

    weight: Tensor
    bias: Tensor | None
    start: int
    heads: int
    head_dim: int
    output_axis: int = 0

    def rows(self, whole: Whole = lambda tensor: tensor) -> tuple[Tensor, Tensor | None]:
        """The weight as (heads, head_dim, fan_in) and the bias as (heads, head_dim), in float32 or wider.

        Args:
            whole: gathers a sharded tensor.
        """
        weight = whole(self.weight.detach())
        weight = (weight.mT if self.output_axis else weight).narrow(0, self.start, self.heads * self.head_dim)
        weight = weight.reshape(self.heads, self.head_dim, -1)
        bias = None if self.bias is None else whole(self.bias.detach())
        if bias is not None:
            bias = _wide(bias.narrow(0, self.start, self.heads * self.head_dim)).view(self.heads, self.head_dim)
        return _wide(weight), bias


@dataclass(frozen=True)
class AttentionProjections:
    """Where the attention logits of one module come from.

    Attributes:
        name: of the module in its model.
        module: the attention module.
        query, key: their projections; ``query.heads`` is a multiple of ``key.heads``.
        scaling: factor of the logits, queries and rotary embeddings included.
        input_norm: the norm whose output both projections read.
        query_norm, key_norm: norms over ``head_dim`` of each head (QK-norm); None if there are none.
    """

    name: str
    module: nn.Module
    query: Projection
    key: Projection
    scaling: float
    input_norm: nn.Module
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None

    def logit_bound(self, whole: Whole = lambda tensor: tensor) -> Tensor:
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
        query = _largest_norm(self.query, self.input_norm, self.query_norm, whole)
        key = _largest_norm(self.key, self.input_norm, self.key_norm, whole)
        bound: Tensor = query * self.scaling * key.repeat_interleave(self.query.heads // self.key.heads)
        return bound


def _largest_norm(projection: Projection, input_norm: nn.Module, head_norm: nn.Module | None, whole: Whole) -> Tensor:
    """Largest length of a query or key, (heads,)."""
    if head_norm is not None:
        length: Tensor = projection.head_dim**0.5 * _wide(whole(_weight_of(head_norm))).abs().max()
        return length.expand(projection.heads)
    weight, bias = projection.rows(whole)
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


def _weight_of(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def find_attention_projections(model: nn.Module) -> tuple[list[AttentionProjections], dict[str, str]]:
    """Find the queries and keys of every attention module of a model.

    Args:
        model: any module; its parameters are not read.

    Returns:
        The modules that are known, in the order of ``named_modules``, and for each class of attention modules that are
        left out, why.
    """
    modules = dict(model.named_modules())
    rope = max([1.0, *(float(getattr(module, "attention_scaling", 1.0)) for module in modules.values())])
    found: list[AttentionProjections] = []
    left_out: dict[str, str] = {}
    previous_norm: nn.Module | None = None  # of post-norm layers
    for name, module in modules.items():
        class_names = transformers_class_names(module)
        class_name = class_names[0] if class_names else type(module).__name__
        parent = modules.get(name.rpartition(".")[0], model)
        if class_name.endswith(("Embeddings", "Output")):
            previous_norm = getattr(module, "LayerNorm", None)
        if "Attention" not in class_name or not _has_projections(module):
            continue
        try:
            found.append(_projections_of(name, module, class_name, parent, previous_norm, rope))
        except _UnknownError as reason:
            left_out.setdefault(class_name, str(reason))
    return found, left_out


class _UnknownError(Exception):
    """Why the queries and keys of a module are not known."""


def _has_projections(module: nn.Module) -> bool:
    """Whether a module owns the layers that make queries, itself and not by an inner attention module."""
    inner = [child for child in module.children() if "Attention" in type(child).__name__]
    return not inner and sum(isinstance(getattr(child, "weight", None), Tensor) for child in module.children()) > 0


def _projections_of(
    name: str,
    module: nn.Module,
    class_name: str,
    parent: nn.Module,
    previous_norm: nn.Module | None,
    rope: float,
) -> AttentionProjections:
    scaling = float(getattr(module, "scaling", 0.0))
    if class_name in _LLAMA_LIKE:
        head_dim = _integer(module, "head_dim")
        query, key = (_linear(module, attribute, head_dim) for attribute in ("q_proj", "k_proj"))
        norms = [getattr(module, attribute, None) for attribute in ("q_norm", "k_norm")]
        for norm in norms:
            if norm is not None and (_norm_kind(norm) != "rms" or _weight_of(norm).numel() != head_dim):
                raise _UnknownError(f"its {type(norm).__name__} of queries and keys is not known")
        input_norm = _known_norm(getattr(parent, "input_layernorm", None))
        return AttentionProjections(name, module, query, key, scaling * rope**2, input_norm, *norms)
    if class_name == "GPT2Attention":
        if module.is_cross_attention:
            raise _UnknownError("it is cross-attention, whose keys come from another model")
        projection = module.c_attn
        weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
        if type(projection).__name__ != "Conv1D" or not isinstance(weight, Tensor):
            raise _UnknownError(f"its c_attn is a {type(projection).__name__}")
        heads, head_dim, size = (_integer(module, part) for part in ("num_heads", "head_dim", "split_size"))
        query, key = (Projection(weight, bias, start, heads, head_dim, output_axis=1) for start in (0, size))
        input_norm = _known_norm(getattr(parent, "ln_1", None))
        return AttentionProjections(name, module, query, key, scaling, input_norm)
    if class_name == "EsmSelfAttention" or class_name in _BERT_LIKE:
        if name.endswith("crossattention.self"):
            raise _UnknownError("it is cross-attention, whose keys come from another model")
        head_dim = _integer(module, "attention_head_size")
        query, key = (_linear(module, attribute, head_dim) for attribute in ("query", "key"))
        if class_name == "EsmSelfAttention":  # it scales the queries before the rotary embeddings
            scaling = scaling * head_dim**-0.5
            previous_norm = getattr(parent, "LayerNorm", None)
        return AttentionProjections(name, module, query, key, scaling, _known_norm(previous_norm))
    raise _UnknownError("its class is not in the table of attention_projections")


def _integer(module: nn.Module, attribute: str) -> int:
    return int(getattr(module, attribute))


def _linear(module: nn.Module, attribute: str, head_dim: int) -> Projection:
    layer = getattr(module, attribute, None)
    if type(layer) is not nn.Linear:
        raise _UnknownError(f"its {attribute} is a {type(layer).__name__}, not a linear layer alone")
    return Projection(layer.weight, layer.bias, 0, layer.out_features // head_dim, head_dim)


def _norm_kind(norm: nn.Module | None) -> str:
    """ "layer", "rms", or "" for a norm that is not known."""
    if isinstance(norm, nn.LayerNorm):
        return "layer"
    names = [] if norm is None else transformers_class_names(norm)
    return "rms" if isinstance(norm, nn.RMSNorm) or (names and names[0] in _RMS_NORMS) else ""


def _known_norm(norm: nn.Module | None) -> nn.Module:
    if norm is None or not _norm_kind(norm):
        raise _UnknownError(f"the norm before it is not known ({type(norm).__name__})")
    return norm
