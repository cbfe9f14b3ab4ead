"""``MatrixTrainer``: the optimizers of this package chosen by class and dataclass, beside ``--optim``."""

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer, TrainerCallback

from hf_matrix_optim.diagnostics import DiagnosticsCallback
from hf_matrix_optim.flattening import refuse_flattened
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.options import (
    OPTIONS_CLASSES,
    MatrixOptimizerOptions,
)
from hf_matrix_optim.partition import explain
from hf_matrix_optim.qk_clip_callback import QKClipCallback
from hf_matrix_optim.registration import accepted_names, options_asked_for
from hf_matrix_optim.registry import (
    optimizer_class_and_kwargs_from_arguments,
    options_with_target_modules,
    partition_options_of,
)
from hf_matrix_optim.tripwire import innermost_optimizer

__all__ = ["ClipPolicy", "MatrixTrainer", "MatrixTrainerMixin"]

# A child of transformers' own logger, so that --log_level and set_verbosity_info() reach it.
logger = logging.getLogger("transformers.hf_matrix_optim")

ClipPolicy: TypeAlias = Literal["all", "adamw_only"]

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBelow
else:
    _TrainerBelow = object


class MatrixTrainerMixin(_TrainerBelow):
    """Gives a Trainer class the arguments of ``MatrixTrainer``; it comes first among the base classes.

    ::

        class MatrixSeq2SeqTrainer(MatrixTrainerMixin, Seq2SeqTrainer): ...

    The optimizer is that of ``optimizer_options``, or else the one that ``args.optim`` names. Where neither is of
    this package, the class does what the Trainer below it does. Weight decay follows ``get_decay_parameter_names``
    of the class. ``log`` adds ``matrix_learning_rate``, that of the matrix groups, to each entry with a
    ``learning_rate``, and the partition is logged at INFO when the optimizer is created.
    """

    args: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        optimizer_options: MatrixOptimizerOptions | None = None,
        clip: ClipPolicy = "all",
        diagnostics_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a trainer; ``args`` and ``kwargs`` are those of the Trainer below.

        Args:
            optimizer_options: ``MuonOptions``, ``AdaMuonOptions``, ``AdaMuonV1Options`` or ``MUDOptions``; its class
                chooses the optimizer. ``self.args`` is then a copy of ``args`` in which ``optim`` is that optimizer,
                so that what is logged and saved names the optimizer that trains. None leaves the choice to
                ``args.optim`` and ``args.optim_args``.
            clip: whose gradients ``args.max_grad_norm`` bounds. "all" is stock Trainer: one norm over all parameters.
                "adamw_only" bounds the norm of the AdamW groups' gradients and leaves the others as they are: the
                update of a matrix group depends little on the scale of its gradient. The logged ``grad_norm`` is
                over all parameters in both cases.
            diagnostics_steps: measure the optimizer every so many steps, at least 1, and log it; like the option
                ``diagnostics``, for every optimizer of this package however it was chosen. None leaves it to the
                options.

        Raises:
            TypeError: if ``optimizer_options`` is not one of these classes.
            ValueError: if ``args.optim`` or ``args.optim_args`` contradict ``optimizer_options``, for an unknown
                ``clip``, or for ``diagnostics_steps`` that are no whole number above 0.
            NotImplementedError: for ``clip="adamw_only"`` with transformers 5.2, which has no method to override, and
                for ``optimizer_options`` under DeepSpeed ZeRO.
        """
        if clip not in get_args(ClipPolicy):
            raise ValueError(f"clip={clip!r} must be one of {', '.join(map(repr, get_args(ClipPolicy)))}")
        if optimizer_options is not None and type(optimizer_options) not in OPTIONS_CLASSES.values():
            known = ", ".join(options_class.__name__ for options_class in OPTIONS_CLASSES.values())
            raise TypeError(f"optimizer_options must be one of {known}, not {type(optimizer_options).__name__}")
        if diagnostics_steps is not None and (type(diagnostics_steps) is not int or diagnostics_steps < 1):
            raise ValueError(
                f"diagnostics_steps={diagnostics_steps!r} must be a whole number of optimizer steps, at least 1: 50 "
                "measures every 50th; leave it out to measure none"
            )
        super().__init__(*args, **kwargs)
        if clip == "adamw_only" and not hasattr(Trainer, "_clip_grad_norm"):
            raise NotImplementedError("clip='adamw_only' needs transformers 5.3 or later")
        self._clip_policy = clip
        self._optimizer_options = optimizer_options
        if optimizer_options is not None:
            # Before training: with an optimizer block in its configuration, DeepSpeed would not ask for ours.
            refuse_flattened(f"optim={_name_of(optimizer_options)!r}", self.model, self.args)
            default = next(field.default for field in fields(self.args) if field.name == "optim")
            value = _value_of(_name_of(optimizer_options))
            self._check_options_agree(optimizer_options, {default, value})
            if value is not None:
                self.args = copy.copy(self.args)
                self.args.optim = type(self.args.optim)(value)
        if not any(isinstance(callback, QKClipCallback) for callback in self.callback_handler.callbacks):
            # Where the import hook is off. First, for the callbacks that report come after it.
            self.callback_handler.callbacks.insert(0, QKClipCallback())
        self._first_optim = self.args.optim
        self._matrix_learning_rate = _MatrixLearningRate()
        self.add_callback(self._matrix_learning_rate)
        self._diagnostics_steps = diagnostics_steps
        # Before the callbacks that report logs; where the import hook is off, it is not there yet.
        self.remove_callback(DiagnosticsCallback)
        self._diagnostics = DiagnosticsCallback(diagnostics_steps)
        self.callback_handler.callbacks.insert(0, self._diagnostics)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer that was asked for, if there is none yet.

        Raises:
            ValueError: if the options contradict the arguments, nothing in the model is a matrix, or
                ``clip="adamw_only"`` or ``diagnostics_steps`` are asked of an optimizer that is not of this package.
            RuntimeError: if the trainer was given an optimizer of another kind.
            NotImplementedError: under DeepSpeed ZeRO and FSDP1.
        """
        chosen = self._chosen_optimizer()
        if chosen is not None:
            name, options = chosen
            optimized_model = self.model if model is None else model
            refuse_flattened(f"optim={name!r}", optimized_model, self.args)
            self._check_no_other_optimizer(name)
            if self.optimizer is None:
                self.optimizer = self._new_optimizer(name, options, optimized_model)
        created: torch.optim.Optimizer = (
            super().create_optimizer() if model is None else super().create_optimizer(model)
        )
        self._check_diagnostics(created)
        if self._clip_policy == "adamw_only" and not isinstance(innermost_optimizer(created), MatrixOptimizer):
            raise ValueError(
                f"clip='adamw_only' needs an optimizer of this package, and optim={str.__str__(self.args.optim)!r} "
                "is not: choose one, or clip='all'"
            )
        return created

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer below, with ``matrix_learning_rate`` (that of the last step) beside ``learning_rate``."""
        if "learning_rate" in logs and self._matrix_learning_rate.value is not None:
            logs["matrix_learning_rate"] = self._matrix_learning_rate.value
        super().log(logs, start_time)

    def _chosen_optimizer(self) -> tuple[str, MatrixOptimizerOptions] | None:
        """Name and options of the optimizer that was asked for, None if it is not one of this package."""
        options = self._optimizer_options
        if options is not None:
            self._check_options_agree(options, {self._first_optim})  # a search may have changed the arguments
            return _name_of(options), options
        asked = options_asked_for(self.args)
        return None if asked is None else (_name_of(asked), asked)

    def _check_diagnostics(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse ``diagnostics_steps`` of another optimizer, or beside an option that says the same; join the two."""
        steps = self._diagnostics_steps
        if steps is None:
            return
        found = innermost_optimizer(optimizer)
        if not isinstance(found, MatrixOptimizer):
            raise ValueError(
                f"diagnostics_steps={steps} needs an optimizer of this package, and "
                f"optim={str.__str__(self.args.optim)!r} is not: choose one, or leave diagnostics_steps out"
            )
        options = options_asked_for(self.args, found)
        if options is not None and options.diagnostics:
            raise ValueError(
                f"diagnostics_steps={steps} and the option diagnostics={options.diagnostics} both say how often to "
                "measure: give one of the two"
            )

    def _check_options_agree(self, options: MatrixOptimizerOptions, allowed: set[Any]) -> None:
        """Raise ValueError if ``args.optim`` is not ``allowed``, or there are ``args.optim_args``."""
        if self.args.optim not in allowed:
            raise ValueError(
                f"optimizer_options={type(options).__name__}(...) chooses {_name_of(options)!r}, but the training "
                f"arguments ask for optim={str.__str__(self.args.optim)!r}: give one of the two"
            )
        if self.args.optim_args:
            raise ValueError(
                f"optimizer_options={type(options).__name__}(...) and optim_args={self.args.optim_args!r} both set "
                "options of the optimizer: give one of the two"
            )

    def _check_no_other_optimizer(self, name: str) -> None:
        if self.optimizer_cls_and_kwargs is not None:
            found = self.optimizer_cls_and_kwargs[0].__name__
        elif self.optimizer is not None:
            innermost = innermost_optimizer(self.optimizer)
            found = getattr(innermost, "algorithm", type(innermost).__name__)
        else:
            return
        if found != name:
            raise RuntimeError(
                f"{name!r} was asked for, but the trainer was given {found!r} in optimizers= or "
                "optimizer_cls_and_kwargs=: remove one of the two"
            )

    def _new_optimizer(self, name: str, options: MatrixOptimizerOptions, model: nn.Module) -> torch.optim.Optimizer:
        optimizer_class, kwargs = optimizer_class_and_kwargs_from_arguments(
            name, self.args, model, options, self.get_decay_parameter_names(model)
        )
        partition = explain(model, partition_options_of(options_with_target_modules(options, self.args)))
        logger.info("Partition of %s for %s:\n%s", type(model).__name__, name, partition)
        optimizer: MatrixOptimizer = optimizer_class(**kwargs)
        optimizer.asked_options = options
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip as ``clip`` says; return the norm of all gradients before, ()."""
        if self._clip_policy == "all":
            norm: Tensor = super()._clip_grad_norm(model)
            return norm
        # Gradients below a GradScaler are unscaled once and for the whole optimizer.
        self.accelerator.unscale_gradients()
        by_role: dict[str, list[nn.Parameter]] = {"adamw": [], "matrix": []}
        for group in innermost_optimizer(self.optimizer).param_groups:
            by_role[group["role"]] += [p for p in group["params"] if p.grad is not None]
        norms = {role: _gradient_norm(parameters) for role, parameters in by_role.items()}
        for parameters in _by_mesh(by_role["adamw"]):
            clip_grads_with_norm_(parameters, self.args.max_grad_norm, norms["adamw"])
        return _joint_norm(norms.values())


class MatrixTrainer(MatrixTrainerMixin, Trainer):
    """``transformers.Trainer`` with the optimizers of this package: by ``args.optim`` or by a dataclass of options.

    ::

        trainer = MatrixTrainer(model, args, train_dataset=data, optimizer_options=AdaMuonOptions(ns_steps=6))

    Beside that, it can leave the gradients of the matrix groups unclipped (``clip="adamw_only"``), and it logs the
    partition and the learning rate of the matrix groups. ``MatrixTrainerMixin`` says how, and does the same for
    other Trainer classes.
    """


def _name_of(options: MatrixOptimizerOptions) -> str:
    return next(name for name, options_class in OPTIONS_CLASSES.items() if options_class is type(options))


def _value_of(name: str) -> str | None:
    """The value of ``--optim`` that means the optimizer ``name``; None where the import hook is switched off."""
    return next((value for value, accepted in accepted_names.items() if accepted == name), None)


class _MatrixLearningRate(TrainerCallback):
    """Keeps the learning rate with which the matrix groups took their last step, before the scheduler changes it."""

    def __init__(self) -> None:
        self.value: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.value = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        found = innermost_optimizer(optimizer)
        if isinstance(found, MatrixOptimizer):
            self.value = next((float(group["lr"]) for group in found.param_groups if group["role"] == "matrix"), None)


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters with a gradient, in lists of one device mesh: norms cannot be taken across meshes."""
    lists: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        lists[getattr(parameter.grad, "device_mesh", None)].append(parameter)
    return list(lists.values())


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of the gradients of all ``parameters``, over all shards; ()."""
    norms = [get_total_norm([p.grad for p in same if p.grad is not None]) for same in _by_mesh(parameters)]
    return _joint_norm(norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms)


def _joint_norm(norms: Iterable[Tensor]) -> Tensor:
    """Norm of vectors that have the ``norms``, each (); 0 if there are none."""
    total = torch.tensor(0.0)
    for norm in norms:
        total = torch.hypot(total.to(norm), norm)
    return total
