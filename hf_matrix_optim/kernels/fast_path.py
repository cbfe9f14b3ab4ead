"""Which parameters of a group the kernels take, kept from step to step; and the step as one CUDA graph."""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.kernels.graph_capture import captured
from hf_matrix_optim.kernels.half_maps import Sides
from hf_matrix_optim.kernels.stack_plan import StackPlan, can_take, matrices_of
from hf_matrix_optim.kernels.stack_step import KernelRule, StepScalars, step_stack, workspace_bytes
from hf_matrix_optim.matrix_layout import MatrixLayout, to_matrices
from hf_matrix_optim.stacks import MatrixLists, present

logger = logging.getLogger("transformers.hf_matrix_optim")

MOST_PLANS = 256
MOST_MATRICES = 65535  # of a stack: the second axis of a grid
Scale = Callable[[int, int], float]


@dataclass
class GroupPlan:
    """The stacks of parameters that are stepped together, the positions of those left over, and their graph."""

    options: Any
    places: list[Any]
    stacks: list[StackPlan]
    rest: list[int]
    scalars: StepScalars
    momentum_starts: list[int]
    momentum_forms: list[Any]
    graph: torch.cuda.CUDAGraph | None = None
    graph_rule: KernelRule | None = None
    steps_of_rule: int = 0


class FastPath:
    """The kernels' side of one optimizer."""

    def __init__(self) -> None:
        self.plans: dict[int, GroupPlan] = {}
        self._said: set[str] = set()

    def step(
        self,
        lists: MatrixLists,
        layout: MatrixLayout,
        rule: KernelRule,
        scale: Scale,
        *,
        lr: float | Tensor,
        correction: float,
        max_workspace_bytes: int,
        cuda_graph: bool,
        take_all: bool,
    ) -> list[int]:
        """Step the parameters that the kernels can take and return the positions of the others.

        Args:
            lists: parameters of one group and device.
            layout: how they are read as matrices.
            rule: the optimizer's.
            scale: factor from direction to update by (fan_out, fan_in).
            lr: learning rate; a tensor on the device is read there.
            correction: 1 / sqrt(1 - beta2^t), or 1.
            max_workspace_bytes: bound of the temporary tensors of a stack.
            cuda_graph: replay the launches of all stacks as one graph from the third step on.
            take_all: refuse to leave any.

        Raises:
            RuntimeError: if ``take_all`` and there are others; none of ``lists`` is stepped then.
        """
        grad_starts = [grad.data_ptr() for grad in lists.grads]
        plan = self._plan(lists, grad_starts, layout, rule, scale, max_workspace_bytes)
        if plan.rest and take_all:
            shape = tuple(lists.params[plan.rest[0]].shape)
            raise RuntimeError(
                f"kernels='triton' was asked for, but a parameter of shape {shape} is too small or not laid out for "
                "them; or use kernels='auto'"
            )
        if plan.stacks:
            with torch.cuda.device(plan.scalars.tensor.device):
                plan.scalars.fill(lr, correction)
                for stack in plan.stacks:
                    stack.point_to(grad_starts)
                if cuda_graph:
                    self._replay(plan, rule)
                else:
                    _launch(plan, rule)
        return plan.rest

    def _replay(self, plan: GroupPlan, rule: KernelRule) -> None:
        if plan.graph_rule != rule:
            plan.graph, plan.graph_rule, plan.steps_of_rule = None, rule, 0
        plan.steps_of_rule += 1
        if plan.steps_of_rule <= 2:  # kernels are compiled, and libraries set up, outside of a capture
            _launch(plan, rule)
            return
        if plan.graph is None:
            device = plan.scalars.tensor.device
            on_device = [other for other in self.plans.values() if other.scalars.tensor.device == device]
            earlier = [other.graph for other in on_device if other.graph is not None]
            plan.graph, _ = captured(functools.partial(_launch, plan, rule), device, earlier)
        plan.graph.replay()

    def _plan(
        self,
        lists: MatrixLists,
        grad_starts: list[int],
        layout: MatrixLayout,
        rule: KernelRule,
        scale: Scale,
        max_workspace_bytes: int,
    ) -> GroupPlan:
        """Stacks for the kernels, and the parameters they cannot take; kept while the tensors stay where they are."""
        options = (layout, scale(1, 1), scale(1, 4), max_workspace_bytes, rule.passes > 0)
        places = _places(lists, grad_starts)
        first = id(lists.params[0])
        momentum_starts = [momentum.data_ptr() for momentum in lists.momenta]
        known = self.plans.get(first)
        has_moved = known is not None and known.momentum_starts != momentum_starts  # int8 ones are new in every step
        if known is not None and has_moved and known.momentum_forms == _forms(lists.momenta):
            known.momentum_starts = momentum_starts
            for stack in known.stacks:
                stack.move_momenta(momentum_starts)
        now = (options, places, momentum_starts)
        if known is None or (known.options, known.places, known.momentum_starts) != now:
            if known is None and len(self.plans) >= MOST_PLANS:  # gathered anew in every step, some never come back
                del self.plans[next(iter(self.plans))]
            stacks, rest = _new_plan(lists, layout, rule, scale, max_workspace_bytes)
            scalars = StepScalars(lists.params[0].device)
            forms = _forms(lists.momenta)
            known = GroupPlan(options, places, stacks, rest, scalars, momentum_starts, forms)
            self.plans[first] = known
            matrices = sum(len(stack.owners) for stack in stacks)
            message = (
                f"{matrices} matrices of {len(lists.params) - len(rest)} parameters are stepped by Triton kernels in "
                f"{len(stacks)} stacks, {len(rest)} parameters by the plain path"
            )
            if message not in self._said:  # sharded parameters are gathered, and planned for, in every step
                self._said.add(message)
                logger.info(message)
        return known


def _places(lists: MatrixLists, grad_starts: list[int]) -> list[Any]:
    """All that a plan rests on but momenta, in lists that C code makes and compares: a step's first launch waits."""
    return [
        [p.data_ptr() for p in lists.params],
        [v.data_ptr() for v in lists.second_moments if v is not None],
        [s.data_ptr() for s in lists.skipped],
        [s.data_ptr() for s in lists.lookahead_scales if s is not None],
        [g.stride() for g in lists.grads],
        [g.dtype for g in lists.grads],
        [start & 15 for start in grad_starts],
    ]


def _forms(momenta: list[Tensor]) -> list[Any]:
    """What a plan rests on of momenta that may move."""
    return [(momentum.stride(), momentum.dtype, momentum.data_ptr() & 15) for momentum in momenta]


def _launch(plan: GroupPlan, rule: KernelRule) -> None:
    for stack in plan.stacks:
        step_stack(stack, rule, plan.scalars.tensor)


def _new_plan(
    lists: MatrixLists, layout: MatrixLayout, rule: KernelRule, scale: Scale, max_workspace_bytes: int
) -> tuple[list[StackPlan], list[int]]:
    rest: list[int] = []
    by_shape: dict[Any, list[tuple[int, tuple[int, int], tuple[Tensor | None, ...]]]] = defaultdict(list)
    for owner, param in enumerate(lists.params):
        parts = list(lists.entry(owner).parts(layout))
        if not all(can_take(part.param, part.grad, part.momentum, part.second_moment) for part in parts):
            rest.append(owner)
            continue
        starts = param.data_ptr(), lists.momenta[owner].data_ptr()
        for part in parts:
            shape = (*part.param.shape[-2:], part.param.stride(-2), part.param.dtype, part.momentum.dtype)
            fans = to_matrices(part.param, layout).shape[-2:]
            params = matrices_of(part.param)
            second = [None] * len(params) if part.second_moment is None else matrices_of(part.second_moment)
            tensors = zip(
                params,
                matrices_of(part.momentum),
                second,
                present(part.lookahead_scale).unbind(),
                part.skipped.unbind(),
                strict=True,
            )
            by_shape[shape, fans] += [(owner, starts, each) for each in tensors]
    stacks = []
    for ((rows, columns, stride, dtype, momentum_dtype), fans), matrices in by_shape.items():
        sides = Sides(rows, columns, rows > columns or (rows == columns and layout.output_axis == 1))
        most = min(MOST_MATRICES, max(1, max_workspace_bytes // workspace_bytes(sides, rule)))
        slices = -(-len(matrices) // most)
        for number in range(slices):  # of equal size, to one
            stack = StackPlan(sides, stride, scale(*fans), dtype, momentum_dtype, lists.params[0].device)
            for matrix in matrices[len(matrices) * number // slices : len(matrices) * (number + 1) // slices]:
                stack.add(*matrix)
            stacks.append(stack)
    return stacks, rest
