"""The Trainer of the recipes: stock Trainer, corrected where it is wrong or slow for pretraining.

Each override names what it is for, and ``tests/test_recipe_trainer.py`` fails when stock Trainer no longer needs it.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peak_memory import PeakMemory
from recipe_error import RecipeError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from training_clock import TrainingClock
from transformers import EvalPrediction, PreTrainedModel, Trainer
from transformers.modeling_outputs import ModelOutput

from hf_matrix_optim.trainer import MatrixTrainerMixin

IGNORED = -100
TRAINER_STATE_FILE = "trainer_state.json"

Log = Callable[[dict[str, Any]], None]


def token_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy summed over all labels that count and divided by how many the whole step has; ().

    For models whose own loss is a mean over each micro-batch. Those differ in their number of labels, so a mean of
    their means depends on how a step is cut into micro-batches and ranks.

    Args:
        outputs: with ``logits``, (..., classes).
        labels: (...), -100 where nothing is asked.
        num_items_in_batch: labels that count in the step, over all micro-batches and ranks; None: those of ``labels``.
        label_smoothing: in [0, 1), of torch's cross entropy.
    """
    logits = outputs["logits"].float()
    total = functional.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def sample_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy of each sample, one after the other so that no float32 copy of all logits is needed.

    Args:
        logits: (batch, ..., classes).
        labels: (batch, ...), -100 where nothing is asked; aligned with the logits.

    Returns:
        (batch, 2): the sum of the losses and the number of right answers; (batch,): the number of labels that count.
    """
    sums = []
    for row, wanted in zip(logits.flatten(1, -2) if logits.ndim > 2 else logits[:, None], labels, strict=True):
        wanted = wanted.flatten()
        loss = functional.cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="sum")
        right = (row.argmax(-1) == wanted).sum()  # no class is -100
        sums.append(torch.stack([loss, right.to(loss.dtype)]))
    return torch.stack(sums), labels.flatten(1).ne(IGNORED).sum(-1) if labels.ndim > 1 else labels.ne(IGNORED).long()


def mean_over_labels(prediction: EvalPrediction) -> dict[str, float]:
    """Turn what `sample_losses` returned for all samples into the loss and the accuracy a label."""
    sums, counts = prediction.predictions.astype("float64").sum(0), prediction.label_ids.astype("float64").sum()
    return {"loss": sums[0] / counts, "accuracy": sums[1] / counts}


def leave_out_logits_while_training(model: PreTrainedModel) -> None:
    """Make a model in training mode return its loss alone when it is given labels.

    accelerate turns what a forward returns into float32: for the logits of a language model several gigabytes a
    micro-batch, that nobody reads. In evaluation mode the model is unchanged.
    """
    forward = model.forward

    @functools.wraps(forward)
    def loss_alone(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        if model.training and kwargs.get("labels") is not None:
            return ModelOutput(loss=outputs["loss"])
        return outputs

    model.forward = loss_alone


class PretrainingTrainer(Trainer):
    """Trainer with a training clock, an exact resume for every model, and losses that are means over tokens.

    - ``eval_loss`` and ``eval_accuracy`` are means over all labels, with ``eval_perplexity`` for language models.
      Stock Trainer's loss is a mean over batches, in which the last, smaller one and rows with few labels weigh too
      much.
    - Weights of a checkpoint are loaded by ``from_pretrained``, and a weight that it lacks is an error. Stock Trainer
      loads the file's names as they are, and an ESM, whose LayerNorms are saved under other names, keeps the
      LayerNorms it was initialised with.
    - A checkpoint is whole when its ``trainer_state.json`` can be read: that file is written last, after all ranks'
      states, and is removed before a checkpoint is written again.
    - Logs have ``train_seconds``, ``tokens_per_second`` and ``mfu``; floating point operations are counted once, not
      by a walk over the model at each micro-batch; batches go to the GPU without waiting for it.
    """

    def __init__(
        self,
        *args: Any,
        tokens_per_step: int,
        tokens_per_sample: int,
        flops_per_token: float,
        peak_flops: float | None = None,
        has_perplexity: bool = True,
        log_record: Log | None = None,
        stream_state: Callable[[int], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a trainer; ``args`` and ``kwargs`` are Trainer's.

        Args:
            tokens_per_step: tokens (or images) of an optimizer step over all devices.
            tokens_per_sample: tokens (or images) of one row of a batch.
            flops_per_token: operations a token costs, forward and backward.
            peak_flops: operations a second of all devices together; None: no MFU.
            has_perplexity: whether exp(loss) has a meaning.
            log_record: receives each record of training and evaluation, on the first process only.
            stream_state: gives the place of streamed data after so many steps, kept in each checkpoint.
        """
        super().__init__(*args, compute_metrics=mean_over_labels, **kwargs)
        self.tokens_per_step = tokens_per_step
        self.tokens_per_sample = tokens_per_sample
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.has_perplexity = has_perplexity
        self.clock = TrainingClock(skips_first_step=self.args.torch_compile or self.args.device.type == "cuda")
        self.add_callback(self.clock)
        self.memory = PeakMemory()
        self.add_callback(self.memory)
        self._log_record = log_record
        self._stream_state = stream_state
        self._evaluated_step: int | None = None
        self._last_logged = (0, 0.0)

    def tokens_per_second(self) -> float | None:
        """Tokens a second over all timed steps; None before any."""
        clock = self.clock
        return self.tokens_per_step * clock.timed_steps / clock.train_seconds if clock.train_seconds else None

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOPs utilisation, 0 to 1; None where the devices' peak is not known."""
        if tokens_per_second is None or self.peak_flops is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak_flops

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer, with the clock's counts; training and evaluation also go to the run's own log."""
        if "loss" in logs:
            self.clock.flush()
            steps, seconds = self.clock.timed_steps, self.clock.train_seconds
            new_steps, new_seconds = steps - self._last_logged[0], seconds - self._last_logged[1]
            self._last_logged = steps, seconds
            if new_steps and new_seconds > 0:
                logs["tokens_per_second"] = round(new_steps * self.tokens_per_step / new_seconds, 1)
                if (mfu := self.mfu(logs["tokens_per_second"])) is not None:
                    logs["mfu"] = round(mfu, 4)
        if "eval_loss" in logs and self.has_perplexity:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
        logs["train_seconds"] = round(self.clock.train_seconds, 3)
        super().log(logs, start_time)
        if self._log_record is not None and self.is_world_process_zero():
            self._record(logs)

    def _record(self, logs: Mapping[str, float]) -> None:
        step = self.state.global_step
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "train_seconds": self.clock.train_seconds,
        }
        if "loss" in logs:
            record |= {"kind": "train", "loss": logs["loss"], "lr": logs["learning_rate"]}
            record |= {name: logs.get(name) for name in ("grad_norm", "tokens_per_second", "mfu")}
            record["optimizer_seconds"] = self.clock.optimizer_seconds
        elif "eval_loss" in logs and step != self._evaluated_step:
            self._evaluated_step = step
            record |= {"kind": "eval", "loss": logs["eval_loss"], "accuracy": logs["eval_accuracy"]}
            if self.has_perplexity:
                record["perplexity"] = logs["eval_perplexity"]
        if "kind" in record and self._log_record is not None:
            self._log_record(record)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader; a stream is split by rank already, and accelerate must not split it again."""
        if not isinstance(self.train_dataset, IterableDataset):
            loader: DataLoader = super().get_train_dataloader()
            return loader
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the scheduler; that of "warmup_stable_decay" with a floor has the floor at its end alone.

        transformers' own starts the warm-up at the floor too.
        """
        kwargs = dict(self.args.lr_scheduler_kwargs or {})
        floor = kwargs.pop("min_lr_ratio", 0.0)
        is_linear = kwargs.get("decay_type") == "linear" and self.args.lr_scheduler_type == "warmup_stable_decay"
        if self.lr_scheduler is None and is_linear and floor:
            warmup, decay = self.args.get_warmup_steps(num_training_steps), kwargs["num_decay_steps"]

            def factor(step: int) -> float:
                if step < warmup:
                    return step / warmup
                return 1 - (1 - floor) * min(1.0, max(0.0, (step - (num_training_steps - decay)) / decay))

            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Operations of a micro-batch, from a count made once."""
        return int(len(inputs["labels"]) * self.tokens_per_sample * self.flops_per_token)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer, with the training clock stopped."""
        self.clock.pause()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.is_in_train:
            self.clock.go_on()
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch's mean loss, and for each sample the sums and the count of `sample_losses`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        labels = inputs.pop("shift_labels", labels)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs)["logits"]
        sums, counts = sample_losses(logits, labels)
        return sums[:, 0].sum() / counts.sum(), sums, counts

    def _prepare_input(self, data: Tensor | Any) -> Tensor | Any:
        if isinstance(data, Tensor) and data.device.type == "cpu" and self.args.device.type == "cuda":
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.clock.pause()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.clock.go_on()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        if self.args.should_save:
            self.clock.save(folder)
        if self._stream_state is not None:
            place = self._stream_state(self.state.global_step)
            stream_state_file(folder, self.args.process_index).write_text(json.dumps(place), encoding="utf-8")
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, str(self.state.best_model_checkpoint))


class ClippingPretrainingTrainer(MatrixTrainerMixin, PretrainingTrainer):
    """The same, with ``clip`` of ``MatrixTrainer``."""


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load a checkpoint's weights into a model by ``from_pretrained``, which knows the names they were saved under.

    Raises:
        RecipeError: if the checkpoint cannot be read or lacks a weight of the model.
    """
    try:
        saved, report = type(model).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"the weights of {folder} cannot be loaded: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise RecipeError(f"{folder} has no weights of the right shape for {', '.join(names[:5])}")
    model.load_state_dict(saved.state_dict())


def stream_state_file(folder: Path, rank: int) -> Path:
    """Where a checkpoint keeps the place of a rank's stream."""
    return folder / f"stream_rank{rank}.json"
