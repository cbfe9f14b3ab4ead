"""Which engine makes flat pieces of parameters, of which no matrix can be made, and what to do instead."""

import os
from typing import Any

from torch import nn

FSDP1_REMEDY = "use FSDP2 (fsdp_version 2) or plain DDP"
DEEPSPEED_REMEDY = f"{FSDP1_REMEDY}, or DeepSpeed's own Muon (its block: hf_matrix_optim.deepspeed_config)"


def uses_deepspeed(args: Any = None) -> bool:
    """Whether ``TrainingArguments`` ask for DeepSpeed, or accelerate runs this process under it."""
    if getattr(args, "deepspeed_plugin", None) is not None or getattr(args, "deepspeed", None):
        return True
    # Set by accelerate launch, and by Accelerator(deepspeed_plugin=...).
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def refuse_flattened(who: str, model: nn.Module, args: Any = None) -> None:
    """Raise where the parameters of ``model`` are in flat pieces, or will be once the optimizer is made.

    Args:
        who: subject of the message, as ``"optim='muon'"``.
        args: ``transformers.TrainingArguments``; None without Trainer.

    Raises:
        NotImplementedError: under DeepSpeed ZeRO and FSDP1, with the remedy.
    """
    classes = {base.__name__ for kind in {type(module) for module in model.modules()} for base in kind.__mro__}
    # A parameter of ZeRO-3 has a ds_id, and the shape (0,) while it is not in use.
    if uses_deepspeed(args) or "DeepSpeedEngine" in classes or any(hasattr(p, "ds_id") for p in model.parameters()):
        engine, remedy = "DeepSpeed ZeRO", DEEPSPEED_REMEDY
    elif "FullyShardedDataParallel" in classes or any(hasattr(p, "_fsdp_flattened") for p in model.parameters()):
        engine, remedy = "FSDP1", FSDP1_REMEDY
    else:
        return
    raise NotImplementedError(
        f"{who} does not run under {engine}, which flattens parameters and cuts through matrices: {remedy}"
    )
