"""A round's matrices to their owners and back, as bytes: two all-to-alls, and over replicas an all-gather."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_matrix_optim.sharding.plan import Round
from hf_matrix_optim.sharding.shard_layout import Ranks

#: ``all_gather_into_tensor`` is its older name.
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass
class Pending:
    """A tensor that arrives; ``wait`` before it is read."""

    tensor: Tensor
    work: Any = None
    kept: Tensor | None = None  # what is being sent must live until then

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        self.work = self.kept = None
        return self.tensor


class Exchange:
    """The collectives of one round, for one rank.

    A stack is (matrices, a, b), with (a, b) this rank's part of (fan_out, fan_in).

    Args:
        plan: the round.
        shards, replicas: this rank's, of all its matrices.
        is_transposed: (a, b) is of (fan_in, fan_out) instead.
    """

    def __init__(self, plan: Round, shards: Ranks, replicas: Ranks, is_transposed: bool = False) -> None:
        self.plan, self.shards, self.replicas = plan, shards, replicas
        job = plan.jobs[0]
        self.fans, self.axis, self.extents = job.fans, job.axis, job.extents
        if is_transposed:
            self.fans, self.axis = (job.fans[1], job.fans[0]), None if job.axis is None else 1 - job.axis
        own = plan.counts[replicas.place]
        before = sum(map(sum, plan.counts[: replicas.place]))
        self.of_replica = slice(before, before + sum(own))  # of the stack: what this replica's ranks map
        self.counts = own
        self.count = own[shards.place]
        start = before + sum(own[: shards.place])
        self.owned = slice(start, start + self.count)

    def shard_shape(self, count: int, place: int) -> tuple[int, int, int]:
        """Shape of a stack of ``count`` matrices as the rank at ``place`` holds it."""
        if self.axis is None:
            return count, *self.fans
        shape = [count, *self.fans]
        shape[1 + self.axis] = self.extents[place]
        return shape[0], shape[1], shape[2]

    def gather(self, stack: Tensor) -> Pending:
        """Send this rank's shards, (matrices, a, b), to the owners; gives bytes for ``assemble``."""
        sent = stack[self.of_replica]
        if self.axis is None or self.shards.size == 1:
            own = sent[self.owned.start - self.of_replica.start :][: self.count]
            return Pending(own if self.count == len(stack) else own.clone())  # what others map is let go
        outgoing = [_bytes_of(self.shard_shape(count, self.shards.place), stack) for count in self.counts]
        incoming = [_bytes_of(self.shard_shape(self.count, place), stack) for place in range(self.shards.size)]
        return self._all_to_all(sent, outgoing, incoming)

    def assemble(self, pending: Pending, wire: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The owned matrices, whole: (count, fan_out, fan_in).

        Args:
            pending: of ``gather``; bytes where matrices are cut.
            wire: dtype of what was sent.
            out: what to write them into, converted to its dtype; without it they are of ``wire``.
        """
        arrived = pending.wait()
        if self.axis is None or self.shards.size == 1:
            return arrived if out is None else out.copy_(arrived)
        shapes = [self.shard_shape(self.count, place) for place in range(self.shards.size)]
        cut = torch.split(arrived.view(wire), [math.prod(shape) for shape in shapes])
        pieces = [piece.view(shape) for piece, shape in zip(cut, shapes, strict=True)]
        return torch.cat(pieces, dim=1 + self.axis, out=out)

    def scatter(self, whole: Tensor) -> Pending:
        """Send the owned matrices' directions, (count, fan_out, fan_in), back to the ranks that hold their shards."""
        if self.axis is None or self.shards.size == 1:
            return Pending(whole.contiguous())
        pieces = torch.split(whole, list(self.extents), dim=1 + self.axis)
        sent = torch.cat([piece.flatten() for piece in pieces])
        outgoing = [_bytes_of(tuple(piece.shape), whole) for piece in pieces]
        incoming = [_bytes_of(self.shard_shape(count, self.shards.place), whole) for count in self.counts]
        return self._all_to_all(sent, outgoing, incoming)

    def share(self, pending: Pending, dtype: torch.dtype) -> Pending:
        """Directions of all matrices of the round, (matrices, a, b), from what the replicas have each mapped."""
        arrived = pending.wait()
        shape = self.shard_shape(sum(self.counts), self.shards.place)
        own = (arrived if arrived.dtype == dtype else arrived.view(dtype)).view(shape)
        if self.replicas.size == 1:
            return Pending(own)
        most = max(map(sum, self.plan.counts))
        sent = own.contiguous()
        if own.size(0) < most:
            sent = own.new_zeros(self.shard_shape(most, self.shards.place))
            sent[: own.size(0)] = own
        received = sent.new_empty(self.replicas.size, *sent.shape)
        work = all_gather(
            received.view(-1).view(torch.uint8), sent.view(-1).view(torch.uint8), self.replicas.group, async_op=True
        )
        return Pending(received, work, sent)

    def directions(self, pending: Pending) -> Tensor:
        """What ``share`` gives, in the order of the round's jobs."""
        arrived = pending.wait()
        if self.replicas.size == 1:
            return arrived
        mapped = [sum(counts) for counts in self.plan.counts]
        if min(mapped) == max(mapped):  # nothing is padding
            return arrived.flatten(0, 1)
        return torch.cat([of[:count] for of, count in zip(arrived, mapped, strict=True)])

    def smallest(self, tensor: Tensor) -> Pending:
        """Elementwise smallest over the ranks that hold the shards."""
        return self._reduced(tensor, "MIN")

    def largest(self, tensor: Tensor) -> Pending:
        """Elementwise largest over the ranks that hold the shards."""
        return self._reduced(tensor, "MAX")

    def over_shards(self, tensor: Tensor) -> Tensor:
        """Sum of a small tensor over the ranks that hold the shards."""
        if self.shards.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, self.shards.group)
        return tensor

    def _reduced(self, tensor: Tensor, operation: str) -> Pending:
        if self.shards.size == 1:
            return Pending(tensor)
        work = dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), self.shards.group, async_op=True)
        return Pending(tensor, work)

    def _all_to_all(self, sent: Tensor, outgoing: list[int], incoming: list[int]) -> Pending:
        payload = sent.contiguous().view(-1).view(torch.uint8)
        received = payload.new_empty(sum(incoming))
        work = dist.all_to_all_single(received, payload, incoming, outgoing, group=self.shards.group, async_op=True)
        return Pending(received, work, payload)


def _bytes_of(shape: tuple[int, ...], like: Tensor) -> int:
    return math.prod(shape) * like.element_size()
