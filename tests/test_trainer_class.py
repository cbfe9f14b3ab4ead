"""MatrixTrainer and its mixin: options as a dataclass, logs, clip policy, and what they refuse."""

import copy
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import (
    OPTIMIZER_NAMES,
    StepRecorder,
    arguments,
    groups_of,
    optimizer_of,
    state_tensors,
    token_rows,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_matrix_optim import MatrixTrainer, create_optimizer, partition
from hf_matrix_optim.options import OPTIONS_CLASSES, AdaMuonOptions, MatrixOptimizerOptions, MUDOptions, MuonOptions
from hf_matrix_optim.trainer import MatrixTrainerMixin

OPTIONS = {
    "muon": (MuonOptions(ns_steps=6, momentum=0.9), "ns_steps=6,momentum=0.9"),
    "adamuon": (AdaMuonOptions(nesterov=True), "nesterov=true"),
    "adamuon_v1": (OPTIONS_CLASSES["adamuon_v1"](beta2=0.99), "beta2=0.99"),
    "mud": (MUDOptions(passes=2, matrix_lr=0.02), "passes=2,matrix_lr=0.02"),
}


def trained(trainer_class, tmp_path, *, callbacks=(), model="gpt2", options=None, clip=None, **values) -> Trainer:
    extra = {key: value for key, value in (("optimizer_options", options), ("clip", clip)) if value is not None}
    trainer = trainer_class(
        tiny_model(model), arguments(tmp_path, **values), train_dataset=token_rows(), callbacks=[*callbacks], **extra
    )
    trainer.train()
    return trainer


def assert_same_training(one: Trainer, other: Trainer) -> None:
    left = state_tensors(one.model, optimizer_of(one))
    right = state_tensors(other.model, optimizer_of(other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# ---- choice of the optimizer ----


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_options_train_as_the_flag_does(tmp_path, name):
    options, optim_args = OPTIONS[name]
    by_flag = trained(Trainer, tmp_path, optim=name, optim_args=optim_args)
    by_class = trained(MatrixTrainer, tmp_path, options=options)
    by_both = trained(MatrixTrainer, tmp_path, options=options, optim=name)
    assert_same_training(by_flag, by_class)
    assert_same_training(by_flag, by_both)


def test_flag_alone_trains_as_in_the_stock_trainer(tmp_path):
    values = {"optim": "mud", "optim_args": "passes=2,exclude=c_fc"}
    assert_same_training(trained(Trainer, tmp_path, **values), trained(MatrixTrainer, tmp_path, **values))


def test_neither_flag_nor_options_is_the_stock_trainer(tmp_path):
    trainer = trained(MatrixTrainer, tmp_path)
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert not any("matrix_learning_rate" in entry for entry in trainer.state.log_history)


def test_arguments_name_the_optimizer_that_trains(tmp_path):
    args = arguments(tmp_path)
    before = args.optim
    trainer = MatrixTrainer(tiny_model("gpt2"), args, train_dataset=token_rows(), optimizer_options=MUDOptions())
    assert trainer.args.optim == "mud"
    assert args.optim == before
    assert type(args.optim)("mud") is trainer.args.optim


def test_target_modules_are_the_include_option(tmp_path):
    trainer = MatrixTrainer(
        tiny_model("qwen2_untied"),
        arguments(tmp_path, optim_target_modules=["lm_head"]),
        train_dataset=token_rows(),
        optimizer_options=MuonOptions(exclude="mlp"),
    )
    trainer.create_optimizer()
    names = {name for group in groups_of(trainer, "matrix") for name in group["param_names"]}
    assert "lm_head.weight" in names
    assert not any("mlp" in name for name in names)


def test_weight_decay_follows_the_class(tmp_path):
    class DecayNothing(MatrixTrainer):
        def get_decay_parameter_names(self, model):
            return ["model.layers.0.self_attn.q_proj.weight"]

    trainer = DecayNothing(
        tiny_model("qwen2"),
        arguments(tmp_path, weight_decay=0.3),
        train_dataset=token_rows(),
        optimizer_options=MuonOptions(),
    )
    trainer.create_optimizer()
    decayed = [
        n for group in optimizer_of(trainer).param_groups if group["weight_decay"] for n in group["param_names"]
    ]
    assert decayed == ["model.layers.0.self_attn.q_proj.weight"]


def test_mixin_with_another_trainer(tmp_path):
    class MatrixSeq2SeqTrainer(MatrixTrainerMixin, Seq2SeqTrainer):
        pass

    args = Seq2SeqTrainingArguments(
        **{**_plain(arguments(tmp_path, max_steps=2)), "predict_with_generate": True, "generation_max_length": 4}
    )
    trainer = MatrixSeq2SeqTrainer(
        tiny_model("t5"), args, train_dataset=token_rows(), eval_dataset=token_rows(4), optimizer_options=MuonOptions()
    )
    trainer.train()
    assert optimizer_of(trainer).algorithm == "muon"
    assert trainer.predict(token_rows(4)).predictions.shape[0] == 4


def _plain(args) -> dict:
    names = ("output_dir", "use_cpu", "max_steps", "report_to", "disable_tqdm", "save_strategy", "logging_steps")
    return {name: getattr(args, name) for name in names}


# ---- logs ----


def test_matrix_rate_is_logged_beside_the_other(tmp_path):
    recorder = StepRecorder()
    trainer = trained(MatrixTrainer, tmp_path, options=MuonOptions(matrix_lr=0.03), callbacks=[recorder])
    steps = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(steps) == 6
    assert [entry["matrix_learning_rate"] for entry in steps] == [rates["matrix"] for rates in recorder.rates]
    assert [entry["learning_rate"] for entry in steps] == [rates["adamw"] for rates in recorder.rates]
    assert "matrix_learning_rate" not in trainer.state.log_history[-1]  # the summary at the end has no rates


def test_matrix_rate_is_logged_when_it_is_the_same(tmp_path):
    trainer = trained(MatrixTrainer, tmp_path, options=MuonOptions())
    steps = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert all(entry["matrix_learning_rate"] == entry["learning_rate"] for entry in steps)


def test_partition_is_logged_at_info(tmp_path):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers.hf_matrix_optim")
    logger.addHandler(handler)
    try:
        trainer = MatrixTrainer(
            tiny_model("gpt2"),
            arguments(tmp_path, log_level="info"),
            train_dataset=token_rows(),
            optimizer_options=MuonOptions(qkv="whole"),
        )
        trainer.create_optimizer()
    finally:
        logger.removeHandler(handler)
        logging.getLogger("transformers").setLevel(logging.WARNING)
    table = partition.explain(trainer.model, partition.PartitionOptions(qkv="whole"))
    assert any(record.levelno == logging.INFO and table in record.getMessage() for record in records)


# ---- clip policy ----


def _norm(gradients) -> float:
    return torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()


def test_adamw_only_clips_the_adamw_groups_alone(tmp_path):
    free, clipped = StepRecorder(), StepRecorder()
    bound = 0.05
    trained(MatrixTrainer, tmp_path, options=MuonOptions(), callbacks=[free], max_grad_norm=0.0)
    trainer = trained(
        MatrixTrainer, tmp_path, options=MuonOptions(), clip="adamw_only", callbacks=[clipped], max_grad_norm=bound
    )
    matrices = {name for group in groups_of(trainer, "matrix") for name in group["param_names"]}
    assert len(clipped.gradients) == 6
    for gradients in clipped.gradients:
        assert _norm(g for name, g in gradients.items() if name not in matrices) == pytest.approx(bound, rel=1e-4)
        assert _norm(g for name, g in gradients.items() if name in matrices) > bound
    for name, gradient in free.gradients[0].items():  # the first step of both runs has the same gradients
        assert torch.equal(gradient, clipped.gradients[0][name]) == (name in matrices)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(_norm(free.gradients[0].values()), rel=1e-5)


def test_adamw_only_leaves_small_gradients_alone(tmp_path):
    values = {"options": MuonOptions(), "learning_rate": 1e-3}
    one = trained(MatrixTrainer, tmp_path, **values, max_grad_norm=1e6, clip="adamw_only")
    assert_same_training(one, trained(MatrixTrainer, tmp_path, **values, max_grad_norm=0.0))


def test_clip_all_is_the_stock_policy(tmp_path):
    values = {"max_grad_norm": 0.1, "optim": "adamuon"}
    one = trained(MatrixTrainer, tmp_path, clip="all", **values)
    assert_same_training(one, trained(Trainer, tmp_path, **values))


def test_one_matrix_with_nan_does_not_reach_the_adamw_groups(tmp_path):
    """Stock clipping multiplies every gradient by the norm's NaN; adamw_only does not look at the matrices."""

    class Poison(StepRecorder):
        def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 2:
                weight = model.transformer.h[0].attn.c_proj.weight
                self.hook = weight.register_hook(lambda gradient: gradient * float("nan"))

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                self.hook.remove()

    poison = Poison()
    trainer = trained(MatrixTrainer, tmp_path, options=MuonOptions(), clip="adamw_only", callbacks=[poison])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    name = "transformer.h.0.attn.c_proj.weight"
    changed = [not torch.equal(b[name], a[name]) for b, a in zip(poison.before, poison.after, strict=True)]
    assert changed == [True, True, False, True, True, True]
    assert int(optimizer_of(trainer).state[trainer.model.transformer.h[0].attn.c_proj.weight]["skipped"]) == 1


# ---- refusals ----


def _refused(tmp_path, error, match, *, optimizers=(None, None), optimizer_cls_and_kwargs=None, **values):
    extra = {key: values.pop(key) for key in ("optimizer_options", "clip") if key in values}
    if optimizer_cls_and_kwargs is not None:
        extra["optimizer_cls_and_kwargs"] = optimizer_cls_and_kwargs
    model = tiny_model("gpt2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        MatrixTrainer(
            model, arguments(tmp_path, **values), train_dataset=token_rows(), optimizers=optimizers, **extra
        ).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("optim", ["mud", "sgd"])
def test_contradiction_names_both(tmp_path, optim):
    _refused(tmp_path, ValueError, f"'muon'.*optim='{optim}'", optim=optim, optimizer_options=MuonOptions())


def test_optim_args_beside_options(tmp_path):
    match = "MuonOptions.*optim_args='ns_steps=6'"
    _refused(tmp_path, ValueError, match, optim_args="ns_steps=6", optimizer_options=MuonOptions())


@pytest.mark.parametrize("options", [{"ns_steps": 6}, MatrixOptimizerOptions()])
def test_options_of_no_optimizer(tmp_path, options):
    _refused(tmp_path, TypeError, "MuonOptions, AdaMuonOptions", optimizer_options=options)


def test_unknown_clip(tmp_path):
    _refused(tmp_path, ValueError, "clip='matrix'.*'all', 'adamw_only'", clip="matrix")


def test_adamw_only_without_adamw_groups(tmp_path):
    _refused(tmp_path, ValueError, "clip='adamw_only'.*optim='sgd'", clip="adamw_only", optim="sgd")


@pytest.mark.parametrize("chosen", [{"optim": "muon"}, {"optimizer_options": MuonOptions()}], ids=["flag", "options"])
def test_optimizer_given_by_hand(tmp_path, chosen):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    _refused(tmp_path, RuntimeError, "'muon'.*SGD", optimizers=(sgd, None), **chosen)
    _refused(tmp_path, RuntimeError, "'muon'.*SGD", optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), **chosen)


def test_optimizer_of_another_kind_given_by_hand(tmp_path):
    mud = create_optimizer("mud", tiny_model("gpt2"), lr=0.1)
    _refused(tmp_path, RuntimeError, "'muon'.*'mud'", optimizers=(mud, None), optimizer_options=MuonOptions())


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "mud"])
def test_search_over_optim_beside_options(tmp_path, optim):
    """Once the options have chosen, not even the default value of ``optim`` goes unnoticed."""
    trainer = MatrixTrainer(
        tiny_model("gpt2"), arguments(tmp_path), train_dataset=token_rows(), optimizer_options=MuonOptions()
    )
    trainer.args.optim = type(trainer.args.optim)(optim)
    with pytest.raises(ValueError, match=f"'muon'.*optim='{optim}'"):
        trainer.train()


def test_works_with_the_hook_switched_off(tmp_path):
    """The class does not need the names in transformers' tables."""
    program = f"""
import json, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from tiny_models import tiny_model
from tiny_training import arguments, optimizer_of, token_rows
from hf_matrix_optim import MatrixTrainer
from hf_matrix_optim.options import MUDOptions
args = arguments({str(tmp_path)!r}, max_steps=2)
options = MUDOptions(diagnostics=2)
trainer = MatrixTrainer(tiny_model("gpt2"), args, train_dataset=token_rows(), optimizer_options=options)
trainer.train()
same_name = str.__str__(trainer.args.optim) == str.__str__(args.optim)
print(json.dumps([optimizer_of(trainer).algorithm, same_name, trainer.state.log_history[1]["diagnostics/step"]]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_MATRIX_OPTIM": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["mud", True, 2]
