"""One round of one step: the stages that every rank takes its matrices through; how is up to a subclass."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.sharding.exchange import Exchange
from hf_matrix_optim.stacks import Matrices


@dataclass
class RoundTask:
    """What is to be done in a round.

    Attributes:
        group: the param group.
        layout: how its parameters are read.
        exchange: of the round.
        stack: this rank's elements of the matrices that have a gradient here.
        present: their positions among the round's matrices.
        roots: for each, root of its second moment's bias.
        scale: factor from direction to update by (fan_out, fan_in).
        device: of all tensors.
        dtype: of the parameters.
    """

    group: dict[str, Any]
    layout: MatrixLayout
    exchange: Exchange
    stack: list[Matrices]
    present: list[int]
    roots: list[float]
    scale: Callable[[int, int], float]
    device: torch.device
    dtype: torch.dtype


class RoundStep:
    """Stages in the order in which they are taken; rounds are taken through them one behind the other."""

    def __init__(self, task: RoundTask) -> None:
        self.task, self.exchange = task, task.exchange
        self.count = len(task.exchange.plan.jobs)
        everything = len(task.present) == self.count
        self._present = None if everything else torch.tensor(task.present, dtype=torch.int64, device=task.device)

    def begin(self) -> None:
        """Momentum and lookahead on shards."""
        raise NotImplementedError

    def send(self) -> None:
        """Lookaheads set out for their owners."""
        raise NotImplementedError

    def map(self) -> None:
        """The map of the matrices that this rank owns; directions set out for the ranks with their shards."""
        raise NotImplementedError

    def share(self) -> None:
        """Directions set out for the other replicas."""
        raise NotImplementedError

    def finish(self) -> None:
        """Second moment, decay and update on shards."""
        raise NotImplementedError

    def of_all(self, tensor: Tensor, missing: float) -> Tensor:
        """(matrices, ...) from what is present, with ``missing`` where a matrix has no gradient here."""
        if self._present is None:
            return tensor
        every = torch.full((self.count, *tensor.shape[1:]), missing, dtype=tensor.dtype, device=self.task.device)
        return every.index_copy_(0, self._present, tensor)

    def of_present(self, tensor: Tensor) -> Tensor:
        """Of (matrices, ...) what is present."""
        return tensor if self._present is None else tensor.index_select(0, self._present)

    def over_shards(self, sums: Tensor) -> Tensor:
        """Sums over the ranks with the other shards, of what is present; a collective."""
        return self.of_present(self.exchange.over_shards(self.of_all(sums, 0)))


STAGES = (RoundStep.begin, RoundStep.send, RoundStep.map, RoundStep.share, RoundStep.finish)


def run_rounds(rounds: Iterable[RoundStep]) -> None:
    """Take rounds through their stages, each one behind the one before, so that messages travel meanwhile.

    A round is made when its turn comes, while the GPU works on those before it, and let go when it is done.
    """
    coming = iter(rounds)
    at_stage: deque[RoundStep | None] = deque([None] * len(STAGES), maxlen=len(STAGES))
    while True:
        at_stage.appendleft(next(coming, None))
        if all(each is None for each in at_stage):
            return
        for stage, each in zip(STAGES, at_stage, strict=True):
            if each is not None:
                getattr(each, stage.__name__)()
