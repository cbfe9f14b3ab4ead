"""A default callback of every Trainer that stops a run whose ``--optim`` would be ignored without a word."""

from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from hf_matrix_optim.flattening import DEEPSPEED_REMEDY, uses_deepspeed
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.registration import accepted_names, logger


class OptimizerTripwire(TrainerCallback):
    """Raises at the beginning of training when ``args.optim`` is ours and the optimizer that would run is not.

    It warns when ``args.optim`` is not ours and ``--optim_args`` asks for attention clipping or diagnostics.

    Trainer ignores ``--optim`` if it is given ``optimizers=``, if a subclass overrides ``create_optimizer``, and if
    the DeepSpeed configuration has an ``optimizer`` block. It also raises, at the beginning of training and at each
    log, if the model has trainable parameters that the optimizer lacks, which would stay as they are: those of an
    adapter added, and frozen ones made trainable, after the optimizer was made. The callback also logs the learning
    rate of the matrix groups, as ``matrix_learning_rate``, where it is not the one that Trainer logs.
    """

    def __init__(self) -> None:
        self._matrix_learning_rate: float | None = None  # of the last step, if it differs from that of group 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        asked = accepted_names.get(args.optim)
        if asked is None:
            _warn_of_unread(args)
            return
        found = innermost_optimizer(optimizer)
        algorithms = {str(group.get("algorithm")) for group in getattr(found, "param_groups", [])} - {"adamw"}
        if isinstance(found, MatrixOptimizer) and algorithms == {asked}:
            _check_cover(found, model)
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

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        found = innermost_optimizer(optimizer)
        if args.optim in accepted_names and isinstance(found, MatrixOptimizer):
            _check_cover(found, model)
        if self._matrix_learning_rate is None or logs is None or "learning_rate" not in logs:
            return
        logs.setdefault("matrix_learning_rate", self._matrix_learning_rate)
        if state.log_history and "learning_rate" in state.log_history[-1]:
            state.log_history[-1].setdefault("matrix_learning_rate", self._matrix_learning_rate)


def _warn_of_unread(args: Any) -> None:
    """Warn if ``--optim_args`` asks for what callbacks of this package do, beside another optimizer.

    A warning and no error: a subclass of Trainer may read a key of the same name itself, and in a form of its own, so
    what is no ``key=value`` is passed over here.
    """
    parts = args.optim_args.split(",") if isinstance(args.optim_args, str) else []
    pairs = {key.strip(): value.strip().lower() for key, _, value in (part.partition("=") for part in parts)}
    for key in ("qk_clip", "diagnostics", "diagnostics_per_layer"):
        if pairs.get(key, "none") not in ("none", "0", "false"):
            logger.warning(
                "optim_args=%r: %s is done with --optim %s, and nothing of it with optim=%r: choose one of those "
                "optimizers, or remove %s from optim_args.",
                args.optim_args,
                key,
                ", ".join(accepted_names),
                str.__str__(args.optim),
                key,
            )
            return


def _check_cover(optimizer: MatrixOptimizer, model: nn.Module | None) -> None:
    """Raise RuntimeError if a trainable parameter of ``model`` is in no group of ``optimizer``."""
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = [] if model is None else model.named_parameters()
    missing = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in grouped]
    if missing:
        raise RuntimeError(
            f"{len(missing)} trainable parameters, such as {missing[0]}, are not in the optimizer and would not be "
            "trained: they were added, or made trainable, after it was made. Add adapters and unfreeze parameters "
            "before Trainer makes the optimizer (a new Trainer makes a new one), or freeze them"
        )


def innermost_optimizer(optimizer: Any) -> Any:
    """The optimizer below the wrappers of accelerate and DeepSpeed, which keep it as ``.optimizer``."""
    while not isinstance(optimizer, MatrixOptimizer) and getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer
