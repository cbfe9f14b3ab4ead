"""What TrainingArguments ask for, reaches the optimizer: rates, schedules, decay, betas, clipping."""

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import OPTIMIZER_NAMES, StepRecorder, arguments, groups_of, optimizer_of, token_rows
from transformers import Trainer

from hf_matrix_optim.matrix_layout import MatrixLayout, split_parts

each_name = pytest.mark.parametrize("name", OPTIMIZER_NAMES)

SCHEDULES = {
    "linear": {"lr_scheduler_type": "linear"},
    "cosine_warmup": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "cosine_with_min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.004}},
    "warmup_stable_decay": {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 2,
        "lr_scheduler_kwargs": {"num_decay_steps": 2},
    },
    "constant": {"lr_scheduler_type": "constant"},
}


def recorded_run(tmp_path, **values) -> tuple[StepRecorder, Trainer]:
    recorder = StepRecorder()
    trainer = Trainer(
        tiny_model("qwen2"), arguments(tmp_path, **values), train_dataset=token_rows(), callbacks=[recorder]
    )
    trainer.train()
    return recorder, trainer


# ---- values ----


@each_name
def test_arguments_reach_the_groups(tmp_path, name):
    args = arguments(
        tmp_path,
        optim=name,
        learning_rate=0.02,
        weight_decay=0.3,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        optim_args="momentum=0.9,update_rms=0.1,matrix_lr=0.05",
    )
    trainer = Trainer(tiny_model("gpt2"), args, train_dataset=token_rows())
    trainer.create_optimizer()
    adamw, matrix = groups_of(trainer, "adamw"), groups_of(trainer, "matrix")
    assert {group["algorithm"] for group in adamw} == {"adamw"}
    assert {group["algorithm"] for group in matrix} == {name}
    assert {group["lr"] for group in adamw} == {0.02}
    assert {group["lr"] for group in matrix} == {0.05}
    assert optimizer_of(trainer).defaults["lr"] == 0.02
    assert {group["betas"] for group in adamw} == {(0.8, 0.95)}
    assert {group["adamw_eps"] for group in adamw} == {1e-6}
    assert {group["momentum"] for group in matrix} == {0.9}
    assert {group["update_rms"] for group in matrix} == {0.1}
    decayed = {n for group in adamw + matrix if group["weight_decay"] == 0.3 for n in group["param_names"]}
    kept = {n for group in adamw + matrix if group["weight_decay"] == 0.0 for n in group["param_names"]}
    assert decayed == set(trainer.get_decay_parameter_names(trainer.model)) - {"lm_head.weight"}
    assert decayed | kept == {n for n, _ in trainer.model.named_parameters()}
    assert not decayed & kept


def test_no_group_is_empty_and_group_0_is_adamw(tmp_path):
    trainer = Trainer(tiny_model("qwen2"), arguments(tmp_path, optim="muon"), train_dataset=token_rows())
    trainer.create_optimizer()
    assert all(group["params"] for group in optimizer_of(trainer).param_groups)
    assert optimizer_of(trainer).param_groups[0]["role"] == "adamw"


# ---- schedules ----


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_each_step_uses_the_rate_of_the_schedule(tmp_path, schedule):
    """The rates are AdamW's, and the weights move by 0.2 lr: the scheduler drives the optimizer that steps."""
    expected, _ = recorded_run(tmp_path, optim="adamw_torch", **schedule)
    recorder, trainer = recorded_run(tmp_path, optim="adamuon", weight_decay=0.0, **schedule)
    rates = [step["adamw"] for step in recorder.rates]
    assert rates == [step["all"] for step in expected.rates]
    assert rates == [step["matrix"] for step in recorder.rates]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == rates
    moved = 0
    for group in groups_of(trainer, "matrix"):
        for name in group["param_names"]:
            for rate, before, after in zip(rates, recorder.before, recorder.after, strict=True):
                change = (after[name] - before[name]).double()
                for part in split_parts(change, MatrixLayout.from_group(group)):
                    assert part.square().mean().sqrt().item() == pytest.approx(0.2 * rate, rel=0.01)
                    moved += rate > 0
    assert moved > 0


def test_matrix_rate_keeps_its_ratio_through_the_schedule(tmp_path):
    recorder, trainer = recorded_run(
        tmp_path,
        optim="muon",
        optim_args="matrix_lr=0.03",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 0.002},
    )
    assert [step["matrix"] for step in recorder.rates] == pytest.approx([3 * step["adamw"] for step in recorder.rates])
    steps = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in steps] == [step["adamw"] for step in recorder.rates]
    assert [entry["matrix_learning_rate"] for entry in steps] == [step["matrix"] for step in recorder.rates]


# ---- clipping and accumulation ----


def test_global_norm_clipping_is_stock(tmp_path):
    recorder, trainer = recorded_run(tmp_path, optim="muon", max_grad_norm=0.25)
    assert len(recorder.gradients) == 6
    for step, gradients in enumerate(recorder.gradients):
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        assert norm == pytest.approx(0.25, rel=1e-4)
        assert trainer.state.log_history[step]["grad_norm"] > 0.25


def test_first_matrix_update_does_not_depend_on_clipping(tmp_path):
    clipped, trainer = recorded_run(tmp_path, optim="muon", optim_args="map_dtype=float32", max_grad_norm=0.01)
    free, _ = recorded_run(tmp_path, optim="muon", optim_args="map_dtype=float32", max_grad_norm=0.0)
    for group in groups_of(trainer, "matrix"):
        for name in group["param_names"]:
            torch.testing.assert_close(clipped.after[0][name], free.after[0][name], atol=2e-6, rtol=1e-5)
            assert not torch.equal(clipped.gradients[0][name], free.gradients[0][name])


@each_name
def test_stock_clipping_does_not_change_the_size_of_a_matrix_update(tmp_path, name):
    """Over six steps whose gradients are bounded at a hundredth of their norm, and as they are."""
    sizes = []
    for bound in (0.01, 0.0):
        recorder, trainer = recorded_run(
            tmp_path, optim=name, optim_args="map_dtype=float32", max_grad_norm=bound, weight_decay=0.0
        )
        names = [name for group in groups_of(trainer, "matrix") for name in group["param_names"]]
        sizes.append(
            torch.tensor(
                [
                    [
                        (recorder.after[t][name] - recorder.before[t][name]).square().mean().sqrt() / rate["matrix"]
                        for name in names
                    ]
                    for t, rate in enumerate(recorder.rates)
                ]
            )
        )
        largest = max(g.norm().item() for g in recorder.gradients[0].values())
        assert (largest <= 0.01) == (bound > 0)
    clipped, free = sizes
    assert clipped.shape == (6, len(names))
    # Newton-Schulz leaves singular values between 0.7 and 1.2, so Muon's size depends a little on the direction.
    torch.testing.assert_close(clipped, free, rtol=0.1 if name == "muon" else 1e-3, atol=0)
    if name != "muon":
        torch.testing.assert_close(free, torch.full_like(free, 0.2), rtol=2e-3, atol=0)


@each_name
def test_accumulation_equals_the_large_batch(tmp_path, name):
    """No dropout in this model and rows of one length: one step of two batches of four is one step of eight."""
    runs = []
    for size, accumulated in ((8, 1), (4, 2)):
        recorder, trainer = recorded_run(
            tmp_path,
            optim=name,
            optim_args="map_dtype=float32",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=3,
        )
        assert {int(state["step"]) for state in optimizer_of(trainer).state.values()} == {3}
        runs.append(recorder)
    large, accumulated = runs
    for parameter_name, gradient in large.gradients[0].items():
        torch.testing.assert_close(accumulated.gradients[0][parameter_name], gradient, atol=1e-6, rtol=1e-4)
    for group in groups_of(trainer, "matrix"):
        for parameter_name in group["param_names"]:
            moved = large.after[-1][parameter_name] - large.before[0][parameter_name]
            difference = accumulated.after[-1][parameter_name] - large.after[-1][parameter_name]
            # AdaMuon's sign turns a rounding error of an element near 0 into a difference.
            assert difference.norm() <= (0.02 if name == "adamuon" else 1e-4) * moved.norm()
