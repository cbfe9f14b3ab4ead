"""The configuration of DeepSpeed's own Muon, for runs under ZeRO, where the optimizers of this package are refused."""

import math
import re
from importlib import metadata
from numbers import Real
from typing import Any, Literal, TypeAlias

from hf_matrix_optim.options import checked_name

OLDEST_DEEPSPEED = (0, 19, 8)

Auto: TypeAlias = Literal["auto"]


def deepspeed_config(
    name: str,
    *,
    lr: float | Auto,
    weight_decay: float | Auto = 0.1,
    betas: tuple[float, float] | Auto = (0.9, 0.999),
    eps: float | Auto = 1e-8,
    momentum: float = 0.95,
    matrix_lr: float | None = None,
    zero_stage: int | None = None,
) -> dict[str, Any]:
    """Return the part of a DeepSpeed configuration that chooses DeepSpeed's own Muon; ``--optim`` keeps its default.

    ::

        configuration.update(deepspeed_config("muon", lr="auto", weight_decay="auto", betas="auto", eps="auto"))
        TrainingArguments(deepspeed=configuration, max_grad_norm=0, learning_rate=6e-4, ...)

    It is not the Muon of this package:

    - An update of a matrix (rows, columns), as it is stored, is sqrt(max(1, rows / columns)) times the orthogonalized
      Nesterov lookahead, by five Newton-Schulz steps. Its root mean square is about 1 / sqrt(columns), not 0.2: one
      of AdamW's size asks for ``matrix_lr = 0.2 * sqrt(columns) * lr``, one number for all the widths of a model.
    - A matrix is every parameter with two axes or more whose name contains neither "embed" nor "lm_head": GPT-2's
      ``wte`` and ``wpe``, task heads and routers too. Fused projections are one matrix.
    - Under Trainer, weight decay is of all parameters, norms and biases included.

    Args:
        name: "muon", the only one of ``OPTIMIZER_NAMES`` that DeepSpeed has.
        lr: learning rate, at least 0. For this and the next three, "auto" is Trainer's argument of that meaning; a
            number must be equal to it.
        weight_decay: decoupled decay per unit of learning rate, at least 0.
        betas: of AdamW, each in [0, 1).
        eps: of AdamW, at least 0.
        momentum: beta of the matrices, in [0, 1).
        matrix_lr: learning rate of the matrices, at least 0; None is ``lr``. A ``scheduler`` block with one
            ``warmup_max_lr`` overrides it; Trainer's schedulers do not.
        zero_stage: 1, 2 or 3; None leaves ``zero_optimization`` to the rest of the configuration, which then needs
            ``reduce_scatter: false`` for stage 3.

    Returns:
        Plain values, for JSON: ``optimizer``; ``gradient_clipping`` 0, because DeepSpeed, at 1 by default, clips the
        norm of the orthogonalized updates and so shrinks them all; ``zero_optimization`` if there is a ``zero_stage``.

    Raises:
        ValueError: for another optimizer, or a value out of range, naming it.
        ImportError: if the DeepSpeed that is installed is older than 0.19.8.

    Source: DeepSpeed 0.19.8, ``runtime/engine.py`` and ``runtime/zero/muon``.
    """
    if checked_name(name) != "muon":
        raise ValueError(
            f"DeepSpeed has no {name!r}, only a Muon: train with optim={name!r} under FSDP2 (fsdp_version 2) or plain "
            "DDP, or take deepspeed_config('muon', ...)"
        )
    _check_version()
    parameters: dict[str, Any] = {
        "lr": lr if lr == "auto" else _number("lr", lr),
        "weight_decay": weight_decay if weight_decay == "auto" else _number("weight_decay", weight_decay),
        "betas": betas if betas == "auto" else _betas(betas),
        "eps": eps if eps == "auto" else _number("eps", eps),
        "momentum": _number("momentum", momentum, below=1),
    }
    if matrix_lr is not None:
        parameters["muon_lr"] = _number("matrix_lr", matrix_lr)
    configuration: dict[str, Any] = {
        "optimizer": {"type": "Muon", "params": parameters},
        "gradient_clipping": 0.0,
    }
    if zero_stage is not None:
        if zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage={zero_stage!r} is not allowed: it must be 1, 2, 3 or None")
        configuration["zero_optimization"] = {"stage": zero_stage}
        if zero_stage == 3:  # DeepSpeed refuses Muon otherwise
            configuration["zero_optimization"]["reduce_scatter"] = False
    return configuration


def _check_version() -> None:
    """Raise ImportError for an old DeepSpeed; one that is not installed here may be so where the run is."""
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return
    if tuple(int(number) for number in re.findall(r"\d+", found)[:3]) < OLDEST_DEEPSPEED:
        needed = ".".join(map(str, OLDEST_DEEPSPEED))
        raise ImportError(
            f"the Muon of DeepSpeed {found} does not do what this configuration says: version {needed} or later is "
            f"needed (pip install 'deepspeed>={needed}')"
        )


def _number(key: str, value: Any, *, below: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < below:
        allowed = "at least 0 and finite" if below == math.inf else f"at least 0 and below {below}"
        raise ValueError(f"{key}={value!r} is not allowed: it must be a number, {allowed}")
    return float(value)


def _betas(betas: Any) -> list[float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} is not allowed: it must be two numbers, each at least 0 and below 1")
    return [_number("betas", beta, below=1) for beta in betas]
