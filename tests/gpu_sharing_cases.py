"""Cases for a process a GPU: matrices that ranks share out by the kernels, against one process.

Gradients are given. Products in float16 depend on the stack that a matrix is in, so equality is to their precision.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizers import OPTIMIZERS
from sharing_cases import Holder, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_matrix_optim.kernels.kernel_round import KernelRound
from hf_matrix_optim.sharding import plan as sharding_plan

STEPS = 4
#: The last is too small for the kernels.
SHAPES = [(256, 512), (512, 256), (320, 128), (128, 128), (128, 128), (128, 128), (768, 3072), (72, 1024), (7, 5)]
PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()]}


def run(name: str, how: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Four steps; "one" is by one process, which every rank is for itself."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    placements = PLACEMENTS.get(how)
    weights = [torch.randn(shape, generator=generator, device=device).to(dtype) * 0.02 for shape in SHAPES]
    params = [nn.Parameter(distribute_tensor(w, mesh, placements) if placements else w) for w in weights]
    module = DistributedDataParallel(Holder(params)) if how == "ddp" else None
    options = {"distribute": "off" if how == "one" else "auto", **options}
    optimizer = OPTIMIZERS[name]([{"params": params, "role": "matrix"}], lr=0.01, **options)
    for step in range(STEPS):
        for i, p in enumerate(params):
            grad = torch.randn(SHAPES[i], generator=generator, device=device).to(dtype) * 10.0 ** (i % 5 - 3)
            if step == 2 and i in (1, 6):
                grad[-1, -1] = float("nan")
            p.grad = distribute_tensor(grad, mesh, placements) if placements else grad
            if step == 3 and i == 4:
                p.grad = None
        optimizer.step()
    assert module is None or module.module is not None
    return {
        f"{i} {key}": whole(value).clone() for i, p in enumerate(params) for key, value in tensors(p, optimizer)
    }, optimizer


def tensors(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    state = optimizer.state[p]
    return [("weight", p.detach())] + [(key, value) for key, value in state.items() if key != "lookahead_scale"]


def equals_one_process(folder: Path, name: str, how: str, dtype: torch.dtype) -> None:
    taken: list[int] = []
    begin = KernelRound.begin

    def counted(self: KernelRound) -> None:
        taken.append(self.count)
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelRound, "begin", counted)
        patch.setattr(sharding_plan, "GPU_OPERATIONS", 1.0)  # DDP shares everything, however small
        found, optimizer = run(name, how, dtype)
    assert sum(taken) == STEPS * (len(SHAPES) - 1)
    assert optimizer.describe_plan().count("\n|") == 1 + len(SHAPES)
    expected, _ = run(name, "one", dtype)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.endswith(("step", "skipped")):
            assert torch.equal(found[key], tensor), key
            continue
        # The update alone, which weights of 0.02 would hide; v divides by small numbers, and bfloat16 rounds weights
        error = (found[key].double() - tensor.double()).norm() / tensor.double().norm()
        assert error < (1e-2 if dtype == torch.float32 else 2e-2), f"{key}: {error}"
    every = [torch.empty_like(found["6 weight"]) for _ in range(dist.get_world_size())]
    dist.all_gather(every, found["6 weight"])
    assert all(torch.equal(each, every[0]) for each in every)


def a_graph_changes_nothing(folder: Path, how: str, name: str) -> None:
    """Maps that are replayed give the same bits as maps that are launched, in all tensors of the optimizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding_plan, "GPU_OPERATIONS", 1.0)
        replayed, optimizer = run(name, how, cuda_graph=True)
        launched, _ = run(name, how)
    (graphs,) = optimizer._map_graphs.values()
    assert graphs.graphs
    assert replayed.keys() == launched.keys()
    for key, tensor in launched.items():
        assert torch.equal(replayed[key], tensor), key


def a_step_does_not_wait(folder: Path, how: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for name in OPTIMIZERS:
        weights = [torch.randn(256, 512, device=device) for _ in range(4)]
        params = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]) if how == "rows" else w) for w in weights]
        module = DistributedDataParallel(Holder(params)) if how == "ddp" else None
        optimizer = OPTIMIZERS[name](params)
        for step in range(5):
            for p in params:
                p.grad = torch.ones_like(p)
            if step == 2:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        assert module is None or module.module is not None


CASES: dict[str, Callable[[Path], None]] = {
    f"{how}_{name}_{str(dtype).removeprefix('torch.')}": partial(equals_one_process, name=name, how=how, dtype=dtype)
    for how in ("rows", "columns", "replicated", "ddp")
    for name in OPTIMIZERS
    for dtype in (torch.float32, torch.bfloat16)
}
CASES |= {f"no_waiting_{how}": partial(a_step_does_not_wait, how=how) for how in ("rows", "ddp")}
CASES |= {
    f"graph_{how}_{name}": partial(a_graph_changes_nothing, how=how, name=name)
    for how in ("rows", "columns", "ddp")
    for name in OPTIMIZERS
}
