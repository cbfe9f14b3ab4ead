"""QK-Clip: query and key projections are scaled down after a step in which attention logits grew beyond a threshold.

Source: *Kimi K2: open agentic intelligence*, arXiv 2507.20534, section 2.1 (QK-Clip, "MuonClip"), alpha = 0.5.
Differs: with grouped queries the query rows take the whole factor, for a key head serves several query heads, and
scaling it would change the logits of those that are within the threshold. The paper's rule for latent attention is not
here.
"""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_matrix_optim import attention_logits
from hf_matrix_optim.attention_logits import REMEDY, LogitWatch, refuse_implementation
from hf_matrix_optim.attention_projections import (
    AttentionProjections,
    HeadRows,
    UnknownAttentionError,
    attention_modules,
    projections_of,
)
from hf_matrix_optim.flattening import refuse_flattened
from hf_matrix_optim.options import check_qk_clip
from hf_matrix_optim.sharding.largest import data_parallel_groups, largest_over, refuse_tensor_parallel, scale_rows
from hf_matrix_optim.tripwire import innermost_optimizer

# A child of transformers' own logger, so that --log_level and set_verbosity_info() reach it.
logger = logging.getLogger("transformers.hf_matrix_optim")


@dataclass(frozen=True)
class _Scaling:
    """A parameter-holding module, and for each row along fan_out which factor it takes.

    Attributes:
        owner: ``nn.Linear`` or ``Conv1D``.
        output_axis: of its weight.
        index: (fan_out,), positions in the concatenation of the module's query factors, key factors and a 1.
    """

    owner: nn.Module
    output_axis: int
    index: Tensor


class QKClip:
    """Keeps the attention logits of a model near a threshold, by scaling query and key projections after a step.

    ::

        S_h = max over batch, micro-batches, ranks and unmasked (i, j) of the logit q_i . k_j * scaling of head h
        g_h = threshold / S_h if S_h > threshold else 1
        W_q, b_q of head h *= sqrt(g_h);  W_k, b_k of head h *= sqrt(g_h)      (as many key heads as query heads)
        W_q, b_q of head h *= g_h                                             (grouped queries)

    S is of the forwards since the last step, so the logits of the next forward exceed the threshold by what the step
    itself added. The state of the optimizer is not scaled. A head without a finite logit since the last step is left
    alone, and so is every weight of a head within the threshold, bit for bit. Evaluation (``model.eval()``) is not
    looked at. Where a step is skipped, as by a GradScaler, nothing is clipped and S goes on to the next one.

    ::

        optimizer = Muon(param_groups_for(model), lr=1e-3)
        QKClip(model, threshold=100.0).attach(optimizer)
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        """Find the attention of a model; nothing is watched before ``attach``.

        Args:
            model: a transformers model, wrapped or not. Attention whose projections are all frozen is left out.
            threshold: of the logits before the softmax, above 0. A huge one (1e9) looks and never clips.

        Raises:
            ValueError: if the threshold is not above 0 and finite, or for attention that cannot be clipped, naming
                the module, the reason and the remedy.
            NotImplementedError: under DeepSpeed ZeRO, FSDP1, DataParallel and tensor parallelism.
        """
        check_qk_clip(threshold)
        refuse_flattened("qk_clip", model)
        self.threshold = float(threshold)
        self._sites = [_Site.of(found) for found in _clippable(model)]
        self._groups: list[Any] | None = None
        self._handle: Any = None
        self._let_go: weakref.finalize[..., Any] | None = None
        self._optimizer: Optimizer | None = None
        device = self._sites[0].watch.max_logits.device
        self._largest = torch.full((), -torch.inf, device=device)
        self._clips = torch.zeros((), dtype=torch.int64, device=device)

    def attach(self, optimizer: Optimizer) -> "QKClip":
        """Watch the model's attention from now on, and clip after each step of ``optimizer``; return self.

        The optimizer may be in accelerate's wrapper.

        Another QKClip that watches the same modules sees nothing from then on.

        Raises:
            RuntimeError: if it is attached already, or the optimizer has another one.
            TypeError: if the optimizer is not one of torch's.
        """
        if self._handle is not None:
            raise RuntimeError("this QKClip is attached already: detach() it first")
        optimizer = innermost_optimizer(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a QKClip is attached to a torch.optim.Optimizer, not to {type(optimizer).__name__}")
        if getattr(optimizer, "qk_clip", None) is not None:
            raise RuntimeError("this optimizer has a QKClip already: optimizer.qk_clip.detach() it first")
        self._handle = optimizer.register_step_post_hook(lambda *_: self.clip())
        attention_logits.watch([site.watch for site in self._sites])
        # Where nobody detaches it, as after an exception, it goes with model and optimizer.
        self._let_go = weakref.finalize(self, attention_logits.unwatch_attention)
        self._optimizer = optimizer
        vars(optimizer)["qk_clip"] = self
        return self

    def detach(self) -> None:
        """Undo ``attach``; does nothing if it is not attached."""
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        if self._let_go is not None:
            self._let_go.detach()
        attention_logits.unwatch([site.watch for site in self._sites])
        if self._optimizer is not None and getattr(self._optimizer, "qk_clip", None) is self:
            del vars(self._optimizer)["qk_clip"]
        self._optimizer = None

    @torch.no_grad()
    def clip(self) -> None:
        """Scale the projections of the heads beyond the threshold, and begin to look anew.

        The host does not wait for the device, but for a check after the first step.

        Raises:
            RuntimeError: if no attention logit was seen before the first step.
        """
        watches = [site.watch for site in self._sites]
        device = watches[0].max_logits.device
        if device != self._largest.device:  # the model was moved after this was made
            self._largest, self._clips = self._largest.to(device), self._clips.to(device)
        largest = torch.cat([watch.max_logits.to(device) for watch in watches])
        is_first = self._groups is None
        if self._groups is None:
            self._groups = data_parallel_groups([p for site in self._sites for p in site.parameters()])
        largest = largest_over(largest, self._groups)
        of_modules = torch.split(largest, [len(watch.max_logits) for watch in watches])
        if is_first:
            self._check_seen(of_modules)
        is_over = (largest > self.threshold) & largest.isfinite()
        factors = torch.where(is_over, self.threshold / largest, 1.0)
        self._largest = torch.maximum(self._largest, largest.max())
        self._clips += is_over.sum()
        for site, own in zip(self._sites, torch.split(factors, [len(own) for own in of_modules]), strict=True):
            site.scale(own)
            site.watch.max_logits.fill_(-torch.inf)

    def drain(self) -> dict[str, float]:
        """What has happened since the last call, brought to the host.

        Returns:
            "qk_clip/max_logit", the largest logit before clipping (absent if there was none), and
            "qk_clip/clipped_heads", how many times a head was clipped.
        """
        largest, clips = float(self._largest), int(self._clips)
        self._largest = torch.full_like(self._largest, -torch.inf)
        self._clips.zero_()
        report = {} if largest == float("-inf") else {"qk_clip/max_logit": largest}
        return {**report, "qk_clip/clipped_heads": clips}

    def _check_seen(self, largest: Sequence[Tensor]) -> None:
        """After the first step: raise if no module, warn if only some, had a finite logit.

        Args:
            largest: of each module, (heads,).
        """
        unseen = [site.projections for site, own in zip(self._sites, largest, strict=True) if not own.isfinite().any()]
        if len(unseen) == len(self._sites):
            raise RuntimeError(
                f"qk_clip has seen no finite attention logit in training, of {len(unseen)} modules "
                f"({type(unseen[0].module).__name__}): the model was in evaluation mode (call model.train()), there "
                "was no forward before the step, or its attention goes another way than transformers' interface: "
                f"{REMEDY}"
            )
        if unseen:
            logger.warning(
                "qk_clip saw no attention logits of %d of %d modules before the first step, the first of them %s; "
                "they are clipped from the step on in which they attend",
                len(unseen),
                len(self._sites),
                unseen[0].name,
            )


@dataclass
class _Site:
    """One attention module that is clipped."""

    projections: AttentionProjections
    watch: LogitWatch
    scalings: list[_Scaling] = field(default_factory=list)

    @classmethod
    def of(cls, projections: AttentionProjections) -> "_Site":
        weight: Tensor = projections.query.owner.weight  # type: ignore[assignment]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        watch = LogitWatch(
            projections, torch.full((projections.heads,), -torch.inf, dtype=dtype, device=weight.device)
        )
        one = projections.heads + projections.kv_heads
        indices: dict[int, tuple[HeadRows, Tensor]] = {}
        for part, offset in ((projections.query, 0), (projections.key, projections.heads)):
            fan_out = part.owner.weight.shape[part.output_axis]  # type: ignore[index]
            _, index = indices.setdefault(id(part.owner), (part, torch.full((int(fan_out),), one)))
            index[part.rows] = (offset + torch.arange(len(part.rows)))[:, None].expand_as(part.rows)
        scalings = [
            _Scaling(part.owner, part.output_axis, index.to(weight.device)) for part, index in indices.values()
        ]
        return cls(projections, watch, scalings)

    def parameters(self) -> list[Tensor]:
        """Weights and biases as they are now."""
        return [p for scaling in self.scalings for p in (scaling.owner.weight, scaling.owner.bias) if p is not None]  # type: ignore[misc]

    def scale(self, factors: Tensor) -> None:
        """Scale the rows of each query head, and its key head's share if it has one of its own; factors: (heads,)."""
        kv_heads = self.projections.kv_heads
        if kv_heads == self.projections.heads:
            parts = [factors.sqrt(), factors.sqrt()]
        else:
            parts = [factors, factors.new_ones(kv_heads)]
        table = torch.cat([*parts, factors.new_ones(1)])
        for scaling in self.scalings:
            weight, bias = scaling.owner.weight, scaling.owner.bias
            assert isinstance(weight, Tensor)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            rows = table.to(weight.device, dtype)[scaling.index.to(weight.device)]
            scale_rows(weight, rows, scaling.output_axis)
            if isinstance(bias, Tensor):
                scale_rows(bias, rows, 0)


# ---- what can be clipped ----


def _clippable(model: nn.Module) -> list[AttentionProjections]:
    """The projections of all trained attention of a model.

    Raises:
        ValueError, NotImplementedError: as ``QKClip``.
    """
    if isinstance(model, nn.DataParallel):
        raise NotImplementedError(
            "qk_clip does not run under DataParallel, whose copies of the model attend apart: start one process a GPU "
            f"with torchrun, or {REMEDY}"
        )
    found, frozen = [], []
    for name, module in attention_modules(model):
        if not any(p.requires_grad for p in module.parameters()):
            frozen.append(name)
            continue
        try:
            projections = projections_of(name, module)
        except UnknownAttentionError as error:
            raise ValueError(f"qk_clip cannot be used with this model: {error}. Remedy: {REMEDY}") from None
        reason = _why_not(projections)
        if reason:
            raise ValueError(
                f"qk_clip cannot be used with this model: in {name} ({type(module).__name__}) {reason}. "
                f"Remedy: {REMEDY}"
            )
        if _trained(projections) == {False}:
            frozen.append(name)
        else:
            found.append(projections)
    if not found:
        reason = f"the projections of all {len(frozen)} are frozen" if frozen else "there is none in it"
        raise ValueError(f"qk_clip has no attention to clip in {type(model).__name__}: {reason}. Remedy: {REMEDY}")
    if frozen:
        logger.info("qk_clip leaves out %d attention modules with frozen queries and keys", len(frozen))
    _refuse_shared(found)
    for module in model.modules():
        # Set by transformers where it cuts a model over ranks.
        if (getattr(module, "_tp_size", None) or 1) > 1:
            raise NotImplementedError(
                "qk_clip does not run under tensor parallelism, where ranks have different heads: use FSDP2 or DDP, "
                f"or {REMEDY}"
            )
    for projections in found:
        refuse_implementation(projections)
        refuse_tensor_parallel(projections.query.owner.weight, projections.query.name)  # type: ignore[arg-type]
    return found


def _why_not(projections: AttentionProjections) -> str:
    """Why the heads of a module cannot be scaled; "" if they can."""
    if projections.qk_norm is not None:
        return (
            f"queries or keys are normalised after their projection ({projections.qk_norm}), which undoes any scale "
            "of it, and the norm bounds the logits already"
        )
    if projections.logit_bound is not None:
        return (
            f"{projections.logit_bound}, so that logits are not in proportion to the projections, and bounded already"
        )
    for part in (projections.query, projections.key):
        owner = part.owner
        forward = next((c for c in type(owner).__mro__ if "forward" in vars(c)), type(owner))
        if hasattr(owner, "base_layer"):
            return (
                f"{part.name} has an adapter ({type(owner).__name__}): its weight is a sum of which a part is trained"
            )
        weight = getattr(owner, "weight", None)
        if forward is not nn.Linear and forward.__name__ != "Conv1D":
            return f"{part.name} is a {type(owner).__name__}, quantised or unknown, not a plain nn.Linear or Conv1D"
        if hasattr(owner, "parametrizations") or not isinstance(weight, nn.Parameter):
            return f"{part.name} has no weight of its own, but computes it"
        if not weight.is_floating_point() or weight.element_size() < 2:
            return f"{part.name} is quantised ({weight.dtype})"
    if len(_trained(projections)) > 1:
        return "some of the weights and biases of queries and keys are frozen and some are trained"
    return ""


def _trained(projections: AttentionProjections) -> set[bool]:
    owners = (projections.query.owner, projections.key.owner)
    return {p.requires_grad for owner in owners for p in owner.parameters(recurse=False)}


def _refuse_shared(found: list[AttentionProjections]) -> None:
    """Raise if two modules share a weight: a factor of one would change the logits of the other."""
    names: dict[int, str] = {}
    for projections in found:
        owners = {id(part.owner): part for part in (projections.query, projections.key)}
        for part in owners.values():
            first = names.setdefault(id(part.owner.weight), part.name)
            if first != part.name:
                raise ValueError(
                    f"qk_clip cannot be used with this model: {part.name} and {first} are one weight, and scaling "
                    f"one's heads would change the other's. Remedy: {REMEDY}"
                )
