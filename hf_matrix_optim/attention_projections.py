"""Where the query and key projections of an attention module are, head by head: tables read off the models' forwards.

A class is in a table if its forward makes queries and keys that are linear in these rows (rotary embeddings and
scaling included) and hands them to transformers' attention interface. What a configuration can put between the two is
in ``AttentionProjections.qk_norm`` and ``logit_bound``.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from hf_matrix_optim.fused_layouts import qkv_sizes, transformers_class_names

# Classes with one projection for queries and one for keys: class -> their attributes.
_SEPARATE: dict[str, tuple[str, str]] = {
    name: attributes
    for attributes, names in (
        (
            ("q_proj", "k_proj"),
            # decoders
            "ArceeAttention BambaAttention BioGptAttention Cohere2Attention CohereAttention CsmAttention "
            "Ernie4_5Attention Ernie4_5_MoeAttention EuroBertAttention FalconH1Attention Gemma2Attention "
            "GemmaAttention Glm4Attention GlmAttention GptOssAttention GraniteAttention GraniteMoeAttention "
            "GraniteMoeHybridAttention GraniteMoeSharedAttention HeliumAttention JambaAttention LlamaAttention "
            "Ministral3Attention MinistralAttention MistralAttention MixtralAttention MllamaTextSelfAttention "
            "ModernBertDecoderAttention NemotronAttention OPTAttention OlmoAttention PhiAttention PhimoeAttention "
            "Qwen2Attention Qwen2MoeAttention Qwen2VLAttention Qwen2_5_VLAttention SeedOssAttention "
            "SmolLM3Attention StableLmAttention Starcoder2Attention "
            # decoders with QK-norm
            "Dots1Attention Exaone4Attention FlexOlmoAttention Gemma3Attention Glm4MoeAttention Olmo2Attention "
            "Olmo3Attention OlmoeAttention Qwen3Attention Qwen3MoeAttention Qwen3VLMoeTextAttention "
            "Qwen3VLTextAttention "
            # encoder-decoders, speech, vision
            "BartAttention BlenderbotAttention BlenderbotSmallAttention M2M100Attention MBartAttention "
            "MarianAttention PLBartAttention PegasusAttention WhisperAttention HubertAttention Wav2Vec2Attention "
            "CLIPAttention DeiTAttention Dinov2Attention SiglipAttention Siglip2Attention ViTAttention "
            "ViTMAEAttention",
        ),
        (
            ("query", "key"),
            "AlbertAttention BertCrossAttention BertSelfAttention CamembertCrossAttention CamembertSelfAttention "
            "Data2VecTextSelfAttention DeiTSelfAttention Dinov2SelfAttention ElectraCrossAttention "
            "ElectraSelfAttention ErnieSelfAttention EsmSelfAttention LayoutLMSelfAttention "
            "RobertaCrossAttention RobertaPreLayerNormSelfAttention RobertaSelfAttention ViTSelfAttention "
            "ViTMAESelfAttention XLMRobertaCrossAttention XLMRobertaSelfAttention XLMRobertaXLSelfAttention",
        ),
        (("q_lin", "k_lin"), "DistilBertSelfAttention"),
    )
    for name in names.split()
}
# Classes with one projection for queries, keys and values, whose parts ``fused_layouts`` knows: class -> attribute.
_FUSED = {
    "GPT2Attention": "c_attn",
    "DecisionTransformerGPT2Attention": "c_attn",
    "Phi3Attention": "qkv_proj",
    "ModernBertAttention": "Wqkv",
    "Qwen2_5_VLVisionAttention": "qkv",
    "VisionAttention": "qkv",
}
# (heads, 3, head_dim) along fan_out.
_INTERLEAVED = {"GPTNeoXAttention": "query_key_value"}
# The query is scaled by head_dim ** -0.5 in the forward, and the attribute ``scaling`` is 1 for the kernel.
_SCALES_THE_QUERY_ITSELF = {"EsmSelfAttention"}

_QK_NORM = re.compile(r"(q|k|qk|query|key)_?(norm|layernorm|layer_norm|ln)")
_ATTENTION_NAME = re.compile(r"Attention|Attn")
_PAIRS = (*sorted(set(_SEPARATE.values())), ("to_q", "to_k"), ("q_lin", "k_lin"), ("q", "k"))


@dataclass(frozen=True)
class HeadRows:
    """The rows of a weight that make the queries, or the keys, of each head.

    Attributes:
        name: of the projection, in the model.
        owner: ``nn.Linear``, or HF ``Conv1D``; of others only its class is known. Parameters are read through it, for
            FSDP2 replaces them.
        rows: (heads, head_dim), rows along fan_out of the weight, and elements of the bias.
        output_axis: of the weight's axes, the one that is fan_out: 0; of ``Conv1D``, which is (fan_in, fan_out), 1.
    """

    name: str
    owner: nn.Module
    rows: Tensor
    output_axis: Literal[0, 1]

    @cached_property
    def span(self) -> range:
        """From the first to the last of ``rows``, which ascend; they are all of it unless other rows lie between."""
        return range(int(self.rows[0, 0]), int(self.rows[-1, -1]) + 1)

    def cut(self, tensor: Tensor, axis: int) -> Tensor:
        """The rows, in order, of the whole weight or bias with fan_out along ``axis``; a view if they lie together."""
        if len(self.span) == self.rows.numel():
            return tensor.narrow(axis, self.span.start, len(self.span))
        rows = self.rows.flatten().to(
            tensor.device, non_blocking=True
        )  # few; waiting for a GPU would show in the step
        return tensor.index_select(axis, rows)


@dataclass(frozen=True)
class AttentionProjections:
    """The query and key projections of one attention module.

    Attributes:
        name: of the module, in the model.
        module: what transformers' attention interface gets as ``module``.
        query: rows of each query head.
        key: rows of each key head; fewer heads with grouped queries.
        head_dim: length of a query.
        scaling: factor from the product of a projected query and key to a logit, rotary embeddings apart.
        qk_norm: attribute of a norm between projection and product; None if there is none.
        logit_bound: what else bounds queries, keys or logits in the forward; None if nothing does.
    """

    name: str
    module: nn.Module
    query: HeadRows
    key: HeadRows
    head_dim: int
    scaling: float
    qk_norm: str | None
    logit_bound: str | None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.query.rows)

    @property
    def kv_heads(self) -> int:
        """Number of key heads; query head h looks at key head ``h // (heads // kv_heads)``."""
        return len(self.key.rows)


class UnknownAttentionError(ValueError):
    """An attention module whose query and key rows are not known; the message names it and says why."""


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of everything with queries and keys in a model: what is known, and what looks like it.

    A module of an unknown class counts if its class is named after attention, or it has a pair of children named as
    query and key projections, and nothing inside it counts.
    """
    inside: set[str] = set()
    found: list[tuple[str, nn.Module]] = []
    for name, module in reversed(list(model.named_modules())):  # children before their parents
        pair = any(all(hasattr(module, attribute) for attribute in attributes) for attributes in _PAIRS)
        named_so = _ATTENTION_NAME.search(type(module).__name__) and next(module.parameters(), None) is not None
        if not is_known(module) and (name in inside or not (pair or named_so)):
            continue
        parts = name.split(".")
        inside.update(".".join(parts[:depth]) for depth in range(len(parts)))
        found.append((name, module))
    return found[::-1]


def is_known(module: nn.Module) -> bool:
    """Whether ``projections_of`` knows the forward of this module."""
    class_name = _forward_class(module)
    return class_name in _SEPARATE or class_name in _FUSED or class_name in _INTERLEAVED


def projections_of(name: str, module: nn.Module) -> AttentionProjections:
    """Say where the query and key rows of an attention module are.

    Args:
        name: of the module in its model, for messages.
        module: a module of ``attention_modules``.

    Raises:
        UnknownAttentionError: if the class is not known, or the weights are not as its class has them.
    """
    class_name = _forward_class(module)
    if class_name in _SEPARATE:
        q_attribute, k_attribute = _SEPARATE[class_name]
        query, key = _owner(name, module, q_attribute), _owner(name, module, k_attribute)
        head_dim = _head_dim(module)
        q_rows, k_rows = torch.arange(_fan_out(query)), torch.arange(_fan_out(key))
    elif class_name in _FUSED:
        q_attribute = k_attribute = _FUSED[class_name]
        query = key = _owner(name, module, q_attribute)
        sizes = qkv_sizes(module, q_attribute, _fan_out(query))
        if sizes is None or len(sizes) != 3:
            raise UnknownAttentionError(
                f"{name} ({type(module).__name__}) has no query, key and value in {q_attribute} of {_fan_out(query)} "
                "rows, as in cross-attention"
            )
        head_dim = _head_dim(module)
        q_rows, k_rows = torch.arange(sizes[0]), sizes[0] + torch.arange(sizes[1])
    elif class_name in _INTERLEAVED:
        q_attribute = k_attribute = _INTERLEAVED[class_name]
        query = key = _owner(name, module, q_attribute)
        head_dim = _head_dim(module)
        q_rows, k_rows, _ = torch.arange(_fan_out(query)).view(-1, 3, head_dim).unbind(1)
    elif hasattr(module, "kv_b_proj") or hasattr(module, "kv_a_proj_with_mqa"):
        raise UnknownAttentionError(
            f"{name} ({type(module).__name__}) is multi-head latent attention: its heads share one rotary key, and "
            "make the rest of keys and values from a latent by one projection"
        )
    else:
        raise UnknownAttentionError(f"{name} is of a class whose forward is not known: {type(module).__name__}")
    if q_rows.numel() % head_dim or k_rows.numel() % head_dim or q_rows.numel() % k_rows.numel():
        raise UnknownAttentionError(
            f"{name} ({type(module).__name__}) has {q_rows.numel()} query and {k_rows.numel()} key rows, which are "
            f"not heads of {head_dim}"
        )
    return AttentionProjections(
        name=name,
        module=module,
        query=HeadRows(f"{name}.{q_attribute}", query, q_rows.reshape(-1, head_dim), _output_axis(query)),
        key=HeadRows(f"{name}.{k_attribute}", key, k_rows.reshape(-1, head_dim), _output_axis(key)),
        head_dim=head_dim,
        scaling=_scaling(module, class_name, head_dim),
        qk_norm=next((child for child, value in module.named_children() if _is_qk_norm(child, value)), None),
        logit_bound=_logit_bound(module),
    )


def _forward_class(module: nn.Module) -> str:
    """Name of the class that defines the forward, if transformers defines it: subclasses may have another one."""
    defining = next((c for c in type(module).__mro__ if "forward" in vars(c)), None)
    return defining.__name__ if defining is not None and defining.__module__.startswith("transformers.") else ""


def _owner(name: str, module: nn.Module, attribute: str) -> nn.Module:
    owner = getattr(module, attribute, None)
    if not isinstance(owner, nn.Module):
        raise UnknownAttentionError(f"{name} ({type(module).__name__}) has no projection {attribute}")
    return owner


def _fan_out(owner: nn.Module) -> int:
    for attribute in ("out_features", "nf"):  # nn.Linear and what wraps or quantises it; Conv1D
        if hasattr(owner, attribute):
            return int(getattr(owner, attribute))
    raise UnknownAttentionError(f"{type(owner).__name__} is not a projection whose number of rows is known")


def _output_axis(owner: nn.Module) -> Literal[0, 1]:
    return 1 if "Conv1D" in transformers_class_names(owner) else 0


def _head_dim(module: nn.Module) -> int:
    for attribute in ("head_dim", "attention_head_size", "head_size"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    raise UnknownAttentionError(f"{type(module).__name__} does not say the size of its heads")


def _scaling(module: nn.Module, class_name: str, head_dim: int) -> float:
    if class_name not in _SCALES_THE_QUERY_ITSELF:
        for attribute in ("scaling", "scale"):
            if isinstance(value := getattr(module, attribute, None), (int, float)):
                return float(value)
    return float(head_dim**-0.5)


def _is_qk_norm(attribute: str, child: nn.Module) -> bool:
    return _QK_NORM.fullmatch(attribute) is not None and not isinstance(child, nn.Identity)


def _logit_bound(module: nn.Module) -> str | None:
    config = getattr(module, "config", None)
    for holder, attribute, meaning in (
        (module, "attn_logit_softcapping", "the logits are capped by tanh"),
        (config, "clip_qkv", "queries and keys are clamped"),
    ):
        value = getattr(holder, attribute, None)
        if value is not None:
            return f"{meaning} ({attribute}={value})"
    return None
