"""The names of the optimizers, the options of each, and the parser of ``--optim_args``; standard library only."""

import difflib
import types
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

OPTIMIZER_NAMES = ("muon", "adamuon", "adamuon_v1", "mud")

NSCoefficientsName: TypeAlias = Literal["jordan", "you", "polar_express_safety_1.01"]
UpdateScale: TypeAlias = Literal["match_rms_adamw", "jordan"]
MapDtype: TypeAlias = Literal["auto", "float64", "float32", "bfloat16", "float16"]

#: What people write in optim_args that TrainingArguments has already.
TRAINING_ARGUMENTS = {
    "lr": "--learning_rate",
    "learning_rate": "--learning_rate",
    "weight_decay": "--weight_decay",
    "wd": "--weight_decay",
    "betas": "--adam_beta1 and --adam_beta2",
    "beta1": "--adam_beta1",
    "beta2": "--adam_beta2",
    "adam_beta1": "--adam_beta1",
    "adam_beta2": "--adam_beta2",
    "eps": "--adam_epsilon",
    "adamw_eps": "--adam_epsilon",
    "adam_epsilon": "--adam_epsilon",
}


@dataclass(frozen=True, kw_only=True)
class MatrixOptimizerOptions:
    """What every optimizer of this package takes beside the learning rate, weight decay, betas and epsilon.

    Attributes:
        matrix_lr: learning rate of the matrix groups, at least 0; None is that of the AdamW groups.
        qkv, lora, head, router, conv, include, exclude: as in ``partition.PartitionOptions``.
        momentum: beta of the matrix groups, in [0, 1).
        update_rms: root mean square of the update per unit of learning rate, above 0.
        adamw_fused: torch's fused AdamW kernel; None uses it where the device has one.
        map_dtype: precision of the map from momentum to direction.
        kernels: "triton" for the GPU kernels, "torch" for the plain path, "auto" for the kernels where they apply.
        cuda_graph: replay the kernels' step as one CUDA graph, or a graph a map where ranks share the matrices.
        momentum_dtype: "auto" (float32 for parameters of 32 bits or less), "bfloat16" or "int8".
        max_workspace_bytes: bound of the temporary stacks of a step, in bytes.
        distribute: "auto" maps each matrix on one of the ranks that hold it or its shards, "off" on every rank.
        qk_clip: threshold of attention logits, above 0, beyond which a head's query and key projections are scaled
            down after a step (``qk_clip.QKClip``); None leaves them alone.
        diagnostics: Trainer measures every so many optimizer steps and logs it; 0: never.
        diagnostics_per_layer: it also logs one value for each matrix and attention module.
    """

    matrix_lr: float | None = None
    qkv: Literal["split", "whole"] = "split"
    lora: Literal["both", "b_only", "adamw"] = "both"
    head: Literal["adamw", "matrix"] = "adamw"
    router: Literal["adamw", "matrix"] = "adamw"
    conv: Literal["matrix", "adamw"] = "matrix"
    include: str | tuple[str, ...] | None = None
    exclude: str | None = None
    momentum: float = 0.95
    update_rms: float = 0.2
    adamw_fused: bool | None = None
    map_dtype: MapDtype = "auto"
    kernels: Literal["auto", "torch", "triton"] = "auto"
    cuda_graph: bool = False
    momentum_dtype: Literal["auto", "bfloat16", "int8"] = "auto"
    max_workspace_bytes: int = 2**30
    distribute: Literal["auto", "off"] = "auto"
    qk_clip: float | None = None
    diagnostics: int = 0
    diagnostics_per_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class MuonOptions(MatrixOptimizerOptions):
    """Options of ``optim="muon"``; the ones of its own are arguments of ``Muon``."""

    nesterov: bool = True
    ns_coefficients: NSCoefficientsName = "jordan"
    ns_steps: int = 5
    update_scale: UpdateScale = "match_rms_adamw"


@dataclass(frozen=True, kw_only=True)
class AdaMuonOptions(MatrixOptimizerOptions):
    """Options of ``optim="adamuon"``; the ones of its own are arguments of ``AdaMuon``."""

    nesterov: bool = False
    eps: float = 1e-8
    ns_coefficients: NSCoefficientsName = "jordan"
    ns_steps: int = 5


@dataclass(frozen=True, kw_only=True)
class AdaMuonV1Options(AdaMuonOptions):
    """Options of ``optim="adamuon_v1"``; the ones of its own are arguments of ``AdaMuon(variant="v1")``."""

    beta2: float = 0.999


@dataclass(frozen=True, kw_only=True)
class MUDOptions(MatrixOptimizerOptions):
    """Options of ``optim="mud"``; the ones of its own are arguments of ``MUD``."""

    nesterov: bool = True
    passes: int = 1
    update_scale: UpdateScale = "match_rms_adamw"


OPTIONS_CLASSES: dict[str, type[MatrixOptimizerOptions]] = {
    "muon": MuonOptions,
    "adamuon": AdaMuonOptions,
    "adamuon_v1": AdaMuonV1Options,
    "mud": MUDOptions,
}


def split_optim_args(optim_args: str | None) -> dict[str, str]:
    """Cut ``"key=value,key=value"`` into a dict, as transformers does, blanks removed.

    Raises:
        ValueError: for a part that is not ``key=value``, naming it. transformers' own parser, which this one
            replaces, says "not enough values to unpack".
    """
    pairs: dict[str, str] = {}
    if not optim_args:
        return pairs
    for part in optim_args.replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if not key or not equals or "=" in value:
            raise ValueError(
                f"optim_args={optim_args!r}: {part!r} is not key=value. Write optim_args as in "
                '"ns_steps=6,nesterov=true"'
            )
        pairs[key] = value
    return pairs


def parse_options(name: str, optim_args: dict[str, str]) -> MatrixOptimizerOptions:
    """Turn the strings of ``--optim_args`` into the options of an optimizer.

    Args:
        name: one of ``OPTIMIZER_NAMES``.
        optim_args: as ``split_optim_args`` returns them.

    Raises:
        ValueError: for a name or key that does not exist, naming the nearest one, and for a value of another kind.
    """
    options_class = OPTIONS_CLASSES[checked_name(name)]
    kinds = {field.name: get_type_hints(options_class)[field.name] for field in fields(options_class)}
    values: dict[str, Any] = {}
    for key, text in optim_args.items():
        if key not in kinds:
            raise ValueError(_unknown_key_message(name, key, list(kinds)))
        try:
            values[key] = _value_of_kind(text, kinds[key])
        except ValueError as error:
            raise ValueError(f"optim_args of optim={name!r}: {key}={text!r} is not {error}") from None
    return options_class(**values)


def check_qk_clip(threshold: Any) -> None:
    """Raise ValueError if ``threshold`` is no threshold of attention logits."""
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not 0 < threshold < float("inf"):
        raise ValueError(
            f"qk_clip={threshold!r} is not allowed: the threshold must be above 0 and finite, say 100; None "
            "leaves the logits alone"
        )


def checked_name(name: str) -> str:
    """Return ``name`` if it is one of ``OPTIMIZER_NAMES``.

    Raises:
        ValueError: if it is not, naming the nearest one.
    """
    if name in OPTIMIZER_NAMES:
        return str(name)
    near = difflib.get_close_matches(str(name), OPTIMIZER_NAMES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name!r} is not an optimizer of this package ({', '.join(OPTIMIZER_NAMES)}){hint}")


def _unknown_key_message(name: str, key: str, known: list[str]) -> str:
    message = f"optim_args of optim={name!r} has no key {key!r}"
    others: dict[str, list[str]] = {}
    for other, options_class in OPTIONS_CLASSES.items():
        for field in fields(options_class):
            if field.name not in known:
                others.setdefault(field.name, []).append(other)
    near = difflib.get_close_matches(key.lower(), [*known, *others], n=1)
    if key.lower() in TRAINING_ARGUMENTS:
        message += f": it is set by {TRAINING_ARGUMENTS[key.lower()]}"
    elif near and near[0] in others:
        message += f": {near[0]!r} is an option of {', '.join(others[near[0]])}"
    elif near:
        message += f"; did you mean {near[0]!r}?"
    return f"{message} (known: {', '.join(known)})"


def _value_of_kind(text: str, kind: Any) -> Any:
    """Read ``text`` as the type annotation ``kind``; the ValueError names what was expected."""
    if get_origin(kind) in (types.UnionType, Union):
        kinds = [member for member in get_args(kind) if member is not type(None) and get_origin(member) is not tuple]
        if len(kinds) != len(get_args(kind)) and type(None) in get_args(kind):
            if text.lower() == "none":
                return None
            try:
                return _value_of_kind(text, kinds[0])
            except ValueError as error:
                raise ValueError(f"{error} or none") from None
        return _value_of_kind(text, kinds[0])
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return text
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "false", "0", "no"):
            return text.lower() in ("true", "1", "yes")
        raise ValueError("true or false")
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            raise ValueError("a whole number" if kind is int else "a number") from None
    if not text:
        raise ValueError("a text of at least one character")
    return text
