"""Resuming through the real Trainer: bitwise equal to the run that was not interrupted, or refused."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import OPTIMIZER_NAMES, StepRecorder, arguments, optimizer_of, state_tensors, token_rows
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer

from hf_matrix_optim import create_optimizer
from hf_matrix_optim.options import OPTIONS_CLASSES

each_name = pytest.mark.parametrize("name", OPTIMIZER_NAMES)

# Rows, and arguments, such that the checkpoint after step 3 of 6 lies where the key says.
SITUATIONS = {
    "end_of_epoch": (12, {}),
    "mid_epoch": (20, {}),
    "mid_epoch_accumulation": (36, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "bf16_parameters": (20, {}),
    "bf16_autocast": (20, {"bf16": True}),
}


def training(folder: Path, situation: str, **values) -> tuple[Trainer, StepRecorder]:
    rows, extra = SITUATIONS[situation]
    model = tiny_model("gpt2")  # with dropout: the random state has to be resumed as well
    if situation == "bf16_parameters":
        model = model.to(torch.bfloat16)
    args = arguments(folder, save_strategy="steps", save_steps=3, max_steps=6, **extra, **values)
    recorder = StepRecorder()
    return Trainer(model, args, train_dataset=token_rows(rows), callbacks=[recorder]), recorder


def assert_equal_values(left, right, where: str) -> None:
    """Equal type, equal bits, through dicts and lists."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal_values(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal_values(one, other, f"{where}[{index}]")
    else:
        assert left == right, where


@each_name
@pytest.mark.parametrize("situation", SITUATIONS)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, name, situation):
    whole, recorder = training(tmp_path / "whole", situation, optim=name)
    whole.train()
    resumed, resumed_recorder = training(tmp_path / "resumed", situation, optim=name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))

    assert resumed_recorder.rates == recorder.rates[3:]
    assert_equal_values(resumed_recorder.gradients, recorder.gradients[3:], "gradients")
    assert_equal_values(
        state_tensors(resumed.model, optimizer_of(resumed)), state_tensors(whole.model, optimizer_of(whole)), "state"
    )
    saved, saved_resumed = (
        torch.load(tmp_path / run / "checkpoint-6" / "optimizer.pt", weights_only=True) for run in ("whole", "resumed")
    )
    assert_equal_values(saved_resumed, saved, "optimizer.pt")
    if situation == "bf16_parameters":
        states = [state for state in saved["state"].values() if "momentum_buffer" in state]
        assert {state["momentum_buffer"].dtype for state in states} == {torch.float32}
        assert {parameter.dtype for parameter in resumed.model.parameters()} == {torch.bfloat16}


def test_resumed_run_keeps_a_rate_of_its_own(tmp_path):
    values = {"optim": "muon", "optim_args": "matrix_lr=0.03", "lr_scheduler_type": "cosine"}
    whole, recorder = training(tmp_path, "mid_epoch", **values)
    whole.train()
    resumed, resumed_recorder = training(tmp_path, "mid_epoch", **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed_recorder.rates == recorder.rates[3:]
    assert recorder.rates[3]["matrix"] == pytest.approx(3 * recorder.rates[3]["adamw"])


# ---- refusals ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Checkpoints of step 3 by each optimizer, and by AdamW."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in (*OPTIMIZER_NAMES, "adamw_torch"):
        trainer, _ = training(folder / name, "mid_epoch", optim=name)
        trainer.train()
    return folder


OTHERS = [
    ("muon", "adamuon"),
    ("adamuon", "adamuon_v1"),
    ("adamuon_v1", "mud"),
    ("mud", "muon"),
    ("adamw_torch", "muon"),
    ("adamw_torch", "mud"),
]


@pytest.mark.parametrize(("saved", "name"), OTHERS)
def test_checkpoint_of_another_optimizer_is_refused(checkpoints, tmp_path, saved, name):
    trainer, recorder = training(tmp_path, "mid_epoch", optim=name)
    trainer.create_optimizer()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in _groups(trainer)]
    saved_name = "torch.optim.AdamW" if saved == "adamw_torch" else saved
    with pytest.raises(ValueError, match=f"written by {saved_name}.* resumed with {name}:"):
        trainer.train(resume_from_checkpoint=str(checkpoints / saved / "checkpoint-3"))
    assert not recorder.after
    assert not optimizer_of(trainer).state
    after = [{key: value for key, value in group.items() if key != "params"} for group in _groups(trainer)]
    for group in after:
        group.pop("initial_lr", None)  # the scheduler's, which is made before the checkpoint is read
    assert after == groups


def _groups(trainer: Trainer) -> list[dict]:
    return optimizer_of(trainer).param_groups


@each_name
def test_adamw_refuses_our_checkpoint(checkpoints, tmp_path, name):
    """torch's own message: the groups differ in number."""
    trainer, recorder = training(tmp_path, "mid_epoch", optim="adamw_torch")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        trainer.train(resume_from_checkpoint=str(checkpoints / name / "checkpoint-3"))
    assert not recorder.after


def test_checkpoint_of_another_partition_is_refused(checkpoints, tmp_path):
    trainer, _ = training(tmp_path, "mid_epoch", optim="muon", optim_args="qkv=whole")
    with pytest.raises(ValueError, match="partition options of the checkpoint"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "muon" / "checkpoint-3"))
    assert not optimizer_of(trainer).state


# ---- torch.distributed.checkpoint, one process ----


class Shapes(nn.Module):
    """Every kind of parameter: a wide, a tall and a 1 x N matrix, a stack of three, a vector, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "wide": (4, 6),
            "tall": (7, 3),
            "row": (1, 5),
            "stack": (3, 4, 5),
            "vector": (6,),
            "embedding": (9, 4),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, generator=generator)))

    def set_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def shapes_optimizer(name: str, model: Shapes) -> torch.optim.Optimizer:
    options = OPTIONS_CLASSES[name](include=("wide", "tall", "row", "stack"), exclude="vector|embedding")
    return create_optimizer(name, model, lr=0.02, weight_decay=0.1, options=options)


@each_name
def test_distributed_checkpoint_takes_a_zero_step(name):
    """On an empty state torch runs a step with zero gradients at lr 0, which must change no weight."""
    model = Shapes()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = shapes_optimizer(name, model)
    saved = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert saved["state"].keys() == before.keys()
    assert all(
        torch.isfinite(value).all() and not value[...].count_nonzero()
        for state in saved["state"].values()
        for key, value in state.items()
        if key != "step"
    )


@each_name
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_resumes(name, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    whole = Shapes()
    optimizer = shapes_optimizer(name, whole)
    for step in range(6):
        if step == 3:
            weights = {key: value.clone() for key, value in whole.state_dict().items()}
            saved = get_optimizer_state_dict(whole, optimizer, options=options)
            saved = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, saved)
        whole.set_gradients(step)
        optimizer.step()

    resumed = Shapes()
    resumed.load_state_dict(weights)
    fresh = shapes_optimizer(name, resumed)
    set_optimizer_state_dict(resumed, fresh, saved, options=options)
    for step in range(3, 6):
        resumed.set_gradients(step)
        fresh.step()
    assert_equal_values(state_tensors(resumed, fresh), state_tensors(whole, optimizer), "state")
