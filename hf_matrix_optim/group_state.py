"""The states of one matrix group, kept from step to step as the lists that a step looks at."""

from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.int8_momentum import INT8
from hf_matrix_optim.sharding.shard_layout import is_sharded, many_ranks
from hf_matrix_optim.stacks import MatrixLists


class GroupState:
    """The states of a matrix group's parameters, in their order; {} for one that has had no gradient yet.

    Their counters are views of one tensor: hundreds of additions to small tensors cost the host as much as all the
    launches. A counter that is not, as after a checkpoint, makes the group be gathered anew.
    """

    def __init__(self, group: dict[str, Any], states: list[dict[str, Any]]) -> None:
        self.group = group
        self.params: list[Tensor] = list(group["params"])
        self.states = states
        counts = [float(state.get("step", 0.0)) for state in states]
        self.steps = torch.tensor(counts, dtype=torch.float32, device="cpu")
        self.views = list(self.steps.unbind())
        for state, view in zip(states, self.views, strict=True):
            if state:
                state["step"] = view
        self.is_together = len({p.device for p in self.params}) == 1 and not any(map(is_sharded, self.params))
        is_int8 = group["momentum_dtype"] == INT8  # which ranks cannot share: it has no views
        self.may_share = group["distribute"] == "auto" and not is_int8 and many_ranks()

    def is_of(self, group: dict[str, Any], state_of: dict[Tensor, Any]) -> bool:
        """Whether params and states are those of the optimizer, and every parameter with a gradient has a state."""
        if self.group is not group or len(self.params) != len(group["params"]):
            return False
        return all(
            p is known and ((state_of.get(p) is state and state["step"] is view) if state else p.grad is None)
            for p, known, state, view in zip(group["params"], self.params, self.states, self.views, strict=True)
        )

    def lists_and_steps(self) -> tuple[MatrixLists, list[float], list[int]]:
        """The parameters with a gradient, the number of this step of each, counted here, and their positions."""
        grads: list[Any] = [p.grad for p in self.params]
        stepping = [i for i, grad in enumerate(grads) if grad is not None]
        states = [self.states[i] for i in stepping]
        lists = MatrixLists(
            params=[self.params[i] for i in stepping],
            grads=[grads[i] for i in stepping],
            momenta=[state["momentum_buffer"] for state in states],
            second_moments=[state.get("exp_avg_sq") for state in states],
            skipped=[state["skipped"] for state in states],
            lookahead_scales=[state.get("lookahead_scale") for state in states],
        )
        if len(stepping) == len(grads):
            self.steps += 1
            return lists, self.steps.tolist(), stepping
        chosen = torch.tensor(stepping, dtype=torch.int64, device="cpu")
        self.steps[chosen] += 1
        return lists, self.steps[chosen].tolist(), stepping
