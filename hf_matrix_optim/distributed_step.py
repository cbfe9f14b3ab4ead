"""One step of matrices that lie on several ranks: each is mapped once, by one rank, and every rank steps its shard.

For a round of equal matrices: momentum and lookahead on shards -> shards to their owners -> the map on whole matrices
-> directions back, and over replicas -> second moment, decay and update on shards. Several rounds are under way at a
time, so that messages travel while matrices are mapped. On CPUs the result is bitwise that of one process.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.kernels.half_maps import Sides, newton_schulz_bytes
from hf_matrix_optim.kernels.kernel_round import KernelRound, KnownStacks, can_take
from hf_matrix_optim.kernels.map_graphs import MapGraphs
from hf_matrix_optim.kernels.stack_step import KernelRule, StepScalars
from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.plain_round import PlainRound
from hf_matrix_optim.plain_step import Group, Rule
from hf_matrix_optim.sharding.exchange import Exchange
from hf_matrix_optim.sharding.guard import are_equal, check_same, is_in_one_host, ranks_of_ddp
from hf_matrix_optim.sharding.plan import ROUND_ELEMENTS, MatrixJob, rounds_of, sharing_pays
from hf_matrix_optim.sharding.plan_table import MatrixRow
from hf_matrix_optim.sharding.round_step import RoundStep, RoundTask, run_rounds
from hf_matrix_optim.sharding.shard_layout import (
    ALONE,
    Ranks,
    ShardLayout,
    in_placements_of,
    is_sharded,
    layout_of,
    local_of,
    pieces_of,
    views_of,
)
from hf_matrix_optim.stacks import Matrices

logger = logging.getLogger("transformers.hf_matrix_optim")


def most_matrices(job: MatrixJob, max_workspace_bytes: int, replicas: int, *, by_kernels: bool) -> int:
    """Matrices that an owner may have in a round, so that the rounds under way stay within a bound; at least 1.

    By the kernels an element that an owner maps takes 14 bytes of messages and whole matrices, 6 for each replica, for
    all have its lookahead and direction, and what the map takes: peaks on 2 and 4 H200 are 65 to 95 % of that.
    """
    if by_kernels:
        of_map = newton_schulz_bytes(Sides(min(job.fans), max(job.fans), along_columns=False))
        needed = (14 + 6 * replicas) * job.elements + of_map
    else:
        needed = 64 * replicas * job.elements
    return max(1, min(ROUND_ELEMENTS // job.elements, max_workspace_bytes // needed))


@dataclass
class Member:
    """A parameter of a group that several ranks step together."""

    index: int
    param: Tensor
    shards: ShardLayout


@dataclass
class PlannedRound:
    """What stays of a round from step to step.

    Attributes:
        exchange: between its ranks.
        by_kernels: whether the GPU kernels take its matrices.
        stacks: what they know of them.
    """

    exchange: Exchange
    by_kernels: bool
    stacks: KnownStacks


class DistributedGroup:
    """The members of one param group, and the rounds in which they are stepped.

    Args:
        members: in the same order on all ranks.
        layout: how they are read as matrices.
        momentum_dtypes: of the members' momenta.
        max_workspace_bytes: bound of the temporary tensors of the rounds under way.
        by_kernels: whether the GPU kernels may be used.
    """

    def __init__(
        self,
        members: list[Member],
        layout: MatrixLayout,
        momentum_dtypes: list[torch.dtype],
        max_workspace_bytes: int,
        by_kernels: bool,
    ) -> None:
        self.members = {member.index: member for member in members}
        self.layout = layout
        self.rounds: list[PlannedRound] = []
        self._views: dict[int, KnownViews] = {}
        self._scalars: dict[torch.device, StepScalars] = {}
        jobs: dict[tuple[Any, ...], list[MatrixJob]] = defaultdict(list)
        groups: dict[tuple[Any, ...], tuple[Ranks, Ranks]] = {}
        for member, momentum_dtype in zip(members, momentum_dtypes, strict=True):
            shards = member.shards
            key = (shards.shards.members, shards.replicas.members)
            groups[key] = (shards.shards, shards.replicas)
            dtypes = (str(member.param.dtype), str(momentum_dtype))
            jobs[key] += [
                MatrixJob(member.index, i, piece.fans, piece.axis, piece.extents, dtypes)
                for i, piece in enumerate(pieces_of(layout, shards))
            ]
        for key, (cut, copies) in groups.items():
            most_of = functools.partial(
                most_matrices, max_workspace_bytes=max_workspace_bytes, replicas=copies.size, by_kernels=by_kernels
            )
            for plan in rounds_of(jobs[key], cut.size, copies.size, most_of):
                takes = by_kernels and can_take(plan.jobs[0], layout)
                exchange = Exchange(plan, cut, copies, is_transposed=takes and layout.output_axis == 1)
                self.rounds.append(PlannedRound(exchange, takes, {}))

    def step(
        self,
        rule: Rule,
        kernel_rule: KernelRule,
        group: Group,
        entries: dict[int, Matrices],
        steps: dict[int, float],
        *,
        scale: Callable[[int, int], float],
        root: Callable[[float], float],
        graphs: dict[torch.device, MapGraphs] | None,
    ) -> None:
        """Step all members; a collective of their ranks.

        Args:
            rule: the optimizer.
            kernel_rule: the same for the kernels.
            group: the param group.
            entries: tensors of the members with a gradient, by index; the others take part with zeros.
            steps: number of this step for each of them.
            scale: factor from direction to update by (fan_out, fan_in).
            root: see ``Rule.adapt``, by number of the step.
            graphs: of the optimizer's maps by the kernels, added to here; None to launch their kernels one by one.
        """

        def rounds() -> Iterator[RoundStep]:
            pieces_of_entry = functools.cache(lambda i: self._pieces(i, entries[i]))
            for planned in self.rounds:
                jobs = planned.exchange.plan.jobs
                present = [k for k, job in enumerate(jobs) if job.parameter in entries]
                first = self.members[jobs[0].parameter].param
                task = RoundTask(
                    group,
                    self.layout,
                    planned.exchange,
                    [pieces_of_entry(jobs[k].parameter)[jobs[k].piece] for k in present],
                    present,
                    [root(steps[jobs[k].parameter]) for k in present],
                    scale,
                    first.device,
                    first.dtype,
                )
                if planned.by_kernels:
                    scalars = functools.partial(self._scalars_on, first.device, group["lr"])
                    yield KernelRound(task, kernel_rule, planned.stacks, scalars, _graphs_on(first.device, graphs))
                else:
                    yield PlainRound(task, rule)

        run_rounds(rounds())

    def _scalars_on(self, device: torch.device, lr: float | Tensor, corrections: list[float]) -> Tensor:
        """(2,), or (1 + b,) where corrections differ: see ``stack_step.apply_direction``; nothing waits for it."""
        if device not in self._scalars:
            self._scalars[device] = StepScalars(device)
        scalars = self._scalars[device].fill(lr, corrections[0])
        if len(set(corrections)) == 1:
            return scalars
        each = torch.tensor(corrections, dtype=torch.float32).to(device, non_blocking=True)
        return torch.cat([scalars[:1], each])

    def without_kernels(self) -> int | None:
        """Index of a parameter that is stepped by the plain functions; None if there is none."""
        plain = (planned for planned in self.rounds if not planned.by_kernels)
        return next((planned.exchange.plan.jobs[0].parameter for planned in plain), None)

    def describe(self, names: list[str]) -> list[MatrixRow]:
        """What is planned for each matrix.

        Args:
            names: of the group's parameters.
        """
        rows = []
        for exchange in (planned.exchange for planned in self.rounds):
            shards, replicas = exchange.shards, exchange.replicas
            owners = [
                f"shard {shard}" + (f" of replica {replica}" if replicas.size > 1 else "")
                if shards.size > 1
                else f"replica {replica}"
                for replica, counts in enumerate(exchange.plan.counts)
                for shard, count in enumerate(counts)
                for _ in range(count)
            ]
            ranks = (shards.members, replicas.members)
            for job, owner in zip(exchange.plan.jobs, owners, strict=True):
                name = names[job.parameter] + (f"[{job.piece}]" if self._count(job.parameter) > 1 else "")
                size = job.elements * self.members[job.parameter].param.element_size()
                rows.append(MatrixRow(name, job.fans, job.axis, owner, size, job.operations, ranks))
        return rows

    def _count(self, index: int) -> int:
        return self.layout.matrix_count(self.members[index].shards.shape)

    def _pieces(self, index: int, entry: Matrices) -> list[Matrices]:
        """This rank's elements of each matrix of a parameter."""
        shards = self.members[index].shards
        local = [
            None if tensor is None else local_of(tensor)
            for tensor in (entry.param, entry.momentum, entry.second_moment)
        ]
        tensors = (*local, entry.skipped, entry.lookahead_scale)
        known = self._views.get(index)
        if known is None or not known.are_of(tensors):
            count = self._count(index)
            views = [[None] * count if tensor is None else views_of(tensor, self.layout, shards) for tensor in local]
            flags = [[None] * count if tensor is None else torch.split(tensor, 1) for tensor in tensors[3:]]
            known = self._views[index] = KnownViews(tensors, _addresses(tensors), [*views, *flags])
        params, momenta, seconds, skipped, scales = known.views
        grads = views_of(local_of(in_placements_of(entry.param, entry.grad)), self.layout, shards)
        return [Matrices(*of) for of in zip(params, grads, momenta, seconds, skipped, scales, strict=True)]


@dataclass
class KnownViews:
    """Views of a parameter and its state, one for each of its matrices; the same objects as long as nothing moves.

    Attributes:
        tensors, addresses: of which they are views: parameter, momentum, second moment, skip counts, lookahead scales.
        views: for each of these, one a matrix.
    """

    tensors: tuple[Tensor | None, ...]
    addresses: tuple[int, ...]
    views: list[Any]

    def are_of(self, tensors: tuple[Tensor | None, ...]) -> bool:
        same = all(a is b for a, b in zip(self.tensors, tensors, strict=True))
        return same and self.addresses == _addresses(tensors)


def _graphs_on(device: torch.device, graphs: dict[torch.device, MapGraphs] | None) -> MapGraphs | None:
    """Those of a device, made when they are first needed; None if there are to be none."""
    if graphs is not None and device not in graphs:
        graphs[device] = MapGraphs(device)
    return None if graphs is None else graphs[device]


def _addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def plan_group(
    group: Group,
    layout: MatrixLayout,
    momentum_dtypes: list[torch.dtype],
    *,
    may_be_ddp: bool,
    by_kernels: bool,
    operations: Callable[[int, int], float],
) -> DistributedGroup | None:
    """Find the parameters of a group that ranks can step together, and plan it; compared over the ranks once.

    DTensors say where their shards are. Plain parameters are stepped together if a DistributedDataParallel module
    holds them and their gradients have the same bits on all its ranks. Left to the caller are DTensors in other
    layouts, stacks of whole matrices on each rank, as experts are, and what on GPUs is mapped sooner than shared.

    Args:
        group: the param group.
        layout: how its parameters are read.
        momentum_dtypes: of each parameter's momentum.
        may_be_ddp: whether plain parameters may be DistributedDataParallel's.
        by_kernels: whether the GPU kernels may be used.
        operations: of the map, by (fan_out, fan_in).

    Raises:
        RuntimeError: on every rank, if they would not do the same.
    """
    params: list[Tensor] = group["params"]
    members: list[Member] = []
    plain: list[tuple[int, Ranks]] = []
    if may_be_ddp:
        plain = [(i, ranks) for i, ranks in enumerate(ranks_of_ddp(params)) if ranks is not None]
        for ranks in {ranks.members: ranks for _, ranks in plain}.values():
            of_module = [params[i] for i, other in plain if other == ranks]
            if not are_equal([*(p.grad for p in of_module), *of_module], ranks, params[0].device):
                warn_once(
                    "gradients or parameters differ between the ranks of DistributedDataParallel, so each rank steps "
                    "all matrices by itself"
                )
                plain = [(i, other) for i, other in plain if other != ranks]
        for i, ranks in plain:
            whole = ShardLayout(tuple(params[i].shape), None, ALONE, ranks)
            needed = sum(operations(*piece.fans) for piece in pieces_of(layout, whole))
            # The exchange is padded to the longest share, so nearly all of it would be padding among many more ranks.
            enough = sum(other == ranks for _, other in plain) >= 2 * ranks.size
            pays = enough and sharing_pays(needed, params[i].numel(), in_one_host=is_in_one_host(ranks))
            if pays or params[i].device.type == "cpu":
                members.append(Member(i, params[i], whole))
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(params))]
    gathered = []
    for i, p in enumerate(params):
        if not is_sharded(p):
            continue
        shards = layout_of(p)
        if shards is None or (not shards.has_whole_matrices(layout) and not pieces_of(layout, shards)):
            gathered.append(f"{names[i]} with placements {getattr(p, 'placements', ())}")
        elif not shards.has_whole_matrices(layout) and not shards.is_on_one_rank:
            members.append(Member(i, p, shards))
    if gathered:
        warn_once(
            f"{len(gathered)} of {len(params)} parameters, {gathered[0]} for one, are gathered whole on every rank "
            "for their step: matrices are shared out where one mesh dimension cuts them"
        )
    if not members:
        return None
    members.sort(key=lambda member: member.index)
    lines = [f"{group['algorithm']} by {'kernels' if by_kernels else 'plain functions'}"] + [
        f"{names[member.index]} {tuple(member.param.shape)} {member.param.dtype} cut along {member.shards.axis}"
        for member in members
    ]
    for ranks in {r.members: r for m in members for r in (m.shards.shards, m.shards.replicas)}.values():
        check_same(lines, ranks, params[0].device)
    dtypes = [momentum_dtypes[member.index] for member in members]
    return DistributedGroup(members, layout, dtypes, group["max_workspace_bytes"], by_kernels)


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
