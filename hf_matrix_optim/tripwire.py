"""A default callback of every Trainer that stops a run whose ``--optim`` would be ignored without a word."""

from typing import Any

from transformers.trainer_callback import TrainerCallback

from hf_matrix_optim.flattening import DEEPSPEED_REMEDY, uses_deepspeed
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.registration import accepted_names


class OptimizerTripwire(TrainerCallback):
    """Raises at the beginning of training when ``args.optim`` is ours and the optimizer that would run is not.

    Trainer ignores ``--optim`` if it is given ``optimizers=``, if a subclass overrides ``create_optimizer``, and if
    the DeepSpeed configuration has an ``optimizer`` block. The callback also logs the learning rate of the matrix
    groups, as ``matrix_learning_rate``, where it is not the one that Trainer logs.
    """

    def __init__(self) -> None:
        self._matrix_learning_rate: float | None = None  # of the last step, if it differs from that of group 0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        asked = accepted_names.get(args.optim)
        if asked is None:
            return
        found = innermost_optimizer(optimizer)
        algorithms = {str(group.get("algorithm")) for group in getattr(found, "param_groups", [])} - {"adamw"}
        if isinstance(found, MatrixOptimizer) and algorithms == {asked}:
            return
        found_class = f"{type(found).__module__}.{type(found).__qualname__}"
        if isinstance(found, MatrixOptimizer):
            found_class += f" ({', '.join(sorted(algorithms)) or 'AdamW groups alone'})"
        if uses_deepspeed(args):
            remedy = (
                "The DeepSpeed configuration has an optimizer of its own, and this package does not run under "
                f"DeepSpeed: {DEEPSPEED_REMEDY}, for which --optim stays at its default."
            )
        else:
            remedy = (
                "Trainer ignores --optim if it is given optimizers= or optimizer_cls_and_kwargs=, or if a subclass "
                "overrides create_optimizer: remove that, or leave --optim at its default."
            )
        raise RuntimeError(
            f"optim={str.__str__(args.optim)!r} was asked for, but the optimizer that would train is {found_class}. "
            f"{remedy}"
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        found = innermost_optimizer(optimizer)
        if not isinstance(found, MatrixOptimizer):
            return
        rates = [float(group["lr"]) for group in found.param_groups if group["role"] == "matrix"]
        differs = bool(rates) and rates[0] != float(found.param_groups[0]["lr"])
        self._matrix_learning_rate = rates[0] if differs else None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._matrix_learning_rate is None or logs is None or "learning_rate" not in logs:
            return
        logs.setdefault("matrix_learning_rate", self._matrix_learning_rate)
        if state.log_history and "learning_rate" in state.log_history[-1]:
            state.log_history[-1].setdefault("matrix_learning_rate", self._matrix_learning_rate)


def innermost_optimizer(optimizer: Any) -> Any:
    """The optimizer below the wrappers of accelerate and DeepSpeed, which keep it as ``.optimizer``."""
    while not isinstance(optimizer, MatrixOptimizer) and getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer
