"""GPU memory of a run."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments


class PeakMemory(TrainerCallback):
    """The most bytes that tensors of this process have on its GPU while it trains, evaluations left out.

    Attributes:
        peak: None on other devices.
    """

    def __init__(self) -> None:
        self.peak: int | None = None

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.device.type == "cuda":
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(args.device))

    def on_evaluate(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
