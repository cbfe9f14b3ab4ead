"""Parameter groups of a model for the matrix optimizers: which parameters are matrices, and a table that says why.

The rules are in ``parameter_routing``; nothing here or there knows an optimizer.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from hf_matrix_optim.flattening import refuse_flattened
from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.model_places import ParameterPlace, places_of
from hf_matrix_optim.parameter_routing import (
    DEFAULT_OPTIONS,
    RANK_ONE,
    ParameterRoute,
    PartitionOptions,
    RoutingRules,
    UnroutableParameterError,
    check_dtype,
    check_initialized,
    combine_verdicts,
)

__all__ = [
    "ParameterRoute",
    "PartitionOptions",
    "UnroutableParameterError",
    "explain",
    "param_groups_for",
    "route_parameters",
    "summary",
]

# Trainer.get_decay_parameter_names: no weight decay on parameters inside an nn.LayerNorm or with one of these names.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def route_parameters(model: nn.Module, options: PartitionOptions = DEFAULT_OPTIONS) -> list[ParameterRoute]:
    """Say for every parameter of a model where it goes, and why.

    Args:
        model: any module, on any device, the meta device too; its parameters are not read.
        options: what differs from the default rules.

    Returns:
        One route for each parameter of ``model.named_parameters()``, in that order.

    Raises:
        UnroutableParameterError: if a parameter looks like a layer's weight and the layer is not known.
        TypeError: if ``model`` is no module, or a trainable parameter not float64, float32, bfloat16 or float16.
        ValueError: if ``include`` or ``exclude`` match no trainable parameter.
        NotImplementedError: under DeepSpeed ZeRO and FSDP1.
    """
    return [route for route, _, _ in _routed(model, options)]


def param_groups_for(
    model: nn.Module,
    *,
    options: PartitionOptions = DEFAULT_OPTIONS,
    weight_decay: float = 0.1,
    decay_parameter_names: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into groups for one matrix optimizer.

    Args:
        model: any module, on any device.
        options: what differs from the default rules.
        weight_decay: of the parameters that are decayed; 0 for the others.
        decay_parameter_names: names of the parameters that are decayed. None follows Trainer: all but biases, norms
            and whatever an ``nn.LayerNorm`` holds.

    Returns:
        Groups of plain values: AdamW groups first (decayed, then not), then one matrix group for each layout. Each
        has ``params``, ``param_names``, ``role`` ("adamw" or "matrix") and ``weight_decay``; matrix groups also have
        the fields of ``MatrixLayout``. No group is empty and every trainable parameter is in exactly one.

    Raises:
        UnroutableParameterError, TypeError, NotImplementedError: as ``route_parameters``.
        ValueError: if no parameter is a matrix, or as ``route_parameters``.
    """
    decay_names = None if decay_parameter_names is None else set(decay_parameter_names)
    groups: dict[tuple[int, MatrixLayout | None, bool], dict[str, Any]] = {}
    routes = []
    for route, parameter, decayed_by_rule in _routed(model, options):
        routes.append(route)
        if route.role == "frozen":
            continue
        decayed = decayed_by_rule if decay_names is None else route.name in decay_names
        key = (int(route.role == "matrix"), route.layout, decayed)
        if key not in groups:
            layout = route.layout
            groups[key] = {
                "params": [],
                "param_names": [],
                "role": route.role,
                "weight_decay": weight_decay if decayed else 0.0,
            }
            if layout is not None:
                groups[key] |= {
                    "output_axis": layout.output_axis,
                    "flatten": layout.flatten,
                    "split_sizes": layout.split_sizes,
                    "interleaved": layout.interleaved,
                }
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(route.name)
    if not any(is_matrix for is_matrix, _, _ in groups):
        raise ValueError(_nothing_message(model, routes))
    # AdamW first, decayed first; matrix groups in the order in which their layouts appear in the model.
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], not (item[0][0] or item[0][2])))
    _check_cover(model, [group for _, group in ordered])
    return [group for _, group in ordered]


def explain(model: nn.Module, options: PartitionOptions = DEFAULT_OPTIONS) -> str:
    """Describe the partition of a model as a Markdown table, one row for each kind of parameter.

    Args:
        model: any module, on any device, the meta device too.
        options: what differs from the default rules.

    Returns:
        The table and, below it, the line of ``summary``. Layers are folded: ``layers.*.mlp.up_proj.weight``.

    Raises:
        UnroutableParameterError, TypeError, ValueError, NotImplementedError: as ``route_parameters``.
    """
    routes = route_parameters(model, options)
    total = sum(route.numel for route in routes) or 1
    rows: dict[tuple[object, ...], list[ParameterRoute]] = {}
    for route in routes:
        folded = re.sub(r"(?<![^.])\d+(?![^.])", "*", route.name)
        rows.setdefault((folded, route.shape, route.role, route.reason, route.layout), []).append(route)
    lines = [
        "| parameter | shape | optimizer | read as | matrices | elements | share | why |",
        "|---|---|---|---|---|---:|---:|---|",
    ]
    for (pattern, *_), same in rows.items():
        first, numel = same[0], sum(route.numel for route in same)
        cells = (
            f"`{pattern}`" + (f" ({len(same)})" if len(same) > 1 else ""),
            " x ".join(map(str, first.shape)) or "scalar",
            first.role,
            _layout_text(first.layout),
            _matrices_text(first, len(same)),
            f"{numel:,}",
            f"{100 * numel / total:.2f} %",
            first.reason,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", summary(routes)])


def summary(routes: Iterable[ParameterRoute]) -> str:
    """Return one line with the number of parameters, of elements and the share of each route."""
    routes = list(routes)
    total = sum(route.numel for route in routes) or 1
    parts = []
    for role in ("matrix", "adamw", "frozen"):
        chosen = [route for route in routes if route.role == role]
        if not chosen and role == "frozen":
            continue
        numel = sum(route.numel for route in chosen)
        name = {"matrix": "matrix optimizer", "adamw": "AdamW", "frozen": "frozen"}[role]
        matrices = f" as {sum(route.matrix_count for route in chosen)} matrices" if role == "matrix" else ""
        parts.append(f"{name}: {len(chosen)} parameters{matrices}, {_count(numel)} ({100 * numel / total:.1f} %)")
    return "; ".join(parts)


def _routed(model: nn.Module, options: PartitionOptions) -> list[tuple[ParameterRoute, nn.Parameter, bool]]:
    """Route, parameter and whether Trainer would decay it, in the order of ``model.named_parameters()``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} is no nn.Module: give the model itself, not its parameters")
    refuse_flattened("a matrix optimizer", model)
    places: dict[int, list[ParameterPlace]] = {}
    for place in places_of(model):
        places.setdefault(id(place.parameter), []).append(place)
    rules = RoutingRules(model, options)
    routed = []
    for name, parameter in model.named_parameters():
        here = places[id(parameter)]
        check_initialized(here[0])
        shape, numel = tuple(parameter.shape), parameter.numel()
        if not parameter.requires_grad:
            rules.see_frozen(here[0])
            routed.append((ParameterRoute(name, shape, numel, "frozen", "not trainable"), parameter, False))
            continue
        check_dtype(here[0])
        role, reason, layout = combine_verdicts(here, [rules.verdict(place) for place in here])
        first = next((place for place in here if place.name == name), here[0])
        routed.append((ParameterRoute(name, shape, numel, role, reason, layout), parameter, _is_decayed(first)))
    rules.check_patterns_used()
    return routed


def _is_decayed(place: ParameterPlace) -> bool:
    """Trainer's rule for weight decay, by the module tree and the name."""
    inside_layernorm = any(isinstance(module, nn.LayerNorm) for module in place.lineage[1:])
    return not inside_layernorm and _NO_DECAY.search(place.name.lower()) is None


def _nothing_message(model: nn.Module, routes: list[ParameterRoute]) -> str:
    trainable = [route for route in routes if route.role != "frozen"]
    if not trainable:
        return f"nothing to orthogonalise in {type(model).__name__}: it has no trainable parameters"
    reasons = sorted({route.reason for route in trainable if len(route.shape) >= 2})
    rank_one = "Adapters of rank 1 are pairs of vectors: give r of at least 2. " if RANK_ONE in reasons else ""
    why = f" (its trainable arrays are: {', '.join(reasons)})" if reasons else " (it has vectors only)"
    return (
        f"nothing to orthogonalise in {type(model).__name__}: none of its {len(trainable)} trainable parameters is a "
        f"matrix{why}. {rank_one}Name modules in optim_target_modules (include= in optim_args), change the options "
        "lora, head, router, conv or exclude, or train this model with optim='adamw_torch'"
    )


def _check_cover(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        raise RuntimeError(
            f"{len(grouped)} parameters in groups, {len(trainable)} trainable ones in {type(model).__name__}: "
            "each must be in exactly one group"
        )


def _layout_text(layout: MatrixLayout | None) -> str:
    if layout is None:
        return ""
    axes = "(out, in, *kernel)" if layout.flatten else ("(out, in)", "(in, out)")[layout.output_axis]
    if layout.split_sizes is None:
        return axes
    sizes, equal = layout.split_sizes, len(set(layout.split_sizes)) == 1
    cut = f"{len(sizes)} x {sizes[0]}" if equal else " + ".join(map(str, sizes))
    return f"{axes}, {'interleaved ' if layout.interleaved else ''}{cut}"


def _matrices_text(route: ParameterRoute, copies: int) -> str:
    """Number and size (fan_out x fan_in) of the matrices of ``copies`` parameters like this one."""
    layout, shape = route.layout, route.shape
    if layout is None:
        return ""
    fan_out = shape[layout.fan_out_axis(len(shape))]
    stacked = 1
    if layout.flatten:
        fan_in = route.numel // fan_out
    else:
        fan_in = shape[-1 if layout.output_axis == 0 else -2]
        stacked = route.numel // (fan_out * fan_in)
    sizes = layout.split_sizes or (fan_out,)
    counts = {size: sizes.count(size) * stacked * copies for size in sizes}
    return " + ".join(f"{count} of {size} x {fan_in}" for size, count in counts.items())


def _count(numel: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if numel >= size:
            return f"{numel / size:.2f} {unit}"
    return str(numel)
