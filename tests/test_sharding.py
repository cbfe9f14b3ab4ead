"""Matrices that several ranks share out, on 2, 3 and 4 gloo processes; the cases are in ``sharing_cases.py``."""

from pathlib import Path

import pytest
from gloo_ranks import run_cases
from interpreters import ROOT, output_of
from sharing_cases import cases


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
