"""The default callback that puts what the optimizer does into Trainer's logs."""

import logging
from typing import Any

from transformers.trainer_callback import TrainerCallback

from hf_matrix_optim.diagnostics_summary import PREFIX
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.optimizer_diagnostics import OptimizerDiagnostics
from hf_matrix_optim.registration import options_asked_for
from hf_matrix_optim.tripwire import innermost_optimizer

# A child of transformers' own logger, so that --log_level and set_verbosity_info() reach it.
logger = logging.getLogger("transformers.hf_matrix_optim")


class DiagnosticsCallback(TrainerCallback):
    """Measures every so many optimizer steps with ``OptimizerDiagnostics`` and adds the values to the next log.

    A default callback of every Trainer, which does nothing unless ``diagnostics`` is among the options of the run.
    Default callbacks come before those of ``report_to``, which thus report what is added here. Steps are counted as
    Trainer counts them, so that N is measured before it is logged. Of several measured steps between two logs the
    newest is logged; ``diagnostics/step`` says which it was.

    Args:
        steps: measure every so many optimizer steps; None: what the run's options say.
        per_layer: see ``OptimizerDiagnostics``; with ``steps``.

    Raises:
        ValueError: if ``steps`` is no whole number above 0.
    """

    def __init__(self, steps: int | None = None, *, per_layer: bool = False) -> None:
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ValueError(
                f"steps={steps!r} must be a whole number of optimizer steps, at least 1: 50 for every 50th"
            )
        self.steps, self.per_layer = steps, per_layer
        self._every = 0
        self._diagnostics: OptimizerDiagnostics | None = None
        self._measured_step: int | None = None  # that no log has yet

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Read the options of the run.

        Raises:
            ValueError: if the run logs nothing, or ``steps`` were given for an optimizer of another package.
        """
        self._diagnostics = self._measured_step = None
        found = innermost_optimizer(optimizer)
        options = options_asked_for(args, found)
        if self.steps is not None:
            self._every, per_layer = self.steps, self.per_layer
        else:
            self._every = 0 if options is None else options.diagnostics
            per_layer = options is not None and options.diagnostics_per_layer
        if self.steps is not None and not isinstance(found, MatrixOptimizer):
            raise ValueError(
                f"DiagnosticsCallback({self.steps}) needs an optimizer of this package, not {type(found).__name__}: "
                "choose one, such as --optim muon, or leave the callback out"
            )
        if not self._every or not isinstance(found, MatrixOptimizer):
            self._every = 0
            return
        if args.logging_strategy == "no":
            raise ValueError(
                f"diagnostics={self._every} goes into Trainer's logs, but logging_strategy='no' switches them off: "
                "use --logging_strategy steps, or leave diagnostics out"
            )
        if args.logging_strategy == "steps" and state.logging_steps > self._every:
            logger.warning(
                "diagnostics=%d measures more often than logging_steps=%d logs: only the last step measured before "
                "each log is reported. Set --logging_steps %d to see all.",
                self._every,
                state.logging_steps,
                self._every,
            )
        if state.global_step // self._every == state.max_steps // self._every:
            logger.warning(
                "diagnostics=%d measures no step of this run, which goes from step %d to %d: choose a smaller number",
                self._every,
                state.global_step,
                state.max_steps,
            )
        self._diagnostics = OptimizerDiagnostics(model, found, per_layer=per_layer)

    def _is_due(self, state: Any) -> bool:
        return self._diagnostics is not None and (state.global_step + 1) % self._every == 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the beginning of a step that is to be measured."""
        if self._diagnostics is not None and self._is_due(state):
            self._diagnostics.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights."""
        if self._diagnostics is not None and self._is_due(state):
            self._diagnostics.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure; Trainer clears the gradients and moves the learning rates after this."""
        if self._diagnostics is not None and self._is_due(state):
            self._diagnostics.after_step()
            self._measured_step = state.global_step + 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the values to a log of training, or to the summary at its end, and to ``state.log_history``."""
        if self._diagnostics is None or self._measured_step is None or logs is None:
            return
        if "loss" not in logs and "train_runtime" not in logs:
            return
        values = {PREFIX + "step": self._measured_step, **self._diagnostics.values()}
        self._measured_step = None
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model and the optimizer."""
        self._diagnostics = None
