"""What one step of a matrix optimizer does to the weights, measured beside it and without a change to it.

``before_step`` keeps copies of matrices, ``after_step`` compares them with what the step has made of them and leaves a
few numbers a matrix on the device, and ``values`` sums them up on the host, by ``diagnostics_summary``.
"""

import logging
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hf_matrix_optim.attention_logit_bounds import find_logit_bounds, largest_logits
from hf_matrix_optim.diagnostics_summary import MeasuredMatrix, Reading, summarize
from hf_matrix_optim.matrix_optimizer import CPU_STACK_BYTES, MatrixOptimizer
from hf_matrix_optim.plain_step import state_dtype
from hf_matrix_optim.sharding.full_tensor import over_shards, whole_of
from hf_matrix_optim.sharding.shard_layout import in_placements_of, is_sharded, local_of
from hf_matrix_optim.spectral_norm import frobenius_and_spectral_norm, orthogonality_error
from hf_matrix_optim.stored_matrices import StoredMatrix, WholeTensors, empty_stack, stored_matrices

# A child of transformers' own logger, so that --log_level and set_verbosity_info() reach it.
logger = logging.getLogger("transformers.hf_matrix_optim")

#: Most elements of each parameter of an AdamW group that are compared, in evenly spread rows.
ADAMW_ELEMENTS = 2**18
#: Parts of max_workspace_bytes. Copies kept over the step take at most the first, and the rest is for what is measured
#: at a time, stacked as far as it fits, for GPUs wait for launches otherwise: updates, of which there are up to three
#: copies, singular values, which need one, and then the query or key rows of attention, of which there are three.
SNAPSHOT_PART, UPDATE_PART, SPECTRAL_PART, ATTENTION_PART = 2, 8, 2, 4
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass
class _Stack:
    """Matrices of one shape, dtype and device, in the order of groups, and their weights before the step."""

    matrices: list[StoredMatrix]
    weights: Tensor  # (b, *stored)


class OptimizerDiagnostics:
    """Measures single steps of a matrix optimizer, in a training loop without Trainer too.

    ::

        diagnostics = OptimizerDiagnostics(model, optimizer)
        for step, batch in enumerate(batches):
            model(**batch).loss.backward()
            if step % 50 == 0:
                diagnostics.before_step()
            optimizer.step()
            if step % 50 == 0:
                diagnostics.after_step()          # gradients are still there
                print(diagnostics.values())
            optimizer.zero_grad()

    With W and W' the weights of a matrix before and after, lr and wd those of its group, and M the momentum after the
    step, and each of the first four a mean over the matrices::

        update U                   ((1 - lr wd) W - W') / lr, the update without decay
        update_rms                 root mean square of U
        relative_update            ||W' - W||_F / ||W||_F
        orthogonality_error        || k U U^T / ||U||_F^2 - I ||_F / sqrt(k), k the shorter side
        momentum_stable_rank       ||M||_F^2 / sigma(M)^2
        spectral_norm_max          the largest sigma(W')
        attention_logit_bound_max  the largest of ``LogitBound.of_heads``, with W'
        grad_norm_matrix           norm of all gradients of the matrix groups, as the step found them
        grad_norm_adamw            and of the AdamW groups
        relative_update_adamw      ||p' - p|| / ||p|| over all parameters p of the AdamW groups, of each at most
                                   2^18 elements in evenly spread rows
        skipped_matrices           how often a matrix was left alone because of a gradient that is not finite, so far
        optimizer_time_share       seconds of ``optimizer.step()`` over those since ``begin_step``, if that was called
        matrices                   how many matrices were measured

    W' - W is what was written: with bfloat16 weights the update after rounding to them, with ``qk_clip`` the heads
    that it has scaled too. sigma is
    ``frobenius_and_spectral_norm``'s. A matrix that did not change has U = 0 and counts in ``update_rms``; what is not
    defined is left out (relative updates of a zero matrix, errors of a zero update, rms with a learning rate of 0,
    matrices without a gradient).

    Copies take at most half the smallest ``max_workspace_bytes`` of the groups, and what is computed with them about
    the other half. Where not all matrices fit, those of an evenly spread sample are measured, always the same. A
    DTensor's matrices are gathered one parameter at a time, on every rank; all ranks must take part.

    Args:
        model: for the attention logits, whose modules are in ``attention_logit_bounds``.
        optimizer: of this package.
        per_layer: also one value for each matrix (expert stacks: for each stack) and attention module.

    Raises:
        TypeError: if the optimizer is not of this package.
    """

    def __init__(self, model: nn.Module, optimizer: MatrixOptimizer, *, per_layer: bool = False) -> None:
        if not isinstance(optimizer, MatrixOptimizer):
            raise TypeError(
                f"diagnostics need an optimizer of hf_matrix_optim, not {type(optimizer).__name__}: create it with "
                "create_optimizer, Muon, AdaMuon or MUD, and give it without a wrapper, whose .optimizer it often is"
            )
        self.optimizer = optimizer
        self.per_layer = per_layer
        self._model = model
        self._modules = _modules_of(model)
        self._attention, left_out = find_logit_bounds(model)
        for class_name, reason in left_out.items():
            logger.info("diagnostics: no bound of the attention logits for %s: %s", class_name, reason)
        self._before: list[_Stack] = []
        self._adamw_before: dict[int, list[Tensor]] = {}
        self._adamw_elements = 0
        self._budget = 0
        self._rates: list[Any] = []
        self._marks: dict[str, Any] = {}
        self._reading: Reading | None = None
        self._told_sample = False

    # ---- around the step ----

    def begin_step(self) -> None:
        """Mark the beginning of a step that will be measured, before its forward; for ``optimizer_time_share``."""
        self._marks = {"begin": self._mark()}

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep the weights, right before ``optimizer.step()``."""
        self._marks["backward"] = self._mark()
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]  # a scheduler will have changed them by ``values``
        self._rates = [
            rate.detach().clone() if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)
            for rate in rates
        ]
        self._budget = min(int(group["max_workspace_bytes"]) for group in groups)
        read = WholeTensors(groups)
        self._before = [
            _Stack(matrices, read.into(empty_stack(matrices, groups), matrices, "param"))
            for matrices in self._matrices_to_measure()
        ]
        adamw = {i: group for i, group in enumerate(groups) if group["role"] == "adamw"}
        count = max(1, sum(len(group["params"]) for group in adamw.values()))
        elements = min(ADAMW_ELEMENTS, self._budget // (16 * count))  # of up to 8 bytes: an eighth of the workspace
        self._adamw_before = {
            i: [_sampled_rows(_at(group["params"], members), elements) for members in _alike(group["params"])]
            for i, group in adamw.items()
        }
        self._adamw_elements = elements
        self._marks["start"] = self._mark()

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure, right after ``optimizer.step()`` and before the gradients are cleared; waits for no device.

        Raises:
            RuntimeError: if ``before_step`` was not called before the step.
        """
        if "start" not in self._marks:
            raise RuntimeError("after_step() measures nothing without before_step() right before optimizer.step()")
        self._marks["end"] = self._mark()
        groups = self.optimizer.param_groups
        matrices = [matrix for stack in self._before for matrix in stack.matrices]
        modules = _modules_of(self._model)
        if modules != self._modules:  # as when an adapter was added
            self._modules, self._attention = modules, find_logit_bounds(self._model)[0]
        reading = Reading(
            matrices=[
                MeasuredMatrix(
                    name=matrix.name(groups[matrix.group]),
                    group=matrix.group,
                    shape=matrix.stored,
                    has_gradient=_has_grad(groups[matrix.group]["params"][matrix.index]),
                )
                for matrix in matrices
            ],
            roles=[group["role"] for group in groups],
            rates=[None if isinstance(rate, Tensor) else rate for rate in self._rates],
            attention=[bound.projections.name for bound in self._attention],
            marks=self._marks,
        )
        self._marks = {}
        read = WholeTensors(groups, self.optimizer.state)
        measured = []
        while self._before:
            measured.append(self._measured(self._before.pop(0), read))
        if measured:
            first = measured[0].device
            reading.numbers["matrices"] = torch.cat([part.to(first) for part in measured], dim=1).flatten()
        for i, rate in enumerate(self._rates):
            if isinstance(rate, Tensor):
                reading.numbers[f"rate_{i}"] = rate.flatten()
        self._add_sums(reading, groups)
        if self._attention:
            stack_bytes = self._bytes(ATTENTION_PART, self._device())
            reading.numbers["attention"] = largest_logits(self._attention, whole_of, max_bytes=stack_bytes)
        self._reading = reading

    def values(self) -> dict[str, float]:
        """The values of the last step that was measured, by key; waits for the device, once.

        Raises:
            RuntimeError: if no step has been measured.
        """
        if self._reading is None:
            raise RuntimeError("no step has been measured: call before_step() and after_step() around one")
        return summarize(self._reading, per_layer=self.per_layer)

    # ---- what is measured ----

    def _matrices_to_measure(self) -> list[list[StoredMatrix]]:
        """The matrices to measure, those alike together, in the order of groups and parameters."""
        groups = self.optimizer.param_groups
        matrices = stored_matrices(groups)
        params = [groups[matrix.group]["params"][matrix.index] for matrix in matrices]
        chosen: list[int] = []
        filled = 0
        # Multiples of the golden ratio spread evenly, and hit no period of the layers.
        for position in sorted(range(len(matrices)), key=lambda i: i * GOLDEN_RATIO % 1.0):
            size = math.prod(matrices[position].stored) * params[position].element_size()
            if chosen and filled + size > self._budget // SNAPSHOT_PART:
                break
            chosen.append(position)
            filled += size
        if len(chosen) < len(matrices) and not self._told_sample:
            logger.info(
                "diagnostics measure %d of %d matrices: more would not fit into max_workspace_bytes=%d",
                len(chosen),
                len(matrices),
                self._budget,
            )
            self._told_sample = True
        alike: dict[tuple[Any, ...], list[StoredMatrix]] = defaultdict(list)
        for position in sorted(chosen):
            key = matrices[position].stored, params[position].dtype, params[position].device
            alike[key].append(matrices[position])
        return list(alike.values())

    def _bytes(self, part: int, device: torch.device) -> int:
        """Bytes of a stack that takes one part of so many of the workspace."""
        return min(self._budget // part, CPU_STACK_BYTES) if device.type == "cpu" else self._budget // part

    def _measured(self, stack: _Stack, read: WholeTensors) -> Tensor:
        """(MEASURED, b) numbers of the matrices of a stack, whose copies are let go."""
        weights = stack.weights
        matrix_bytes = math.prod(weights.shape[1:]) * state_dtype(weights).itemsize
        numbers = []
        # first the changes, which put the new weights into the place of the old ones
        for measure, copies, part in ((self._changes, 1, UPDATE_PART), (self._spectral_norms, 2, SPECTRAL_PART)):
            count = max(1, self._bytes(part, weights.device) // (copies * matrix_bytes))
            found = [
                measure(weights[start : start + count], stack.matrices[start : start + count], read)
                for start in range(0, len(weights), count)
            ]
            numbers.append(torch.cat(found, dim=1))
        return torch.cat(numbers)

    def _changes(self, weights: Tensor, matrices: list[StoredMatrix], read: WholeTensors) -> Tensor:
        """(4, b): norms of weights, changes and updates, and the updates' errors; ``weights`` become the new ones."""
        dtype = state_dtype(weights)
        after = read.into(torch.empty_like(weights), matrices, "param")
        weight_norm = torch.linalg.vector_norm(weights, dim=(-2, -1), dtype=dtype)
        update = weights.to(dtype, copy=True).sub_(after)
        change_norm = torch.linalg.vector_norm(update, dim=(-2, -1))
        start = 0
        for g, same in groupby(matrices, key=lambda matrix: matrix.group):
            rate = self._rates[g]
            divisor = rate.to(update.device) if isinstance(rate, Tensor) else rate or 1.0
            part = slice(start, start := start + len(list(same)))
            update[part].div_(divisor).sub_(weights[part], alpha=self.optimizer.param_groups[g]["weight_decay"])
        weights.copy_(after)
        del after
        update.masked_fill_((change_norm == 0)[:, None, None], 0)  # not stepped: not decayed either
        update_norm = torch.linalg.vector_norm(update, dim=(-2, -1))
        return torch.stack([weight_norm, change_norm, update_norm, orthogonality_error(update, owned=True)])

    def _spectral_norms(self, weights: Tensor, matrices: list[StoredMatrix], read: WholeTensors) -> Tensor:
        """(3, b): spectral norms of weights, and Frobenius and spectral norms of momenta."""
        both = weights.new_empty(2, *weights.shape, dtype=state_dtype(weights))
        both[0].copy_(weights)
        read.into(both[1], matrices, "momentum_buffer")
        frobenius, spectral = frobenius_and_spectral_norm(both.flatten(0, 1), owned=True)
        return torch.stack([spectral[: len(weights)], frobenius[len(weights) :], spectral[len(weights) :]])

    def _add_sums(self, reading: Reading, groups: list[dict[str, Any]]) -> None:
        """Squared norms of each group, and its skips; collectives where there are DTensors, alike on all ranks."""
        for g, group in enumerate(groups):
            alike = _alike(group["params"])
            sums = []
            for position, members in enumerate(alike):
                params = _at(group["params"], members)
                grads = [local_of(in_placements_of(p, p.grad)) for p in params if _has_grad(p)]
                like = local_of(params[0])
                local = [_sum_of_squares(grads, like)]
                # the AdamW groups' weights and changes, 0 of matrix groups
                if group["role"] == "adamw":
                    old = self._adamw_before[g][position]
                    change = _sampled_rows(params, self._adamw_elements).to(state_dtype(old)).sub_(old)
                    local += [torch.linalg.vector_norm(x, dtype=_sum_dtype(like)).square() for x in (old, change)]
                else:
                    local += [torch.zeros_like(local[0])] * 2
                sums.append(over_shards(torch.stack(local), params[0], "sum"))
            if not sums:  # a group without parameters
                sums.append(torch.zeros(3))
            reading.numbers[f"sums_{g}"] = torch.stack([part.to(sums[0].device) for part in sums]).sum(0)
            if group["role"] == "matrix":
                reading.numbers[f"skipped_{g}"] = self._skips(group, alike)
        self._adamw_before = {}

    def _skips(self, group: dict[str, Any], alike: list[list[int]]) -> Tensor:
        """How many matrices of a group have been skipped so far, (1,)."""
        counts = []
        for members in alike:
            params = _at(group["params"], members)
            skipped = [
                self.optimizer.state[p]["skipped"] for p in params if "skipped" in self.optimizer.state.get(p, {})
            ]
            if skipped:  # a rank without elements of a matrix does not count its skips
                counts.append(over_shards(torch.cat(skipped), params[0], "max").sum())
        if not counts:
            return torch.zeros(1)
        return torch.stack([count.to(counts[0].device) for count in counts]).sum(0, keepdim=True)

    def _mark(self) -> Any:
        """Now: an event in the queue of the GPU, or seconds."""
        device = self._device()
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            return event
        return time.perf_counter() if device.type == "cpu" else None

    def _device(self) -> torch.device:
        return next(local_of(p).device for group in self.optimizer.param_groups for p in group["params"])


def _modules_of(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """All modules and their classes, which FSDP2 and parametrizations exchange; equal as long as nothing is."""
    return [(module, type(module)) for module in model.modules()]


def _alike(params: list[Tensor]) -> list[list[int]]:
    """Positions of the parameters on each device, or of each mesh and placements."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        alike[(p.device_mesh, p.placements) if is_sharded(p) else p.device].append(i)  # type: ignore[attr-defined]
    return list(alike.values())


def _sampled_rows(params: list[Tensor], elements: int) -> Tensor:
    """A new flat tensor of every so many rows of each parameter, at least one, about ``elements`` elements of each."""
    sampled = []
    for tensor in map(local_of, params):
        if tensor.ndim > 0 and tensor.numel() > elements:
            rows = max(1, elements // (tensor.numel() // tensor.size(0)))
            tensor = tensor[:: -(-tensor.size(0) // rows)]
        sampled.append(tensor.reshape(-1))
    return torch.cat(sampled)


def _has_grad(p: Tensor) -> bool:
    return p.grad is not None


def _at(items: list[Any], positions: list[int]) -> list[Any]:
    return [items[i] for i in positions]


def _sum_dtype(like: Tensor) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Over all elements of all tensors; () in ``_sum_dtype``."""
    dtype = _sum_dtype(like)
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=dtype, device=like.device)
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    norms = [
        torch.stack(torch._foreach_norm(same, 2, dtype=torch.promote_types(found, torch.float32))).to(dtype)
        for found, same in by_dtype.items()
    ]
    return torch.cat(norms).square().sum()
