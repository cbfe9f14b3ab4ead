"""The stages of a round by plain torch functions; on CPUs bit by bit what one process does."""

import torch
from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.plain_step import Rule, apply_direction, are_finite, look_ahead
from hf_matrix_optim.sharding.round_step import RoundStep, RoundTask


class PlainRound(RoundStep):
    """For every device and precision.

    Args:
        task: what is to be done.
        rule: the optimizer.
    """

    def __init__(self, task: RoundTask, rule: Rule) -> None:
        super().__init__(task)
        self.rule, self.group = rule, task.group
        self.layout = MatrixLayout(task.layout.output_axis, task.layout.flatten)  # of a piece, which is one matrix
        self.dtype = torch.promote_types(task.dtype, torch.float32)
        self.wire_in, self.wire_out = rule.wire_dtypes(task.group, self.dtype, task.device)

    def begin(self) -> None:
        stack, device = self.task.stack, self.task.device
        if stack:
            weight = self.rule.gradient_weight(self.group)
            self.momentum, lookahead = look_ahead(stack, self.layout, self.group, weight)
            x, finite = self.rule.map_input(lookahead, self.group).to(self.wire_in), are_finite(lookahead)
        else:
            shape = self.exchange.shard_shape(0, self.exchange.shards.place)
            x = torch.empty(shape, dtype=self.wire_in, device=device)
            finite = torch.empty(0, 1, 1, dtype=torch.bool, device=device)
        self.finite = self.exchange.smallest(self.of_all(finite, 1).to(torch.int32))
        self.x = self.of_all(x, 0)

    def send(self) -> None:
        self.gathered = self.exchange.gather(self.x)
        del self.x

    def map(self) -> None:
        whole = self.exchange.assemble(self.gathered, self.wire_in).to(self.dtype)
        del self.gathered
        self.is_finite = self.finite.wait() > 0
        if not (whole.device.type == "cpu" and bool(self.is_finite.all())):  # on a GPU, looking would mean waiting
            whole = torch.where(self.is_finite[self.exchange.owned], whole, 0)
        direction = self.rule.map_lookahead(whole, self.group) if whole.numel() else whole
        self.scattered = self.exchange.scatter(direction.to(self.wire_out))

    def share(self) -> None:
        self.shared = self.exchange.share(self.scattered, self.wire_out)
        del self.scattered

    def finish(self) -> None:
        direction, device = self.exchange.directions(self.shared), self.task.device
        del self.shared
        if not self.task.stack:
            if self.rule.has_second_moment:
                self.over_shards(torch.empty(0, 1, 1, dtype=torch.float64, device=device))
            return
        finite: Tensor | None = self.of_present(self.is_finite)
        if finite is not None and device.type == "cpu" and bool(finite.all()):
            finite = None
        roots = self.task.roots
        root: float | Tensor = roots[0]
        if len(set(roots)) > 1:
            root = torch.tensor(roots, dtype=self.dtype, device=device).view(-1, 1, 1)
        fan_out, fan_in = self.exchange.fans
        apply_direction(
            self.rule, self.task.stack, self.layout, self.group, self.momentum,
            self.of_present(direction).to(self.dtype, copy=True), finite,
            scale=self.task.scale(fan_out, fan_in), root=root, elements=fan_out * fan_in,
            over_shards=self.over_shards,
        )  # fmt: skip
