"""The Trainer of the recipes. Tests named ``stock_...`` fail when transformers no longer needs an override of ours."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_error import RecipeError
from recipe_trainer import (
    IGNORED,
    TRAINER_STATE_FILE,
    PretrainingTrainer,
    leave_out_logits_while_training,
    load_weights,
    sample_losses,
    token_loss,
)
from safetensors.torch import load_file, save_file
from tiny_training import arguments
from torch import Tensor, nn
from torch.nn import functional
from training_clock import TrainingClock
from transformers import (
    AutoModelForCausalLM,
    EsmConfig,
    EsmForMaskedLM,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    get_scheduler,
)

WORDS = 33


def esm(seed: int) -> EsmForMaskedLM:
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=WORDS,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        position_embedding_type="rotary",
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = EsmForMaskedLM(config)
    model.esm.contact_head.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or "layer_norm" in name:
                parameter.add_(torch.randn_like(parameter))  # as after training
    return model


def rows(count: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    """Rows with 1, 2, 3, ... labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 24, (count, length), generator=generator)
    labels = torch.full((count, length), IGNORED)
    for number, row in enumerate(tokens):
        labels[number, : number + 1] = row[: number + 1]
    return [
        {"input_ids": row, "attention_mask": torch.ones(length, dtype=torch.long), "labels": wanted}
        for row, wanted in zip(tokens, labels, strict=True)
    ]


def pretraining_trainer(folder: Path, model: nn.Module, more: dict[str, Any] | None = None, **values: Any) -> Any:
    return PretrainingTrainer(
        model,
        arguments(folder, train_sampling_strategy="sequential", **values),
        train_dataset=rows() * 4,
        eval_dataset=rows(),
        compute_loss_func=token_loss,
        tokens_per_step=48,
        tokens_per_sample=12,
        flops_per_token=10.0,
        **more or {},
    )


def stock_trainer(folder: Path, model: nn.Module, **values: Any) -> Trainer:
    values = {"train_sampling_strategy": "sequential", **values}
    return Trainer(model, arguments(folder, **values), train_dataset=rows() * 4, eval_dataset=rows())


def layer_norms(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "attention.LayerNorm" in name])


def loaders(kind: type[Trainer], folder: Path, model: nn.Module, saved: Path) -> list[Callable[[], None]]:
    trainer = stock_trainer(folder, model) if kind is Trainer else pretraining_trainer(folder, model)
    trainer.state.best_model_checkpoint = str(saved)
    return [lambda: trainer._load_from_checkpoint(str(saved)), trainer._load_best_model]


@pytest.mark.parametrize("which", [0, 1], ids=["resume", "best model"])
def test_weights_of_an_esm_are_loaded_whole(tmp_path: Path, which: int) -> None:
    saved, model = esm(1), esm(2)
    saved.save_pretrained(tmp_path / "saved")
    loaders(PretrainingTrainer, tmp_path, model, tmp_path / "saved")[which]()
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.lm_head.decoder.weight is model.esm.embeddings.word_embeddings.weight


@pytest.mark.parametrize("which", [0, 1], ids=["resume", "best model"])
def test_stock_trainer_keeps_fresh_layer_norms(tmp_path: Path, which: int) -> None:
    saved, model = esm(1), esm(2)
    saved.save_pretrained(tmp_path / "saved")
    fresh = layer_norms(model).clone()
    loaders(Trainer, tmp_path, model, tmp_path / "saved")[which]()
    assert torch.equal(layer_norms(model), fresh)
    assert not torch.equal(fresh, layer_norms(saved))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    model = esm(0)
    model.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_weights(model, str(tmp_path / "nothing"))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["esm.encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"no weights of the right shape for esm\.encoder\.layer\.1"):
        load_weights(model, str(tmp_path))


def loss_over_labels(model: nn.Module) -> float:
    total, count = 0.0, 0
    for row in rows():
        logits = model(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0]
        wanted = row["labels"] != IGNORED
        total += functional.cross_entropy(logits[wanted], row["labels"][wanted], reduction="sum").item()
        count += int(wanted.sum())
    return total / count


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_is_a_mean_over_labels(tmp_path: Path, batch: int) -> None:
    model = esm(0).eval()
    metrics = pretraining_trainer(tmp_path, model, per_device_eval_batch_size=batch).evaluate()
    expected = loss_over_labels(model)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_stock_evaluation_is_a_mean_over_batches(tmp_path: Path) -> None:
    model = esm(0).eval()
    found = [
        stock_trainer(tmp_path, model, per_device_eval_batch_size=batch).evaluate()["eval_loss"] for batch in (1, 3, 8)
    ]
    assert abs(found[0] - found[2]) > 1e-3
    assert abs(found[0] - loss_over_labels(model)) > 1e-3


def test_accuracy_counts_right_answers() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 2] = logits[0, 1, 1] = logits[1, 2, 3] = 5.0
    labels = torch.tensor([[2, 0, IGNORED], [IGNORED, IGNORED, 3]])
    sums, counts = sample_losses(logits, labels)
    assert sums[:, 1].tolist() == [1, 1]
    assert counts.tolist() == [2, 1]
    expected = functional.cross_entropy(logits[0, :2], labels[0, :2], reduction="sum")
    assert torch.allclose(sums[0, 0], expected)
    images, count_of_images = sample_losses(logits[0], torch.tensor([2, 0, 0]))
    assert (images[:, 1].tolist(), count_of_images.tolist()) == ([1, 0, 1], [1, 1, 1])


def losses_of(trainer: Trainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_accumulation_does_not_change_a_masked_loss(tmp_path: Path) -> None:
    cuts = ((8, 1), (2, 4), (1, 8))
    curves = [
        losses_of(
            pretraining_trainer(
                tmp_path, esm(0), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=3
            )
        )
        for batch, steps in cuts
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert curves[2] == pytest.approx(curves[0], rel=1e-6)


def test_stock_loss_of_an_esm_depends_on_accumulation(tmp_path: Path) -> None:
    whole, cut = (
        losses_of(
            stock_trainer(
                tmp_path, esm(0), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1
            )
        )
        for batch, steps in ((8, 1), (1, 8))
    )
    assert abs(whole[0] - cut[0]) > 1e-3


def test_label_smoothing_is_torchs() -> None:
    logits, labels = torch.randn(4, 5), torch.tensor([1, 2, 0, IGNORED])
    expected = functional.cross_entropy(logits[:3], labels[:3], label_smoothing=0.2)
    assert torch.allclose(token_loss({"logits": logits}, labels, label_smoothing=0.2), expected)


def test_floating_point_operations_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    count = EsmForMaskedLM.num_parameters
    monkeypatch.setattr(
        EsmForMaskedLM, "num_parameters", lambda self, *a, **k: walks.append(1) or count(self, *a, **k)
    )
    trainer = pretraining_trainer(tmp_path, esm(0), max_steps=3)
    trainer.train()
    assert not walks
    assert trainer.state.total_flos == 3 * 4 * 12 * 10


def test_stock_trainer_walks_the_model_at_each_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    count = EsmForMaskedLM.num_parameters
    monkeypatch.setattr(
        EsmForMaskedLM, "num_parameters", lambda self, *a, **k: walks.append(1) or count(self, *a, **k)
    )
    stock_trainer(tmp_path, esm(0), max_steps=3).train()
    assert len(walks) == 3


def test_the_warm_up_starts_at_zero_and_the_floor_is_at_the_end(tmp_path: Path) -> None:
    kwargs = {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.25}
    trainer = pretraining_trainer(
        tmp_path,
        esm(0),
        max_steps=10,
        learning_rate=1.0,
        warmup_steps=2,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs=kwargs,
        max_grad_norm=1e-6,
    )
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.8125, 0.625, 0.4375])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.25)


def test_stock_warm_up_starts_at_the_floor() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=2,
        num_training_steps=10,
        scheduler_specific_kwargs={"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.25},
    )
    assert scheduler.get_last_lr() == [0.25]


class StateFileWatch(PretrainingTrainer):
    """Notes whether the state's file is there when the other files of a checkpoint are written."""

    seen: tuple[bool, ...] = ()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.seen = (*self.seen, (Path(output_dir) / TRAINER_STATE_FILE).exists())
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.seen = (*self.seen, (Path(output_dir) / TRAINER_STATE_FILE).exists())


def test_the_state_of_a_checkpoint_is_written_last(tmp_path: Path) -> None:
    stale = tmp_path / "checkpoint-2" / TRAINER_STATE_FILE
    stale.parent.mkdir()
    stale.write_text('{"global_step": 2}')
    trainer = StateFileWatch(
        esm(0),
        arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=rows(),
        compute_loss_func=token_loss,
        tokens_per_step=48,
        tokens_per_sample=12,
        flops_per_token=1.0,
    )
    trainer.train()
    assert trainer.seen == (False, False, False, False)
    assert json.loads(stale.read_text())["global_step"] == 2
    assert json.loads((stale.parent / "training_clock.json").read_text())["timed_steps"] == 2


def test_a_training_model_returns_its_loss_alone() -> None:
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.arange(24).view(2, 12)
    stock = model(input_ids=tokens, labels=tokens)
    leave_out_logits_while_training(model)
    trained, evaluated = model.train()(input_ids=tokens, labels=tokens), model.eval()(input_ids=tokens, labels=tokens)
    assert dict(trained) == {"loss": trained.loss}
    assert trained.loss == evaluated.loss == stock.loss
    assert torch.equal(evaluated.logits, stock.logits)


class LogitsType(TrainerCallback):
    """Notes the type of the logits that a wrapped model returns while it trains under bfloat16."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        row = rows()[0]
        with torch.no_grad():
            outputs = model.train()(row["input_ids"][None], labels=row["labels"][None])
        self.types = {name: value.dtype for name, value in outputs.items()}
        control.should_training_stop = True


def test_stock_trainer_makes_float32_logits_in_bfloat16(tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path, esm(0), bf16=True, max_steps=1)
    noted = LogitsType()
    trainer.add_callback(noted)
    trainer.train()
    assert noted.types["logits"] == torch.float32


def test_the_log_has_the_clock_and_the_records(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    more = {"log_record": records.append, "peak_flops": 1e6}
    trainer = pretraining_trainer(
        tmp_path, esm(0), more, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    trainer.evaluate()  # at the same step again: no second record
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 2),
        ("eval", 2),
        ("train", 4),
        ("eval", 4),
    ]
    assert [record["tokens"] for record in records] == [96, 96, 192, 192]
    for record in records[::2]:
        assert record["tokens_per_second"] > 0
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 10 / 1e6, abs=1e-4)
    assert records[3]["perplexity"] == pytest.approx(math.exp(records[3]["loss"]))
    assert 0 < records[2]["optimizer_seconds"] < records[2]["train_seconds"]


class Sleeper(TrainerCallback):
    """Spends time where the clock must run, and longer where it must not."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        time.sleep(0.02)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        time.sleep(0.3)


def test_the_clock_stops_for_evaluation_and_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    trainer = pretraining_trainer(
        tmp_path, esm(0), {"callbacks": [Sleeper()]}, max_steps=4, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert trainer.clock.timed_steps == 4
    assert 4 * 0.02 < trainer.clock.train_seconds < 1.2  # evaluations alone took 4 x 0.3
    trainer.clock.save(tmp_path)
    clock = TrainingClock(skips_first_step=True)
    clock.load(tmp_path)
    assert (clock.train_seconds, clock.timed_steps) == (trainer.clock.train_seconds, 4)


def test_a_first_step_that_compiles_is_not_timed(tmp_path: Path) -> None:
    trainer = pretraining_trainer(tmp_path, esm(0), {"callbacks": [Sleeper()]}, max_steps=3)
    trainer.clock.skips_first_step = True
    trainer.train()
    assert trainer.clock.timed_steps == 2
    assert trainer.clock.first_step_seconds is not None
    assert trainer.clock.first_step_seconds > 0.02
