"""Five steps of every optimizer against the papers' equations, and against independent implementations from PyPI."""

import math

import pytest
import torch
from oracles import AdaMuonOracle, AdaMuonV1Oracle, MUDOracle, MuonOracle
from torch import Tensor

from hf_matrix_optim import MUD, AdaMuon, Muon
from hf_matrix_optim.matrix_layout import MatrixLayout, split_parts, to_matrices
from hf_matrix_optim.matrix_optimizer import STACK_COPIES

LR, DECAY, BETA, STEPS = 0.02, 0.1, 0.9, 5

#: name -> (constructor of ours, oracle of one matrix)
CASES = {
    "muon": (lambda p, **kw: Muon(p, LR, DECAY, BETA, **kw), lambda W: MuonOracle(W, LR, DECAY, BETA)),
    "muon plain": (
        lambda p, **kw: Muon(p, LR, DECAY, BETA, False, **kw),
        lambda W: MuonOracle(W, LR, DECAY, BETA, nesterov=False),
    ),
    "muon jordan": (
        lambda p, **kw: Muon(p, LR, DECAY, BETA, update_scale="jordan", **kw),
        lambda W: MuonOracle(W, LR, DECAY, BETA, scale="jordan"),
    ),
    "adamuon": (lambda p, **kw: AdaMuon(p, LR, DECAY, BETA, **kw), lambda W: AdaMuonOracle(W, LR, DECAY, BETA)),
    "adamuon nesterov": (
        lambda p, **kw: AdaMuon(p, LR, DECAY, BETA, True, **kw),
        lambda W: AdaMuonOracle(W, LR, DECAY, BETA, nesterov=True),
    ),
    "adamuon_v1": (
        lambda p, **kw: AdaMuon(p, LR, DECAY, BETA, variant="v1", **kw),
        lambda W: AdaMuonV1Oracle(W, LR, DECAY, BETA),
    ),
    "mud": (lambda p, **kw: MUD(p, LR, DECAY, BETA, **kw), lambda W: MUDOracle(W, LR, DECAY, BETA)),
    "mud two passes": (
        lambda p, **kw: MUD(p, LR, DECAY, BETA, passes=2, **kw),
        lambda W: MUDOracle(W, LR, DECAY, BETA, passes=2),
    ),
    "mud plain": (
        lambda p, **kw: MUD(p, LR, DECAY, BETA, False, **kw),
        lambda W: MUDOracle(W, LR, DECAY, BETA, nesterov=False),
    ),
}

#: parameter shapes and how they are read; every layout that the partition uses
LAYOUTS = {
    "wide": ((4, 9), MatrixLayout()),
    "tall": ((9, 4), MatrixLayout()),
    "square": ((6, 6), MatrixLayout()),
    "one row": ((1, 7), MatrixLayout()),
    "one column": ((7, 1), MatrixLayout()),
    "batched": ((3, 4, 6), MatrixLayout()),
    "conv1d": ((9, 4), MatrixLayout(output_axis=1)),
    "fused qkv": ((12, 5), MatrixLayout(split_sizes=(6, 3, 3))),
    "conv1d fused qkv": ((5, 12), MatrixLayout(output_axis=1, split_sizes=(4, 4, 4))),
    "experts": ((3, 5, 8), MatrixLayout(output_axis=1, split_sizes=(4, 4), interleaved=True)),
    "convolution": ((6, 3, 2, 2), MatrixLayout(flatten=True)),
    "grouped convolution": ((6, 2, 3), MatrixLayout(flatten=True, split_sizes=(3, 3))),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(tensor: Tensor, layout: MatrixLayout) -> list[Tensor]:
    return [matrix for part in split_parts(tensor, layout) for matrix in to_matrices(part, layout)]


def group_of(params: list[torch.nn.Parameter], layout: MatrixLayout) -> dict:
    return {"params": params, "role": "matrix", **vars(layout)}


@pytest.mark.parametrize("case", CASES)
def test_five_steps_are_the_oracle(case):
    make, make_oracle = CASES[case]
    params = {name: torch.nn.Parameter(random(*shape, seed=1)) for name, (shape, _) in LAYOUTS.items()}
    optimizer = make([group_of([params[name]], layout) for name, (_, layout) in LAYOUTS.items()])
    oracles = {name: [make_oracle(W) for W in read(params[name].data, LAYOUTS[name][1])] for name in LAYOUTS}
    for step in range(STEPS):
        for i, (name, param) in enumerate(params.items()):
            param.grad = random(*param.shape, seed=100 * step + i)
            for oracle, G in zip(oracles[name], read(param.grad, LAYOUTS[name][1]), strict=True):
                oracle.step(G)
        optimizer.step()
    for name, param in params.items():
        for oracle, W in zip(oracles[name], read(param.data, LAYOUTS[name][1]), strict=True):
            torch.testing.assert_close(W, oracle.W, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("map_dtype", ["float32", "bfloat16"])
def test_lower_precision_stays_close(case, dtype, map_dtype):
    """One update from a zero weight: direction and size against the oracle."""
    make, make_oracle = CASES[case]
    param = torch.nn.Parameter(torch.zeros(48, 80, dtype=dtype))
    G = random(48, 80, seed=3).to(dtype)
    oracle = make_oracle(torch.zeros(48, 80, dtype=torch.float64))
    oracle.step(G.double())
    optimizer = make([param], map_dtype=map_dtype)
    param.grad = G
    optimizer.step()
    update = param.detach().double()
    cosine = torch.nn.functional.cosine_similarity(update.flatten(), oracle.W.flatten(), dim=0)
    rms_ratio = update.square().mean().sqrt() / oracle.W.square().mean().sqrt()
    # AdaMuon's first update is O / |O|, a sign: elements near zero flip with the last bit of a bfloat16 map.
    assert cosine > (0.98 if map_dtype == "bfloat16" and "adamuon" in case else 0.998)
    assert abs(rms_ratio - 1) < 0.03


@pytest.mark.parametrize("make", [AdaMuon, MUD], ids=["adamuon", "mud"])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (96, 96)])
def test_update_rms_is_a_fifth_of_the_learning_rate(make, shape):
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make([param], lr=0.01)
    for step in range(3):
        before = param.detach().clone()
        param.grad = random(*shape, seed=step).float()
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        rms = (param.detach() - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2 * 0.01, rel=0.01)


def directions(make_a, make_b, shape=(48, 80), steps=5, dtype=torch.float32):
    """Cosine and size ratio of the total movement of two optimizers under the same gradients."""
    moved = []
    for make in (make_a, make_b):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = make([param])
        for step in range(steps):
            param.grad = random(*shape, seed=step).to(dtype)
            optimizer.step()
        moved.append(param.detach().double().flatten())
    cosine = torch.nn.functional.cosine_similarity(*moved, dim=0).item()
    return cosine, (moved[0].norm() / moved[1].norm()).item()


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_torch_muon_agrees(shape, nesterov):
    cosine, ratio = directions(
        lambda p: Muon(p, LR, DECAY, 0.95, nesterov),
        lambda p: torch.optim.Muon(p, LR, DECAY, 0.95, nesterov, adjust_lr_fn="match_rms_adamw"),
        shape,
    )
    assert cosine > 0.998  # torch iterates in bfloat16
    assert ratio == pytest.approx(1, abs=0.03)


def test_pytorch_optimizer_adamuon_is_the_first_version():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="an oracle of the test extra")
    cosine, ratio = directions(
        lambda p: AdaMuon(p, LR, 0.0, 0.9, variant="v1", beta2=0.95, eps=1e-10),
        lambda p: pytorch_optimizer.AdaMuon([{"params": p, "use_muon": True}], lr=LR, betas=(0.9, 0.95)),
    )
    assert cosine > 0.998
    assert ratio == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("nesterov", [True, False])
def test_adv_optm_adamuon_is_the_second_version(nesterov):
    adv_optm = pytest.importorskip("adv_optm", reason="an oracle of the test extra")

    def theirs(p):
        return adv_optm.AdaMuon_adv(
            p, lr=LR, betas=(0.95, 0.95), nesterov=nesterov, use_muon=True, stochastic_rounding=False
        )

    cosine, ratio = directions(lambda p: AdaMuon(p, LR, 0.0, 0.95, nesterov), theirs)
    assert cosine > 0.99
    assert ratio == pytest.approx(1, abs=0.03)


def test_the_two_adamuons_and_their_nesterov_forms_differ():
    """Guards against a variant that silently runs another."""
    forms = {
        "v2": lambda p: AdaMuon(p, LR, 0.0, 0.9),
        "v2 nesterov": lambda p: AdaMuon(p, LR, 0.0, 0.9, True),
        "v1": lambda p: AdaMuon(p, LR, 0.0, 0.9, variant="v1"),
    }
    names = list(forms)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert directions(forms[a], forms[b])[0] < 0.97, (a, b)


def test_adamw_groups_are_bit_equal_to_torch():
    shapes = [(7, 5), (11,), (1,)]
    for fused in (True, False):
        ours = [torch.nn.Parameter(random(*shape, seed=1).float()) for shape in shapes]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        a = Muon([{"params": ours, "role": "adamw"}], LR, DECAY, betas=(0.9, 0.95), adamw_eps=1e-6, adamw_fused=fused)
        b = torch.optim.AdamW(theirs, LR, (0.9, 0.95), 1e-6, DECAY, fused=fused)
        for step in range(5):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = random(*p.shape, seed=step).float()
                q.grad = p.grad.clone()
            a.step()
            b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("case", CASES)
def test_stacking_changes_nothing(case):
    """All matrices of one shape in one batched product == one optimizer for each matrix == one matrix at a time."""
    make, _ = CASES[case]
    shapes = [(5, 8), (8, 5), (5, 8), (6, 6), (2, 5, 8)]
    together = [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    one, many = make(together), [make([p]) for p in alone]
    tight = make(
        [torch.nn.Parameter(p.detach().clone()) for p in together], max_workspace_bytes=1
    )  # one matrix at a time
    for step in range(3):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = random(*p.shape, seed=10 * step + i)
            q.grad = p.grad.clone()
            tight.param_groups[0]["params"][i].grad = p.grad.clone()
        one.step()
        tight.step()
        for optimizer in many:
            optimizer.step()
    for p, q, r in zip(together, alone, tight.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(p, r, atol=1e-12, rtol=1e-12)


def test_stacks_hold_matrices_of_one_shape_and_keep_to_the_cap():
    seen = []

    class Watched(Muon):
        def map_lookahead(self, x, group):
            seen.append(tuple(x.shape))
            return super().map_lookahead(x, group)

    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in [(4, 6), (6, 4), (4, 6), (5, 5), (3, 4, 6)]]
    for p in params:
        p.grad = torch.randn_like(p)
    Watched(params).step()
    assert sorted(seen) == [(1, 5, 5), (1, 6, 4), (5, 4, 6)]
    seen.clear()
    two_matrices = 2 * STACK_COPIES * 4 * 6 * 4  # bytes, float32
    Watched(params, max_workspace_bytes=two_matrices).step()
    assert max(shape[0] for shape in seen) == 2
    assert sum(shape[0] for shape in seen) == 7


def test_channels_last_convolution_is_the_contiguous_one():
    weight = random(6, 3, 2, 2, seed=0)
    grad = random(6, 3, 2, 2, seed=1)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(weight.clone().contiguous(memory_format=memory_format))
        p.grad = grad.clone().contiguous(memory_format=memory_format)
        MUD([{"params": [p], "role": "matrix", "flatten": True}], LR).step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1].contiguous())
    assert math.isfinite(results[0].sum())
