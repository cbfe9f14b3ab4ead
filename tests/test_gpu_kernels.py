"""The GPU fast paths against the plain functions that define them, at real sizes and on hard inputs."""

import pytest
import torch
from optimizers import OPTIMIZERS

from hf_matrix_optim import MUD, Muon
from hf_matrix_optim.decorrelate import decorrelate
from hf_matrix_optim.int8_momentum import LEVELS, in_float, quantize_into, zeros_for
from hf_matrix_optim.kernels import fast_path
from hf_matrix_optim.kernels.half_maps import Sides
from hf_matrix_optim.kernels.int8_plan import Int8Plan, Int8Plans
from hf_matrix_optim.kernels.stack_step import KernelRule, workspace_bytes
from hf_matrix_optim.newton_schulz import NS_COEFFICIENTS, newton_schulz

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SIZES = [(768, 3072), (3072, 768), (1280, 5120), (1536, 8960), (8960, 1536), (1280, 1280), (256, 1536), (640, 2560)]
ODD_SIZES = [(72, 200), (200, 72), (264, 1000), (1000, 264), (65, 72), (1600, 1600), (896, 4864)]


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


def power_law(rows: int, columns: int) -> torch.Tensor:
    """Singular values 1, 1/2, 1/3, ..."""
    k = min(rows, columns)
    left = torch.linalg.qr(randn(rows, k, seed=5))[0]
    right = torch.linalg.qr(randn(columns, k, seed=6))[0]
    return (left / torch.arange(1, k + 1, device="cuda")) @ right.mT


def heavy_tails(rows: int, columns: int) -> torch.Tensor:
    return randn(rows, columns) * torch.exp(1.5 * randn(rows, columns, seed=7))


INPUTS = [gaussian, low_rank_plus_noise, near_duplicates, zero_vector, power_law, heavy_tails]
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def direction(optimizer_class, grad: torch.Tensor, group: dict | None = None, **kwargs) -> torch.Tensor:
    """Direction of the first step by the kernels: (rows, columns) in float64."""
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    fan_out, fan_in = grad.shape[-2:]
    groups = [{"params": [p], "role": "matrix", **(group or {})}]
    optimizer_class(groups, lr=1.0, weight_decay=0.0, kernels="triton", **kwargs).step()
    return -p.detach().double() / (0.2 * max(fan_out, fan_in) ** 0.5)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("shape", SIZES + ODD_SIZES)
def test_mud_kernels_are_the_plain_map(shape, make):
    grad = make(*shape)
    # Of a power law the last vectors are what rounding leaves of a millionth: float32 itself is off by more.
    most = (
        3e-2
        if make is not power_law
        else 1.5 * relative_error(decorrelate(grad.half()).double(), decorrelate(grad.double()))
    )
    assert relative_error(direction(MUD, grad), decorrelate(grad.double())) < most


@pytest.mark.parametrize("passes", [2, 3])
def test_mud_kernels_take_several_passes(passes):
    grad = low_rank_plus_noise(640, 2560)
    expected = decorrelate(grad.double(), passes=passes)
    assert relative_error(direction(MUD, grad, passes=passes), expected) < 3e-2


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("shape", SIZES + ODD_SIZES)
def test_muon_kernels_are_better_than_the_bfloat16_iteration(shape, make):
    grad = make(*shape)
    expected = newton_schulz(grad.double())
    of_bfloat16 = relative_error(newton_schulz(grad, map_dtype=torch.bfloat16).double(), expected)
    assert relative_error(direction(Muon, grad), expected) < 0.5 * of_bfloat16


@pytest.mark.parametrize(
    ("table", "steps"),
    # "you" is a table of exactly five steps.
    [(table, steps) for table in NS_COEFFICIENTS for steps in (1, 3, 5, 9) if table != "you" or steps == 5],
)
@pytest.mark.parametrize("shape", [(640, 640), (640, 2560)])
def test_muon_kernels_follow_every_table(shape, steps, table):
    grad = low_rank_plus_noise(*shape)
    options = {"ns_coefficients": table, "ns_steps": steps}
    assert relative_error(direction(Muon, grad, **options), newton_schulz(grad.double(), **options)) < 3e-2


def test_kernels_on_conv1d_fused_parts_and_experts():
    for optimizer_class, plain in ((MUD, decorrelate), (Muon, newton_schulz)):
        square = low_rank_plus_noise(512, 512)
        expected = plain(square.double().mT).mT
        assert relative_error(direction(optimizer_class, square, {"output_axis": 1}), expected) < 3e-2
        fused = low_rank_plus_noise(256, 768)  # GPT-2's c_attn: three (fan_in, fan_out) parts, strided in memory
        expected = torch.cat([plain(part.double().mT).mT for part in fused.split(256, dim=1)], dim=1)
        layout = {"output_axis": 1, "split_sizes": (256, 256, 256)}
        assert relative_error(direction(optimizer_class, fused, layout) * (768 / 256) ** 0.5, expected) < 3e-2
        experts = torch.stack([low_rank_plus_noise(256, 128), gaussian(256, 128)])
        expected = torch.cat([plain(part.double()) for part in experts.split(128, dim=1)], dim=1)
        found = direction(optimizer_class, experts, {"split_sizes": (128, 128)}) * (256 / 128) ** 0.5
        assert relative_error(found, expected) < 3e-2


def twins(name, shapes=((256, 512), (512, 256), (128, 128)), dtype=torch.float32, fast=None, **kwargs):
    """The same parameters under the kernels and under the plain path in float32."""
    made = []
    for options in (
        {"kernels": "triton", **(fast or {})},
        {"kernels": "torch", "map_dtype": "float32"},
    ):
        params = [torch.nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
        made.append((OPTIMIZERS[name](params, lr=0.02, weight_decay=0.1, **options, **kwargs), params))
    return made


def set_gradients(params, step: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = (randn(*p.shape, seed=100 * step + i) * scale).to(p.dtype)


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
def test_five_steps_stay_with_the_plain_path(name, dtype, nesterov):
    (fast_one, fast_params), (plain, plain_params) = twins(name, dtype=dtype, nesterov=nesterov)
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
        for key in ("momentum_buffer", "exp_avg_sq"):
            if key in plain.state[q]:
                found, expected = fast_one.state[p][key].double(), plain.state[q][key].double()
                assert relative_error(found, expected) < (1e-5 if key == "momentum_buffer" else 1e-2)


@each_optimizer
def test_bfloat16_momentum_is_the_rounded_one_in_both_paths(name):
    both = {"momentum_dtype": "bfloat16"}
    (fast_one, fast_params), (plain, plain_params) = twins(name, **both)
    start = [p.detach().double() for p in plain_params]
    for step in range(3):
        for optimizer, params in ((fast_one, fast_params), (plain, plain_params)):
            set_gradients(params, step)
            optimizer.step()
    for p, q, begin in zip(fast_params, plain_params, start, strict=True):
        assert fast_one.state[p]["momentum_buffer"].dtype == plain.state[q]["momentum_buffer"].dtype == torch.bfloat16
        assert relative_error(p.detach().double() - begin, q.detach().double() - begin) < 3e-2


@each_optimizer
@pytest.mark.parametrize("scale", [2.0**-66, 1e-20, 1e20, 1e35, 2.0**66])
def test_kernels_do_not_depend_on_the_gradient_scale(name, scale):
    grad = low_rank_plus_noise(256, 512)
    is_power_of_two = scale in (2.0**-66, 2.0**66)  # the others round every element anew
    scaled = direction(OPTIMIZERS[name], grad * scale)
    most = 1e-5 if is_power_of_two else 1e-2
    if name == "adamuon_v1" and not is_power_of_two:
        most = 1e-1  # its first step is nearly the sign of an orthogonal matrix, so elements near zero change sign
    assert relative_error(scaled, direction(OPTIMIZERS[name], grad)) < most


@each_optimizer
def test_zero_gradients_only_decay(name):
    (optimizer, params), _ = twins(name)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), q * (1 - 0.02 * 0.1))


@each_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_skips_its_matrix_and_is_counted(name, bad):
    (optimizer, params), _ = twins(name, shapes=((256, 512), (256, 512)))
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    weight = params[0].detach().clone()
    before = {key: value.clone() for key, value in optimizer.state[params[0]].items() if value.is_floating_point()}
    other = params[1].detach().clone()
    set_gradients(params, 2)
    params[0].grad[7, 9] = bad
    optimizer.step()
    assert torch.equal(params[0], weight)
    for key in {"momentum_buffer", "exp_avg_sq"} & set(before):
        torch.testing.assert_close(optimizer.state[params[0]][key], before[key], atol=1e-5, rtol=1e-5, msg=key)
    assert optimizer.state[params[0]]["skipped"].tolist() == [1]
    assert optimizer.state[params[1]]["skipped"].tolist() == [0]
    assert not torch.equal(params[1], other)
    set_gradients(params, 3)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert not torch.equal(params[0], weight)


@each_optimizer
def test_auto_takes_the_kernels_where_they_apply_and_says_so(name, monkeypatch, caplog):
    taken = []
    original = fast_path.step_stack
    monkeypatch.setattr(fast_path, "step_stack", lambda plan, *a: (taken.append(len(plan.owners)), original(plan, *a)))
    params = [torch.nn.Parameter(randn(*shape)) for shape in [(256, 512), (256, 512), (40, 512)]]
    set_gradients(params, 0)
    make = OPTIMIZERS[name]
    with caplog.at_level("INFO", logger="transformers.hf_matrix_optim"):
        make(params).step()
    assert taken == [2]
    assert "2 matrices of 2 parameters are stepped by Triton kernels in 1 stacks, 1 parameters by" in caplog.text
    taken.clear()
    make(params, kernels="torch").step()
    make(params, map_dtype="float32").step()
    assert taken == []
    with pytest.raises(RuntimeError, match=r"kernels='triton' was asked for, but .*\(40, 512\) is too small"):
        make(params[1:], kernels="triton").step()
    assert taken == []


@each_optimizer
@pytest.mark.parametrize("momentum_dtype", ["auto", "int8"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_never_waits_for_the_device(name, cuda_graph, momentum_dtype):
    (optimizer, params), _ = twins(name, fast={"cuda_graph": cuda_graph}, momentum_dtype=momentum_dtype)
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(optimizer, params, steps) -> None:
    """Steps as in training: a schedule, clipping, new gradient tensors, and one parameter without a gradient once."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in steps:
        set_gradients(params, step)
        if step == 4:
            params[1].grad = None
        torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()


@each_optimizer
@pytest.mark.parametrize("momentum_dtype", ["auto", "int8"])
def test_a_graph_makes_the_same_steps(name, momentum_dtype):
    (eager, eager_params), _ = twins(name, momentum_dtype=momentum_dtype)
    (graphed, graphed_params), _ = twins(name, fast={"cuda_graph": True}, momentum_dtype=momentum_dtype)
    train(eager, eager_params, range(9))
    train(graphed, graphed_params, range(9))
    plans = graphed.__dict__["_fast_path"].plans.values()
    assert any(plan.graph is not None for plan in plans)
    for p, q in zip(eager_params, graphed_params, strict=True):
        assert torch.equal(p, q)


@each_optimizer
def test_a_learning_rate_on_the_device_is_read_there(name):
    rate = torch.tensor(0.02, device="cuda")
    (by_float, float_params), _ = twins(name)
    (_, params), _ = twins(name)
    by_tensor = OPTIMIZERS[name](params, lr=rate, weight_decay=0.1, kernels="triton", cuda_graph=True)
    for step in range(5):
        for group in by_float.param_groups:
            group["lr"] = 0.02 / (1 + step)
        rate.fill_(0.02 / (1 + step))
        set_gradients(float_params, step)
        set_gradients(params, step)
        by_float.step()
        by_tensor.step()
    for p, q in zip(float_params, params, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@each_optimizer
@pytest.mark.parametrize("shape", [(1280, 2560), (1536, 1536), (1664, 640)])
def test_a_matrix_is_stepped_alike_alone_and_in_a_stack(name, shape):
    (stacked, params), _ = twins(name, shapes=(shape,) * 5)
    set_gradients(params, 0)
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    stacked.step()
    for p, q in zip(params, alone, strict=True):
        q.grad = p.grad
        OPTIMIZERS[name]([q], lr=0.02, weight_decay=0.1, kernels="triton").step()
        torch.testing.assert_close(q, p, atol=1e-4, rtol=1e-4)


@each_optimizer
def test_steps_are_the_same_bit_for_bit(name):
    """Replicas on several GPUs each make the step: they would drift apart if sums had no fixed order."""
    shapes = ((1280, 5120), (5120, 1280), (1280, 1280))
    results = []
    for _ in range(2):
        (optimizer, params), _ = twins(name, shapes=shapes)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        results.append([p.detach().clone() for p in params])
        del optimizer, params
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_plans_follow_gradients_and_parameters_that_move():
    (optimizer, params), (plain, plain_params) = twins("mud")
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


def workspace_of_four(name):
    """Bytes that the kernels need for four matrices of 512 x 2048."""
    rule = KernelRule(0.95, True, 0.1, 1.0, passes=int(name == "mud"), beta2=0.9 if "ada" in name else None)
    return 4 * workspace_bytes(Sides(512, 2048, False), rule)


def assert_second_step_keeps_to(name, cap, **options):
    """Of 24 matrices of 512 x 2048; returns the bytes that it leaves beside what there was before."""
    params = [torch.nn.Parameter(randn(512, 2048)) for _ in range(24)]
    set_gradients(params, 0)
    optimizer = OPTIMIZERS[name](params, max_workspace_bytes=cap, kernels="triton", **options)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * cap
    return torch.cuda.memory_allocated() - before


@each_optimizer
def test_workspace_keeps_to_the_cap(name):
    assert_second_step_keeps_to(name, workspace_of_four(name))


@each_optimizer
@pytest.mark.parametrize("momentum_dtype", ["auto", "int8"])
def test_resume_is_bitwise(name, momentum_dtype, tmp_path):
    (whole, whole_params), _ = twins(name, momentum_dtype=momentum_dtype)
    for step in range(4):
        if step == 2:
            torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
            weights = [p.detach().clone() for p in whole_params]
        set_gradients(whole_params, step)
        whole.step()
    (resumed, resumed_params), _ = twins(name, momentum_dtype=momentum_dtype)
    for p, q in zip(resumed_params, weights, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cuda"))
    for step in range(2, 4):
        set_gradients(resumed_params, step)
        resumed.step()
    for p, q in zip(whole_params, resumed_params, strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_of_a_cpu_goes_on_by_the_kernels():
    params = [torch.nn.Parameter(torch.zeros(128, 256))]
    on_cpu = Muon(params)
    params[0].grad = torch.ones(128, 256)
    on_cpu.step()
    moved = [torch.nn.Parameter(params[0].detach().cuda())]
    on_gpu = Muon(moved, kernels="triton")
    on_gpu.load_state_dict(on_cpu.state_dict())
    set_gradients(moved, 1)
    on_gpu.step()
    assert torch.isfinite(moved[0]).all()


def mixed_blocks() -> torch.Tensor:
    """Blocks of zeros, of one element, of subnormal numbers, and of each level with the halves between them."""
    x = torch.zeros(40, 256, device="cuda")
    x[3:9, 17] = -3.0
    x[9:15] = randn(6, 256, seed=8) * 1e-41
    x[15:21, 200:] = 1e-38
    x[21:27] = randn(6, 256, seed=9)
    x[21:27, :128] *= 1e-30
    root = torch.arange(256, device="cuda") % 127
    x[27:33] = (root / 127).square()
    x[33:39] = -((root + 0.5) / 127).square()
    x[27:39, 0] = 1.0
    return x


POWERS = (37, 30, 0, -18, -19, -35, -38, -44)
INT8_VALUES = {
    "one block": lambda: [randn(256)],
    "smallest": lambda: [randn(64, 64)],
    "no whole program": lambda: [randn(17, 256)],
    "several": lambda: [randn(256 * count, seed=count) for count in (16, 17, 31, 1, 33, 5, 4096)],
    "shapes": lambda: [randn(768, 3072), randn(4, 64, 64, seed=1), randn(1280, 1280, seed=2)],
    "zeros": lambda: [torch.zeros(64, 128, device="cuda"), randn(64, 64)],
    "mixed": lambda: [mixed_blocks(), randn(256)],
    "wide": lambda: [torch.exp(12 * randn(64, 256)) * randn(64, 256, seed=1).sign()],
    "sizes": lambda: [randn(20, 256, seed=i) * 10.0**power for i, power in enumerate(POWERS)],
}


@pytest.mark.parametrize("values", INT8_VALUES)
def test_int8_kernels_are_the_plain_functions_bit_for_bit(values):
    tensors = INT8_VALUES[values]()
    by_kernel, plainly = ([zeros_for(x) for x in tensors] for _ in range(2))
    for state in by_kernel:  # every scale is written, every level too
        state["momentum_buffer"].fill_(3)
        state["momentum_scale"].fill_(float("nan"))
    levels, scales = ([state[key] for state in by_kernel] for key in ("momentum_buffer", "momentum_scale"))
    plan = Int8Plan(levels, scales, LEVELS)
    plan.quantize(torch.cat([x.flatten() for x in tensors]))
    for state, x in zip(plainly, tensors, strict=True):
        quantize_into(state, x)
    for _ in range(3):  # what was read and not changed is written back as it was
        read = plan.in_float()
        for found, expected, view in zip(by_kernel, plainly, plan.views(read), strict=True):
            assert torch.equal(found["momentum_scale"], expected["momentum_scale"])
            assert torch.equal(found["momentum_buffer"], expected["momentum_buffer"])
            assert torch.equal(view, in_float(expected))
            assert view.is_contiguous()
            assert view.data_ptr() % 16 == 0
        plan.quantize(read)


def test_int8_kernels_write_nothing_beside_the_momenta():
    around = torch.full((3, 17 * 256), 5, dtype=torch.int8, device="cuda")
    around_scales = torch.full((3, 64), 7.0, device="cuda")  # rows are aligned as the kernels want them
    plan = Int8Plan([around[1]], [around_scales[1, :17]], LEVELS)
    plan.quantize(randn(17 * 256))
    assert (around[[0, 2]] == 5).all()
    assert (around_scales[[0, 2]] == 7).all()
    assert (around_scales[1, 17:] == 7).all()
    assert (around_scales[1, :17] != 7).all()


def test_new_int8_momenta_reach_the_device_without_waiting():
    states = [zeros_for(randn(64, 64)) for _ in range(3)]
    levels, scales = ([state[key] for state in states] for key in ("momentum_buffer", "momentum_scale"))
    compiled = Int8Plan(levels, scales, LEVELS)
    compiled.quantize(compiled.in_float())
    plans = Int8Plans()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = plans.of(levels, scales, LEVELS, states)
        plan.quantize(plan.in_float())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plans.of(levels, scales, LEVELS, states) is plan
    assert plans.of([x.clone() for x in levels], scales, LEVELS, states) is not plan
    assert plans.of([levels[0].mT], scales[:1], LEVELS, plan) is None


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_momentum_is_the_same_in_both_paths(name, dtype):
    shapes = ((256, 512), (512, 256), (128, 128), (65, 72), (192, 136))  # the fourth keeps float32
    (fast_one, fast_params), (plain, plain_params) = twins(name, shapes=shapes, dtype=dtype, momentum_dtype="int8")
    start = [p.detach().double() for p in plain_params]
    for step in range(3):
        for optimizer, params in ((fast_one, fast_params), (plain, plain_params)):
            set_gradients(params, step)
            optimizer.step()
    for i, (p, q, begin) in enumerate(zip(fast_params, plain_params, start, strict=True)):
        kept = fast_one.state[p]["momentum_buffer"].dtype
        assert kept == plain.state[q]["momentum_buffer"].dtype == (torch.float32 if i == 3 else torch.int8)
        # A sum that is rounded otherwise may fall to the next level.
        assert relative_error(in_float(fast_one.state[p]).double(), in_float(plain.state[q]).double()) < 1e-3
        most = 1e-1 if name == "adamuon" else 3e-2  # the sign of an element near 0 is that of the level it falls to
        assert relative_error(p.detach().double() - begin, q.detach().double() - begin) < most


@each_optimizer
def test_int8_kernels_are_taken_and_parts_change_nothing(name, monkeypatch):
    written = []
    original = Int8Plan.quantize
    monkeypatch.setattr(Int8Plan, "quantize", lambda plan, x: (written.append(len(plan.sizes)), original(plan, x)))
    shapes = ((256, 512),) * 5
    (whole, whole_params), (plain, plain_params) = twins(name, shapes=shapes, momentum_dtype="int8")
    in_parts, part_params = twins(
        name, shapes=shapes, momentum_dtype="int8", fast={"max_workspace_bytes": 2 * 2 * 4 * 256 * 512}
    )[0]
    start = [p.detach().double() for p in whole_params]
    for optimizer, params, expected in (
        (whole, whole_params, [5]),
        (in_parts, part_params, [2, 2, 1]),
        (plain, plain_params, []),
    ):
        for step in range(2):
            written.clear()
            set_gradients(params, step)
            optimizer.step()
            assert written == expected
    for p, q, begin in zip(whole_params, part_params, start, strict=True):
        assert relative_error(p.detach().double() - begin, q.detach().double() - begin) < 3e-2


def test_int8_momentum_of_parameters_that_the_kernels_of_the_step_leave():
    """Convolutions, other layouts in memory, short sides: their momenta come and go by the kernels all the same."""
    found = []
    for kernels in ("auto", "torch"):
        params = [randn(64, 16, 4, 4), randn(128, 64, seed=1).mT, randn(16, 512, seed=2), randn(256, 256, seed=3)]
        params = [torch.nn.Parameter(p) for p in params]
        groups = [{"params": params[:1], "flatten": True}, {"params": params[1:]}]
        optimizer = Muon(groups, lr=0.02, kernels=kernels, momentum_dtype="int8")
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        found.append([*params, *(in_float(optimizer.state[p]) for p in params)])
    for p, q in zip(*found, strict=True):
        assert relative_error(p.detach().double(), q.detach().double()) < 1e-2


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_plans_are_kept_where_int8_momenta_move(cuda_graph, monkeypatch):
    kept = []  # so that the next ones lie elsewhere
    original = Int8Plan.in_float

    def in_float_elsewhere(plan):
        kept.append(original(plan))
        return kept[-1]

    monkeypatch.setattr(Int8Plan, "in_float", in_float_elsewhere)
    (optimizer, params), (plain, plain_params) = twins("mud", fast={"cuda_graph": cuda_graph}, momentum_dtype="int8")
    plans, graphs = [], []
    for step in range(6):
        for each, each_params in ((optimizer, params), (plain, plain_params)):
            set_gradients(each_params, step)
            each.step()
        (plan,) = optimizer.__dict__["_fast_path"].plans.values()
        plans.append(plan)
        graphs.append(plan.graph)
    assert len({values.data_ptr() for values in kept}) == 6
    assert all(plan is plans[0] for plan in plans)
    assert (graphs[-1] is not None) == cuda_graph
    assert graphs[-1] is graphs[2]
    for p, q in zip(params, plain_params, strict=True):
        assert relative_error(p.detach().double(), q.detach().double()) < 1e-3


@each_optimizer
def test_workspace_with_int8_momentum_keeps_to_the_cap(name):
    cap = 2 * max(workspace_of_four(name), 8 * 4 * 512 * 2048)
    assert assert_second_step_keeps_to(name, cap, momentum_dtype="int8") <= 2**20
