"""Momentum in 8 bits between steps: what it is worth, what it costs in exactness, checkpoints, refusals."""

import io
from pathlib import Path

import pytest
import torch
from optimizers import OPTIMIZERS
from tiny_models import VOCABULARY
from tiny_training import arguments, optimizer_of, state_tensors, token_rows
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_matrix_optim import Muon
from hf_matrix_optim.int8_momentum import SLICE, from_checkpoint, in_float, quantize_into, zeros_for

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
SHAPES = [(96, 64), (64, 128), (2, 64, 64), (64, 128), (7, 5)]  # the last is too small


def build(name: str, **options) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in SHAPES]
    return OPTIMIZERS[name](params, lr=0.01, **{"map_dtype": "float32", **options}), params


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def in_file(state_dict: dict) -> dict:
    """Through a file, as Trainer loads optimizer.pt."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stored_bytes(state: dict) -> int:
    return sum(state[key].nbytes for key in ("momentum_buffer", "momentum_scale") if key in state)


@each_optimizer
def test_a_quarter_of_the_memory_and_nearly_the_same_steps(name):
    exact, exact_params = build(name)
    rounded, rounded_params = build(name, momentum_dtype="int8")
    start = [p.detach().clone() for p in exact_params]
    for optimizer, params in ((exact, exact_params), (rounded, rounded_params)):
        run(optimizer, params, range(6))
    for p, q, begin in zip(exact_params[:-1], rounded_params[:-1], start[:-1], strict=True):
        kept, momentum = stored_bytes(rounded.state[q]), exact.state[p]["momentum_buffer"]
        assert kept == momentum.numel() * (1 + 4 / 256)
        cosine = nn.functional.cosine_similarity((p - begin).flatten(), (q - begin).flatten(), dim=0)
        assert 0.97 < cosine < 1
    assert torch.equal(exact_params[-1], rounded_params[-1])


def test_the_momentum_is_the_recursion_up_to_half_a_level():
    """M = beta Q(M) + G in float64, and each element is stored to within the coarsest level of its block's scale."""
    optimizer, params = build("muon", momentum_dtype="int8")
    p = params[0]
    before = torch.zeros(p.shape, dtype=torch.float64)
    for step in range(4):
        run(optimizer, params, range(step, step + 1))
        expected = 0.95 * before + p.grad.double()
        before = in_float(optimizer.state[p]).double()
        scale = expected.abs().view(-1, 256).amax(1, keepdim=True)
        error = (before - expected).abs().view(-1, 256) / scale
        assert error.max() < 0.008  # levels near 1 lie 2 / 127 apart
        assert error.max() > 1e-3


def test_slices_of_a_large_momentum_are_quantised_as_the_whole():
    values = torch.randn(3, 2 * SLICE // 3 // 256 * 256, generator=torch.Generator().manual_seed(0))
    assert values.numel() > SLICE
    state = zeros_for(values)
    quantize_into(state, values)
    for i, row in enumerate(values):
        of_row = zeros_for(row)
        quantize_into(of_row, row)
        assert torch.equal(of_row["momentum_buffer"], state["momentum_buffer"][i])
        assert torch.equal(of_row["momentum_scale"], state["momentum_scale"].view(3, -1)[i])


@each_optimizer
def test_a_small_workspace_changes_nothing(name):
    large, large_params = build(name, momentum_dtype="int8")
    small, small_params = build(name, momentum_dtype="int8", max_workspace_bytes=1)
    for optimizer, params in ((large, large_params), (small, small_params)):
        run(optimizer, params, range(3))
    for p, q in zip(large_params, small_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_leaves_weights_alone_and_is_counted():
    optimizer, params = build("muon", momentum_dtype="int8")
    run(optimizer, params, range(2))
    before, momentum = params[0].detach().clone(), in_float(optimizer.state[params[0]])
    assert momentum.abs().max() > 0
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]]["skipped"].item() == 1
    after = in_float(optimizer.state[params[0]])
    assert torch.equal(after, momentum)


@each_optimizer
def test_a_run_goes_on_bitwise_from_its_checkpoint(name):
    optimizer, params = build(name, momentum_dtype="int8")
    run(optimizer, params, range(3))
    resumed, resumed_params = build(name, momentum_dtype="int8")
    resumed.load_state_dict(in_file(optimizer.state_dict()))
    for p, q in zip(params, resumed_params, strict=True):
        q.data.copy_(p)
        assert resumed.state[q]["momentum_buffer"] is not optimizer.state[p]["momentum_buffer"]
    for each, each_params in ((optimizer, params), (resumed, resumed_params)):
        run(each, each_params, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(params, resumed_params, strict=True))


@pytest.mark.parametrize("written", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("read", ["auto", "bfloat16", "int8"])
def test_a_checkpoint_is_read_in_the_form_that_the_run_asks_for(written, read, caplog):
    writer, params = build("adamuon", momentum_dtype=written)
    run(writer, params, range(2))
    reader, own_params = build("adamuon", momentum_dtype=read)
    reader.load_state_dict(in_file(writer.state_dict()))
    assert caplog.text == ""
    assert reader.param_groups[0]["momentum_dtype"] == read
    kinds = {"auto": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    for i, (p, q) in enumerate(zip(params, own_params, strict=True)):
        is_small = i == len(params) - 1
        found = reader.state[q]["momentum_buffer"].dtype
        assert found == (torch.float32 if is_small and read == "int8" else kinds[read])
        values = [in_float(state).float() for state in (writer.state[p], reader.state[q])]
        assert (values[0] - values[1]).abs().max() <= 0.008 * values[0].abs().max()
    run(reader, own_params, range(2, 3))


def test_what_says_how_a_step_is_computed_stays_the_runs_own():
    """A checkpoint from another machine does not bring its kernels along."""
    written = {"kernels": "triton", "max_workspace_bytes": 5, "distribute": "off", "map_dtype": "auto"}
    writer, _ = build("muon", **written)
    reader, params = build("muon", kernels="torch", map_dtype="auto")
    reader.load_state_dict(writer.state_dict())
    found = {key: reader.param_groups[0][key] for key in ("kernels", "max_workspace_bytes", "distribute")}
    assert found == {"kernels": "torch", "max_workspace_bytes": 2**30, "distribute": "auto"}
    run(reader, params, range(1))


def test_through_trainer_and_its_checkpoints(tmp_path: Path):
    def trainer(folder: str) -> Trainer:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=2, n_head=2))
        args = arguments(
            tmp_path / folder,
            optim="adamuon",
            optim_args="momentum_dtype=int8",
            save_strategy="steps",
            save_steps=3,
        )
        return Trainer(model, args, train_dataset=token_rows(24))

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    momenta = [state["momentum_buffer"] for state in optimizer_of(whole).state.values() if "momentum_buffer" in state]
    assert torch.int8 in {momentum.dtype for momentum in momenta}
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = state_tensors(whole.model, optimizer_of(whole))
    found = state_tensors(resumed.model, optimizer_of(resumed))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def test_a_float64_parameter_keeps_float64_momentum():
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.float64))
    optimizer = Muon([p], lr=0.01, momentum_dtype="int8")
    p.grad = torch.eye(64, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float64
    loaded = from_checkpoint(optimizer.state[p], p, torch.float64, as_int8=True)
    assert loaded["momentum_buffer"].dtype == torch.float64


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_all_sizes_are_kept_alike(size):
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * size
    values[3] = 0
    state = zeros_for(values)
    quantize_into(state, values)
    error = (in_float(state).double() - values.double()).abs().view(-1, 256)
    scale = values.abs().double().view(-1, 256).amax(1, keepdim=True)
    assert (error <= 0.008 * scale).all()
    assert (in_float(state)[3] == 0).all()
    again = zeros_for(values)
    quantize_into(again, in_float(state))
    assert torch.equal(again["momentum_buffer"], state["momentum_buffer"])


def test_a_checkpoint_without_scales_is_refused():
    optimizer, params = build("muon", momentum_dtype="int8")
    run(optimizer, params, range(1))
    before = in_file(optimizer.state_dict())["state"]
    saved = in_file(optimizer.state_dict())
    del saved["state"][0]["momentum_scale"]
    with pytest.raises(
        ValueError, match=r"momentum_buffer of parameter .* int8, without a momentum_scale for each 256"
    ):
        optimizer.load_state_dict(saved)
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[i][key]) for key, value in state.items())
