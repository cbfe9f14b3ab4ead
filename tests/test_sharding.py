"""Matrices that several ranks share out, on 2, 3 and 4 gloo processes; the cases are in ``sharing_cases.py``."""

import gc
import weakref
from pathlib import Path

import pytest
from gloo_ranks import run_cases
from interpreters import ROOT, output_of
from sharing_cases import cases

from hf_matrix_optim.sharding.round_step import STAGES, RoundStep, run_rounds


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    known = {}

    def outcome(ranks, name):
        if ranks not in known:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            known[ranks] = run_cases("sharing_cases", ranks, folder, list(cases(ranks)))
        return known[ranks][name]

    return outcome


@pytest.mark.parametrize("name", list(cases(2)))
def test_on_two_ranks(outcomes, name):
    assert not outcomes(2, name), outcomes(2, name)


@pytest.mark.parametrize("name", list(cases(3)))
def test_on_three_ranks(outcomes, name):
    assert not outcomes(3, name), outcomes(3, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cases(4)))
def test_on_four_ranks(outcomes, name):
    assert not outcomes(4, name), outcomes(4, name)


def test_one_process_pays_nothing(tmp_path: Path) -> None:
    """No import of DTensors by this package, no process group, no plan; the watch does notice a sharded step."""
    script = """
import builtins, torch
imported, real_import = [], builtins.__import__

def watched(name, globals=None, *arguments, **keywords):
    if (globals or {}).get("__name__", "").startswith("hf_matrix_optim") and name.startswith("torch.distributed."):
        imported.append(name)
    return real_import(name, globals, *arguments, **keywords)

builtins.__import__ = watched
from hf_matrix_optim import AdaMuon, MUD, Muon, param_groups_for

for optimizer_class in (Muon, AdaMuon, MUD):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = optimizer_class(param_groups_for(model))
    for _ in range(2):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.describe_plan().startswith("Nothing")
assert imported == [], imported
assert not torch.distributed.is_initialized()

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
model = torch.nn.Linear(6, 4, bias=False)
torch.distributed.fsdp.fully_shard(model, mesh=mesh)
optimizer = Muon(model.parameters())
model(torch.randn(2, 6)).sum().backward()
optimizer.step()
assert "torch.distributed.tensor" in imported, imported
print("done")
"""
    (tmp_path / "step.py").write_text(script)
    assert output_of(tmp_path / "step.py", cwd=tmp_path, PYTHONPATH=str(ROOT)).split() == ["done"]


def test_shards_of_a_single_rank_are_stepped_as_they_are(tmp_path: Path) -> None:
    """FSDP2 on one GPU: nothing is gathered, and equal matrices are one stack; bit by bit the plain model."""
    script = """
import copy, torch
from hf_matrix_optim import AdaMuon, MUD, Muon
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
sizes, step_lists = [], MatrixOptimizer._step_lists

def counted(self, lists, *arguments):
    sizes.append(len(lists.params))
    step_lists(self, lists, *arguments)

def gathered(*arguments, **keywords):
    raise AssertionError("nothing is to be gathered")

for optimizer_class in (Muon, AdaMuon, MUD):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(*(torch.nn.Linear(12, 12, bias=False) for _ in range(4)))
    sharded = copy.deepcopy(plain)
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = [optimizer_class(model.parameters(), lr=0.1) for model in (plain, sharded)]
    for step in range(3):
        x = torch.randn(8, 12)
        for model, optimizer in zip((plain, sharded), optimizers):
            model(x).square().mean().backward()
            whole, DTensor.full_tensor, MatrixOptimizer._step_lists = DTensor.full_tensor, gathered, counted
            optimizer.step()
            DTensor.full_tensor, MatrixOptimizer._step_lists = whole, step_lists
            optimizer.zero_grad()
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor())
assert sizes == [4] * len(sizes), sizes
print("done")
"""
    (tmp_path / "step.py").write_text(script)
    assert output_of(tmp_path / "step.py", cwd=tmp_path, PYTHONPATH=str(ROOT)).split() == ["done"]


def test_rounds_are_made_one_after_the_other_and_let_go() -> None:
    """Stages follow each other, newest round first; no more rounds live than there are stages."""
    alive: weakref.WeakSet[RoundStep] = weakref.WeakSet()
    seen: list[tuple[str, int]] = []
    most = 0

    class Counted(RoundStep):
        def __init__(self, number: int) -> None:
            self.number = number
            alive.add(self)

        def say(self, stage: str) -> None:
            nonlocal most
            most = max(most, len(alive))
            seen.append((stage, self.number))

    for stage in STAGES:
        setattr(Counted, stage.__name__, lambda self, name=stage.__name__: self.say(name))
    run_rounds(Counted(number) for number in range(9))
    assert most == len(STAGES)
    assert seen[:3] == [("begin", 0), ("begin", 1), ("send", 0)]
    for number in range(9):
        assert [name for name, of in seen if of == number] == [stage.__name__ for stage in STAGES]
    gc.collect()
    assert not alive
    run_rounds([])
