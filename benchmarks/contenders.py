"""The optimizers that ``optimizer_step.py`` can time: this package's, torch's and those of other libraries.

Libraries that are not installed are not imported; ``Contender.why_not`` says what is missing.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim import MUD, AdaMuon, Muon

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """An optimizer that can be asked for by name.

    Attributes:
        rule: "adamw", "muon", "adamuon" or "mud": what it computes, which decides what its step is counted as.
        build: from param groups with a ``role`` to the optimizer.
        label: what the table calls it; "" is its name.
        splits: whether a fused query, key and value are matrices of their own to it.
        passes: of MUD's map.
        package: what must be installed for it; "" if nothing beyond what this program imports.
        needs: (class, keyword) that it gives to an optimizer of this package.
        needs_cuda: whether it is for CUDA GPUs alone.
    """

    rule: str
    build: Callable[[Groups], torch.optim.Optimizer]
    label: str = ""
    splits: bool = False
    passes: int = 1
    package: str = ""
    needs: tuple[tuple[type, str], ...] = ()
    needs_cuda: bool = False

    def __call__(self, groups: Groups) -> torch.optim.Optimizer:
        return self.build(groups)

    def why_not(self, device: torch.device) -> str:
        """Why it cannot run here; "" if it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed: install it or leave this optimizer out"
        for optimizer_class, keyword in self.needs:
            if keyword not in inspect.signature(optimizer_class).parameters:
                return f"{optimizer_class.__name__} of this hf_matrix_optim has no {keyword!r}"
        if self.needs_cuda and device.type != "cuda":
            return f"it is for CUDA GPUs, and the device is {device}"
        return ""


class Together:
    """Two optimizers for the two roles of parameters, for libraries that leave AdamW to another optimizer."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def ours(optimizer_class: Any, rule: str, *, passes: int = 1, **options: Any) -> Contender:
    """A contender of this package; ``passes`` and ``options`` are keywords of the class."""
    keywords = {**options, **({"passes": passes} if passes != 1 else {})}
    return Contender(
        rule,
        lambda groups: optimizer_class(groups, lr=1e-3, **keywords),
        splits=True,
        passes=passes,
        needs=tuple((optimizer_class, keyword) for keyword in keywords),
        needs_cuda="cuda_graph" in options,
    )


def _adamw(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(all_of(groups), lr=1e-3, fused=True)


def _torch_muon(groups: Groups) -> Any:
    muon = torch.optim.Muon(matrices_of(groups), lr=1e-3, adjust_lr_fn="match_rms_adamw")
    others = [group for group in groups if group["role"] == "adamw"]
    return Together(muon, _adamw(others)) if others else muon


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[Groups], torch.optim.Optimizer]:
    def build(groups: Groups) -> torch.optim.Optimizer:
        import pytorch_optimizer

        flagged = [{"params": group["params"], "use_muon": group["role"] == "matrix"} for group in groups]
        optimizer: torch.optim.Optimizer = getattr(pytorch_optimizer, name)(
            flagged, lr=1e-3, weight_decay=0.1, adamw_wd=0.1, use_adjusted_lr=True, foreach=True, **options
        )
        return optimizer

    return build


def _dion_muon(groups: Groups) -> torch.optim.Optimizer:
    from dion import Muon as DionMuon

    named = [
        {"params": group["params"], "algorithm": "muon" if group["role"] == "matrix" else "adamw"} for group in groups
    ]
    on_gpu = groups[0]["params"][0].is_cuda
    optimizer: torch.optim.Optimizer = DionMuon(
        named, lr=1e-3, weight_decay=0.1, nesterov=True, adjust_lr="rms_norm", use_triton=on_gpu
    )
    return optimizer


OPTIMIZERS: dict[str, Contender] = {
    "adamw": Contender("adamw", _adamw, "torch.optim.AdamW(fused=True)"),
    "torch_muon": Contender("muon", _torch_muon, "torch.optim.Muon"),
    "muon": ours(Muon, "muon"),
    "muon_torch": ours(Muon, "muon", kernels="torch"),
    "muon_graph": ours(Muon, "muon", cuda_graph=True),
    "adamuon": ours(AdaMuon, "adamuon"),
    "adamuon_torch": ours(AdaMuon, "adamuon", kernels="torch"),
    "adamuon_graph": ours(AdaMuon, "adamuon", cuda_graph=True),
    "adamuon_v1": ours(AdaMuon, "adamuon", variant="v1"),
    "mud": ours(MUD, "mud"),
    "mud_torch": ours(MUD, "mud", kernels="torch"),
    "mud_graph": ours(MUD, "mud", cuda_graph=True),
    "mud_2_passes": ours(MUD, "mud", passes=2),
    "pytorch_optimizer_muon": Contender("muon", _pytorch_optimizer("Muon"), package="pytorch_optimizer"),
    "pytorch_optimizer_muon_gram": Contender(
        "muon", _pytorch_optimizer("Muon", ns_method="gram_newton_schulz"), package="pytorch_optimizer"
    ),
    "pytorch_optimizer_adamuon": Contender("adamuon", _pytorch_optimizer("AdaMuon"), package="pytorch_optimizer"),
    "dion_muon": Contender("muon", _dion_muon, package="dion"),
}


def all_of(groups: Groups) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def matrices_of(groups: Groups) -> list[Tensor]:
    return [p for group in groups if group["role"] == "matrix" for p in group["params"]]


def fresh(groups: Groups) -> Groups:
    """The groups without what an optimizer has added to them."""
    kept = ("params", "param_names", "role", "output_axis", "flatten", "split_sizes", "interleaved", "weight_decay")
    return [{key: group[key] for key in kept if key in group} for group in groups]
