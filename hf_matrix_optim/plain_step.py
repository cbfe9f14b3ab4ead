"""The step of a stack of equal matrices in plain torch; what the GPU kernels are tested against.

``look_ahead`` -> the optimizer's ``map_lookahead`` -> ``apply_direction``. The first and the last are elementwise, up
to one sum a matrix, so that they can run on shards of matrices while the map runs on whole ones.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.newton_schulz import largest_magnitude
from hf_matrix_optim.stacks import Matrices, gather, present, scatter

Group = dict[str, Any]


class Rule(Protocol):
    """What an optimizer is, beside its constructor. Stacks are (b, fan_out, fan_in)."""

    has_second_moment: bool

    def gradient_weight(self, group: Group) -> float:
        """Factor of the gradient in the momentum; negative to step along the gradient."""

    def map_input(self, lookahead: Tensor, group: Group) -> Tensor:
        """What the map looks at, elementwise from the lookahead; may be of a smaller dtype."""

    def wire_dtypes(self, group: Group, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
        """The smallest dtypes that hold what goes into the map and what comes out of it, for a state of ``dtype``."""

    def map_lookahead(self, x: Tensor, group: Group) -> Tensor:
        """Direction of whole matrices, finite, in the state's dtype; not modified."""

    def adapt(self, direction: Tensor, second_moment: Tensor, group: Group, root: float | Tensor) -> Tensor:
        """Update the second moment in place and divide by its root, elementwise.

        Args:
            root: sqrt(1 - beta2^t), or 1 without bias correction; a tensor (b, 1, 1) where matrices differ in t.
        """

    def rms_divisor(self, rms: Tensor, group: Group) -> Tensor:
        """What an adapted direction with this root mean square, (b, 1, 1), is divided by."""


def state_dtype(p: Tensor) -> torch.dtype:
    """float32 at least, whatever the parameter's dtype."""
    return torch.promote_types(p.dtype, torch.float32)


def look_ahead(stack: list[Matrices], layout: MatrixLayout, group: Group, weight: float) -> tuple[Tensor, Tensor]:
    """Momentum after this step's gradient, and the lookahead; new tensors, (b, fan_out, fan_in) each."""
    dtype = state_dtype(stack[0].param)
    beta = group["momentum"]
    grad = gather([entry.grad for entry in stack], layout).to(dtype)
    if weight != 1:
        grad.mul_(weight)
    momentum = gather([entry.momentum for entry in stack], layout).to(dtype).mul_(beta).add_(grad)
    return momentum, grad.add_(momentum, alpha=beta) if group["nesterov"] else momentum


def are_finite(lookahead: Tensor) -> Tensor:
    """(b, 1, 1) bool: whether all elements of a matrix are finite; True for one without elements."""
    if lookahead.numel() == 0:
        return torch.ones(lookahead.size(0), 1, 1, dtype=torch.bool, device=lookahead.device)
    return torch.isfinite(largest_magnitude(lookahead, dim=(-2, -1)))


def sum_of_squares(stack: Tensor) -> Tensor:
    """(b, 1, 1) float64, so that the sum over shards is the sum over the whole up to float32's rounding."""
    norm: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return norm.square_()


def apply_direction(
    rule: Rule,
    stack: list[Matrices],
    layout: MatrixLayout,
    group: Group,
    momentum: Tensor,
    direction: Tensor,
    finite: Tensor | None,
    *,
    scale: float,
    root: float | Tensor,
    elements: int,
    over_shards: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Write a step into the tensors of a stack: second moment, decay, update, momentum, skip counts.

    Args:
        rule: the optimizer.
        stack: the matrices, or this rank's shards of them.
        layout: how they are read.
        group: their param group.
        momentum: from ``look_ahead``.
        direction: from the map; overwritten.
        finite: (b, 1, 1) bool, False for a matrix to be left as it is; None if there is none.
        scale: factor from direction to update.
        root: see ``Rule.adapt``.
        elements: of one whole matrix.
        over_shards: sums a tensor over the ranks that hold the other shards.
    """
    dtype = state_dtype(stack[0].param)
    second_moment = None
    if rule.has_second_moment:
        second_moment = gather([present(entry.second_moment) for entry in stack], layout)
        direction = rule.adapt(direction, second_moment, group, root)
        rms = (over_shards(sum_of_squares(direction)) / elements).sqrt_().to(dtype)
        direction = direction.div_(rule.rms_divisor(rms, group))

    # Where a matrix is skipped its rate is 0; a plain number is faster where none is.
    rate = group["lr"] if finite is None else group["lr"] * finite.to(dtype)
    param = gather([entry.param for entry in stack], layout).to(dtype).mul_(1 - rate * group["weight_decay"])
    if isinstance(rate, Tensor):
        param.addcmul_(direction, -rate * scale)
    else:
        param.add_(direction, alpha=-rate * scale)
    scatter(param, [entry.param for entry in stack], layout)

    if finite is not None:
        momentum = torch.where(finite, momentum, gather([entry.momentum for entry in stack], layout))
    scatter(momentum, [entry.momentum for entry in stack], layout)
    if second_moment is not None:
        old = [present(entry.second_moment) for entry in stack]
        if finite is not None:
            second_moment = torch.where(finite, second_moment, gather(old, layout))
        scatter(second_moment, old, layout)
    if finite is not None:
        bad = (~finite).flatten().to(torch.int64)
        counts = [entry.skipped.numel() for entry in stack]
        torch._foreach_add_([entry.skipped for entry in stack], list(torch.split(bad, counts)))


def step_stack(
    rule: Rule, stack: list[Matrices], layout: MatrixLayout, group: Group, *, scale: float, root: float
) -> None:
    """One step of whole matrices of one shape, as one stack."""
    momentum, lookahead = look_ahead(stack, layout, group, rule.gradient_weight(group))
    finite: Tensor | None = are_finite(lookahead)
    assert finite is not None
    if finite.device.type == "cpu" and bool(finite.all()):  # on a GPU, looking would mean waiting
        finite = None
    else:
        lookahead = torch.where(finite, lookahead, 0)
    elements = math.prod(lookahead.shape[-2:])
    direction = rule.map_lookahead(rule.map_input(lookahead, group), group)
    apply_direction(rule, stack, layout, group, momentum, direction, finite, scale=scale, root=root, elements=elements)
