"""Short runs of the real Trainer on a CPU: arguments, token rows, and what a run leaves behind."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_matrix_optim  # noqa: F401  (registers the optimizers)
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.options import OPTIMIZER_NAMES
from hf_matrix_optim.tripwire import innermost_optimizer

__all__ = ["OPTIMIZER_NAMES", "StepRecorder", "arguments", "groups_of", "optimizer_of", "state_tensors", "token_rows"]


def token_rows(count: int = 24, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of random tokens for a language model, each (length,)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path | str, **values: Any) -> TrainingArguments:
    """Six steps of four rows on the CPU, without reports, progress bars and checkpoints."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return TrainingArguments(**{**defaults, **values})


def optimizer_of(trainer: Trainer) -> MatrixOptimizer:
    """The optimizer of this package that a trainer runs, below accelerate's wrappers."""
    optimizer = innermost_optimizer(trainer.optimizer)
    assert isinstance(optimizer, MatrixOptimizer)
    return optimizer


def groups_of(trainer: Trainer, role: str) -> list[dict[str, Any]]:
    """The param groups of one role."""
    return [group for group in optimizer_of(trainer).param_groups if group["role"] == role]


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all weights and all tensors of the optimizer's state, by name."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}: {key}"] = value.detach().clone()
    return tensors


class StepRecorder(TrainerCallback):
    """Keeps, for every step, the learning rates by role, the gradients, and the weights before and after."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        groups = optimizer.param_groups
        self.rates.append({group.get("role", "all"): float(group["lr"]) for group in groups})
        named = dict(model.named_parameters())
        self.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        self.before.append({name: p.detach().clone() for name, p in named.items()})

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.after.append({name: p.detach().clone() for name, p in model.named_parameters()})
