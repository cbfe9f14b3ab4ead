"""What ``python -m hf_matrix_optim explain`` prints: the partition of a model, its optimizer state and its step."""

import os
from typing import Any

import torch
from torch import nn

from hf_matrix_optim import int8_momentum
from hf_matrix_optim.int8_momentum import INT8
from hf_matrix_optim.options import (
    AdaMuonOptions,
    MatrixOptimizerOptions,
    MuonOptions,
    parse_options,
    split_optim_args,
)
from hf_matrix_optim.partition import explain, route_parameters
from hf_matrix_optim.registry import OPTIMIZER_CLASSES, partition_options_of

# In this order: a T5 is also a language model, a BERT can also be a decoder.
AUTO_CLASSES = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForAudioClassification",
    "AutoModel",
)


class ModelSourceError(Exception):
    """No model can be made of what the user named; the message says why and what else to name."""


def model_report(source: str, optimizer_name: str | None = None, optim_args: str | None = None) -> str:
    """Describe how the parameters of a model are routed, without loading or allocating a weight.

    Args:
        source: a config.json, a folder with one, a model type of transformers ("gpt2"), or a name on the Hub.
        optimizer_name: one of ``OPTIMIZER_NAMES``; adds its state's memory and its step.
        optim_args: as for ``--optim_args``.

    Returns:
        Markdown.

    Raises:
        ModelSourceError: if no model can be made of ``source``.
        ValueError: for an unknown optimizer or a bad optim_args.
    """
    options = parse_options(optimizer_name or "muon", split_optim_args(optim_args))
    config = _config(source)
    model = _meta_model(source, config)
    lines = [f"{type(model).__name__} ({source})", "", explain(model, partition_options_of(options))]
    if optimizer_name is not None:
        lines += ["", *_state_lines(optimizer_name, model, options), "", *_step_lines(optimizer_name, options)]
    return "\n".join(lines)


def _config(source: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    is_local = os.path.exists(source)
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise ModelSourceError(f"the folder {source} has no config.json")
    if not is_local and source in CONFIG_MAPPING:
        return AutoConfig.for_model(source)
    if not is_local and (source.endswith(".json") or source.startswith(("/", "./", "../", "~"))):
        raise ModelSourceError(f"there is no file or folder {source}")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_local:
            raise ModelSourceError(f"{source} is not a model configuration of transformers: {reason}") from error
        raise ModelSourceError(
            f"{source!r} is no local file or folder, no model type of transformers (such as gpt2, qwen2, bert), and "
            f"cannot be read from the Hugging Face Hub: {reason}"
        ) from error


def _meta_model(source: str, config: Any) -> nn.Module:
    import transformers

    for architecture in getattr(config, "architectures", None) or []:
        model_class = getattr(transformers, architecture, None)
        if model_class is not None:
            return _build(source, model_class._from_config, config)
    for auto_class in (getattr(transformers, name) for name in AUTO_CLASSES):
        if type(config) in auto_class._model_mapping:
            return _build(source, auto_class.from_config, config)
    raise ModelSourceError(
        f"transformers has no model class for the configuration {type(config).__name__} of {source}"
    )


def _build(source: str, build: Any, config: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = build(config)
    except Exception as error:  # a default configuration may lack a size, a model an extra package
        raise ModelSourceError(
            f"no model can be built from the configuration of {source} ({type(error).__name__}: {error}). Give a "
            "complete config.json or a name on the Hub"
        ) from error
    return model


def _state_lines(name: str, model: nn.Module, options: MatrixOptimizerOptions) -> list[str]:
    """Bytes of optimizer state, as ``MatrixOptimizer`` allocates it."""
    parameters = dict(model.named_parameters())
    elements = {"matrix": 0, "adamw": 0}
    state_bytes = {"matrix": 0.0, "adamw": 0.0}
    adamw_alone = 0
    has_second_moment = OPTIMIZER_CLASSES[name].has_second_moment
    for route in route_parameters(model, partition_options_of(options)):
        if route.role == "frozen":
            continue
        element_size = parameters[route.name].element_size()
        second_moment_size = torch.promote_types(parameters[route.name].dtype, torch.float32).itemsize
        momentum_size: float = second_moment_size
        if options.momentum_dtype == "bfloat16":
            momentum_size = torch.bfloat16.itemsize
        elif options.momentum_dtype == INT8 and int8_momentum.takes(parameters[route.name]):
            momentum_size = 1 + torch.float32.itemsize / int8_momentum.BLOCK
        elements[route.role] += route.numel
        state_bytes[route.role] += route.numel * (
            momentum_size + has_second_moment * second_moment_size if route.role == "matrix" else 2 * element_size
        )
        adamw_alone += route.numel * 2 * element_size
    kept = {
        "matrix": "momentum_buffer and exp_avg_sq" if has_second_moment else "momentum_buffer",
        "adamw": "exp_avg and exp_avg_sq",
    }
    lines = ["| state | bytes per element | elements | MiB | tensors |", "|---|---:|---:|---:|---|"]
    for role, title in (("matrix", name), ("adamw", "AdamW")):
        per_element = state_bytes[role] / elements[role] if elements[role] else 0
        lines.append(
            f"| {title} | {per_element:g} | {elements[role]:,} | {state_bytes[role] / 2**20:,.1f} | {kept[role]} |"
        )
    total = sum(state_bytes.values())
    lines += ["", f"Together {total / 2**20:,.1f} MiB; AdamW alone would keep {adamw_alone / 2**20:,.1f} MiB."]
    return lines


def _step_lines(name: str, options: MatrixOptimizerOptions) -> list[str]:
    """The update of a matrix with these options, as the optimizers' docstrings write it."""
    values: dict[str, Any] = vars(options)
    beta, rms = values["momentum"], values["update_rms"]
    is_v1 = name == "adamuon_v1"
    weight = f"{1 - beta:g} " if is_v1 else ""
    lookahead = f"{weight}G + {beta:g} M" if values["nesterov"] else "M"
    update_scale = {
        "match_rms_adamw": f"{rms:g} sqrt(max(fan_out, fan_in))",
        "jordan": "sqrt(max(1, fan_out / fan_in))",
    }
    lines = [f"    M = {beta:g} M + {weight}G"]
    if isinstance(options, (MuonOptions, AdaMuonOptions)):
        argument = lookahead if is_v1 or isinstance(options, MuonOptions) else f"sign({lookahead})"
        lines.append(f"    O = newton_schulz({argument}), {options.ns_steps} steps, {options.ns_coefficients}")
    else:
        lines.append(f"    O = decorrelate({lookahead}), passes={values['passes']}")
    if isinstance(options, AdaMuonOptions):
        beta2 = values.get("beta2", beta)
        corrected = f"V / (1 - {beta2:g}^t)" if is_v1 else "V"
        lines.append(f"    V = {beta2:g} V + {1 - beta2:g} O * O;  D = O / (sqrt({corrected}) + {options.eps:g})")
        lines.append(f"    W = W - lr ({rms:g} D / RMS(D) + weight_decay W)")
    else:
        lines.append(f"    W = W - lr ({update_scale[values['update_scale']]} O + weight_decay W)")
    rate = "" if options.matrix_lr is None else f" with lr = {options.matrix_lr:g}"
    return [
        f"Step of {name} on a matrix W of (fan_out, fan_in) with gradient G{rate}; the rest goes through AdamW:",
        "",
        *lines,
    ]
