"""The stages of a round by Triton kernels: float16 on the wire, as in the stacks of one process."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hf_matrix_optim.kernels.half_maps import Sides
from hf_matrix_optim.kernels.map_graphs import MapGraphs
from hf_matrix_optim.kernels.stack_plan import SMALLEST, STATE_DTYPES, StackPlan
from hf_matrix_optim.kernels.stack_step import KernelRule, apply_direction, look_ahead, repair, top_of, whole_direction
from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.sharding.plan import MatrixJob
from hf_matrix_optim.sharding.round_step import RoundStep, RoundTask
from hf_matrix_optim.stacks import Matrices

Scalars: TypeAlias = Callable[[list[float]], Tensor]
#: By positions of the matrices with a gradient: their parameters' views, and the plan made from these.
KnownStacks: TypeAlias = dict[tuple[int, ...], tuple[list[Tensor], StackPlan]]


def can_take(job: MatrixJob, layout: MatrixLayout) -> bool:
    """Whether the kernels can take a matrix and its shards; said by what all ranks know alike."""
    along_columns = job.axis is not None and job.axis != layout.output_axis  # of memory
    columns = list(job.extents) if along_columns else [job.fans[1 - layout.output_axis]]
    return (
        not layout.flatten
        and min(job.fans) >= SMALLEST
        and all(length % 8 == 0 for length in columns)
        and (not job.extents or min(job.extents) > 0)
        and all(dtype in map(str, STATE_DTYPES) for dtype in job.dtypes)
    )


class KernelRound(RoundStep):
    """For linear layers on a GPU.

    Args:
        task: what is to be done; its exchange is of matrices as they lie in memory.
        rule: the optimizer's.
        stacks: of this round, kept from step to step; changed here.
        scalars: brings the learning rate and 1 / root, one for all or one a matrix, to the device.
        graphs: of the maps; None to launch their kernels one by one.
    """

    def __init__(
        self, task: RoundTask, rule: KernelRule, stacks: KnownStacks, scalars: Scalars, graphs: MapGraphs | None
    ) -> None:
        super().__init__(task)
        self.rule, self.stacks, self.scalars, self.graphs = rule, stacks, scalars, graphs
        rows, columns = self.exchange.fans  # of memory
        transposed = task.layout.output_axis == 1
        self.sides = Sides(rows, columns, rows > columns or (rows == columns and transposed))
        self.top = top_of(self.sides, rule)
        self.is_sent = self.exchange.axis is not None and self.exchange.shards.size > 1
        self.wire = torch.int8 if rule.takes_sign and self.is_sent else torch.float16

    def begin(self) -> None:
        shape = self.exchange.shard_shape(0, self.exchange.shards.place)
        if self.task.stack:
            self.plan = self._plan(shape)
            self.grads = [_readable(entry) for entry in self.task.stack]
            self.plan.point_to([grad.data_ptr() for grad in self.grads])
            self.found = look_ahead(self.plan, self.rule)
            bits = self.found.largest_bits
        else:
            bits = torch.empty(0, dtype=torch.int32, device=self.task.device)
        self.largest = self.exchange.largest(self.of_all(bits, 0))

    def send(self) -> None:
        self.bits = self.of_present(self.largest.wait())
        if self.task.stack:
            self.found.largest_bits = self.bits
            repair(self.plan, self.rule, self.found, self.top)
            x = self.found.x
            del self.found, self.grads
        else:
            shape = self.exchange.shard_shape(0, self.exchange.shards.place)
            x = torch.empty(shape, dtype=torch.float16, device=self.task.device)
        self.gathered = self.exchange.gather(self.of_all(x.to(self.wire), 0))

    def map(self) -> None:
        count, of_graph = self.exchange.count, None
        if count and self.graphs is not None:
            of_graph = self.graphs.input_of(count, self.sides, self.rule)
        x = self.exchange.assemble(self.gathered, self.wire, out=of_graph)
        del self.gathered
        if self.graphs is not None and of_graph is not None:
            x = self.graphs.replay(count, self.sides, self.rule)
            x = x if self.is_sent else x.clone()  # the next round's map overwrites it
        else:
            x = x.to(torch.float16)
            x = whole_direction(x.contiguous(), self.sides, self.rule) if count else x
        self.scattered = self.exchange.scatter(x)

    def share(self) -> None:
        self.shared = self.exchange.share(self.scattered, torch.float16)
        del self.scattered

    def finish(self) -> None:
        direction = self.of_present(self.exchange.directions(self.shared))
        del self.shared
        if not self.task.stack:
            if self.rule.beta2 is not None:
                self.over_shards(torch.empty(0, 1, 1, dtype=torch.float64, device=self.task.device))
            return
        apply_direction(
            self.plan,
            self.rule,
            self.scalars([1 / root for root in self.task.roots]),
            direction,
            torch.ones(len(self.task.stack), dtype=torch.float32, device=self.task.device),
            self.bits,
            top=self.top,
            inverse_rms=self._inverse_rms if self.exchange.shards.size > 1 else None,
        )

    def _inverse_rms(self, squares: Tensor) -> Tensor:
        total = self.over_shards(squares.sum(1, dtype=torch.float64).view(-1, 1, 1)).flatten()
        rms = (total / (self.sides.rows * self.sides.columns)).sqrt() + self.rule.rms_eps
        return torch.where(rms > 0, 1 / rms, 0).float()

    def _plan(self, shape: tuple[int, int, int]) -> StackPlan:
        """Addresses of this rank's elements; made anew when tensors, and so their views, are others."""
        stack, key = self.task.stack, tuple(self.task.present)
        first = stack[0]
        scale = self.task.scale(*self.exchange.plan.jobs[0].fans)
        params = [entry.param for entry in stack]
        if key in self.stacks:
            of, known = self.stacks[key]
            if known.scale == scale and all(a is b for a, b in zip(of, params, strict=True)):
                return known
        made = StackPlan(
            Sides(shape[1], shape[2], False),
            first.param.stride(0),
            scale,
            first.param.dtype,
            first.momentum.dtype,
            self.task.device,
        )
        for i, entry in enumerate(stack):
            state = [entry.param, entry.momentum] + ([] if entry.second_moment is None else [entry.second_moment])
            if any(t.stride() != first.param.stride() or t.stride(1) != 1 or t.data_ptr() % 16 for t in state):
                raise RuntimeError(
                    f"a parameter of shape {tuple(entry.param.shape)} and its state are not laid out alike, which the "
                    "GPU kernels need: set kernels='torch'"
                )
            tensors = (entry.param, entry.momentum, entry.second_moment, entry.lookahead_scale, entry.skipped)
            made.add(i, (entry.param.data_ptr(), entry.momentum.data_ptr()), tensors)
        self.stacks[key] = params, made
        return made


def _readable(entry: Matrices) -> Tensor:
    """The gradient as the kernels read it: of the parameter's dtype and strides, and aligned."""
    grad, param = entry.grad, entry.param
    if grad.dtype == param.dtype and grad.stride() == param.stride() and grad.data_ptr() % 16 == 0:
        return grad
    return torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device).copy_(grad)
