"""One step of matrices that lie on several ranks: each is mapped once, by one rank, and every rank steps its shard.

For a round of equal matrices: momentum and lookahead on shards -> shards to their owners -> the map on whole matrices
-> directions back, and over replicas -> second moment, decay and update on shards. Several rounds are under way at a
time, so that messages travel while matrices are mapped. On CPUs the result is bitwise that of one process.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.plain_step import Group, Rule, apply_direction, are_finite, look_ahead, state_dtype
from hf_matrix_optim.sharding.exchange import Exchange, Pending
from hf_matrix_optim.sharding.guard import are_equal, check_same, ranks_of_ddp
from hf_matrix_optim.sharding.plan import ROUND_ELEMENTS, MatrixJob, Round, rounds_of
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

#: Bytes that a round needs for each element of an owner's share, all its stages together.
BYTES_AN_ELEMENT = 64


@dataclass
class Member:
    """A parameter of a group that several ranks step together."""

    index: int
    param: Tensor
    shards: ShardLayout


class DistributedGroup:
    """The members of one param group, and the rounds in which they are stepped.

    Args:
        members: in the same order on all ranks.
        layout: how they are read as matrices.
        momentum_dtypes: of the members' momenta.
        max_workspace_bytes: bound of the temporary tensors of the rounds under way.
    """

    def __init__(
        self,
        members: list[Member],
        layout: MatrixLayout,
        momentum_dtypes: list[torch.dtype],
        max_workspace_bytes: int,
    ) -> None:
        self.members = {member.index: member for member in members}
        self.layout = layout
        self.schedules: list[tuple[Ranks, Ranks, list[Round]]] = []
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
        most = max(1, min(ROUND_ELEMENTS, max_workspace_bytes // BYTES_AN_ELEMENT))
        for key, (cut, copies) in groups.items():
            self.schedules.append((cut, copies, rounds_of(jobs[key], cut.size, copies.size, most)))

    def step(
        self,
        rule: Rule,
        group: Group,
        entries: dict[int, Matrices],
        steps: dict[int, float],
        *,
        scale: Callable[[int, int], float],
        root: Callable[[float], float],
    ) -> None:
        """Step all members; a collective of their ranks.

        Args:
            rule: the optimizer.
            group: the param group.
            entries: tensors of the members with a gradient, by index; the others take part with zeros.
            steps: number of this step for each of them.
            scale: factor from direction to update by (fan_out, fan_in).
            root: see ``Rule.adapt``, by number of the step.
        """
        pieces = {i: self._pieces(i, entry) for i, entry in entries.items()}
        stages: list[_RoundStep] = []
        for shards, replicas, rounds in self.schedules:
            for plan in rounds:
                present = [k for k, job in enumerate(plan.jobs) if job.parameter in pieces]
                stack = [pieces[plan.jobs[k].parameter][plan.jobs[k].piece] for k in present]
                roots = [root(steps[plan.jobs[k].parameter]) for k in present]
                like = local_of(self.members[plan.jobs[0].parameter].param)
                exchange = Exchange(plan, shards, replicas)
                stages.append(_RoundStep(rule, group, self.layout, exchange, stack, present, roots, scale, like))
        for i in range(len(stages) + 3):
            for late, stage in enumerate((_RoundStep.begin, _RoundStep.map, _RoundStep.share, _RoundStep.finish)):
                if 0 <= i - late < len(stages):
                    stage(stages[i - late])

    def describe(self, names: list[str]) -> list[tuple[str, ...]]:
        """A row for each matrix: name, shape, axis that is cut, owning rank, bytes of its elements, share of the work.

        Args:
            names: of the group's parameters.
        """
        rows: list[tuple[str, ...]] = []
        for shards, replicas, rounds in self.schedules:
            total = sum(job.operations for plan in rounds for job in plan.jobs)
            for plan in rounds:
                owners = [
                    f"shard {shard}" + (f" of replica {replica}" if replicas.size > 1 else "")
                    if shards.size > 1
                    else f"replica {replica}"
                    for replica, counts in enumerate(plan.counts)
                    for shard, count in enumerate(counts)
                    for _ in range(count)
                ]
                for job, owner in zip(plan.jobs, owners, strict=True):
                    cut = "" if job.axis is None else ("rows", "columns")[job.axis]
                    piece = f"[{job.piece}]" if self._count(job.parameter) > 1 else ""
                    shape = f"{job.fans[0]} x {job.fans[1]}"
                    share = f"{job.operations / total:.2%}"
                    rows.append((names[job.parameter] + piece, shape, cut, owner, f"{job.elements:,}", share))
        return rows

    def _count(self, index: int) -> int:
        return self.layout.matrix_count(self.members[index].shards.shape)

    def _pieces(self, index: int, entry: Matrices) -> list[Matrices]:
        """This rank's elements of each matrix of a parameter."""
        shards = self.members[index].shards
        second = entry.second_moment
        views = [
            views_of(local_of(tensor), self.layout, shards)
            for tensor in (entry.param, in_placements_of(entry.param, entry.grad), entry.momentum)
        ]
        seconds = [None] * len(views[0]) if second is None else views_of(local_of(second), self.layout, shards)
        skipped = torch.split(entry.skipped, 1)
        return [Matrices(*tensors) for tensors in zip(*views, seconds, skipped, strict=True)]


def plan_group(
    group: Group, layout: MatrixLayout, momentum_dtypes: list[torch.dtype], *, may_be_ddp: bool
) -> DistributedGroup | None:
    """Find the parameters of a group that ranks can step together, and plan it; compared over the ranks once.

    DTensors say where their shards are. Plain parameters are stepped together if a DistributedDataParallel module
    holds them and their gradients have the same bits on all its ranks. Left to the caller are DTensors in other
    layouts, and stacks of whole matrices on each rank, as experts are.

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
        members += [
            Member(i, params[i], ShardLayout(tuple(params[i].shape), None, ALONE, ranks)) for i, ranks in plain
        ]
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(params))]
    gathered = []
    for i, p in enumerate(params):
        if not is_sharded(p):
            continue
        shards = layout_of(p)
        if shards is None or (not shards.has_whole_matrices(layout) and not pieces_of(layout, shards)):
            gathered.append(f"{names[i]} with placements {getattr(p, 'placements', ())}")
        elif not shards.has_whole_matrices(layout) and shards.shards.size * shards.replicas.size > 1:
            members.append(Member(i, p, shards))
    if gathered:
        warn_once(
            f"{len(gathered)} of {len(params)} parameters, {gathered[0]} for one, are gathered whole on every rank "
            "for their step: matrices are shared out where one mesh dimension cuts them"
        )
    if not members:
        return None
    members.sort(key=lambda member: member.index)
    lines = [
        f"{names[member.index]} {tuple(member.param.shape)} {member.param.dtype} cut along {member.shards.axis}"
        for member in members
    ]
    for ranks in {r.members: r for m in members for r in (m.shards.shards, m.shards.replicas)}.values():
        check_same(lines, ranks, params[0].device)
    dtypes = [momentum_dtypes[member.index] for member in members]
    return DistributedGroup(members, layout, dtypes, group["max_workspace_bytes"])


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


class _RoundStep:
    """The stages of one round in one step."""

    def __init__(
        self,
        rule: Rule,
        group: Group,
        layout: MatrixLayout,
        exchange: Exchange,
        stack: list[Matrices],
        present: list[int],
        roots: list[float],
        scale: Callable[[int, int], float],
        like: Tensor,
    ) -> None:
        self.rule, self.group, self.exchange, self.stack = rule, group, exchange, stack
        self.scale = scale(*exchange.fans)
        self.layout = MatrixLayout(layout.output_axis, layout.flatten)  # of a piece, which is one matrix
        self.count = len(exchange.plan.jobs)
        self.present = None if len(present) == self.count else torch.tensor(present, dtype=torch.int64)
        self.roots = roots
        self.device = like.device
        self.dtype = state_dtype(like)

    def begin(self) -> None:
        """Momentum and lookahead on shards; they set out for their owners."""
        shape = self.exchange.shard_shape(self.count, self.exchange.shards.place)
        wire, _ = self.rule.wire_dtypes(self.group, self.dtype, self.device)
        if self.stack:
            weight = self.rule.gradient_weight(self.group)
            self.momentum, lookahead = look_ahead(self.stack, self.layout, self.group, weight)
            x, finite = self.rule.map_input(lookahead, self.group).to(wire), are_finite(lookahead)
        else:
            x = torch.empty(0, *shape[1:], dtype=wire, device=self.device)
            finite = torch.empty(0, 1, 1, dtype=torch.bool, device=self.device)
        self.finite = self.exchange.all_finite(self._of_all(finite, 1))
        self.gathered = self.exchange.gather(self._of_all(x, 0))

    def map(self) -> None:
        """The map of the matrices that this rank owns; directions set out for the ranks with their shards."""
        wire_in, self.wire = self.rule.wire_dtypes(self.group, self.dtype, self.device)
        whole = self.exchange.assemble(self.gathered, wire_in).to(self.dtype)
        self.is_finite = self.finite.wait() > 0
        if not (self.device.type == "cpu" and bool(self.is_finite.all())):
            whole = torch.where(self.is_finite[self.exchange.owned], whole, 0)
        direction = self.rule.map_lookahead(whole, self.group) if whole.numel() else whole
        self.scattered = self.exchange.scatter(direction.to(self.wire))
        del self.gathered

    def share(self) -> None:
        """Directions set out for the other replicas."""
        self.shared: Pending = self.exchange.share(self.scattered, self.wire)
        del self.scattered

    def finish(self) -> None:
        """Second moment, decay and update on shards."""
        direction = self.exchange.directions(self.shared)
        if not self.stack:
            if self.rule.has_second_moment:
                self._over_shards(torch.empty(0, 1, 1, dtype=torch.float64, device=self.device))
            return
        finite: Tensor | None = self._of_present(self.is_finite)
        if finite is not None and self.device.type == "cpu" and bool(finite.all()):
            finite = None
        fan_out, fan_in = self.exchange.fans
        root: float | Tensor = self.roots[0]
        if len(set(self.roots)) > 1:
            root = torch.tensor(self.roots, dtype=self.dtype, device=self.device).view(-1, 1, 1)
        apply_direction(
            self.rule, self.stack, self.layout, self.group, self.momentum,
            self._of_present(direction).to(self.dtype, copy=True), finite,
            scale=self.scale, root=root, elements=fan_out * fan_in, over_shards=self._over_shards,
        )  # fmt: skip

    def _of_all(self, tensor: Tensor, missing: float) -> Tensor:
        """(matrices, ...) with ``missing`` where a matrix has no gradient here."""
        if self.present is None:
            return tensor
        every = torch.full((self.count, *tensor.shape[1:]), missing, dtype=tensor.dtype, device=self.device)
        return every.index_copy_(0, self.present.to(self.device), tensor)

    def _of_present(self, tensor: Tensor) -> Tensor:
        return tensor if self.present is None else tensor.index_select(0, self.present.to(self.device))

    def _over_shards(self, tensor: Tensor) -> Tensor:
        return self._of_present(self.exchange.over_shards(self._of_all(tensor, 0)))
