"""The host's part of the GPU kernels' path, with the launches replaced: what the kernels would be given."""

import contextlib

import pytest
import torch
from optimizers import OPTIMIZERS

from hf_matrix_optim import Muon, int8_momentum, matrix_optimizer
from hf_matrix_optim.kernels import fast_path
from hf_matrix_optim.kernels.int8_plan import Int8Plans

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Launches(list):
    """What each stack was launched with: (addresses by kind, rule, scalars)."""

    def __call__(self, plan, rule, scalars) -> None:
        self.append(([row.tolist() for row in plan.addresses()], rule, scalars.tolist()))


@pytest.fixture
def launches(monkeypatch) -> Launches:
    recorded = Launches()
    monkeypatch.setattr(fast_path, "step_stack", recorded)
    monkeypatch.setattr(matrix_optimizer, "why_not", lambda device: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    state_of = matrix_optimizer.MatrixOptimizer._matrix_state

    def with_scale(self, p, layout, group):
        state = state_of(self, p, layout, group)
        state.setdefault("lookahead_scale", torch.zeros(state["skipped"].numel()))
        return state

    monkeypatch.setattr(matrix_optimizer.MatrixOptimizer, "_matrix_state", with_scale)
    return recorded


def parameters(count: int = 3) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(64, 128)) for _ in range(count)]


def set_gradients(params) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def expected(optimizer, params) -> list[list[int]]:
    states = [optimizer.state[p] for p in params]
    second = [state["exp_avg_sq"].data_ptr() if "exp_avg_sq" in state else 0 for state in states]
    keys = ("momentum_buffer", None, "lookahead_scale", "skipped")
    rest = [second if key is None else [state[key].data_ptr() for state in states] for key in keys]
    return [[p.grad.data_ptr() for p in params], [p.data_ptr() for p in params], *rest]


@each_optimizer
def test_kernels_are_given_the_tensors_of_this_step(launches, name):
    params = parameters()
    optimizer = OPTIMIZERS[name](params, lr=0.1)
    kept = []
    for step in range(6):
        kept.append([p.grad for p in params])  # so that no address comes back
        set_gradients(params)
        stepping = [params]
        if step == 2:
            params[0].data = params[0].data.clone()
        if step == 3:
            momentum = optimizer.state[params[1]]["momentum_buffer"]
            optimizer.state[params[1]]["momentum_buffer"] = momentum.clone()
        if step == 4:
            params[2].grad, stepping = None, [params[:2]]
        if step == 5:  # one parameter is a step behind the others
            stepping = [params[:2], params[2:]]
        launches.clear()
        optimizer.step()
        assert [addresses for addresses, _, _ in launches] == [expected(optimizer, each) for each in stepping]


@each_optimizer
def test_the_rule_and_the_scalars_follow_the_group(launches, name):
    params = parameters()
    optimizer = OPTIMIZERS[name](params, lr=0.5, weight_decay=0.25, momentum=0.75)
    for step in range(1, 4):
        set_gradients(params)
        launches.clear()
        optimizer.step()
        _, rule, (lr, correction) = launches[0]
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"])
        assert (rule.beta, rule.weight_decay) == (0.75, optimizer.param_groups[0]["weight_decay"])
        assert rule.weight == (0.25 if name == "adamuon_v1" else 1)
        assert correction == pytest.approx((1 - 0.999**step) ** -0.5 if name == "adamuon_v1" else 1)
        optimizer.param_groups[0]["lr"] /= 2
        optimizer.param_groups[0]["weight_decay"] /= 2
    maximizing = OPTIMIZERS[name](params, maximize=True)
    maximizing.step()
    assert launches[-1][1].weight < 0


def test_what_the_kernels_cannot_read_goes_the_plain_path(launches):
    odd = torch.nn.Parameter(torch.zeros(64, 132))
    params = [*parameters(), odd, torch.nn.Parameter(torch.zeros(32, 128))]
    optimizer = Muon(params, lr=0.1, weight_decay=0.0)
    set_gradients(params)
    params[1].grad = torch.randn(128, 64).mT
    optimizer.step()
    ((addresses, _, _),) = launches
    assert addresses[1] == [params[0].data_ptr(), params[2].data_ptr()]
    assert all(bool(params[i].detach().any()) == (i in (1, 3, 4)) for i in range(5))
    set_gradients(params)  # the gradient that lay otherwise is as the others now
    launches.clear()
    optimizer.step()
    ((addresses, _, _),) = launches
    assert addresses[1] == [p.data_ptr() for p in params[:3]]


def test_stacks_keep_to_the_workspace_and_are_of_equal_size(launches):
    params = parameters(10)
    set_gradients(params)
    optimizer = Muon(params)
    optimizer.step()
    whole = fast_path.workspace_bytes(fast_path.Sides(64, 128, False), launches[0][1])
    capped = Muon(params, max_workspace_bytes=4 * whole)
    launches.clear()
    capped.step()
    assert [len(addresses[0]) for addresses, _, _ in launches] == [3, 3, 4]


@each_optimizer
@pytest.mark.parametrize("split_sizes", [None, (64, 64)])
def test_a_plan_is_kept_where_int8_momenta_are_new_in_every_step(launches, name, split_sizes, monkeypatch):
    made = []

    def in_float(state):
        made.append(original(state))  # kept, so that no address comes back
        return made[-1]

    original = int8_momentum.in_float
    monkeypatch.setattr(int8_momentum, "in_float", in_float)
    monkeypatch.setattr(Int8Plans, "of", lambda *args: None)  # Triton is not here
    params = [torch.nn.Parameter(torch.zeros(128, 128)), torch.nn.Parameter(torch.zeros(128, 128))]
    optimizer = OPTIMIZERS[name]([{"params": params, "split_sizes": split_sizes}], momentum_dtype="int8")
    plans = []
    for _ in range(3):
        set_gradients(params)
        launches.clear()
        optimizer.step()
        ((addresses, _, _),) = launches
        starts = [0, 64 * 128 * 4] if split_sizes else [0]
        assert addresses[0] == [p.grad.data_ptr() + start for p in params for start in starts]
        assert addresses[2] == [momentum.data_ptr() + start for momentum in made[-2:] for start in starts]
        plans.append(*optimizer.__dict__["_fast_path"].plans.values())
    assert all(plan is plans[0] for plan in plans)


def test_an_optimizer_of_many_groups_keeps_its_plans(launches, monkeypatch):
    monkeypatch.setattr(fast_path, "MOST_PLANS", 4)
    groups = [{"params": [p]} for p in parameters(4)]
    optimizer = Muon(groups)
    for group in groups:
        set_gradients(group["params"])
    optimizer.step()
    plans = dict(optimizer.__dict__["_fast_path"].plans)
    optimizer.step()
    assert optimizer.__dict__["_fast_path"].plans == plans
    optimizer.add_param_group({"params": parameters(1)})
    set_gradients(optimizer.param_groups[-1]["params"])
    optimizer.step()
    assert len(optimizer.__dict__["_fast_path"].plans) == 4
