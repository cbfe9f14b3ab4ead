"""What only a GPU can show: the oracles there, bfloat16 maps, and a step that never waits for the device."""

import copy

import pytest
import torch
from oracles import AdaMuonOracle, AdaMuonV1Oracle, MUDOracle, MuonOracle

from hf_matrix_optim import MUD, AdaMuon, Muon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LR, DECAY, BETA = 0.02, 0.1, 0.9
SHAPES = [(48, 80), (80, 48), (48, 80), (64, 64), (1, 40), (3, 48, 80)]
OPTIMIZERS = {
    "muon": (Muon, {}, MuonOracle),
    "adamuon": (AdaMuon, {}, AdaMuonOracle),
    "adamuon_v1": (AdaMuon, {"variant": "v1"}, AdaMuonV1Oracle),
    "mud": (MUD, {}, MUDOracle),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to("cuda", dtype)


def build(name: str, dtype: torch.dtype, shapes=SHAPES, **kwargs):
    make, own, _ = OPTIMIZERS[name]
    params = [torch.nn.Parameter(random(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    vector = torch.nn.Parameter(random(33, seed=99, dtype=dtype))
    optimizer = make(
        [{"params": [vector], "role": "adamw"}, {"params": params, "role": "matrix"}], LR, DECAY, BETA, **own, **kwargs
    )
    return optimizer, [vector, *params]


def set_gradients(params, step: int) -> None:
    for i, p in enumerate(params):
        p.grad = random(*p.shape, seed=1000 * step + i, dtype=p.dtype)


@each_optimizer
def test_five_steps_are_the_oracle_in_float64(name):
    oracle_class = OPTIMIZERS[name][2]
    optimizer, params = build(name, torch.float64, map_dtype="float64")
    matrices = params[1:]
    oracles = [[oracle_class(W, LR, DECAY, BETA) for W in p.detach().reshape(-1, *p.shape[-2:])] for p in matrices]
    for step in range(5):
        set_gradients(params, step)
        for p, group in zip(matrices, oracles, strict=True):
            for G, oracle in zip(p.grad.reshape(-1, *p.shape[-2:]), group, strict=True):
                oracle.step(G)
        optimizer.step()
    for p, group in zip(matrices, oracles, strict=True):
        expected = torch.stack([oracle.W for oracle in group]).reshape(p.shape)
        torch.testing.assert_close(p.detach(), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["muon", "mud"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_precision_stays_close_to_the_oracle(name, dtype):
    W = torch.zeros(256, 1024, device="cuda", dtype=torch.float64)
    G = random(256, 1024, seed=5, dtype=dtype)
    oracle = OPTIMIZERS[name][2](W, LR, DECAY, BETA)
    oracle.step(G.double())
    p = torch.nn.Parameter(W.to(dtype))
    p.grad = G
    OPTIMIZERS[name][0]([p], LR, DECAY, BETA).step()
    cosine = torch.nn.functional.cosine_similarity(p.detach().double().flatten(), oracle.W.flatten(), dim=0)
    assert cosine > 0.998
    assert (p.detach().double().norm() / oracle.W.norm()).item() == pytest.approx(1, abs=0.03)


@each_optimizer
def test_a_step_never_waits_for_the_device(name):
    optimizer, params = build(name, torch.float32)
    set_gradients(params, 0)
    optimizer.step()  # creates the state
    set_gradients(params, 1)
    params[1].grad[0, 0] = float("nan")
    before = params[1].detach().clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(params[1], before)
    assert optimizer.state[params[1]]["skipped"].tolist() == [1]
    assert all(torch.isfinite(p).all() for p in params)


@each_optimizer
def test_resume_on_the_device_is_bitwise(name, tmp_path):
    whole, whole_params = build(name, torch.bfloat16)
    for step in range(4):
        if step == 2:
            torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
            weights = [p.detach().clone() for p in whole_params]
        set_gradients(whole_params, step)
        whole.step()
    resumed, resumed_params = build(name, torch.bfloat16)
    for p, q in zip(resumed_params, weights, strict=True):
        p.data.copy_(q)
    # As Trainer does: everything arrives on the device.
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cuda"))
    assert resumed.state[resumed_params[1]]["step"].device.type == "cpu"
    for step in range(2, 4):
        set_gradients(resumed_params, step)
        resumed.step()
    for p, q in zip(whole_params, resumed_params, strict=True):
        assert torch.equal(p, q)


@each_optimizer
def test_grad_scaler_skips_the_whole_step_on_overflow(name):
    optimizer, params = build(name, torch.float32)
    set_gradients(params, 0)
    optimizer.step()
    scaler = torch.amp.GradScaler("cuda")
    loss = sum((p * torch.inf).sum() for p in params)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for key, values in optimizer.state_dict()["state"].items():
        for field, value in values.items():
            assert torch.equal(value, state[key][field])
