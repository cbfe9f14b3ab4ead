"""What must hold for every optimizer of the package: one table, every property of a torch optimizer."""

import copy
import gc
import io
import itertools
import pickle
import weakref
from functools import partial

import pytest
import torch
from optimizers import OPTIMIZERS as NAMED_OPTIMIZERS
from torch import Tensor, nn

from hf_matrix_optim import MUD, AdaMuon, Muon

OPTIMIZERS = NAMED_OPTIMIZERS | {
    "muon_plain": partial(Muon, nesterov=False),
    "adamuon_nesterov": partial(AdaMuon, nesterov=True),
    "mud_2": partial(MUD, passes=2),
}
SHAPES = [(4, 6), (6, 4), (5, 5), (1, 7), (7, 1), (2, 4, 6)]

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    matrices = [nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in SHAPES]
    vectors = [nn.Parameter(torch.randn(9, generator=generator).to(dtype))]
    return matrices, vectors


def groups(matrices: list[nn.Parameter], vectors: list[nn.Parameter]) -> list[dict]:
    return [
        {
            "params": list(vectors),
            "param_names": [f"v{i}" for i in range(len(vectors))],
            "role": "adamw",
            "weight_decay": 0.0,
        },
        {"params": list(matrices), "param_names": [f"w{i}" for i in range(len(matrices))], "role": "matrix"},
    ]


def set_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def build(make, dtype: torch.dtype = torch.float32, **kwargs):
    matrices, vectors = parameters(dtype)
    return make(groups(matrices, vectors), **{"lr": 0.02, **kwargs}), matrices + vectors


def run(optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def tensors(optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach() for p in params] + [value for p in params for value in optimizer.state[p].values()]


def assert_same(a, b) -> None:
    for left, right in zip(tensors(a), tensors(b), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


# ---- numerics ----


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_only_decays(make, dtype):
    optimizer, params = build(make, dtype, lr=0.5, weight_decay=0.5)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), q * 0.75 if p.ndim > 1 else q)


@each_optimizer
def test_zero_gradient_at_zero_rate_changes_no_bit(make):
    """What torch.distributed.checkpoint does to create the state before it loads one."""
    optimizer, params = build(make, lr=0.02)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(torch.count_nonzero(optimizer.state[p]["momentum_buffer"]) == 0 for p in params if p.ndim > 1)


@each_optimizer
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_update_does_not_depend_on_the_gradient_scale(make, factor):
    results = []
    for scale in (1.0, factor):
        matrices, _ = parameters()
        optimizer = make([{"params": matrices}], lr=0.02)
        for step in range(3):
            set_gradients(matrices, step, scale)
            optimizer.step()
        results.append([p.detach() for p in matrices])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=2e-5)


@each_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_skips_its_matrix_alone_and_is_counted(make, bad):
    optimizer, params = build(make)
    clean, clean_params = build(make)
    run(optimizer, params, range(2))
    run(clean, clean_params, range(2))
    before = [t.clone() for t in tensors(optimizer)]
    set_gradients(params, 2)
    set_gradients(clean_params, 2)
    stack = params[SHAPES.index((2, 4, 6))]
    params[0].grad[0, 0] = bad
    stack.grad[1, 2, 3] = bad
    optimizer.step()
    clean.step()
    assert torch.equal(params[0], before[1])  # the vector's group comes first
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], clean_before(make, params[0].shape))
    clean_stack = clean_params[SHAPES.index((2, 4, 6))]
    torch.testing.assert_close(stack[0], clean_stack[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(stack[1], before[1 + SHAPES.index((2, 4, 6))][1])
    assert optimizer.state[params[0]]["skipped"].tolist() == [1]
    assert optimizer.state[stack]["skipped"].tolist() == [0, 1]
    for i, (p, q) in enumerate(zip(params, clean_params, strict=True)):
        if p is not params[0] and p is not stack:
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6, msg=str(i))
    run(optimizer, params, range(3, 5))
    assert all(torch.isfinite(t).all() for t in tensors(optimizer))


def clean_before(make, shape) -> Tensor:
    """Momentum of the first matrix after two steps."""
    optimizer, params = build(make)
    run(optimizer, params, range(2))
    assert params[0].shape == shape
    return optimizer.state[params[0]]["momentum_buffer"]


@each_optimizer
def test_a_missing_gradient_leaves_the_parameter_and_its_state_alone(make):
    optimizer, params = build(make)
    run(optimizer, params, range(2))
    before = params[1].detach().clone()
    state = copy.deepcopy(optimizer.state[params[1]])
    for step in range(2, 4):
        set_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    assert torch.equal(params[1], before)
    assert all(torch.equal(state[key], optimizer.state[params[1]][key]) for key in state)
    run(optimizer, params, range(4, 6))  # and it can come back
    assert optimizer.state[params[1]]["step"].item() == 4
    assert optimizer.state[params[0]]["step"].item() == 6


@each_optimizer
def test_gradients_are_never_written(make):
    for maximize in (False, True):
        optimizer, params = build(make, maximize=maximize)
        set_gradients(params, 0)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))


@each_optimizer
def test_bfloat16_parameters_keep_float32_momentum_across_save_and_load(make):
    optimizer, params = build(make, torch.bfloat16)
    run(optimizer, params, range(3))
    loaded, loaded_params = build(make, torch.bfloat16)
    for p, q in zip(loaded_params, params, strict=True):
        p.data.copy_(q.data)
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for p in loaded_params:
        if p.ndim > 1:
            assert loaded.state[p]["momentum_buffer"].dtype == torch.float32
            low = loaded.state[p]["momentum_buffer"].bfloat16().float()
            assert not torch.equal(low, loaded.state[p]["momentum_buffer"])
    run(optimizer, params, range(3, 6))
    run(loaded, loaded_params, range(3, 6))
    assert_same(optimizer, loaded)


@each_optimizer
def test_small_decay_reaches_bfloat16_weights_through_one_rounding(make):
    """Decay and update are added in float32 and rounded once, so they do not vanish one by one."""
    p = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    reference = p.detach().double()
    optimizer = make([p], lr=0.01, weight_decay=0.1)
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    double = nn.Parameter(reference.clone())
    twin = make([double], lr=0.01, weight_decay=0.1)
    double.grad = p.grad.double()
    optimizer.step()
    twin.step()
    assert (p.double() - double).abs().max() <= 2**-8  # one unit in the last place around 1


# ---- the torch contract ----


def saved_and_loaded(state_dict: dict) -> dict:
    """Through a file, as Trainer loads optimizer.pt."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_optimizer
def test_bfloat16_momentum_stays_so_across_save_and_load_and_steps_nearly_alike(make):
    exact, exact_params = build(make)
    rounded, rounded_params = build(make, momentum_dtype="bfloat16")
    start = [p.detach().clone() for p in exact_params]
    for optimizer, params in ((exact, exact_params), (rounded, rounded_params)):
        run(optimizer, params, range(2))
    resumed, resumed_params = build(make, momentum_dtype="bfloat16")
    resumed.load_state_dict(rounded.state_dict())
    for p, q in zip(resumed_params, rounded_params, strict=True):
        p.data.copy_(q)
    for optimizer, params in ((rounded, rounded_params), (resumed, resumed_params), (exact, exact_params)):
        run(optimizer, params, range(2, 4))
    for p, q, r, begin in zip(exact_params, rounded_params, resumed_params, start, strict=True):
        assert torch.equal(q, r)
        if p.ndim > 1:
            assert resumed.state[r]["momentum_buffer"].dtype == torch.bfloat16
            assert exact.state[p]["momentum_buffer"].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity((p - begin).flatten(), (q - begin).flatten(), dim=0)
        assert cosine > 0.97


@each_optimizer
def test_what_needs_a_gpu_is_refused_without_one(make):
    for kwargs, message in (
        ({"kernels": "triton"}, "kernels='triton' was asked for, but the parameters are on cpu"),
        (
            {"cuda_graph": True},
            "cuda_graph=True was asked for, .* but the parameters are on cpu.*; or leave cuda_graph out",
        ),
    ):
        optimizer, params = build(make, **kwargs)
        before = [p.detach().clone() for p in params if p.ndim > 1]
        set_gradients(params, 0)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip((p for p in params if p.ndim > 1), before, strict=True))


@each_optimizer
def test_loading_lets_go_of_the_state_before(make):
    optimizer, params = build(make)
    run(optimizer, params, range(1))
    before = weakref.ref(optimizer.state[next(p for p in params if p.ndim > 1)]["momentum_buffer"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert before() is None


@each_optimizer
def test_a_state_that_is_dropped_starts_anew(make):
    optimizer, params = build(make)
    run(optimizer, params, range(3))
    optimizer.state.clear()
    fresh, fresh_params = build(make)
    for p, q in zip(fresh_params, params, strict=True):
        p.data.copy_(q)
    run(optimizer, params, range(3, 5))
    run(fresh, fresh_params, range(3, 5))
    for p, q in zip(fresh_params, params, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[q]["step"].item() == 2


@each_optimizer
def test_default_device_and_dtype_do_not_reach_the_counters(make):
    optimizer, params = build(make)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        run(optimizer, params, range(2))
    finally:
        torch.set_default_dtype(before)
    matrices = [p for p in params if p.ndim > 1]
    assert all(optimizer.state[p]["step"].dtype == torch.float32 for p in matrices)


def test_a_zero_row_without_eps_only_decays():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    p.grad[2] = 0
    AdaMuon([p], lr=0.1, weight_decay=0.0, eps=0.0).step()
    assert torch.equal(p[2], torch.ones(6))
    assert not torch.equal(p[1], torch.ones(6))


@each_optimizer
def test_steps_are_counted_for_each_parameter(make):
    optimizer, params = build(make)
    matrices = [p for p in params if p.ndim > 1]
    for step in range(4):
        set_gradients(params, step)
        if step in (0, 2):
            matrices[1].grad = None
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in matrices] == [4, 2, 4, 4, 4, 4]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, range(4, 5))
    assert [optimizer.state[p]["step"].item() for p in matrices] == [5, 3, 5, 5, 5, 5]


@each_optimizer
def test_resume_is_bitwise(make):
    whole, whole_params = build(make)
    run(whole, whole_params, range(6))
    half, half_params = build(make)
    run(half, half_params, range(3))
    resumed, resumed_params = build(make, lr=0.5)
    for p, q in zip(resumed_params, half_params, strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(saved_and_loaded(half.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.02
    run(resumed, resumed_params, range(3, 6))
    assert_same(whole, resumed)


@each_optimizer
def test_loading_shares_no_tensor_with_the_caller(make):
    optimizer, params = build(make)
    run(optimizer, params, range(2))
    state_dict = optimizer.state_dict()
    frozen = copy.deepcopy(state_dict)
    other, other_params = build(make)
    other.load_state_dict(state_dict)
    run(other, other_params, range(2, 4))
    for key, state in frozen["state"].items():
        for name, value in state.items():
            assert torch.equal(value, state_dict["state"][key][name])


@each_optimizer
def test_state_is_plain_and_created_lazily(make):
    optimizer, params = build(make)
    assert optimizer.state_dict()["state"] == {}
    run(optimizer, params, range(1))
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            assert isinstance(value, (int, float, bool, str, tuple, list, type(None))), key
    keys = {"step", "momentum_buffer", "skipped"}
    assert set(optimizer.state[params[0]]) in (keys, keys | {"exp_avg_sq"})
    assert optimizer.state[params[0]]["momentum_buffer"].shape == params[0].shape


@each_optimizer
def test_parameters_may_be_swapped_before_the_first_step(make):
    """FSDP2 through accelerate: load_state_dict(state_dict()) and new parameter objects after construction."""
    plain, plain_params = build(make)
    swapped, old = build(make)
    swapped.load_state_dict(swapped.state_dict())
    new = [nn.Parameter(p.detach().clone()) for p in old]
    by_old = dict(zip(old, new, strict=True))
    for group in swapped.param_groups:
        group["params"] = [by_old[p] for p in group["params"]]
    run(plain, plain_params, range(3))
    run(swapped, new, range(3))
    assert_same(plain, swapped)
    assert len(swapped.state) == len(new)


@each_optimizer
def test_closure_is_run_with_gradients_and_its_loss_returned(make):
    optimizer, params = build(make)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first


@each_optimizer
def test_maximize_is_the_negated_gradient(make):
    up, up_params = build(make, maximize=True)
    down, down_params = build(make)
    for step in range(3):
        set_gradients(up_params, step)
        set_gradients(down_params, step)
        for p in down_params:
            p.grad.neg_()
        up.step()
        down.step()
    for p, q in zip(up_params, down_params, strict=True):
        assert torch.equal(p, q)


@each_optimizer
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_learning_rate_filled_in_place(make, shape):
    rates = [0.02, 0.01, 0.03]
    plain, plain_params = build(make)
    lr = torch.full(shape, 0.02)
    tensor, tensor_params = build(make, lr=lr)
    for step, rate in enumerate(rates):
        lr.fill_(rate)
        for group in plain.param_groups:
            group["lr"] = rate
        run(plain, plain_params, range(step, step + 1))
        run(tensor, tensor_params, range(step, step + 1))
    for p, q in zip(plain_params, tensor_params, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@each_optimizer
def test_groups_added_later_and_their_own_rates(make):
    matrices, vectors = parameters()
    optimizer = make([{"params": matrices[:2], "lr": 0.0}], lr=0.02)
    run(optimizer, matrices[:2], range(2))
    optimizer.add_param_group({"params": matrices[2:], "role": "matrix"})
    optimizer.add_param_group({"params": vectors, "role": "adamw"})
    before = [p.detach().clone() for p in matrices + vectors]
    run(optimizer, matrices + vectors, range(2, 4))
    moved = [not torch.equal(p, q) for p, q in zip(matrices + vectors, before, strict=True)]
    assert moved == [False, False] + [True] * (len(matrices) - 2 + len(vectors))
    with pytest.raises(ValueError, match="role='embedding'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "role": "embedding"})
    assert len(optimizer.param_groups) == 3  # a refused group is not left behind


@each_optimizer
def test_schedulers_scale_every_group(make):
    matrices, vectors = parameters()
    group_list = groups(matrices, vectors)
    group_list[1]["lr"] = 0.04
    optimizer = make(group_list, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run(optimizer, matrices + vectors, range(1))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    assert optimizer.defaults["lr"] == 0.02


@each_optimizer
def test_copies_and_pickles(make):
    optimizer, params = build(make)
    run(optimizer, params, range(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin_params = [p for group in reversed(twin.param_groups) for p in group["params"]]
        original, original_params = build(make)
        run(original, original_params, range(2))
        run(original, original_params, range(2, 4))
        run(twin, twin_params, range(2, 4))
        assert_same(original, twin)


# ---- refusals ----


@pytest.mark.parametrize(("saved", "current"), itertools.permutations(["muon", "adamuon", "adamuon_v1", "mud"], 2))
def test_another_optimizers_checkpoint_is_refused_with_both_names(saved, current):
    writer, params = build(OPTIMIZERS[saved])
    run(writer, params, range(2))
    reader, reader_params = build(OPTIMIZERS[current])
    run(reader, reader_params, range(1))
    before = [t.clone() for t in tensors(reader)]
    with pytest.raises(ValueError, match=f"written by {saved} and cannot be resumed with {current}"):
        reader.load_state_dict(writer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tensors(reader), before, strict=True))


@each_optimizer
@pytest.mark.parametrize("foreign", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_a_foreign_checkpoint_is_refused(make, foreign):
    matrices, vectors = parameters()
    stranger = foreign([{"params": vectors}, {"params": matrices}], lr=0.1)
    optimizer, _ = build(make)
    with pytest.raises(ValueError, match="written by .*cannot be resumed with"):
        optimizer.load_state_dict(stranger.state_dict())


@each_optimizer
def test_other_parameters_or_another_reading_are_refused(make):
    optimizer, _ = build(make)
    saved = optimizer.state_dict()
    renamed = copy.deepcopy(saved)
    renamed["param_groups"][1]["param_names"][0] = "old"
    with pytest.raises(ValueError, match=r"only in the checkpoint \['old'\], only here \['w0'\]"):
        optimizer.load_state_dict(renamed)
    transposed = copy.deepcopy(saved)
    transposed["param_groups"][1]["output_axis"] = 1
    with pytest.raises(ValueError, match="reads its matrices as"):
        optimizer.load_state_dict(transposed)
    fewer = copy.deepcopy(saved)
    del fewer["param_groups"][0]
    with pytest.raises(ValueError, match="1 param groups, this optimizer 2"):
        optimizer.load_state_dict(fewer)


def test_hyperparameters_of_the_checkpoint_are_taken_with_a_warning(caplog):
    writer, _ = build(Muon, ns_steps=6)
    reader, _ = build(Muon)
    reader.load_state_dict(writer.state_dict())
    assert reader.param_groups[1]["ns_steps"] == 6
    assert "checkpoint's ns_steps=6 replaces 5" in caplog.text


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (Muon, {"lr": -1.0}, "lr=-1.0 is not allowed: it must be at least 0"),
        (Muon, {"lr": float("nan")}, "lr=nan"),
        (Muon, {"lr": float("inf")}, "lr=inf is not allowed: it must be at least 0 and finite"),
        (Muon, {"lr": torch.ones(2)}, r"1 element, but has shape \(2,\)"),
        (Muon, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        (MUD, {"weight_decay": float("inf")}, "weight_decay=inf"),
        (Muon, {"momentum": 1.0}, "momentum=1.0 is not allowed: it must be at least 0 and below 1"),
        (Muon, {"momentum": "high"}, "momentum='high'"),
        (Muon, {"ns_steps": 0}, "ns_steps=0 must be at least 1"),
        (AdaMuon, {"ns_steps": 2.5}, "ns_steps=2.5 must be an integer"),
        (Muon, {"ns_coefficients": "quintic"}, "ns_coefficients='quintic' is not one of jordan"),
        (Muon, {"update_scale": "spectral"}, "update_scale='spectral'.*match_rms_adamw or jordan"),
        (Muon, {"update_rms": 0}, "update_rms=0"),
        (Muon, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        (Muon, {"betas": (0.9,)}, r"betas=\(0.9,\) is not allowed: it must be two numbers"),
        (Muon, {"betas": 0.9}, "betas=0.9 is not allowed: it must be two numbers"),
        (Muon, {"adamw_fused": "yes"}, "fused='yes' is not allowed: it must be True, False or None"),
        (MUD, {"cuda_graph": "no"}, "cuda_graph='no' is not allowed: it must be True or False"),
        (Muon, {"map_dtype": "int8"}, "map_dtype='int8'"),
        (Muon, {"max_workspace_bytes": 0}, "max_workspace_bytes=0"),
        (Muon, {"adamw_eps": -1e-8}, "adamw_eps=-1e-08"),
        (AdaMuon, {"kernels": "cuda"}, "kernels='cuda' is not allowed: it must be auto or torch or triton"),
        (Muon, {"kernels": "triton", "map_dtype": "float32"}, "for map_dtype='auto', not 'float32'"),
        (Muon, {"kernels": "torch", "cuda_graph": True}, "cuda_graph=True is for the GPU kernels"),
        (MUD, {"momentum_dtype": "float16"}, "momentum_dtype='float16' is not allowed"),
        (AdaMuon, {"variant": "v3"}, "variant='v3' is not one of v1, v2"),
        (AdaMuon, {"beta2": 0.99}, "beta2=0.99 is for variant='v1'"),
        (AdaMuon, {"variant": "v1", "beta2": 1.0}, "beta2=1.0"),
        (AdaMuon, {"eps": -1.0}, "eps=-1.0"),
        (MUD, {"passes": 0}, "passes=0"),
        (MUD, {"passes": 1.5}, "passes=1.5 is not allowed: it must be an integer"),
    ],
)
def test_bad_values_are_named(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2, 3))], **kwargs)


@each_optimizer
def test_bad_parameters_are_named(make):
    def group(param):
        return [{"params": [param], "param_names": ["block.weight"], "role": "matrix"}]

    with pytest.raises(ValueError, match=r"'block.weight' of shape \(3,\) is not a matrix"):
        make(group(nn.Parameter(torch.ones(3))))
    with pytest.raises(ValueError, match="'block.weight' is complex"):
        make(group(nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))))
    sparse = nn.Parameter(torch.ones(3, 3))
    optimizer = make(group(sparse))
    sparse.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="'block.weight' has a sparse gradient.*sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match="number 0 of its group"):
        make([nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize("role", ["matrix", "adamw"])
def test_a_checkpoint_of_another_width_is_refused(role):
    """Fused kernels would read past the end of its state."""
    optimizers = []
    for width in (16, 32):
        p = torch.nn.Parameter(torch.ones(width, 8))
        p.grad = torch.ones_like(p)
        optimizers.append(Muon([{"params": [p], "role": role}]))
        optimizers[-1].step()
    narrow, wide = optimizers
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(
        ValueError, match=r"in the checkpoint has shape \(16, 8\), the parameter \(32, 8\): use the model"
    ):
        wide.load_state_dict(narrow.state_dict())
    for key, value in before["state"][0].items():
        assert torch.equal(wide.state_dict()["state"][0][key], value)
