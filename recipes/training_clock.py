"""Seconds that a run has trained, apart from everything else it does."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CLOCK_FILE = "training_clock.json"


class TrainingClock(TrainerCallback):
    """Counts the seconds of training steps and of waiting for their data, without evaluation and saving.

    The clock waits for the GPU only where it is read (`flush`, `pause`), not at each step. The optimizer's share is
    measured by events in the GPU's own queue. A resumed run goes on from the checkpoint's count.

    Attributes:
        train_seconds: seconds of the timed steps.
        timed_steps: how many steps these are; with ``skips_first_step`` all but the first of each session.
        optimizer_seconds: seconds of ``optimizer.step()`` in the timed steps.
        first_step_seconds: seconds of this session's first step where that is skipped, else None.
    """

    def __init__(self, *, skips_first_step: bool) -> None:
        """Make a clock.

        Args:
            skips_first_step: leave out the first step of a session, in which kernels are compiled and loaded.
        """
        self.skips_first_step = skips_first_step
        self.train_seconds = 0.0
        self.timed_steps = 0
        self.optimizer_seconds = 0.0
        self.first_step_seconds: float | None = None
        self._mark: float | None = None
        self._is_first_step = False
        self._uses_cuda = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._optimizer_mark = 0.0

    def save(self, folder: Path) -> None:
        """Write the counts into a checkpoint's folder."""
        names = ("train_seconds", "timed_steps", "optimizer_seconds")
        counts = json.dumps({name: getattr(self, name) for name in names})
        (folder / CLOCK_FILE).write_text(counts, encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from the counts of a checkpoint, from zero where it has none."""
        file = folder / CLOCK_FILE
        counts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.train_seconds = float(counts.get("train_seconds", 0.0))
        self.timed_steps = int(counts.get("timed_steps", 0))
        self.optimizer_seconds = float(counts.get("optimizer_seconds", 0.0))

    def flush(self) -> None:
        """Wait for the GPU and add what has passed since the last reading."""
        if self._mark is None:
            return
        if self._uses_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if not self._is_first_step:
            self.train_seconds += now - self._mark
            self._mark = now
        self.optimizer_seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._events.clear()

    def pause(self) -> None:
        """Stop counting until `go_on`."""
        self.flush()
        self._mark = None

    def go_on(self) -> None:
        """Count again from now."""
        self._mark = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._uses_cuda = args.device.type == "cuda"
        self._is_first_step = self.skips_first_step
        self.go_on()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._uses_cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._optimizer_mark = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._uses_cuda:
            self._events[-1][1].record()
        elif not self._is_first_step:
            self.optimizer_seconds += time.perf_counter() - self._optimizer_mark

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._is_first_step:
            self.timed_steps += 1
            return
        if self._uses_cuda:
            torch.cuda.synchronize()
        self._events.clear()
        now = time.perf_counter()
        self.first_step_seconds = now - (now if self._mark is None else self._mark)
        self._mark = now
        self._is_first_step = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.pause()
