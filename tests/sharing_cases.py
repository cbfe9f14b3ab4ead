"""Cases for several gloo processes: matrices that ranks share out, against one process, bit by bit.

Gradients are given, not computed, so that every difference is the optimizer's; ``test_sharding.py`` starts them.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizers import OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_matrix_optim import MUD, AdaMuon, Muon
from hf_matrix_optim.sharding.exchange import Exchange, Pending

STEPS = 4
#: Groups of parameters that are read alike: their shapes and the keys of their group.
GROUPS: list[tuple[dict[str, Any], list[tuple[int, ...]]]] = [
    ({}, [(8, 6), (7, 5), (1, 6), (6, 1), (5, 5), (12, 4), (4, 12), (8, 6), (8, 6), (7, 5), (2, 3)]),
    ({}, [(3, 5, 4), (4, 6, 6)]),
    ({"output_axis": 1}, [(6, 10), (5, 3)]),
    ({"split_sizes": (6, 3, 3)}, [(12, 4), (12, 7)]),
    ({"split_sizes": (4, 4, 4), "interleaved": True}, [(12, 4), (12, 7)]),
    ({"split_sizes": (5, 5)}, [(3, 10, 4)]),
    ({"flatten": True}, [(6, 3, 2, 2), (5, 2, 3)]),
]


def parameters(seed: int = 0) -> list[list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [[nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes] for _, shapes in GROUPS]


def gradients(step: int) -> list[list[Tensor | None]]:
    """Of very different sizes; the fourth step has none for two parameters, the third a NaN and an infinity."""
    generator = torch.Generator().manual_seed(100 + step)
    grads: list[list[Tensor | None]] = [
        [torch.randn(shape, generator=generator) * 10 ** (i - 2) for i, shape in enumerate(shapes)]
        for _, shapes in GROUPS
    ]
    if step == 2:
        for group, i, value in (
            (0, 1, float("nan")),
            (0, 7, float("inf")),
            (3, 0, float("nan")),
            (1, 0, float("nan")),
        ):
            grad = grads[group][i]
            assert grad is not None
            grad.view(-1)[-1] = value
    if step == 3:
        grads[0][2] = grads[1][1] = None
    return grads


def optimizer_for(name: str, params: list[list[nn.Parameter]], **options: Any) -> torch.optim.Optimizer:
    groups = [{"params": each, "role": "matrix", **keys} for each, (keys, _) in zip(params, GROUPS, strict=True)]
    return OPTIMIZERS[name](groups, lr=0.02, map_dtype="float32", **options)


def one_process(name: str, **options: Any) -> dict[str, Tensor]:
    """What a single process makes of the same parameters and gradients; no collective."""
    params = parameters()
    optimizer = optimizer_for(name, params, distribute="off", **options)
    for step in range(STEPS):
        for p, grad in zip(itertools.chain(*params), itertools.chain(*gradients(step)), strict=True):
            p.grad = grad
        optimizer.step()
    return whole_tensors(params, optimizer)


def whole_tensors(params: list[list[nn.Parameter]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, p in named(params):
        tensors[name] = whole(p.detach())
        for key, value in optimizer.state[p].items():
            if key != "skipped" or not is_cut_between_matrices(p):  # of those each rank counts its own
                tensors[f"{name}: {key}"] = whole(value)
    return {key: tensor.clone() for key, tensor in tensors.items()}


def named(params: list[list[nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{i}.{j} {tuple(p.shape)}", p) for i, each in enumerate(params) for j, p in enumerate(each)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_cut_between_matrices(p: Tensor) -> bool:
    return isinstance(p, DTensor) and p.ndim == 3 and Shard(0) in p.placements


def assert_equal(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert found.keys() >= expected.keys() - {key for key in expected if key.endswith("skipped")}
    for key, tensor in found.items():
        assert torch.equal(expected[key], tensor), f"{key}: {(expected[key] - tensor).abs().max()}"


def mesh_of(sizes: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def sharded_run(name: str, sizes: tuple[int, ...], placements: list[Any], **options: Any) -> Any:
    """Parameters cut as ``placements`` say, stepped with the same gradients."""
    mesh = mesh_of(sizes)
    params = [[nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in each] for each in parameters()]
    optimizer = optimizer_for(name, params, **options)
    for step in range(STEPS):
        for p, grad in zip(itertools.chain(*params), itertools.chain(*gradients(step)), strict=True):
            p.grad = None if grad is None else distribute_tensor(grad, mesh, placements)
        optimizer.step()
    return params, optimizer


def sharded(folder: Path, name: str, sizes: tuple[int, ...], placements: list[Any], **options: Any) -> None:
    params, optimizer = sharded_run(name, sizes, placements, **options)
    plain = {key: value for key, value in options.items() if key != "distribute"}
    assert_equal(one_process(name, **plain), whole_tensors(params, optimizer))
    for p in itertools.chain(*params):
        state = optimizer.state[p]
        assert state["momentum_buffer"].placements == p.placements


class Holder(nn.Module):
    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)

    def forward(self) -> Tensor:
        return torch.stack([p.sum() for p in self.weights]).sum()


def ddp_run(name: str, *, differ: bool = False, move: bool = False, **options: Any) -> Any:
    params = parameters()
    module = DistributedDataParallel(Holder(itertools.chain(*params)))
    optimizer = optimizer_for(name, params, **options)
    for step in range(STEPS):
        for p, grad in zip(itertools.chain(*params), itertools.chain(*gradients(step)), strict=True):
            p.grad = grad
        if differ:
            for each in params:
                each[0].grad.view(-1)[0] += dist.get_rank()
        if move:
            for p in itertools.chain(*params):
                p.data = p.data.clone()
        optimizer.step()
    return params, optimizer, module


def ddp(folder: Path, name: str, **options: Any) -> None:
    params, optimizer, _module = ddp_run(name, **options)
    assert optimizer.describe_plan().count("\n") > len(list(itertools.chain(*params)))
    assert_equal(one_process(name, **options), whole_tensors(params, optimizer))


def ddp_of_parameters_that_move(folder: Path) -> None:
    """The same parameters in other memory at each step, as after ``module.to``."""
    params, optimizer, _module = ddp_run("muon", move=True)
    assert_equal(one_process("muon"), whole_tensors(params, optimizer))


def int8_momentum_is_each_ranks_own(folder: Path) -> None:
    """It has no views of single matrices: under DDP every rank steps all of them."""
    both = []
    for is_ddp in (False, True):
        params = [nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(i))) for i in range(4)]
        module = DistributedDataParallel(Holder(params)) if is_ddp else None
        optimizer = Muon(params, lr=0.02, momentum_dtype="int8")
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        assert (module is None) == (not is_ddp)
        assert "Nothing is shared out" in optimizer.describe_plan()
        assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.int8
        both.append(torch.stack([p.detach() for p in params]))
    assert torch.equal(*both)


def int8_momentum_of_shards_is_refused(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"momentum_dtype='int8' was asked for, .* in shards: use momentum_dtype="):
        sharded_run("muon", (dist.get_world_size(),), [Shard(0)], momentum_dtype="int8")


def ddp_of_other_gradients(folder: Path) -> None:
    """Gradients that DDP has not averaged (as with a local-SGD hook): every rank goes its own way, as without us."""
    params, optimizer, _module = ddp_run("muon", differ=True)
    assert "Nothing is shared out" in optimizer.describe_plan()
    if dist.get_rank() == 0:
        assert_equal(one_process("muon"), whole_tensors(params, optimizer))


def ddp_of_a_gradient_on_one_rank_only(folder: Path) -> None:
    """Noticed like other gradients, and by every rank alike."""
    params = [nn.Parameter(torch.ones(8, 6)) for _ in range(3)]
    module = DistributedDataParallel(Holder(params))
    optimizer = Muon(params, lr=0.02)
    for i, p in enumerate(params):
        p.grad = None if i == 1 and dist.get_rank() == 1 else torch.ones(8, 6)
    optimizer.step()
    assert "Nothing is shared out" in optimizer.describe_plan()
    unchanged = [torch.equal(p.detach(), torch.ones(8, 6)) for p in module.parameters()]
    assert unchanged == [False, dist.get_rank() == 1, False]


def without_ddp_nothing_is_exchanged(folder: Path) -> None:
    """Ranks with models of their own: one rank steps alone, and no other answers it."""
    if dist.get_rank() == 0:
        params = parameters()
        optimizer = optimizer_for("muon", params)
        for step in range(STEPS):
            for p, grad in zip(itertools.chain(*params), itertools.chain(*gradients(step)), strict=True):
                p.grad = grad
            optimizer.step()
        assert_equal(one_process("muon"), whole_tensors(params, optimizer))
    dist.barrier()


def a_gradient_on_one_rank_only(folder: Path) -> None:
    """A rank without a gradient takes part with zeros and leaves its shard alone; nobody waits for it."""
    mesh = mesh_of((dist.get_world_size(),))
    torch.manual_seed(0)
    full = torch.randn(8, 6)
    for name in OPTIMIZERS:
        params = [nn.Parameter(distribute_tensor(full, mesh, [Shard(0)])) for _ in range(3)]
        optimizer = OPTIMIZERS[name](params, lr=0.02)
        for i, p in enumerate(params):
            p.grad = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)])
            if i == 1 and dist.get_rank() == 1:
                p.grad = None
        before = [p.to_local().clone() for p in params]
        optimizer.step()
        changed = [not torch.equal(p.to_local(), old) for p, old in zip(params, before, strict=True)]
        assert changed == [True, dist.get_rank() != 1, True], (name, changed)
        assert all(set(optimizer.state[p]) == set(optimizer.state[params[0]]) for p in params)


def late_parameters_count_their_own_steps(folder: Path) -> None:
    """AdaMuon v1 corrects its second moment by each parameter's own number of steps."""
    mesh = mesh_of((dist.get_world_size(),))
    torch.manual_seed(0)
    first, grads = torch.randn(2, 8, 6), torch.randn(5, 2, 8, 6)
    found = []
    for is_cut in (False, True):
        cut = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)]) if is_cut else torch.clone
        params = [nn.Parameter(cut(each)) for each in first]
        optimizer = AdaMuon(params, lr=0.02, variant="v1", map_dtype="float32")
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = None if i == 1 and step < 3 else cut(grads[step, i])
            optimizer.step()
        found.append([whole(p.detach()) for p in params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def other_layouts_are_gathered(folder: Path) -> None:
    """Cut along two axes: gathered whole, with one warning; the result is the same."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("a", "b"))
    torch.manual_seed(0)
    full, grad = torch.randn(8, 6), torch.randn(8, 6)
    plain = nn.Parameter(full.clone())
    plain.grad = grad
    Muon([plain], distribute="off").step()
    for placements in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Shard(0)]):
        p = nn.Parameter(distribute_tensor(full.clone(), mesh, placements))
        p.grad = distribute_tensor(grad, mesh, placements)
        optimizer = Muon([p])
        optimizer.step()
        assert torch.equal(whole(p.detach()), plain.detach()), placements


def gradients_in_other_placements(folder: Path) -> None:
    """A gradient that is still a partial sum, or whole, is brought into the parameter's placements first."""
    ranks = dist.get_world_size()
    mesh = mesh_of((ranks,))
    torch.manual_seed(0)
    full, grad = torch.randn(8, 6), torch.randn(8, 6)
    plain = nn.Parameter(full.clone())
    plain.grad = grad * ranks
    Muon([plain], distribute="off", map_dtype="float32").step()
    partial_sum = DTensor.from_local(grad.clone(), mesh, [Partial()])
    for given in (partial_sum, distribute_tensor(grad * ranks, mesh, [Replicate()])):
        for placement in (Shard(0), Shard(1), Replicate()):
            p = nn.Parameter(distribute_tensor(full.clone(), mesh, [placement]))
            p.grad = given
            Muon([p], map_dtype="float32").step()
            torch.testing.assert_close(whole(p.detach()), plain.detach(), atol=1e-6, rtol=1e-6)


def whole_state_is_refused_by_shards(folder: Path) -> None:
    """And shards by whole parameters; each rank would take rows that are not its own."""
    mesh = mesh_of((dist.get_world_size(),))
    optimizers = []
    for is_cut in (False, True):
        values = [torch.ones(8, 6), torch.ones(8)]
        params = [nn.Parameter(distribute_tensor(v, mesh, [Shard(0)]) if is_cut else v) for v in values]
        for p in params:
            p.grad = p.detach().clone()
        roles = ("matrix", "adamw")
        optimizers.append(Muon([{"params": [p], "role": role} for p, role in zip(params, roles, strict=True)]))
        optimizers[-1].step()
    for one, other in itertools.permutations(optimizers):
        before = whole_state(one)
        with pytest.raises(
            ValueError, match=r"momentum_buffer of parameter .* whole tensor.*set_optimizer_state_dict"
        ):
            one.load_state_dict(other.state_dict())
        after = whole_state(one)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        one.load_state_dict(one.state_dict())


def whole_state(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    states = optimizer.state_dict()["state"]
    return {(i, key): whole(value).clone() for i, state in states.items() for key, value in state.items()}


def adamw_of_shards_and_whole_tensors(folder: Path) -> None:
    """One AdamW group with whole tensors, as tensor parallel models have, and shards of two meshes, some empty."""
    ranks = dist.get_world_size()
    meshes = [mesh_of((ranks,)), init_device_mesh("cpu", (1, ranks))]
    values = [torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in ((7, 3), (1,), (5,), (4,))]
    results = []
    for fused in (True, False):
        for is_cut in (False, True):
            params = [nn.Parameter(value.clone()) for value in values]
            if is_cut:
                params[0] = nn.Parameter(distribute_tensor(values[0], meshes[0], [Shard(0)]))
                params[1] = nn.Parameter(distribute_tensor(values[1], meshes[0], [Shard(0)]))
                params[2] = nn.Parameter(distribute_tensor(values[2], meshes[1], [Replicate(), Shard(0)]))
            optimizer = Muon([{"params": params, "role": "adamw"}], lr=0.02, adamw_fused=fused)
            for _ in range(3):
                for p, value in zip(params, values, strict=True):
                    p.grad = value.clone()
                    if isinstance(p, DTensor):
                        p.grad = distribute_tensor(value, p.device_mesh, p.placements)
                optimizer.step()
            results.append([whole(p.detach()) for p in params])
    for plain, cut in (results[:2], results[2:]):
        for one, other in zip(plain, cut, strict=True):
            torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def replicated_beside_shards(folder: Path) -> None:
    """Plain tensors beside DTensors, as adapters that were attached later: stepped on every rank, alike."""
    mesh = mesh_of((dist.get_world_size(),))
    torch.manual_seed(0)
    shapes = [(8, 6), (4, 6), (8, 4)]
    full, grads = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    plain = [nn.Parameter(t.clone()) for t in full]
    mixed = [nn.Parameter(distribute_tensor(full[0], mesh, [Shard(0)])), *(nn.Parameter(t.clone()) for t in full[1:])]
    for params in (plain, mixed):
        for p, grad in zip(params, grads, strict=True):
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(p, DTensor) else grad.clone()
        MUD(params, distribute="off" if params is plain else "auto").step()
    for one, other in zip(plain, mixed, strict=True):
        assert torch.equal(one.detach(), whole(other.detach()))


def ranks_that_disagree_get_an_error(folder: Path) -> None:
    mesh = mesh_of((dist.get_world_size(),))
    rows = 6 + 2 * (dist.get_rank() == 1)
    local = torch.randn(rows, 5)
    p = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], shape=(rows * 2, 5), stride=(5, 1), run_check=False))
    p.grad = DTensor.from_local(local.clone(), mesh, [Shard(0)], shape=(rows * 2, 5), stride=(5, 1), run_check=False)
    with pytest.raises(RuntimeError, match=r"do not step the same matrices: one has .*12, 5.*another .*16, 5"):
        Muon([p]).step()


def requests_that_cannot_be_met_are_refused(folder: Path) -> None:
    mesh = mesh_of((dist.get_world_size(),))
    for options, message in (({"cuda_graph": True}, "cuda_graph=True"), ({"kernels": "triton"}, "kernels='triton'")):
        p = nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)]))
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=message):
            Muon([p], **options).step()
        assert torch.equal(whole(p.detach()), torch.ones(8, 6))


def each_matrix_is_mapped_once(folder: Path, is_ddp: bool) -> None:
    """The ranks together map every matrix once, and the work is shared out evenly."""
    mapped: list[Any] = []
    map_lookahead = Muon.map_lookahead

    def counted(self: Any, x: Tensor, group: Any) -> Tensor:
        mapped.append(tuple(x.shape))
        return map_lookahead(self, x, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Muon, "map_lookahead", counted)
        torch.manual_seed(0)
        mesh = mesh_of((dist.get_world_size(),))
        full = [torch.randn(shape) for shape in [(8, 6)] * 6 + [(4, 16)] * 6]
        params = [nn.Parameter(t if is_ddp else distribute_tensor(t, mesh, [Shard(0)])) for t in full]
        module = DistributedDataParallel(Holder(params)) if is_ddp else None
        for p in params:
            p.grad = torch.ones_like(p)
        Muon(params).step()
        assert module is None or len(list(module.parameters())) == 12
    counts = [sum(b for b, *shape in mapped if tuple(shape) == want) for want in ((8, 6), (4, 16))]
    every: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, counts)
    assert [sum(each) for each in zip(*every, strict=True)] == [6, 6], every
    assert max(map(sum, every)) - min(map(sum, every)) <= 1, every


def bytes_are_those_of_the_formula(folder: Path, name: str, is_ddp: bool) -> None:
    """Elements that go to other ranks, in all: FSDP2 (N-1)/N P each way, DDP (N-1) P; times the bytes on the wire."""
    sent = 0
    all_to_all, all_gather = dist.all_to_all_single, Exchange.share

    def counted(output: Tensor, payload: Tensor, incoming: Any, outgoing: Any, **keys: Any) -> Any:
        nonlocal sent
        sent += sum(outgoing) - outgoing[dist.get_rank()]
        return all_to_all(output, payload, incoming, outgoing, **keys)

    def counted_share(self: Exchange, pending: Pending, dtype: torch.dtype) -> Pending:
        nonlocal sent
        shared = all_gather(self, pending, dtype)
        if shared.kept is not None:
            sent += shared.kept.numel() * shared.kept.element_size() * (self.replicas.size - 1)
        return shared

    ranks = dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        patch.setattr(Exchange, "share", counted_share)
        mesh = mesh_of((ranks,))
        full = [torch.randn(4 * ranks, 6) for _ in range(2 * ranks)]
        params = [nn.Parameter(t if is_ddp else distribute_tensor(t, mesh, [Shard(0)])) for t in full]
        module = DistributedDataParallel(Holder(params)) if is_ddp else None
        for p in params:
            p.grad = torch.ones_like(p)
        OPTIMIZERS[name](params, map_dtype="bfloat16").step()
        assert module is None or module.module is not None
    total = torch.tensor([float(sent)])
    dist.all_reduce(total)
    elements = 2 * ranks * 4 * ranks * 6
    into = {"adamuon": 1}.get(name, 4)
    out = {"mud": 4}.get(name, 2)
    expected = elements * (ranks - 1) * out if is_ddp else elements * (ranks - 1) / ranks * (into + out)
    assert total.item() == expected


# ---- planted faults: each must be noticed by the comparison above ----


def faults_are_noticed(folder: Path) -> None:
    def rolled(self: Exchange, pending: Pending) -> Tensor:
        return directions(self, pending).roll(1, 0)

    def lost(self: Exchange, pending: Pending, dtype: torch.dtype) -> Pending:
        shared = share(self, pending, dtype)
        if self.replicas.size > 1:
            shared.wait()[1 - self.replicas.place].zero_()
        return shared

    directions, share = Exchange.directions, Exchange.share
    size = (dist.get_world_size(),)
    run_sharded = partial(sharded, folder, sizes=size, placements=[Shard(0)])
    for attribute, fault, run in (
        ("directions", rolled, partial(run_sharded, "muon")),
        ("over_shards", lambda self, tensor: tensor, partial(run_sharded, "adamuon")),
        ("share", lost, partial(ddp, folder, "mud")),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Exchange, attribute, fault)
            try:
                run()
                noticed = torch.zeros(1)
            except AssertionError:
                noticed = torch.ones(1)
        dist.all_reduce(noticed)
        assert noticed.item() > 0, attribute


def cases(ranks: int) -> dict[str, Callable[[Path], None]]:
    """All cases for a number of ranks."""
    layouts: dict[str, tuple[tuple[int, ...], list[Any]]] = {
        "rows": ((ranks,), [Shard(0)]),
        "columns": ((ranks,), [Shard(1)]),
        "replicated": ((ranks,), [Replicate()]),
    }
    if ranks == 4:
        layouts = {"hybrid": ((2, 2), [Replicate(), Shard(0)]), "hybrid_columns": ((2, 2), [Replicate(), Shard(1)])}
    found: dict[str, Callable[[Path], None]] = {
        f"{layout}_{name}": partial(sharded, name=name, sizes=sizes, placements=placements)
        for layout, (sizes, placements) in layouts.items()
        for name in OPTIMIZERS
    }
    found |= {f"ddp_{name}": partial(ddp, name=name) for name in OPTIMIZERS}
    if ranks == 4:
        return found
    by_rows = partial(sharded, sizes=(ranks,), placements=[Shard(0)])
    found |= {
        "small_rounds": partial(by_rows, name="adamuon_v1", max_workspace_bytes=1),
        "not_nesterov": partial(by_rows, name="mud", nesterov=False),
        "off": partial(by_rows, name="muon", distribute="off"),
        "bfloat16_momentum": partial(by_rows, name="muon", momentum_dtype="bfloat16"),
        "ddp_of_parameters_that_move": ddp_of_parameters_that_move,
        "int8_ddp": int8_momentum_is_each_ranks_own,
        "int8_shards": int8_momentum_of_shards_is_refused,
        "ddp_of_other_gradients": ddp_of_other_gradients,
        "ddp_one_rank_without_gradient": ddp_of_a_gradient_on_one_rank_only,
        "without_ddp": without_ddp_nothing_is_exchanged,
        "one_rank_without_gradient": a_gradient_on_one_rank_only,
        "late_parameters": late_parameters_count_their_own_steps,
        "other_layouts": other_layouts_are_gathered,
        "gradient_placements": gradients_in_other_placements,
        "replicated_beside_shards": replicated_beside_shards,
        "refused": requests_that_cannot_be_met_are_refused,
        "whole_state_into_shards": whole_state_is_refused_by_shards,
        "adamw_of_shards_and_whole": adamw_of_shards_and_whole_tensors,
        "disagreement": ranks_that_disagree_get_an_error,
        "mapped_once_fsdp": partial(each_matrix_is_mapped_once, is_ddp=False),
        "mapped_once_ddp": partial(each_matrix_is_mapped_once, is_ddp=True),
        "faults": faults_are_noticed,
    }
    for name in OPTIMIZERS:
        for is_ddp in (False, True):
            key = f"bytes_{'ddp' if is_ddp else 'fsdp'}_{name}"
            found[key] = partial(bytes_are_those_of_the_formula, name=name, is_ddp=is_ddp)
    return found


CASES = {**cases(2), **cases(4)}
if dist.is_initialized():
    CASES = cases(dist.get_world_size())
