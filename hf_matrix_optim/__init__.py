"""Matrix optimizers (Muon, AdaMuon, MUD) behind Hugging Face Trainer's ``--optim`` flag.

``import hf_matrix_optim`` is enough for ``TrainingArguments(optim="adamuon")``, before or after transformers is
imported. It loads neither torch nor transformers: the names below are imported when they are first used.
"""

from hf_matrix_optim import import_hook

# Neither typing nor importlib here: a script that only asks for the names should not wait for this import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hf_matrix_optim.adamuon import AdaMuon
    from hf_matrix_optim.deepspeed_configuration import deepspeed_config
    from hf_matrix_optim.mud import MUD
    from hf_matrix_optim.muon import Muon
    from hf_matrix_optim.optimizer_diagnostics import OptimizerDiagnostics
    from hf_matrix_optim.partition import PartitionOptions, explain, param_groups_for
    from hf_matrix_optim.qk_clip import QKClip
    from hf_matrix_optim.registry import create_optimizer
    from hf_matrix_optim.trainer import MatrixTrainer

__version__ = "0.1.0"

_HOMES = {
    "AdaMuon": "adamuon",
    "MUD": "mud",
    "Muon": "muon",
    "MatrixTrainer": "trainer",
    "OptimizerDiagnostics": "optimizer_diagnostics",
    "PartitionOptions": "partition",
    "QKClip": "qk_clip",
    "create_optimizer": "registry",
    "deepspeed_config": "deepspeed_configuration",
    "explain": "partition",
    "param_groups_for": "partition",
}

__all__ = [
    "MUD",
    "AdaMuon",
    "MatrixTrainer",
    "Muon",
    "OptimizerDiagnostics",
    "PartitionOptions",
    "QKClip",
    "create_optimizer",
    "deepspeed_config",
    "explain",
    "param_groups_for",
]


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_hook.install()
