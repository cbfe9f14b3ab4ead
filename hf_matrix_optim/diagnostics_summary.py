"""The numbers of a measured step, brought from the devices to the host and summed up as what the logs say of it."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PREFIX = "diagnostics/"
#: What is measured of each matrix, in this order.
MEASURED = ("weight", "change", "update", "orthogonality", "weight_spectral", "momentum", "momentum_spectral")


@dataclass(frozen=True)
class MeasuredMatrix:
    """Which matrix was measured.

    Attributes:
        name: of its parameter, and of its part of a fused one.
        group: its param group.
        shape: as it is stored, (fan_out, fan_in) or (fan_in, fan_out).
        has_gradient: in the step that was measured.
    """

    name: str
    group: int
    shape: tuple[int, int]
    has_gradient: bool


@dataclass
class Reading:
    """What was measured in one step; it knows neither model nor optimizer, and tensors wait on their devices.

    Attributes:
        matrices: those that were measured.
        roles: of the param groups.
        rates: learning rates of the groups; None: on the device, as ``numbers["rate_i"]``.
        attention: names of the attention modules with a bound.
        numbers: 1-D each. "matrices": (MEASURED x matrices); "attention": a bound for each module; of group i
            "sums_i": squared norms of gradients, weights and changes, and of matrix groups "skipped_i".
        marks: GPU events or seconds of "begin", "backward", "start" and "end".
    """

    matrices: list[MeasuredMatrix]
    roles: list[str]
    rates: list[float | None]
    attention: list[str]
    marks: dict[str, Any]
    numbers: dict[str, Tensor] = field(default_factory=dict)


def summarize(reading: Reading, *, per_layer: bool) -> dict[str, float]:
    """The values of a step by key, as in ``OptimizerDiagnostics``; waits for the devices, once each.

    Args:
        per_layer: also one value for each matrix and attention module.
    """
    numbers = _to_host(reading.numbers)
    values: dict[str, float] = {PREFIX + "matrices": len(reading.matrices)}
    values.update(_of_matrices(reading, numbers, per_layer=per_layer))
    values.update(_of_sums(reading.roles, numbers))
    if reading.attention:
        bounds = numbers["attention"]
        values[PREFIX + "attention_logit_bound_max"] = _largest(bounds)
        if per_layer:
            by_name = zip(reading.attention, bounds, strict=True)
            values.update({f"{PREFIX}attention_logit_bound/{name}": bound for name, bound in by_name})
    if (share := _time_share(reading.marks)) is not None:
        values[PREFIX + "optimizer_time_share"] = share
    return values


def _to_host(numbers: dict[str, Tensor]) -> dict[str, list[float]]:
    """All numbers, by one transfer from each device."""
    by_device: dict[torch.device, list[str]] = defaultdict(list)
    for name, tensor in numbers.items():
        by_device[tensor.device].append(name)
    host: dict[str, list[float]] = {}
    for device, names in by_device.items():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.cat([numbers[name].flatten().to(dtype) for name in names]).tolist()
        for name in names:
            host[name], flat = flat[: numbers[name].numel()], flat[numbers[name].numel() :]
    return host


def _of_matrices(reading: Reading, numbers: dict[str, list[float]], *, per_layer: bool) -> dict[str, float]:
    """Means, or the largest, over all matrices, over each group's if there are several, and of each layer."""
    count = len(reading.matrices)
    flat = numbers.get("matrices", [])
    columns = {name: flat[i * count : (i + 1) * count] for i, name in enumerate(MEASURED)}
    collected: dict[str, list[float]] = defaultdict(list)
    for i, matrix in enumerate(reading.matrices):
        if not matrix.has_gradient:
            continue
        rate = reading.rates[matrix.group]
        rate = numbers[f"rate_{matrix.group}"][0] if rate is None else rate
        suffixes = [""]
        if reading.roles.count("matrix") > 1:
            suffixes.append(f"/group_{matrix.group}")
        if per_layer:
            suffixes.append("/" + matrix.name)
        known = _values_of({name: column[i] for name, column in columns.items()}, matrix.shape, rate)
        for name, value in known.items():
            for suffix in suffixes:
                collected[name + suffix].append(value)
    return {
        PREFIX + key: _largest(found) if key.partition("/")[0].endswith("_max") else sum(found) / len(found)
        for key, found in collected.items()
    }


def _values_of(measured: dict[str, float], shape: tuple[int, int], rate: float) -> dict[str, float]:
    """The values of one matrix that are defined."""
    values: dict[str, float] = {}
    if rate != 0:
        values["update_rms"] = measured["update"] / math.sqrt(math.prod(shape))
        if measured["update"] != 0:
            values["orthogonality_error"] = measured["orthogonality"]
    if measured["weight"] != 0:
        values["relative_update"] = measured["change"] / measured["weight"]
    if measured["momentum"] != 0 and measured["momentum_spectral"] != 0:
        values["momentum_stable_rank"] = (measured["momentum"] / measured["momentum_spectral"]) ** 2
    values["spectral_norm_max"] = measured["weight_spectral"]
    return values


def _of_sums(roles: list[str], numbers: dict[str, list[float]]) -> dict[str, float]:
    """Norms over all groups of a role, and over each if there are several; and the skips."""
    values: dict[str, float] = {}
    for role in ("matrix", "adamw"):
        members = [i for i, found in enumerate(roles) if found == role]
        chosen = [("", members)] if members else []
        if len(members) > 1:
            chosen += [(f"/group_{i}", [i]) for i in members]
        for suffix, some in chosen:
            gradients, weights, changes = (sum(numbers[f"sums_{i}"][k] for i in some) for k in range(3))
            values[f"{PREFIX}grad_norm_{role}{suffix}"] = math.sqrt(gradients)
            if role == "adamw" and weights:
                values[f"{PREFIX}relative_update_adamw{suffix}"] = math.sqrt(changes / weights)
    values[PREFIX + "skipped_matrices"] = int(
        sum(numbers[f"skipped_{i}"][0] for i, role in enumerate(roles) if role == "matrix")
    )
    return values


def _largest(found: list[float]) -> float:
    """NaN if there is one."""
    return next((value for value in found if math.isnan(value)), max(found))


def _time_share(marks: dict[str, Any]) -> float | None:
    """Of the time between "begin" and "backward", and "start" and "end", the part of the latter."""
    if marks.get("begin") is None:
        return None

    def seconds(first: Any, second: Any) -> float:
        if isinstance(second, float):
            return second - float(first)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000

    step = seconds(marks["start"], marks["end"])
    rest = seconds(marks["begin"], marks["backward"])
    return step / (step + rest) if step + rest > 0 else None
