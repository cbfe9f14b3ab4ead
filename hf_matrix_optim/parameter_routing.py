"""The rules that say where a parameter of a model goes, and how it is read as matrices.

Decided by the module that owns a parameter and by its place in the model; the first rule that applies wins:

1. not trainable: left alone; trainable but not float64, float32, bfloat16 or float16: TypeError
2. the user's ``exclude``, then ``include``
3. input and output embeddings of every submodel, tied or not, Embedding modules, an image's patch convolution: AdamW
4. norms, biases, fewer than two axes, a single row or column: AdamW
5. outside the base model (task heads): AdamW, or ``head="matrix"``
6. routers of mixtures of experts: AdamW, or ``router="matrix"``
7. Linear, Conv1D, convolutions, stacks of experts, LoRA factors: matrices; a weight of a layer that is not known: an
   error with its name; any other free parameter (position tables, Mamba's A_log): AdamW
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Literal, get_args, get_type_hints

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from hf_matrix_optim.fused_layouts import (
    experts_layout,
    gate_up_sizes,
    is_experts,
    is_interleaved_qkv,
    qkv_sizes,
    transformers_class_names,
)
from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.model_places import Landmarks, ParameterPlace

Role = Literal["matrix", "adamw", "frozen"]
Verdict = tuple[Role, str, MatrixLayout | None]  # role, reason, layout
RANK_ONE = "a single row or column (LoRA of rank 1)"
_TRAINABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class UnroutableParameterError(ValueError):
    """A trainable parameter cannot be routed: it looks like a layer's weight, but how to read it is not known."""


@dataclass(frozen=True)
class PartitionOptions:
    """What a user may change about the partition; the names are keys of ``optim_args``.

    Attributes:
        qkv: "split" makes each of fused q, k and v a matrix of its own, where they are contiguous; "whole" does not.
        lora: "both" makes matrices of LoRA's A and B, "b_only" of B (A goes to AdamW), "adamw" of neither; chosen by
            the comparison in recipes/results/finetune.md. Factors of rank 1 go to AdamW.
        head: where layers outside the base model go. Projections to the vocabulary stay with AdamW in any case.
        router: where the routers of mixtures of experts go.
        conv: where convolutions go; depthwise and transposed ones go to AdamW in any case.
        include: what is a matrix although the rules say otherwise: a regular expression (``re.search``) or a list of
            parts of names, as in Trainer's ``optim_target_modules``; "all-linear" is every linear layer. Parameters
            with fewer than two axes are not concerned.
        exclude: regular expression (``re.search``) of names that go to AdamW; stronger than ``include``.
    """

    qkv: Literal["split", "whole"] = "split"
    lora: Literal["both", "b_only", "adamw"] = "both"
    head: Literal["adamw", "matrix"] = "adamw"
    router: Literal["adamw", "matrix"] = "adamw"
    conv: Literal["matrix", "adamw"] = "matrix"
    include: str | Sequence[str] | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("include", "exclude"):
                if isinstance(value, str):
                    _check_pattern(field.name, value)
                continue
            allowed = get_args(hints[field.name])
            if value not in allowed:
                raise ValueError(f"{field.name}={value!r} must be one of {', '.join(map(repr, allowed))}")


DEFAULT_OPTIONS = PartitionOptions()


@dataclass(frozen=True)
class ParameterRoute:
    """Where one parameter goes, and why.

    Attributes:
        name: its first name in ``model.named_parameters()``.
        shape: its shape.
        numel: number of its elements.
        role: "matrix", "adamw", or "frozen" (in no group).
        reason: the rule that decided, in a few words.
        layout: how it is read as matrices; None unless ``role`` is "matrix".
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    role: Role
    reason: str
    layout: MatrixLayout | None = None

    @property
    def matrix_count(self) -> int:
        """Number of matrices that are orthogonalised one by one; 0 unless ``role`` is "matrix"."""
        return 0 if self.layout is None else self.layout.matrix_count(self.shape)


class RoutingRules:
    """The rules of this module's docstring for one model and one set of options.

    Args:
        model: the model; it is asked once for its embeddings and heads.
        options: what differs from the default rules.
    """

    def __init__(self, model: nn.Module, options: PartitionOptions) -> None:
        self._options = options
        self._landmarks = Landmarks.of(model)
        self._model_class = type(model).__name__
        self._used = {"include": False, "exclude": False}
        self._frozen: list[ParameterPlace] = []

    def verdict(self, place: ParameterPlace) -> Verdict:
        """Route one place of a trainable parameter, rules 2 to 7.

        Raises:
            UnroutableParameterError: if the parameter is a weight of a layer that is not known.
        """
        options, marks, key = self._options, self._landmarks, id(place.parameter)
        if options.exclude is not None and _matches(options.exclude, place):
            self._used["exclude"] = True
            return "adamw", "exclude", None
        if options.include is not None and len(place.shape) >= 2 and self._is_included(options.include, place):
            self._used["include"] = True
            return "matrix", "include", self._included_layout(place)
        if key in marks.output_embeddings:
            return "adamw", f"{'tied input and ' * (key in marks.input_embeddings)}output embeddings", None
        if key in marks.input_embeddings or _is_embedding(place):
            return "adamw", "embedding", None
        if reason := _vector_reason(place):
            return "adamw", RANK_ONE if _is_rank_one_factor(place) else reason, None
        if key in marks.heads and options.head == "adamw":
            return "adamw", "head", None
        if _is_router(place) and options.router == "adamw":
            return "adamw", "router", None
        if reason := self._adapter_reason(place):
            return "adamw", reason, None
        layout = self._layout(place)
        if isinstance(layout, MatrixLayout):
            return "matrix", _matrix_reason(place, layout), layout
        if layout is None and (place.leaf == "weight" or (is_experts(place.owner) and len(place.shape) > 2)):
            raise UnroutableParameterError(_unknown_layer_message(place))
        return "adamw", layout or f"free parameter of {type(place.owner).__name__}", None

    def see_frozen(self, place: ParameterPlace) -> None:
        """Keep a parameter that is not trainable, for the message where a pattern matches nothing else."""
        self._frozen.append(place)

    def check_patterns_used(self) -> None:
        """Raise ValueError if ``include`` or ``exclude`` decided on no parameter; call it after all verdicts."""
        for key, used in self._used.items():
            pattern = getattr(self._options, key)
            if pattern is not None and not used:
                kind = "trainable parameter with two axes or more" if key == "include" else "trainable parameter"
                raise ValueError(
                    f"{key}={pattern!r} matches no {kind} of {self._model_class}{self._frozen_matches(pattern)}: "
                    "names are those of model.named_parameters(), and python -m hf_matrix_optim explain MODEL shows "
                    "them"
                )

    def _frozen_matches(self, pattern: str | Sequence[str]) -> str:
        """What a message says of the parameters that ``pattern`` matches and that are not trainable."""
        matched = [place for place in self._frozen if _matches(pattern, place)]
        if not matched:
            return ""
        if quantised := [place for place in matched if _is_quantised(place)]:
            return f" (it matches quantised weights, such as {quantised[0].name}, which cannot be trained)"
        return f" (it matches {len(matched)} that are frozen, such as {matched[0].name})"

    def _is_included(self, pattern: str | Sequence[str], place: ParameterPlace) -> bool:
        words = [pattern] if isinstance(pattern, str) else pattern
        if [word.replace("_", "-").lower() for word in words] == ["all-linear"]:
            linear = isinstance(place.owner, nn.Linear) or _is_conv1d(place.owner)
            return linear and id(place.parameter) not in self._landmarks.input_embeddings
        return _matches(pattern, place)

    def _included_layout(self, place: ParameterPlace) -> MatrixLayout:
        layout = self._layout(place)
        if isinstance(layout, MatrixLayout):
            return layout
        if isinstance(place.owner, _ConvNd) and not isinstance(place.owner, _ConvTransposeNd):
            return _convolution_layout(place.owner, place.shape)
        if len(place.shape) > 3 or isinstance(place.owner, _ConvTransposeNd):
            raise UnroutableParameterError(
                f"parameter {place.name} ({type(place.owner).__name__}, shape {place.shape}) is named in include or "
                "optim_target_modules, but is not known to be made of matrices (fan_out, fan_in): do not name it there"
            )
        # A lookup is a product with a one-hot row: (fan_in, fan_out).
        return MatrixLayout(output_axis=int(isinstance(place.owner, (nn.Embedding, nn.EmbeddingBag))))

    def _adapter_reason(self, place: ParameterPlace) -> str | None:
        """Why an adapter's weight goes to AdamW; None if it does not, or is no adapter's."""
        if (adapter := place.adapter()) is None:
            return None
        layer, part = adapter
        if part not in ("lora_A", "lora_B") or not isinstance(place.owner, (nn.Linear, _ConvNd)):
            return f"adapter weight {part}"
        if self._options.lora == "adamw" or (self._options.lora == "b_only" and part == "lora_A"):
            return f"{part}, lora={self._options.lora!r}"
        if getattr(layer, "num_experts", 1) > 1:
            return f"{part} of a stack of experts: its factors are interleaved"
        return None

    def _layout(self, place: ParameterPlace) -> MatrixLayout | str | None:
        """The layout that the owner implies; a reason if it implies AdamW; None if the owner is not known."""
        owner, shape, leaf = place.owner, place.shape, place.leaf
        if isinstance(owner, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
            fused = leaf == "in_proj_weight" and self._options.qkv == "split"
            return MatrixLayout(split_sizes=(shape[0] // 3,) * 3 if fused else None)
        if is_experts(owner):
            layout = experts_layout(owner, leaf, shape)
            return layout if layout is None or layout.split_sizes else self._split(place, layout.output_axis)
        if leaf != "weight":
            return None
        if isinstance(owner, nn.Linear):
            return self._split(place, output_axis=0)
        if _is_conv1d(owner):
            return self._split(place, output_axis=1)
        if isinstance(owner, _ConvTransposeNd):
            return "transposed convolution"
        if isinstance(owner, _ConvNd):
            if _is_depthwise(owner):
                return "depthwise convolution"
            return "convolution, conv='adamw'" if self._options.conv == "adamw" else _convolution_layout(owner, shape)
        # Routers that own their weight use it as nn.Linear does: (experts, hidden).
        return MatrixLayout() if len(shape) == 2 and _is_router(place) else None

    def _split(self, place: ParameterPlace, output_axis: int) -> MatrixLayout:
        """The layout of a projection, cut where a table says that it holds several matrices."""
        holder, attribute = place.holder()
        fan_out = place.shape[-1 if output_axis == 1 else -2]
        sizes = None
        if place.adapter() is None:
            sizes = gate_up_sizes(holder, attribute, fan_out)
            if sizes is None and self._options.qkv == "split":
                sizes = qkv_sizes(holder, attribute, fan_out)
        return MatrixLayout(output_axis=output_axis, split_sizes=sizes)


def check_initialized(place: ParameterPlace) -> None:
    """Raise UnroutableParameterError if a parameter of a lazy module has no shape yet."""
    if isinstance(place.parameter, UninitializedParameter):
        raise UnroutableParameterError(
            f"parameter {place.name} has no shape yet (a lazy module): run a forward pass before making the optimizer"
        )


def check_dtype(place: ParameterPlace) -> None:
    """Raise TypeError if a trainable parameter has a type that cannot be trained."""
    if _is_quantised(place):
        found = "quantised" if place.parameter.dtype in _TRAINABLE_DTYPES else place.parameter.dtype
        raise TypeError(
            f"parameter {place.name} is trainable but {found}: only float64, float32, bfloat16 and "
            "float16 parameters can be trained. Freeze it (requires_grad_(False)), as quantised weights are, and "
            "train adapters"
        )


def _is_quantised(place: ParameterPlace) -> bool:
    """Whether the elements are not the weights: bitsandbytes packs 4-bit ones into any type, bfloat16 too."""
    packed = getattr(place.parameter, "quant_state", None) is not None
    return packed or place.parameter.dtype not in _TRAINABLE_DTYPES


def combine_verdicts(places: list[ParameterPlace], verdicts: list[Verdict]) -> Verdict:
    """Return one verdict on a parameter with several places: the user's word, then AdamW, then the common layout.

    Raises:
        UnroutableParameterError: if all places say matrix but read it in different ways.
    """
    for wins in (lambda v: v[1] == "exclude", lambda v: v[1] == "include", lambda v: v[0] == "adamw"):
        if found := next(filter(wins, verdicts), None):
            return found
    if len({layout for _, _, layout in verdicts}) > 1:
        raise UnroutableParameterError(
            f"the tied parameter {', '.join(place.name for place in places)} is read as matrices in different ways: "
            f"add exclude={re.escape(places[0].name)} to optim_args to leave it to AdamW"
        )
    return verdicts[0]


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}={pattern!r} is not a regular expression: {error}") from error


def _matches(pattern: str | Sequence[str], place: ParameterPlace) -> bool:
    if isinstance(pattern, str):
        return any(re.search(pattern, name) for name in (place.name, ".".join(place.path)))
    return any(part in place.name for part in pattern)


def _is_embedding(place: ParameterPlace) -> bool:
    """Whether an embedding module owns the parameter, or holds the convolution of an image's patches that owns it."""
    of_patches = isinstance(place.owner, _ConvNd) and place.owner.in_channels <= 4
    modules = place.lineage[-2:] if of_patches else place.lineage[-1:]
    return any(re.search(r"Embeddings?$|PatchEmbed", type(module).__name__) for module in modules)


def _vector_reason(place: ParameterPlace) -> str | None:
    owner, shape = place.owner, place.shape
    if isinstance(owner, (_NormBase, nn.LayerNorm, nn.GroupNorm)) or "Norm" in type(owner).__name__:
        return "norm"
    if "bias" in place.leaf:
        return "bias"
    if len(shape) < 2:
        return "fewer than two axes"
    rows_columns = (shape[0], prod(shape[1:])) if isinstance(owner, _ConvNd) else shape[-2:]
    return "a single row or column" if min(rows_columns) <= 1 else None


def _is_rank_one_factor(place: ParameterPlace) -> bool:
    """Whether the parameter is a LoRA factor (1, fan_in) or (fan_out, 1)."""
    adapter = place.adapter()
    parts = {"lora_A": 0, "lora_B": 1}
    return adapter is not None and len(place.shape) == 2 and place.shape[parts.get(adapter[1], 0)] == 1


def _is_router(place: ParameterPlace) -> bool:
    """Whether the parameter belongs to what picks the experts: by class, or by a name beside experts."""
    for parent, name, module in zip(place.lineage, place.path, place.lineage[1:], strict=False):
        class_name = type(module).__name__
        if "Router" in class_name or "router" in name or (name in ("gate", "gating") and hasattr(parent, "experts")):
            return True
    return False


def _is_depthwise(convolution: _ConvNd) -> bool:
    """Whether every group of channels has one input or one output, so that no group is a matrix."""
    groups = convolution.groups
    return groups > 1 and groups in (convolution.in_channels, convolution.out_channels)


def _convolution_layout(convolution: _ConvNd, shape: tuple[int, ...]) -> MatrixLayout:
    groups = 1 if _is_depthwise(convolution) else convolution.groups
    return MatrixLayout(flatten=True, split_sizes=(shape[0] // groups,) * groups if groups > 1 else None)


def _is_conv1d(module: nn.Module) -> bool:
    return "Conv1D" in transformers_class_names(module)


def _matrix_reason(place: ParameterPlace, layout: MatrixLayout) -> str:
    if (adapter := place.adapter()) is not None:
        return f"LoRA {adapter[1][-1]}"
    if layout.flatten:
        return "convolution" if layout.split_sizes is None else "grouped convolution"
    if is_experts(place.owner):
        return "experts" if layout.split_sizes is None or len(place.shape) == 2 else "experts, fused gate and up"
    if _is_router(place):
        return "router"
    kind = "Conv1D" if layout.output_axis == 1 else "linear"
    if layout.split_sizes is None:
        return f"{kind}, qkv interleaved by head" if is_interleaved_qkv(*place.holder()) else kind
    fused_gate_up = gate_up_sizes(*place.holder(), sum(layout.split_sizes)) is not None
    return f"{kind}, fused {'gate and up' if fused_gate_up else 'qkv'}"


def _unknown_layer_message(place: ParameterPlace) -> str:
    name = re.escape(place.name)
    return (
        f"parameter {place.name} of shape {place.shape} looks like a layer's weight, but how "
        f"{type(place.owner).__name__} uses it is not known. To orthogonalise it as (..., fan_out, fan_in), name "
        f"{place.name} in optim_target_modules, or add include={name} to optim_args; to leave it to AdamW, add "
        f"exclude={name} to optim_args"
    )
