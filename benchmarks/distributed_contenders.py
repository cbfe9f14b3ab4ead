"""What ``distributed_step.py`` times: optimizers over matrices that DDP holds or FSDP2 cuts, and one process's result.

Every rank makes the same weights and gradients from the same seeds, each matrix from its own, so that any of them can
be made again when it is needed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from communication import RULES, SCHEMES
from contenders import OPTIMIZERS, Contender, Groups, ours
from optimizer_step import random_gradient, random_weight
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_matrix_optim import MUD, AdaMuon, Muon
from hf_matrix_optim.sharding import exchange
from hf_matrix_optim.sharding.shard_layout import is_sharded, local_of

CLASSES = {"muon": Muon, "adamuon": AdaMuon, "mud": MUD}
#: Steps after which the result is compared with that of one process.
CHECKED_STEPS = 2
#: Largest relative error of an update, (rule, whether products may be in half precision). One rank's products have
#: other sizes than another's, so their sums are rounded differently; and where AdaMuon's direction is near 0, dividing
#: it by its own root mean square makes a whole step of a rounding error, to the power of 1/2.
TOLERANCES = {
    ("adamw", False): 1e-5, ("adamw", True): 1e-5,
    ("muon", False): 1e-5, ("muon", True): 5e-2,
    ("adamuon", False): 1e-5, ("adamuon", True): 2.5e-1,
    ("mud", False): 1e-5, ("mud", True): 5e-2,
}  # fmt: skip


@dataclass(frozen=True)
class DistributedContender:
    """An optimizer on an engine.

    Attributes:
        engine: "ddp" or "fsdp2".
        scheme: a key of ``communication.SCHEMES``, "torch_muon", or "adamw".
        rule: "adamw", "muon", "adamuon" or "mud".
        build: on the engine's parameters.
        alone: the same in one process.
        is_exact: whether on CPUs its result is that of one process up to float32's rounding.
    """

    engine: str
    scheme: str
    rule: str
    build: Contender
    alone: Contender
    is_exact: bool = True

    @property
    def is_shared(self) -> bool:
        """Whether ranks do different things, so that they also fail at different points."""
        return self.scheme in SCHEMES and SCHEMES[self.scheme].is_shared

    @property
    def label(self) -> str:
        if self.scheme in SCHEMES:
            return SCHEMES[self.scheme].label
        name = "AdamW, fused" if self.scheme == "adamw" else "torch.optim.Muon"
        return f"{'DDP' if self.engine == 'ddp' else 'FSDP2'}, {name}"

    def tolerance(self, device: torch.device) -> float:
        return TOLERANCES[self.rule, device.type == "cuda" or not self.is_exact]


SCHEME_NAMES = ("ddp_redundant", "ddp_share", "fsdp2_full_tensor", "torch_muon", "fsdp2_all_to_all")


def contenders_of(schemes: list[str], rules: list[str], **options: Any) -> list[DistributedContender]:
    """Fused AdamW first on each engine, which the others are compared with.

    Args:
        schemes: of ``SCHEME_NAMES``.
        rules: of ``communication.RULES``.
        options: keywords of this package's optimizers.
    """
    found = []
    for engine in ("ddp", "fsdp2"):
        here = [s for s in SCHEME_NAMES if s in schemes and ("ddp" if s.startswith("ddp") else "fsdp2") == engine]
        if here:
            found.append(DistributedContender(engine, "adamw", "adamw", *2 * (OPTIMIZERS["adamw"],)))
        for rule in (rule for rule in RULES if rule in rules):
            alone = ours(CLASSES[rule], rule, distribute="off", **options)
            for scheme in here:
                if scheme != "torch_muon":
                    is_shared = SCHEMES[scheme].is_shared
                    shared = ours(CLASSES[rule], rule, distribute="auto", **options)
                    found.append(DistributedContender(engine, scheme, rule, shared if is_shared else alone, alone))
                elif rule == "muon":
                    torch_muon = OPTIMIZERS["torch_muon"]
                    found.append(DistributedContender(engine, scheme, rule, torch_muon, torch_muon, is_exact=False))
    return found


# ---- parameters ----


@dataclass(frozen=True)
class SeededMatrices:
    """Weights and gradients of a model's matrices, by position."""

    shapes: list[torch.Size]
    device: torch.device

    def weight(self, index: int) -> Tensor:
        return random_weight(self.shapes[index], self._generator(2 * index))

    def gradient(self, index: int) -> Tensor:
        return random_gradient(self.shapes[index], self._generator(2 * index + 1))

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


class Held(Protocol):
    """Parameters with gradients, as an engine holds them."""

    params: list[nn.Parameter]

    def reset(self) -> None:
        """Make the weights what they were at the start."""


class HeldByDdp:
    """Plain parameters of a DistributedDataParallel module, with gradients that it has averaged."""

    def __init__(self, matrices: SeededMatrices) -> None:
        self.matrices = matrices
        self.params = [nn.Parameter(matrices.weight(i)) for i in range(len(matrices.shapes))]
        # Gradients in its buckets, or they would take memory twice.
        self.module = DistributedDataParallel(_Holder(self.params, matrices), gradient_as_bucket_view=True)
        self.module().backward()

    @torch.no_grad()
    def reset(self) -> None:
        for i, p in enumerate(self.params):
            p.copy_(self.matrices.weight(i))


class CutByFsdp2:
    """DTensors cut along their first axis over all ranks, as ``fully_shard`` leaves them, with gradients cut alike."""

    def __init__(self, matrices: SeededMatrices) -> None:
        self.matrices = matrices
        self.mesh = init_device_mesh(matrices.device.type, (dist.get_world_size(),))
        self.params = [nn.Parameter(self._cut(matrices.weight(i))) for i in range(len(matrices.shapes))]
        for i, p in enumerate(self.params):
            p.grad = self._cut(matrices.gradient(i))

    @torch.no_grad()
    def reset(self) -> None:
        for i, p in enumerate(self.params):
            local_of(p).copy_(local_of(self._cut(self.matrices.weight(i))))

    def _cut(self, whole: Tensor) -> Tensor:
        return distribute_tensor(whole, self.mesh, [Shard(0)], src_data_rank=None)  # every rank has it: no message


ENGINES: dict[str, Callable[[SeededMatrices], Held]] = {"ddp": HeldByDdp, "fsdp2": CutByFsdp2}


class _Holder(nn.Module):
    def __init__(self, params: list[nn.Parameter], matrices: SeededMatrices) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)
        self.matrices = matrices

    def forward(self) -> Tensor:
        return torch.stack([_WithGradient.apply(p, i, self.matrices) for i, p in enumerate(self.weights)]).sum()


class _WithGradient(torch.autograd.Function):
    """0 whose gradient is that of ``SeededMatrices``."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, index: int, matrices: SeededMatrices) -> Tensor:
        ctx.index, ctx.matrices = index, matrices
        return p.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.matrices.gradient(ctx.index), None, None


def with_params(groups: Groups, params: list[Any]) -> Groups:
    """Groups with other parameters in the order of theirs."""
    given = iter(params)
    return [{**group, "params": [next(given) for _ in group["params"]]} for group in groups]


# ---- what one process makes of the same ----


@torch.no_grad()
def largest_error(contender: DistributedContender, held: Held, groups: Groups, matrices: SeededMatrices) -> float:
    """Of the updates of ``CHECKED_STEPS``, relative to those of one process, by Frobenius norms of each matrix.

    Each rank looks at its share of the matrices; a collective if they are DTensors. The gradients are those that the
    ranks hold: a mean over three ranks is another number in its last bit, which bfloat16 maps turn into 3e-3.
    Infinite where an update is not finite.
    """
    single = [{**group, "params": [p]} for group in groups for p in group["params"]]
    worst = 0.0
    for i, group in enumerate(single):
        found, grad = _whole(held.params[i].detach()), _whole(held.params[i].grad)
        if i % dist.get_world_size() != dist.get_rank():
            continue
        start, p = matrices.weight(i), nn.Parameter(matrices.weight(i))
        p.grad = grad
        optimizer = contender.alone([{**group, "params": [p]}])
        for _ in range(CHECKED_STEPS):
            optimizer.step()
        error = float(_norm(found - p.detach()) / _norm(p.detach() - start))
        worst = max(worst, error if error < float("inf") else float("inf"))
    return worst


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def held_state_bytes(optimizer: Any, params: list[Any]) -> int:
    """Bytes of state on this rank."""
    tensors = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    return sum(local_of(tensor).numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Message:
    """A collective, and the bytes that this rank sends to others and gets from them."""

    collective: str
    sent: int
    received: int


@contextmanager
def recorded_messages() -> Iterator[list[Message]]:
    """What this package's exchange sends meanwhile."""
    messages: list[Message] = []
    all_to_all, all_gather = dist.all_to_all_single, exchange.all_gather

    def recorded_all_to_all(
        output: Tensor, payload: Tensor, incoming: list[int], outgoing: list[int], group: Any, **keys: Any
    ) -> Any:
        size, rank = payload.element_size(), dist.get_group_rank(group, dist.get_rank())
        sent, received = (size * (sum(split) - split[rank]) for split in (outgoing, incoming))
        messages.append(Message("all_to_all_single", sent, received))
        return all_to_all(output, payload, incoming, outgoing, group, **keys)

    def recorded_all_gather(output: Tensor, payload: Tensor, *arguments: Any, **keys: Any) -> Any:
        others = payload.element_size() * (output.numel() - payload.numel())
        messages.append(Message("all_gather", others, others))
        return all_gather(output, payload, *arguments, **keys)

    dist.all_to_all_single, exchange.all_gather = recorded_all_to_all, recorded_all_gather
    try:
        yield messages
    finally:
        dist.all_to_all_single, exchange.all_gather = all_to_all, all_gather
