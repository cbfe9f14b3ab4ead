"""Adds the optimizers to transformers' tables, once ``import_hook`` has seen a module of it imported.

Three tables: the members of ``OptimizerNames`` (what ``--optim`` accepts and ``--help`` lists), the handlers that
``Trainer`` looks up by name, and the default callbacks. Each function may be called again and does nothing then.
"""

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_matrix_optim.options import OPTIMIZER_NAMES, MatrixOptimizerOptions, parse_options, split_optim_args

OLDEST_TRANSFORMERS = (5, 2)

# A child of transformers' own logger, so that --log_level and set_verbosity_info() reach it.
logger = logging.getLogger("transformers.hf_matrix_optim")

#: A value of ``--optim`` -> the optimizer of this package that it means; filled when transformers is imported.
accepted_names: dict[str, str] = {}


def register(module: ModuleType) -> None:
    """Add what belongs into ``module``, one of ``import_hook.WATCHED_MODULES``.

    Raises:
        ImportError: if transformers is older than 5.2.
    """
    match module.__name__:
        case "transformers.training_args":
            _check_version()
            add_optimizer_names(module.OptimizerNames)
        case "transformers.trainer_optimizer":
            add_handlers(module._OPTIMIZER_HANDLERS)
            module._parse_optim_args = split_optim_args  # type: ignore[attr-defined]
        case "transformers.trainer":
            from hf_matrix_optim.diagnostics import DiagnosticsCallback
            from hf_matrix_optim.qk_clip_callback import QKClipCallback
            from hf_matrix_optim.tripwire import OptimizerTripwire

            module._parse_optim_args = split_optim_args  # type: ignore[attr-defined]
            for callback in (OptimizerTripwire, QKClipCallback, DiagnosticsCallback):
                if callback not in module.DEFAULT_CALLBACKS:
                    module.DEFAULT_CALLBACKS.append(callback)


def _check_version() -> None:
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST_TRANSFORMERS:
        raise ImportError(
            f"transformers {transformers.__version__} has no table of optimizers to add to: version "
            f"{'.'.join(map(str, OLDEST_TRANSFORMERS))} or later is needed"
        )


def add_optimizer_names(names: Any) -> None:
    """Add a member to the enum ``OptimizerNames`` for each optimizer, and fill ``accepted_names``.

    A name that transformers has already stays transformers'; ours is then ``matrix_<name>``.

    Args:
        names: ``transformers.training_args.OptimizerNames``.
    """
    yielded = []
    for name in OPTIMIZER_NAMES:
        value = f"matrix_{name}" if _is_taken(names, name) else name
        if value not in names._value2member_map_:
            _add_member(names, value.upper(), value)
            if value != name:
                yielded.append(name)
        accepted_names[value] = name
    if yielded:
        logger.warning(
            "transformers has optimizers of its own named %s: --optim %s is transformers', and those of "
            "hf_matrix_optim are --optim %s.",
            ", ".join(yielded),
            yielded[0],
            ", ".join(f"matrix_{name}" for name in yielded),
        )


def _is_taken(names: Any, value: str) -> bool:
    member = names._value2member_map_.get(value) or names._member_map_.get(value.upper())
    return member is not None and not getattr(member, "is_matrix_optimizer", False)


def _add_member(names: Any, member_name: str, value: str) -> None:
    """Add a member to a ``(str, Enum)`` class that is complete, as the enum module of this Python would have."""
    member = str.__new__(names, value)
    member._name_ = member_name
    member._value_ = value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    member.is_matrix_optimizer = True
    # A plain string in pickles: training_args.bin is then loaded where this package is absent.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    type.__setattr__(names, member_name, member)  # before _member_map_, which makes the name read-only
    names._member_names_.append(member_name)
    names._member_map_[member_name] = member
    names._value2member_map_[value] = member
    hashable_values = getattr(names, "_hashable_values_", None)  # Python 3.12.5 and later
    if hashable_values is not None and value not in hashable_values:
        hashable_values.append(value)


def add_handlers(handlers: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]]) -> None:
    """Add a handler for each accepted name to ``transformers.trainer_optimizer._OPTIMIZER_HANDLERS``."""
    for value, name in accepted_names.items():
        handlers.setdefault(value, _handler(name))


def _handler(name: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    def handler(context: Any) -> tuple[Any, dict[str, Any]]:
        """Return an optimizer class and its arguments, ``params`` among them.

        Args:
            context: ``transformers.trainer_optimizer.OptimizerContext``.
        """
        from hf_matrix_optim.registry import optimizer_class_and_kwargs_from_arguments

        options = parse_options(name, context.optim_args)
        return optimizer_class_and_kwargs_from_arguments(name, context.args, context.model, options)

    return handler


def options_asked_for(args: Any, optimizer: Any = None) -> MatrixOptimizerOptions | None:
    """Return the options of the run: those that the optimizer was made from, or else what ``--optim_args`` says.

    Args:
        args: ``transformers.TrainingArguments``.
        optimizer: the one that trains, below the wrappers of accelerate.

    Returns:
        None if ``args.optim`` is not of this package.
    """
    options: MatrixOptimizerOptions | None = getattr(optimizer, "asked_options", None)
    if options is not None:
        return options
    name = accepted_names.get(args.optim)
    return None if name is None else parse_options(name, split_optim_args(args.optim_args))
