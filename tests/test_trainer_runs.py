"""Ways to run the real Trainer that change what an optimizer sees: precision, compiling, adapters, searches."""

import math

import optuna
import pytest
import torch
from accelerate.utils import AutocastKwargs
from tiny_models import tiny_lora_model, tiny_model
from tiny_training import (
    OPTIMIZER_NAMES,
    StepRecorder,
    arguments,
    groups_of,
    optimizer_of,
    state_tensors,
    token_rows,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_matrix_optim import MatrixTrainer
from hf_matrix_optim.tripwire import innermost_optimizer

each_name = pytest.mark.parametrize("name", OPTIMIZER_NAMES)


def trained(tmp_path, model=None, trainer_class=Trainer, rows=None, **values) -> tuple[Trainer, StepRecorder]:
    recorder = StepRecorder()
    trainer = trainer_class(
        tiny_model("qwen2") if model is None else model,
        arguments(tmp_path, **values),
        train_dataset=token_rows() if rows is None else rows,
        callbacks=[recorder],
    )
    trainer.train()
    return trainer, recorder


def assert_equal_tensors(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def run_tensors(trainer: Trainer) -> dict:
    return state_tensors(trainer.model, optimizer_of(trainer))


# ---- the AdamW half ----


class Frozen(StepRecorder):
    """Puts the matrices back after each step."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.names:
                    parameter.copy_(self.before[-1][name])
        super().on_optimizer_step(args, state, control, model=model, **kwargs)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_adamw_half_is_stock_adamw_bit_by_bit(tmp_path, max_grad_norm):
    """With the matrices held in place both runs see the same gradients at every step."""
    values = {"weight_decay": 0.3, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "max_grad_norm": max_grad_norm}
    ours, recorder = trained(tmp_path, optim="muon", optim_args="matrix_lr=0.0", **values)
    matrices = {name for group in groups_of(ours, "matrix") for name in group["param_names"]}
    frozen = Frozen(matrices)
    stock = Trainer(
        tiny_model("qwen2"),
        arguments(tmp_path, optim="adamw_torch_fused", **values),
        train_dataset=token_rows(),
        callbacks=[frozen],
    )
    stock.train()
    for one, other in zip(recorder.after, frozen.after, strict=True):
        assert_equal_tensors(one, other)
    theirs = state_tensors(stock.model, innermost_optimizer(stock.optimizer))
    halves = {key: value for key, value in run_tensors(ours).items() if key.split(":")[0] not in matrices}
    assert any("exp_avg_sq" in key for key in halves)
    assert_equal_tensors(halves, {key: value for key, value in theirs.items() if key.split(":")[0] not in matrices})


# ---- models ----


@each_name
def test_loss_falls(tmp_path, name):
    trainer, _ = trained(tmp_path, optim=name, rows=token_rows(4), max_steps=30)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0.9 * math.log(93)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("model", ["qwen2", "qwen2_untied"])
def test_tied_and_untied_weights(tmp_path, model):
    trainer, _ = trained(tmp_path, optim="mud", model=tiny_model(model))
    is_tied = model == "qwen2"
    head, embedding = trainer.model.lm_head.weight, trainer.model.model.embed_tokens.weight
    assert (head is embedding) == is_tied
    grouped = [parameter for group in optimizer_of(trainer).param_groups for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in grouped) == sum(p.numel() for p in trainer.model.parameters())
    assert len({id(parameter) for parameter in grouped}) == len(grouped)
    assert {id(head), id(embedding)} <= {id(p) for group in groups_of(trainer, "adamw") for p in group["params"]}


@pytest.mark.parametrize("lora", ["both", "b_only", "adamw"])
def test_lora(tmp_path, lora):
    if lora == "adamw":
        with pytest.raises(ValueError, match="nothing to orthogonalise"):
            trained(tmp_path, model=tiny_lora_model(), optim="muon", optim_args=f"lora={lora}")
        return
    trainer, recorder = trained(tmp_path, model=tiny_lora_model(), optim="muon", optim_args=f"lora={lora}")
    before, after = recorder.before[0], recorder.after[-1]
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    matrices = {name for group in groups_of(trainer, "matrix") for name in group["param_names"]}
    assert matrices == {name for name in changed if "lora_B" in name or lora == "both"}


def test_lora_resumes_bitwise(tmp_path):
    values = {"optim": "adamuon", "save_strategy": "steps", "save_steps": 3}
    whole, _ = trained(tmp_path, model=tiny_lora_model(), **values)
    resumed = Trainer(tiny_lora_model(), arguments(tmp_path, **values), train_dataset=token_rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_tensors(run_tensors(resumed), run_tensors(whole))


def test_seq2seq_trainer(tmp_path):
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        optim="adamuon",
        max_steps=3,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=4,
    )
    trainer = Seq2SeqTrainer(tiny_model("t5"), args, train_dataset=token_rows(), eval_dataset=token_rows(4))
    trainer.train()
    assert optimizer_of(trainer).algorithm == "adamuon"
    assert {int(state["step"]) for state in optimizer_of(trainer).state.values()} == {3}
    assert trainer.predict(token_rows(4)).predictions.shape[0] == 4


# ---- precision, compiling, memory ----


def test_bf16_autocast_keeps_float32_weights_and_state(tmp_path):
    trainer, recorder = trained(tmp_path, optim="muon", bf16=True)
    _, plain = trained(tmp_path, optim="muon")
    tensors = [tensor for tensor in run_tensors(trainer).values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors)
    first, first_plain = recorder.gradients[0], plain.gradients[0]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], first_plain[name])  # bfloat16 products took place
    assert torch.cosine_similarity(first[name].flatten(), first_plain[name].flatten(), dim=0) > 0.99


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 has a new name for it
def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, _ = trained(tmp_path, optim="adamuon_v1")
    saving, _ = trained(tmp_path, optim="adamuon_v1", gradient_checkpointing=True)
    assert saving.model.is_gradient_checkpointing
    assert_equal_tensors(run_tensors(saving), run_tensors(plain))


def test_torch_compile(tmp_path):
    """The model is compiled after the optimizer was made; the checkpoint goes on without compiling."""
    values = {"optim": "mud", "optim_args": "map_dtype=float32", "save_strategy": "steps", "save_steps": 3}
    _, recorder = trained(tmp_path / "plain", **values)
    compiled, compiled_recorder = trained(
        tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager", **values
    )
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    names = [name for group in optimizer_of(compiled).param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in compiled.model.named_parameters())
    for name, gradient in recorder.gradients[0].items():
        torch.testing.assert_close(compiled_recorder.gradients[0][name], gradient, atol=1e-6, rtol=1e-4)
    resumed = Trainer(tiny_model("qwen2"), arguments(tmp_path / "resumed", **values), train_dataset=token_rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-3"))
    assert {int(state["step"]) for state in optimizer_of(resumed).state.values()} == {6}


# ---- GradScaler ----


class ScaledTrainer(MatrixTrainer):
    """What accelerate sets up for fp16 on a GPU, with torch's GradScaler for the CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)  # the products stay in float32


class Overflow(StepRecorder):
    """Makes the gradient of one matrix infinite in step ``at``, counted from 0; keeps the state after each step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.states: list[dict] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == self.at:
            weight = model.model.layers[0].self_attn.o_proj.weight
            self.hook = weight.register_hook(lambda gradient: gradient * float("inf"))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.states.append(state_tensors(model, innermost_optimizer(optimizer)))
        if state.global_step == self.at + 1:
            self.hook.remove()


def scaled_run(tmp_path, trainer_class, clip: str, overflow_at: int = -1) -> tuple[Trainer, Overflow]:
    recorder = Overflow(overflow_at)
    args = arguments(tmp_path, optim="muon", max_grad_norm=0.2)
    trainer = trainer_class(tiny_model("qwen2"), args, train_dataset=token_rows(), callbacks=[recorder], clip=clip)
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("clip", ["all", "adamw_only"])
def test_scaled_gradients_are_unscaled_once(tmp_path, clip):
    """A power of two as the scale changes no bit of the run."""
    scaled, recorder = scaled_run(tmp_path, ScaledTrainer, clip)
    plain, plain_recorder = scaled_run(tmp_path, MatrixTrainer, clip)
    assert scaled.accelerator.scaler.get_scale() == 2.0**10
    assert_equal_tensors(run_tensors(scaled), run_tensors(plain))
    for gradients, expected in zip(recorder.gradients, plain_recorder.gradients, strict=True):
        assert_equal_tensors(gradients, expected)
    norms = [[entry.get("grad_norm") for entry in run.state.log_history] for run in (scaled, plain)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("clip", ["all", "adamw_only"])
def test_overflow_skips_the_step(tmp_path, clip):
    trainer, recorder = scaled_run(tmp_path, ScaledTrainer, clip, overflow_at=3)
    assert trainer.accelerator.scaler.get_scale() == 2.0**9
    assert_equal_tensors(recorder.states[3], recorder.states[2])
    assert recorder.rates[4] == recorder.rates[3]  # the scheduler waited as well
    assert all(tensor.isfinite().all() for tensor in recorder.states[-1].values())
    assert {int(state["step"]) for state in optimizer_of(trainer).state.values()} == {5}
    assert sum(int(value.sum()) for key, value in recorder.states[-1].items() if "skipped" in key) == 0


# ---- several runs of one trainer ----


@each_name
def test_train_twice(tmp_path, name):
    trainer, recorder = trained(tmp_path, optim=name)
    optimizer = optimizer_of(trainer)
    trainer.train()
    assert optimizer_of(trainer) is optimizer
    assert recorder.rates[6:] == recorder.rates[:6]
    assert {int(state["step"]) for state in optimizer.state.values()} == {12}
    for before, after in zip(recorder.before, recorder.after, strict=True):
        assert not any(
            torch.equal(before[group["param_names"][0]], after[group["param_names"][0]])
            for group in groups_of(trainer, "matrix")
        )


class OutOfMemory(Trainer):
    """Fails as an allocator does: at its fourth batch of more than two rows."""

    batches = 0

    def training_step(self, model, inputs, *args, **kwargs):
        type(self).batches += inputs["input_ids"].size(0) > 2
        if self.batches == 4:
            raise RuntimeError("CUDA out of memory. (a test)")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_auto_find_batch_size(tmp_path, name):
    """The second attempt goes on with the weights and the state of the first, as it does with AdamW."""
    OutOfMemory.batches = 0
    trainer, recorder = trained(tmp_path, trainer_class=OutOfMemory, optim=name, auto_find_batch_size=True)
    assert trainer._train_batch_size < 4
    assert trainer.state.global_step == 6
    steps = {int(state["step"]) for state in innermost_optimizer(trainer.optimizer).state.values()}
    assert steps == {3 + 6}
    assert recorder.rates[3:] == [dict.fromkeys(recorder.rates[0], rate) for rate in _linear(0.01, 6)]


def _linear(rate: float, steps: int) -> list[float]:
    return [rate * ((steps - step) / steps) for step in range(steps)]


class TrialRecorder(TrainerCallback):
    def __init__(self) -> None:
        self.algorithms: list[tuple[str, float]] = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        found = innermost_optimizer(optimizer)
        self.algorithms.append((getattr(found, "algorithm", type(found).__name__), found.param_groups[0]["lr"]))


def test_hyperparameter_search_over_optim(tmp_path):
    names = [*OPTIMIZER_NAMES, "adamw_torch"]
    recorder = TrialRecorder()
    trainer = Trainer(
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=3, max_steps=3, lr_scheduler_type="constant"),
        model_init=lambda: tiny_model("qwen2"),
        train_dataset=token_rows(),
        eval_dataset=token_rows(4, seed=1),
        callbacks=[recorder],
    )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"optim": trial.suggest_categorical("optim", names), "learning_rate": 0.02},
            n_trials=len(names),
            backend="optuna",
            sampler=optuna.samplers.GridSampler({"optim": names}),
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
    assert sorted(recorder.algorithms) == sorted((name, 0.02) for name in [*OPTIMIZER_NAMES, "AdamW"])
    assert best.hyperparameters["optim"] in names
