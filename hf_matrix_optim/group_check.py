"""The values of a param group: which are allowed, and the errors for the others."""

from collections.abc import Callable
from typing import Any

import torch

from hf_matrix_optim.int8_momentum import INT8
from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.update_scale import UPDATE_SCALES

ROLES = ("adamw", "matrix")
MAP_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KERNELS = ("auto", "torch", "triton")
MOMENTUM_DTYPES = ("auto", "bfloat16", INT8)
DISTRIBUTE = ("auto", "off")


def check_group(group: dict[str, Any]) -> None:
    """Check what every param group of a matrix optimizer has.

    Raises:
        ValueError, TypeError: naming the value or the parameter, and what is allowed.
    """
    if group["role"] not in ROLES:
        raise ValueError(f"role={group['role']!r} of a param group is not one of {', '.join(ROLES)}")
    _check(group, "lr", lambda value: 0 <= value < float("inf"), "at least 0 and finite")
    _check(group, "weight_decay", lambda value: 0 <= value < float("inf"), "at least 0 and finite")
    _check(group, "momentum", lambda value: 0 <= value < 1, "at least 0 and below 1")
    _check(group, "update_rms", lambda value: value > 0, "above 0")
    _check(group, "adamw_eps", lambda value: value >= 0, "at least 0")
    _check(
        group,
        "betas",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "two numbers, each at least 0 and below 1",
    )
    _check(group, "fused", lambda value: value is None or isinstance(value, bool), "True, False or None")
    _check(group, "cuda_graph", lambda value: isinstance(value, bool), "True or False")
    _check(group, "map_dtype", lambda value: value in ("auto", *MAP_DTYPES), f"auto, {', '.join(MAP_DTYPES)}")
    _check(group, "kernels", lambda value: value in KERNELS, " or ".join(KERNELS))
    _check(group, "momentum_dtype", lambda value: value in MOMENTUM_DTYPES, " or ".join(MOMENTUM_DTYPES))
    if group["kernels"] == "triton" and group["map_dtype"] != "auto":
        raise ValueError(
            f"kernels='triton' multiplies in float16 and is for map_dtype='auto', not {group['map_dtype']!r}: use "
            "kernels='auto'"
        )
    if group["cuda_graph"] and group["kernels"] == "torch":
        raise ValueError("cuda_graph=True is for the GPU kernels, not for kernels='torch'")
    _check(group, "distribute", lambda value: value in DISTRIBUTE, " or ".join(DISTRIBUTE))
    _check(group, "max_workspace_bytes", lambda value: value > 0, "above 0")
    if "update_scale" in group:
        _check(group, "update_scale", lambda value: value in UPDATE_SCALES, " or ".join(UPDATE_SCALES))
    for i, p in enumerate(group["params"]):
        if torch.is_complex(p):
            raise ValueError(f"parameter {parameter_name(group, i)} is complex: only real parameters are supported")
        if not p.is_floating_point():
            raise TypeError(
                f"parameter {parameter_name(group, i)} is {p.dtype}: only floating-point parameters are trained"
            )
        if group["role"] == "matrix":
            MatrixLayout.from_group(group).check(tuple(p.shape), parameter_name(group, i))


def parameter_name(group: dict[str, Any], index: int) -> str:
    """What to call a parameter of a group in a message."""
    names = group.get("param_names")
    return repr(names[index]) if names else f"number {index} of its group"


def _check(group: dict[str, Any], key: str, is_valid: Callable[[Any], bool], allowed: str) -> None:
    try:
        valid = bool(is_valid(group[key]))
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{key}={group[key]!r} is not allowed: it must be {allowed}")
