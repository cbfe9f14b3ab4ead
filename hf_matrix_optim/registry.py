"""From the name of an optimizer and a model to the optimizer's class and its arguments."""

import logging
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

from torch import nn

from hf_matrix_optim.adamuon import AdaMuon
from hf_matrix_optim.flattening import refuse_flattened
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.mud import MUD
from hf_matrix_optim.muon import Muon
from hf_matrix_optim.options import (
    OPTIMIZER_NAMES,
    OPTIONS_CLASSES,
    MatrixOptimizerOptions,
    check_qk_clip,
    checked_name,
    parse_options,
)
from hf_matrix_optim.partition import PartitionOptions, param_groups_for, route_parameters, summary

__all__ = ["OPTIMIZER_NAMES", "create_optimizer", "optimizer_class_and_kwargs", "parse_options"]

# A child of transformers' own logger, so that --log_level and set_verbosity_info() reach it.
logger = logging.getLogger("transformers.hf_matrix_optim")

OPTIMIZER_CLASSES: dict[str, type[MatrixOptimizer]] = {
    "muon": Muon,
    "adamuon": AdaMuon,
    "adamuon_v1": AdaMuon,
    "mud": MUD,
}
VARIANTS = {"adamuon": "v2", "adamuon_v1": "v1"}
#: Options that others than the optimizer honour: ``qk_clip`` and ``diagnostics``.
NOT_THE_OPTIMIZERS = ("qk_clip", "diagnostics", "diagnostics_per_layer")


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    options: MatrixOptimizerOptions | None = None,
) -> MatrixOptimizer:
    """Return the optimizer of ``model``, for a training loop without Trainer.

    Args:
        name: one of ``OPTIMIZER_NAMES``.
        model: its parameters are routed by ``partition``; frozen ones are left out.
        lr: learning rate, at least 0.
        weight_decay: of weights, not of norms and biases, at least 0.
        betas: of the AdamW groups, each in [0, 1).
        eps: of the AdamW groups, at least 0.
        options: ``MuonOptions`` for "muon", and so on; None takes the defaults. With ``qk_clip`` the model's attention
            is watched from now on; ``optimizer.qk_clip`` is the ``QKClip``.

    Raises:
        ValueError: for an unknown name, a value out of range, a model with nothing to orthogonalise, ``qk_clip`` for
            attention that cannot be clipped, or ``options.diagnostics``, which is for Trainer.
        NotImplementedError: under DeepSpeed ZeRO and FSDP1.
    """
    if options is not None and options.diagnostics:
        raise ValueError(
            f"diagnostics={options.diagnostics!r} is logged by Trainer, and create_optimizer makes an optimizer "
            "without one: in a loop of your own, put hf_matrix_optim.OptimizerDiagnostics around optimizer.step(); "
            "with Trainer, use --optim_args or MatrixTrainer(diagnostics_steps=...)"
        )
    optimizer_class, kwargs = optimizer_class_and_kwargs(
        name, model, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, options=options
    )
    optimizer: MatrixOptimizer = optimizer_class(**kwargs)
    optimizer.asked_options = OPTIONS_CLASSES[name]() if options is None else options
    if optimizer.asked_options.qk_clip is not None:
        from hf_matrix_optim.qk_clip import QKClip  # which imports transformers' models

        QKClip(model, optimizer.asked_options.qk_clip).attach(optimizer)
    return optimizer


def optimizer_class_and_kwargs(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    options: MatrixOptimizerOptions | None = None,
    decay_parameter_names: Collection[str] | None = None,
) -> tuple[type[Any], dict[str, Any]]:
    """Return an optimizer's class and all its arguments, the param groups as ``params``.

    ``options.qk_clip`` is checked and is not among the arguments: ``qk_clip.QKClip`` is what does it. Logs how many
    parameters go where, one line at INFO.

    Args:
        name, model, lr, weight_decay, betas, eps, options: as in ``create_optimizer``.
        decay_parameter_names: names of the parameters that weight decay applies to; None is transformers' own rule.

    Raises:
        ValueError: for an unknown name, the options of another optimizer, or a model with nothing to orthogonalise.
        NotImplementedError: as ``param_groups_for``.
    """
    options_class = OPTIONS_CLASSES[checked_name(name)]
    options = options_class() if options is None else options
    if type(options) is not options_class:
        raise ValueError(f"options of {name!r} must be {options_class.__name__}, not {type(options).__name__}")
    if options.matrix_lr is not None and not 0 <= options.matrix_lr < float("inf"):
        raise ValueError(f"matrix_lr={options.matrix_lr} is not allowed: it must be at least 0 and finite")
    if options.qk_clip is not None:
        check_qk_clip(options.qk_clip)
    check_diagnostics(options)

    partition_options = partition_options_of(options)
    groups = param_groups_for(
        model,
        options=partition_options,
        weight_decay=weight_decay,
        decay_parameter_names=decay_parameter_names,
    )
    if options.matrix_lr is not None:
        for group in groups:
            if group["role"] == "matrix":
                group["lr"] = options.matrix_lr
    logger.info("optim=%s: %s", name, summary(route_parameters(model, partition_options)))

    routing_keys = {"matrix_lr", *NOT_THE_OPTIMIZERS, *vars(partition_options)}
    kwargs: dict[str, Any] = {key: value for key, value in vars(options).items() if key not in routing_keys}
    if name in VARIANTS:
        kwargs["variant"] = VARIANTS[name]
    kwargs.update(lr=lr, weight_decay=weight_decay, betas=betas, adamw_eps=eps, params=RoutedGroups(groups))
    return OPTIMIZER_CLASSES[name], kwargs


def check_diagnostics(options: MatrixOptimizerOptions) -> None:
    """Raise ValueError if the options of the diagnostics mean nothing."""
    steps = options.diagnostics
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(
            f"diagnostics={steps!r} must be a whole number of optimizer steps: 50 measures every 50th, 0 never"
        )
    if not isinstance(options.diagnostics_per_layer, bool):
        raise ValueError(f"diagnostics_per_layer={options.diagnostics_per_layer!r} must be True or False")
    if options.diagnostics_per_layer and not steps:
        raise ValueError("diagnostics_per_layer=True needs diagnostics, every how many optimizer steps to measure: 50")


def partition_options_of(options: MatrixOptimizerOptions) -> PartitionOptions:
    """The part of an optimizer's options that decides where parameters go."""
    return PartitionOptions(**{field.name: getattr(options, field.name) for field in fields(PartitionOptions)})


def optimizer_class_and_kwargs_from_arguments(
    name: str,
    args: Any,
    model: nn.Module | None,
    options: MatrixOptimizerOptions,
    decay_parameter_names: Collection[str] | None = None,
) -> tuple[type[Any], dict[str, Any]]:
    """Return an optimizer's class and arguments as ``TrainingArguments`` asks for them.

    Args:
        args: ``transformers.TrainingArguments``; its ``optim_target_modules`` become ``include``.
        model: as Trainer passes it.
        options: from ``args.optim_args``.

    Raises:
        ValueError: if there is no model, or ``include`` comes from both sides.
        NotImplementedError: under DeepSpeed ZeRO and FSDP1.
    """
    if model is None:
        raise ValueError(
            f"optim={name!r} needs the model, because its layers decide which parameters are matrices: call "
            "get_optimizer_cls_and_kwargs(args, model)"
        )
    refuse_flattened(f"optim={name!r}", model, args)
    return optimizer_class_and_kwargs(
        name,
        model,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        options=options_with_target_modules(options, args),
        decay_parameter_names=decay_parameter_names,
    )


def options_with_target_modules(options: MatrixOptimizerOptions, args: Any) -> MatrixOptimizerOptions:
    """Return ``options`` with ``args.optim_target_modules`` as its ``include``.

    Raises:
        ValueError: if ``include`` comes from both.
    """
    if args.optim_target_modules is None:
        return options
    if options.include is not None:
        raise ValueError("give either optim_target_modules or include in optim_args, not both: they are the same")
    target_modules = args.optim_target_modules
    return replace(options, include=target_modules if isinstance(target_modules, str) else tuple(target_modules))


class RoutedGroups(list[dict[str, Any]]):
    """Param groups that keep their routing when a Trainer subclass moves parameters to groups of its own.

    sentence-transformers does so for its ``learning_rate_mapping``: it filters ``params`` of each group and appends
    groups without a role. Appending such a group here cuts it along the original groups, and brings ``param_names``
    of the filtered groups up to date.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self._routes = {
            id(parameter): (index, name)
            for index, group in enumerate(groups)
            for parameter, name in zip(group["params"], group["param_names"], strict=True)
        }
        self._templates = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups
        ]

    def append(self, group: dict[str, Any]) -> None:
        parameters = list(group["params"])
        if "role" in group or any(id(parameter) not in self._routes for parameter in parameters):
            super().append(group)
            return
        for index, template in enumerate(self._templates):
            members = [parameter for parameter in parameters if self._routes[id(parameter)][0] == index]
            if members:
                super().append({**template, **group, "params": members})
        self[:] = [kept for kept in self if kept["params"]]
        for kept in self:
            if all(id(parameter) in self._routes for parameter in kept["params"]):
                kept["param_names"] = [self._routes[id(parameter)][1] for parameter in kept["params"]]
