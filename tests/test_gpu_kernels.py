"""The GPU fast paths against the plain functions that define them, at real sizes and on hard inputs."""

import pytest
import torch

from hf_matrix_optim import MUD
from hf_matrix_optim.decorrelate import decorrelate
from hf_matrix_optim.kernels import mud_step as fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SIZES = [(768, 3072), (3072, 768), (1280, 5120), (1536, 8960), (8960, 1536), (1280, 1280), (256, 1536), (640, 2560)]
ODD_SIZES = [(72, 200), (200, 72), (264, 1000), (1000, 264), (65, 72)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), device="cuda")


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return randn(rows, columns)


def low_rank_plus_noise(rows: int, columns: int) -> torch.Tensor:
    return randn(rows, 32, seed=1) @ randn(32, columns, seed=2) / 32**0.5 + 0.1 * randn(rows, columns, seed=3)


def near_duplicates(rows: int, columns: int) -> torch.Tensor:
    """Half of the vectors of the shorter side repeat another but for one part in ten."""
    x = randn(rows, columns)
    wide = x if rows <= columns else x.mT
    half = wide.size(0) // 2
    wide[half : 2 * half] = wide[:half] + 0.1 * randn(half, wide.size(1), seed=4)
    return x


def zero_vector(rows: int, columns: int) -> torch.Tensor:
    x = randn(rows, columns)
    (x if rows <= columns else x.mT)[3] = 0
    return x


INPUTS = [gaussian, low_rank_plus_noise, near_duplicates, zero_vector]


def direction(grad: torch.Tensor, **group) -> torch.Tensor:
    """Direction of the first step by the kernels: (rows, columns) in float64."""
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    fan_out, fan_in = grad.shape[-2:]
    MUD([{"params": [p], "role": "matrix", **group}], lr=1.0, weight_decay=0.0, kernels="triton").step()
    return -p.detach().double() / (0.2 * max(fan_out, fan_in) ** 0.5)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("shape", SIZES + ODD_SIZES)
def test_mud_kernels_are_the_plain_map(shape, make):
    grad = make(*shape)
    assert relative_error(direction(grad), decorrelate(grad.double())) < 3e-2


def test_mud_kernels_on_conv1d_fused_parts_and_experts():
    square = low_rank_plus_noise(512, 512)
    assert relative_error(direction(square, output_axis=1), decorrelate(square.double().mT).mT) < 3e-2
    fused = low_rank_plus_noise(256, 768)  # GPT-2's c_attn: three (fan_in, fan_out) parts, strided in memory
    expected = torch.cat([decorrelate(part.double().mT).mT for part in fused.split(256, dim=1)], dim=1)
    found = direction(fused, output_axis=1, split_sizes=(256, 256, 256)) * (768 / 256) ** 0.5
    assert relative_error(found, expected) < 3e-2
    experts = torch.stack([low_rank_plus_noise(256, 128), gaussian(256, 128)])
    expected = torch.cat([decorrelate(part.double()) for part in experts.split(128, dim=1)], dim=1)
    found = direction(experts, split_sizes=(128, 128)) * (256 / 128) ** 0.5
    assert relative_error(found, expected) < 3e-2


def twins(shapes=((256, 512), (512, 256), (128, 128)), dtype=torch.float32, **kwargs):
    """The same parameters under the kernels and under the plain path."""
    made = []
    for kernels in ("triton", "torch"):
        params = [torch.nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
        made.append((MUD(params, lr=0.02, weight_decay=0.1, kernels=kernels, **kwargs), params))
    return made


def set_gradients(params, step: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = (randn(*p.shape, seed=100 * step + i) * scale).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
def test_five_steps_stay_with_the_plain_path(dtype, nesterov):
    (fast_one, fast_params), (plain, plain_params) = twins(dtype=dtype, nesterov=nesterov)
    start = [p.detach().double() for p in plain_params]
    for step in range(5):
        # A gradient that jumps by 1e4 and back does not fit the scale of the step before it.
        for params in (fast_params, plain_params):
            set_gradients(params, step, 1e4 if step == 2 else 1.0)
        fast_one.step()
        plain.step()
    for p, q, begin in zip(fast_params, plain_params, start, strict=True):
        moved = relative_error(p.detach().double() - begin, q.detach().double() - begin)
        assert moved < (1e-2 if dtype == torch.float32 else 3e-2)
        torch.testing.assert_close(
            fast_one.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"], atol=1e-2, rtol=1e-5
        )


@pytest.mark.parametrize("scale", [2.0**-66, 1e-20, 1e20, 2.0**66])
def test_mud_kernels_do_not_depend_on_the_gradient_scale(scale):
    grad = low_rank_plus_noise(256, 512)
    is_power_of_two = scale in (2.0**-66, 2.0**66)  # the others round every element anew
    assert relative_error(direction(grad * scale), direction(grad)) < (1e-5 if is_power_of_two else 1e-2)


def test_zero_gradients_only_decay():
    (optimizer, params), _ = twins()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), q * (1 - 0.02 * 0.1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_skips_its_matrix_and_is_counted(bad):
    (optimizer, params), _ = twins(shapes=((256, 512), (256, 512)))
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    weight = params[0].detach().clone()
    momentum = optimizer.state[params[0]]["momentum_buffer"].clone()
    other = params[1].detach().clone()
    set_gradients(params, 2)
    params[0].grad[7, 9] = bad
    optimizer.step()
    assert torch.equal(params[0], weight)
    torch.testing.assert_close(optimizer.state[params[0]]["momentum_buffer"], momentum, atol=1e-5, rtol=1e-5)
    assert optimizer.state[params[0]]["skipped"].tolist() == [1]
    assert optimizer.state[params[1]]["skipped"].tolist() == [0]
    assert not torch.equal(params[1], other)
    set_gradients(params, 3)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert not torch.equal(params[0], weight)


def test_auto_takes_the_kernels_where_they_apply_and_says_why_not_where_they_do_not(monkeypatch):
    taken = []
    original = fast.mud_step
    monkeypatch.setattr(
        "hf_matrix_optim.mud.mud_step", lambda plan, *a, **k: (taken.append(len(plan.owners)), original(plan, *a, **k))
    )
    shapes = [(256, 512), (256, 512), (40, 512)]
    params = [torch.nn.Parameter(randn(*shape)) for shape in shapes]
    set_gradients(params, 0)
    MUD(params).step()
    assert taken == [2]
    taken.clear()
    MUD(params, passes=2).step()
    MUD(params, kernels="torch").step()
    MUD(params, lr=torch.tensor(0.01)).step()
    assert taken == []
    with pytest.raises(RuntimeError, match=r"kernels='triton' was asked for, but .*\(40, 512\) is too small"):
        MUD(params[2:], kernels="triton").step()


def test_a_step_never_waits_for_the_device():
    (optimizer, params), _ = twins()
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_plans_follow_gradients_and_parameters_that_move():
    (optimizer, params), (plain, plain_params) = twins()
    for step in range(4):
        set_gradients(params, step)  # new gradient tensors in every step
        set_gradients(plain_params, step)
        if step == 2:
            for p in params:
                p.data = p.data.clone()
        optimizer.step()
        plain.step()
    for p, q in zip(params, plain_params, strict=True):
        assert relative_error(p.detach().double(), q.detach().double()) < 1e-3


def test_workspace_keeps_to_the_cap():
    params = [torch.nn.Parameter(randn(512, 2048)) for _ in range(24)]
    set_gradients(params, 0)
    cap = 4 * fast.workspace_bytes(512, 2048)
    optimizer = MUD(params, max_workspace_bytes=cap, kernels="triton")
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * cap


def test_resume_is_bitwise(tmp_path):
    (whole, whole_params), _ = twins()
    for step in range(4):
        if step == 2:
            torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
            weights = [p.detach().clone() for p in whole_params]
        set_gradients(whole_params, step)
        whole.step()
    (resumed, resumed_params), _ = twins()
    for p, q in zip(resumed_params, weights, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cuda"))
    for step in range(2, 4):
        set_gradients(resumed_params, step)
        resumed.step()
    for p, q in zip(whole_params, resumed_params, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)  # squared norms are summed by atomics
