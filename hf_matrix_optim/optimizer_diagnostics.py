"""What one step of a matrix optimizer does to the weights, measured beside it and without a change to it.

``before_step`` keeps copies of matrices, ``after_step`` compares them with what the step has made of them and leaves a
few numbers a matrix on the device, and ``values`` sums them up on the host, by ``diagnostics_summary``.
"""

import logging
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_matrix_optim.attention_logit_bounds import find_logit_bounds
from hf_matrix_optim.diagnostics_summary import MeasuredMatrix, Reading, summarize
from hf_matrix_optim.int8_momentum import in_float
from hf_matrix_optim.matrix_layout import MatrixLayout, split_parts, to_matrices
from hf_matrix_optim.matrix_optimizer import CPU_STACK_BYTES, MatrixOptimizer
from hf_matrix_optim.plain_step import state_dtype
from hf_matrix_optim.sharding.full_tensor import over_shards, whole_of
from hf_matrix_optim.sharding.shard_layout import in_placements_of, is_sharded, local_of
from hf_matrix_optim.spectral_norm import frobenius_and_spectral_norm, orthogonality_error

# A child of transformers' own logger, so that --log_level and set_verbosity_info() reach it.
logger = logging.getLogger("transformers.hf_matrix_optim")

#: Most elements of each parameter of an AdamW group that are compared, in evenly spread rows.
ADAMW_ELEMENTS = 2**18
#: Copies kept over the step take at most this part of max_workspace_bytes, a stack with its temporary copies the rest.
SNAPSHOT_PART, STACK_PART = 2, 16
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a parameter: its group, its parameter there, its part and its place in a stack of matrices."""

    group: int
    index: int
    part: int
    element: int
    shape: tuple[int, int]

    def view_in(self, tensor: Tensor, layout: MatrixLayout) -> Tensor:
        """The matrix in its whole parameter, or in a tensor of that shape; (fan_out, fan_in)."""
        return to_matrices(split_parts(tensor, layout)[self.part], layout)[self.element]


@dataclass
class _Stack:
    """Matrices of one group and shape, and their weights before the step, (b, fan_out, fan_in)."""

    matrices: list[_Matrix]
    before: Tensor | None = None


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

    Copies take at most half the smallest ``max_workspace_bytes`` of the groups. Where not all matrices fit, those of
    an evenly spread sample are measured, always the same. A DTensor's matrices are gathered one parameter at a time,
    on every rank; all ranks must take part.

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
        for class_name, reason in find_logit_bounds(model)[1].items():
            logger.info("diagnostics: no bound of the attention logits for %s: %s", class_name, reason)
        self._before: list[_Stack] = []
        self._adamw_before: dict[int, list[Tensor]] = {}
        self._adamw_elements = 0
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
        budget = min(int(group["max_workspace_bytes"]) for group in groups)
        self._before = self._stacks(budget)
        read = _WholeTensors(groups)
        for stack in self._before:
            stack.before = torch.stack([read.matrix(matrix, "param") for matrix in stack.matrices])
        adamw = {i: group for i, group in enumerate(groups) if group["role"] == "adamw"}
        count = max(1, sum(len(group["params"]) for group in adamw.values()))
        elements = min(ADAMW_ELEMENTS, budget // (16 * count))  # of up to 8 bytes, for an eighth of the workspace
        self._adamw_before = {
            i: [_sampled_rows(local_of(p.detach()), elements).clone() for p in group["params"]]
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
        attention, _ = find_logit_bounds(self._model)  # anew, for engines exchange parameters
        reading = Reading(
            matrices=[
                MeasuredMatrix(
                    name=_name_of(matrix, groups[matrix.group]),
                    group=matrix.group,
                    shape=matrix.shape,
                    has_gradient=_has_grad(groups[matrix.group]["params"][matrix.index]),
                )
                for matrix in matrices
            ],
            roles=[group["role"] for group in groups],
            rates=[None if isinstance(rate, Tensor) else rate for rate in self._rates],
            attention=[bound.projections.name for bound in attention],
            marks=self._marks,
        )
        self._marks = {}
        read = _WholeTensors(groups, self.optimizer.state)
        measured = [self._measured(stack, read) for stack in self._before]
        if measured:
            first = measured[0].device
            reading.numbers["matrices"] = torch.cat([part.to(first) for part in measured], dim=1).flatten()
        self._before = []
        for i, rate in enumerate(self._rates):
            if isinstance(rate, Tensor):
                reading.numbers[f"rate_{i}"] = rate.flatten()
        self._add_sums(reading, groups)
        if attention:
            bounds = [bound.of_heads(whole_of).max() for bound in attention]
            reading.numbers["attention"] = torch.stack([bound.to(bounds[0].device) for bound in bounds])
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

    def _stacks(self, budget: int) -> list[_Stack]:
        """The matrices to measure, those of one group and shape in stacks, in the order of groups and parameters."""
        groups = self.optimizer.param_groups
        matrices = [
            _Matrix(g, i, part, element, shape)
            for g, group in enumerate(groups)
            if group["role"] == "matrix"
            for i, p in enumerate(group["params"])
            for part, element, shape in _shapes(tuple(p.shape), MatrixLayout.from_group(group))
        ]
        params = {(m.group, m.index): groups[m.group]["params"][m.index] for m in matrices}
        chosen: list[int] = []
        filled = 0
        # Multiples of the golden ratio spread evenly, and hit no period of the layers.
        for position in sorted(range(len(matrices)), key=lambda i: i * GOLDEN_RATIO % 1.0):
            matrix = matrices[position]
            size = math.prod(matrix.shape) * params[matrix.group, matrix.index].element_size()
            if chosen and filled + size > budget // SNAPSHOT_PART:
                break
            chosen.append(position)
            filled += size
        if len(chosen) < len(matrices) and not self._told_sample:
            logger.info(
                "diagnostics measure %d of %d matrices: more would not fit into max_workspace_bytes=%d",
                len(chosen),
                len(matrices),
                budget,
            )
            self._told_sample = True
        alike: dict[tuple[Any, ...], list[_Matrix]] = defaultdict(list)
        for matrix in (matrices[position] for position in sorted(chosen)):
            p = params[matrix.group, matrix.index]
            alike[matrix.group, matrix.shape, p.dtype, p.device].append(matrix)
        stacks = []
        for (_, shape, dtype, device), members in alike.items():
            stack_bytes = budget // STACK_PART
            if device.type == "cpu":
                stack_bytes = min(stack_bytes, CPU_STACK_BYTES)
            count = max(1, stack_bytes // (math.prod(shape) * torch.promote_types(dtype, torch.float32).itemsize))
            stacks += [_Stack(members[start : start + count]) for start in range(0, len(members), count)]
        return stacks

    def _measured(self, stack: _Stack, read: "_WholeTensors") -> Tensor:
        """(MEASURED, b) numbers of the matrices of a stack, whose copies are let go."""
        group = self.optimizer.param_groups[stack.matrices[0].group]
        rate = self._rates[stack.matrices[0].group]
        assert stack.before is not None
        dtype = state_dtype(stack.before)
        before = stack.before.to(dtype)
        stack.before = None
        after = torch.stack([read.matrix(matrix, "param") for matrix in stack.matrices]).to(dtype)
        change = before - after
        weight_norm, change_norm = (torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (before, change))
        divisor = rate.to(change.device) if isinstance(rate, Tensor) else rate or 1.0
        update = change.div_(divisor).sub_(before, alpha=group["weight_decay"])
        update = torch.where((change_norm == 0)[:, None, None], 0, update)  # not stepped: not decayed either
        del before, change
        update_norm = torch.linalg.vector_norm(update, dim=(-2, -1))
        error = orthogonality_error(update)
        del update
        _, weight_spectral = frobenius_and_spectral_norm(after)
        del after
        momentum = torch.stack([read.matrix(matrix, "momentum_buffer") for matrix in stack.matrices]).to(dtype)
        norms = frobenius_and_spectral_norm(momentum)
        return torch.stack([weight_norm, change_norm, update_norm, error, weight_spectral, *norms])

    def _add_sums(self, reading: Reading, groups: list[dict[str, Any]]) -> None:
        """Squared norms of each group, and its skips; collectives where there are DTensors, alike on all ranks."""
        for g, group in enumerate(groups):
            by_mesh: dict[Any, list[int]] = defaultdict(list)
            for i, p in enumerate(group["params"]):
                by_mesh[(p.device_mesh, p.placements) if is_sharded(p) else p.device].append(i)
            sums = []
            for members in by_mesh.values():
                first = group["params"][members[0]]
                grads = [local_of(in_placements_of(p, p.grad)) for p in _at(group["params"], members) if _has_grad(p)]
                # the AdamW groups' weights and changes, 0 of matrix groups
                pairs: list[list[Tensor]] = [[], []]
                for i in members if group["role"] == "adamw" else ():
                    old = self._adamw_before[g][i]
                    new = _sampled_rows(local_of(group["params"][i].detach()), self._adamw_elements)
                    pairs[0].append(old)
                    pairs[1].append(new.to(state_dtype(old)) - old)
                local = [_sum_of_squares(tensors, local_of(first)) for tensors in (grads, *pairs)]
                sums.append(over_shards(torch.stack(local), first, "sum"))
            if not sums:  # a group without parameters
                sums.append(torch.zeros(3))
            reading.numbers[f"sums_{g}"] = torch.stack([part.to(sums[0].device) for part in sums]).sum(0)
            if group["role"] == "matrix":
                reading.numbers[f"skipped_{g}"] = self._skips(group, by_mesh)
        self._adamw_before = {}

    def _skips(self, group: dict[str, Any], by_mesh: dict[Any, list[int]]) -> Tensor:
        """How many matrices of a group have been skipped so far, (1,)."""
        counts = []
        for members in by_mesh.values():
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
        device = next(local_of(p).device for group in self.optimizer.param_groups for p in group["params"])
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            return event
        return time.perf_counter() if device.type == "cpu" else None


class _WholeTensors:
    """Reads matrices out of parameters and their state: DTensors whole, int8 momenta in float32."""

    def __init__(self, groups: list[dict[str, Any]], state: Any = None) -> None:
        self.groups, self.state = groups, state
        self._last: tuple[Any, Tensor] | None = None

    def matrix(self, matrix: _Matrix, what: str) -> Tensor:
        """A view (fan_out, fan_in) of the parameter, "param", or of a tensor of its state; zeros if that has none."""
        group = self.groups[matrix.group]
        param = group["params"][matrix.index]
        tensor = param.detach() if what == "param" else self.state.get(param, {}).get(what)
        if tensor is None:
            return torch.zeros(matrix.shape, dtype=state_dtype(param), device=param.device)
        key = (matrix.group, matrix.index, what)
        if is_sharded(tensor) or tensor.dtype == torch.int8:
            if self._last is None or self._last[0] != key:
                self._last = None
                self._last = (key, whole_of(tensor) if is_sharded(tensor) else in_float(self.state[param]))
            tensor = self._last[1]
        return matrix.view_in(tensor, MatrixLayout.from_group(group))


def _shapes(shape: tuple[int, ...], layout: MatrixLayout) -> list[tuple[int, int, tuple[int, int]]]:
    """(part, element, (fan_out, fan_in)) of all matrices of a parameter."""
    parts = split_parts(torch.empty(shape, device="meta"), layout)
    stacks = [to_matrices(part, layout).shape for part in parts]
    return [(i, element, (stack[1], stack[2])) for i, stack in enumerate(stacks) for element in range(stack[0])]


def _sampled_rows(tensor: Tensor, elements: int) -> Tensor:
    """A view of every so many rows of a tensor, at least one, of about ``elements`` elements."""
    if tensor.ndim == 0 or tensor.numel() <= elements:
        return tensor
    rows = max(1, elements // (tensor.numel() // tensor.size(0)))
    return tensor[:: -(-tensor.size(0) // rows)]


def _name_of(matrix: _Matrix, group: dict[str, Any]) -> str:
    names = group.get("param_names")
    name = names[matrix.index] if names else f"group_{matrix.group}.param_{matrix.index}"
    return f"{name}.part_{matrix.part}" if group.get("split_sizes") else str(name)


def _has_grad(p: Tensor) -> bool:
    return p.grad is not None


def _at(items: list[Any], positions: list[int]) -> list[Any]:
    return [items[i] for i in positions]


def _sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Over all elements of all tensors; () in float64 where the device has it."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=dtype, device=like.device)
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    norms = [
        norm.to(dtype)
        for found, same in by_dtype.items()
        for norm in torch._foreach_norm(same, 2, dtype=torch.promote_types(found, torch.float32))
    ]
    return torch.stack(norms).square().sum()
