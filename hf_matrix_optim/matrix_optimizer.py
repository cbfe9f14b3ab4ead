"""The one ``step()`` and the one ``state_dict`` of every matrix optimizer.

A gradient's way through a matrix group: ``step`` -> ``_step_matrix_group`` (which parameters, which state) ->
``_step_lists`` (int8 momenta become float32) -> ``_step_floats`` (what the GPU kernels take goes to
``kernels.fast_path``) -> ``_step_plainly`` (matrices of one shape in stacks under the workspace cap) ->
``plain_step.step_stack``. What lies on several ranks goes to ``distributed_step`` instead. A subclass is a
constructor, ``map_lookahead`` with its companions, and ``_kernel_rule`` for the kernels. AdamW groups go to
``adamw_group``; ``group_check`` says what a group may hold.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_matrix_optim import int8_momentum
from hf_matrix_optim.adamw_group import can_be_fused, step_adamw_group
from hf_matrix_optim.checkpoint_check import RUN_KEYS, check_checkpoint, check_state
from hf_matrix_optim.distributed_step import DistributedGroup, plan_group
from hf_matrix_optim.group_check import MAP_DTYPES, check_group, parameter_name
from hf_matrix_optim.group_state import GroupState
from hf_matrix_optim.int8_momentum import INT8
from hf_matrix_optim.kernels.fast_path import FastPath
from hf_matrix_optim.kernels.int8_plan import Int8Plans
from hf_matrix_optim.kernels.map_graphs import MapGraphs
from hf_matrix_optim.kernels.stack_plan import why_not
from hf_matrix_optim.kernels.stack_step import KernelRule
from hf_matrix_optim.matrix_layout import MatrixLayout, to_matrices
from hf_matrix_optim.matrix_state import momentum_dtype, new_state, restore
from hf_matrix_optim.plain_step import state_dtype, step_stack
from hf_matrix_optim.sharding.full_tensor import Written, local_or_whole, write_shard
from hf_matrix_optim.sharding.plan_table import MatrixRow, table_of
from hf_matrix_optim.sharding.shard_layout import is_sharded
from hf_matrix_optim.stacks import Matrices, MatrixLists, chunks
from hf_matrix_optim.update_scale import update_scale

#: A param group, its parameters, and what ranks step together of them.
Plan: TypeAlias = tuple[dict[str, Any], list[Tensor], DistributedGroup | None]
#: Tensors of a stack's size that are alive at once in ``step_stack``, for the workspace cap.
STACK_COPIES = 8
#: Bound of a stack and its copies on a CPU: about its caches. Larger stacks are slower, smaller ones all overhead.
CPU_STACK_BYTES = 4 * 2**20


class MatrixOptimizer(Optimizer):
    """Base of the matrix optimizers; use ``Muon``, ``AdaMuon`` or ``MUD``.

    ::

        M = beta M + w G                     (w = 1, heavy ball; 1 - beta where a subclass sets momentum_is_average)
        U = w G + beta M if nesterov else M
        O = direction(U)                     (the subclass)
        W = W - lr (s O + weight_decay W)    (s: update_scale, so that the update's root mean square is update_rms)

    A matrix whose gradient or momentum is not finite is left as it is in that step (its momentum, by the GPU kernels,
    up to rounding) and counted in ``state[p]["skipped"]``, without a device synchronisation. A parameter whose
    ``grad`` is None is left alone.
    """

    algorithm: str
    momentum_is_average: bool = False
    has_second_moment: bool = False
    #: The dataclass of options that it was made from, if it was; some of them are for others than the optimizer.
    asked_options: Any = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if isinstance(defaults["lr"], Tensor) and defaults["lr"].numel() != 1:
            raise ValueError(f"a tensor lr must have 1 element, but has shape {tuple(defaults['lr'].shape)}")
        super().__init__(params, {"role": "matrix", "algorithm": None, **defaults})

    # ---- groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``role`` is "adamw" or "matrix" (the default), and every value is checked.

        Raises:
            ValueError: for a value out of range, or a parameter of a matrix group that cannot be read as matrices.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        group["algorithm"] = self.algorithm if group["role"] == "matrix" else "adamw"
        if group["role"] == "adamw":
            if group["fused"] is None:
                group["fused"] = can_be_fused(group["params"])
        else:
            layout = MatrixLayout.from_group(group)
            group.update({field.name: getattr(layout, field.name) for field in fields(layout)})

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check what a subclass adds to a group, after this."""
        check_group(group)

    # ---- step ----

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss.

        Raises:
            RuntimeError: for a sparse gradient, naming the parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            is_sparse = [(grad := p.grad) is not None and grad.is_sparse for p in group["params"]]
            if True in is_sparse:
                name = parameter_name(group, is_sparse.index(True))
                raise RuntimeError(
                    f"parameter {name} has a sparse gradient, which is not supported: use nn.Embedding(sparse=False)"
                )
            if group["role"] == "matrix":
                self._step_matrix_group(group)
            else:
                step_adamw_group(group, self.state)
        return loss

    def _step_matrix_group(self, group: dict[str, Any]) -> None:
        layout = MatrixLayout.from_group(group)
        known: dict[int, GroupState] = self.__dict__.setdefault("_group_states", {})
        gathered = known.get(id(group))
        if gathered is None or not gathered.is_of(group, self.state):
            for gone in set(known) - set(map(id, self.param_groups)):
                del known[gone]
            # All ranks must save the same keys, so a sharded parameter has a state also before its first gradient.
            states = [
                self._matrix_state(p, layout, group) if p.grad is not None or is_sharded(p) else {}
                for p in group["params"]
            ]
            gathered = known[id(group)] = GroupState(group, states)
        lists, steps, stepping = gathered.lists_and_steps()
        shared = self._shared_group(group, layout) if gathered.may_share else None
        if shared is None and gathered.is_together and len(set(steps)) == 1:
            self._step_lists(lists, layout, group, steps[0])
            return
        if shared is not None:
            shared.step(
                self,
                self._kernel_rule(group),
                group,
                {i: lists.entry(k) for k, i in enumerate(stepping) if i in shared.members},
                dict(zip(stepping, steps, strict=True)),
                scale=lambda fan_out, fan_in: self._scale(fan_out, fan_in, group),
                root=lambda step: self._root(group, step),
                graphs=self._map_graphs_for(group),
            )
        # Parameters that joined later are behind the others; a model may lie on several devices, or in shards.
        together: dict[tuple[float, torch.device], list[Matrices]] = defaultdict(list)
        for k, (i, step) in enumerate(zip(stepping, steps, strict=True)):
            if shared is not None and i in shared.members:
                continue
            entry = lists.entry(k)
            written: Written = []
            if is_sharded(entry.param):
                entry, written = local_or_whole(entry, layout)
            if not entry.param.numel():  # no rows or experts here, but the others gather it
                pass
            elif not written:
                together[step, entry.param.device].append(entry)
            else:  # one at a time, for gathered ones take memory
                self._step_lists(MatrixLists.of([entry]), layout, group, step)
            for destination, source in written:
                write_shard(destination, source)
        for (step, _), entries in together.items():
            self._step_lists(MatrixLists.of(entries), layout, group, step)

    def _shared_group(self, group: dict[str, Any], layout: MatrixLayout) -> DistributedGroup | None:
        """The parameters of a group that ranks step together; planned once, None where there are none."""
        plans: dict[int, Plan] = self.__dict__.setdefault("_plans", {})
        params: list[Tensor] = group["params"]
        known = plans.get(id(group))
        # Planning is a collective. The group is kept and compared, for that of a later checkpoint may get the address
        # of an earlier one, on some of the ranks.
        if known is None or known[0] is not group or list(map(id, known[1])) != list(map(id, params)):
            for gone in set(plans) - set(map(id, self.param_groups)):
                del plans[gone]
            has_shards = any(is_sharded(p) for other in self.param_groups for p in other["params"])
            dtypes = [momentum_dtype(p, group) for p in params]
            by_kernels = not self._why_not_kernels(params[0].device, layout, group)
            plan = plan_group(
                group,
                layout,
                dtypes,
                may_be_ddp=not has_shards,
                by_kernels=by_kernels,
                operations=lambda fan_out, fan_in: self._operations(fan_out, fan_in, group),
            )
            if plan is not None:
                self._check_shared(plan, layout, group)
            known = plans[id(group)] = (group, list(params), plan)
        return known[2]

    def _check_shared(self, plan: DistributedGroup, layout: MatrixLayout, group: dict[str, Any]) -> None:
        """Refuse what was asked for and cannot be had where ranks share the matrices of a group."""
        self._check_graph(self._why_not_kernels(group["params"][0].device, layout, group), layout, group)
        if group["kernels"] == "triton" and (left := plan.without_kernels()) is not None:
            reason = self._why_not_kernels(group["params"][left].device, layout, group)
            reason = (
                reason
                or f"parameter {parameter_name(group, left)} or its shards are too small or not laid out for them"
            )
            raise RuntimeError(f"kernels='triton' was asked for, but {reason}; or use kernels='auto'")

    def _map_graphs_for(self, group: dict[str, Any]) -> dict[torch.device, MapGraphs] | None:
        """The graphs of all groups that ask for them, by device; let go when none does."""
        if group["cuda_graph"]:
            graphs: dict[torch.device, MapGraphs] = self.__dict__.setdefault("_map_graphs", {})
            return graphs
        if not any(other.get("cuda_graph") for other in self.param_groups):
            self.__dict__.pop("_map_graphs", None)
        return None

    def _check_graph(self, reason: str, layout: MatrixLayout, group: dict[str, Any]) -> None:
        """Refuse a CUDA graph of kernels that cannot be used, for a reason."""
        if reason and group["cuda_graph"] and not layout.flatten:
            raise RuntimeError(
                f"cuda_graph=True was asked for, which is for the kernels, but {reason}; or leave cuda_graph out"
            )

    def _step_lists(self, lists: MatrixLists, layout: MatrixLayout, group: dict[str, Any], step: float) -> None:
        """Step parameters of one group and device, their momenta in float32 or bfloat16 for as long as it takes."""
        if group["momentum_dtype"] != INT8:
            self._step_floats(lists, layout, group, step)
            return
        half = max(1, group["max_workspace_bytes"] // 2)  # for the momenta, and for the step
        plans: Int8Plans | None = None
        if group["kernels"] != "torch" and not why_not(lists.params[0].device):
            plans = self.__dict__.setdefault("_int8_plans", Int8Plans())
        for part in int8_momentum.in_float_by_parts(lists, [self.state[p] for p in lists.params], half, plans):
            self._step_floats(part, layout, {**group, "max_workspace_bytes": half}, step)

    def _step_floats(self, lists: MatrixLists, layout: MatrixLayout, group: dict[str, Any], step: float) -> None:
        """What the GPU kernels can take by them, the others plainly."""
        reason = self._why_not_kernels(lists.params[0].device, layout, group)
        if reason and group["kernels"] == "triton":
            raise RuntimeError(f"kernels='triton' was asked for, but {reason}; or use kernels='auto'")
        self._check_graph(reason, layout, group)
        rest: Iterable[int] = range(len(lists.params))
        if not reason:
            fast_path: FastPath = self.__dict__.setdefault("_fast_path", FastPath())
            rest = fast_path.step(
                lists,
                layout,
                self._kernel_rule(group),
                lambda fan_out, fan_in: self._scale(fan_out, fan_in, group),
                lr=group["lr"],
                correction=1 / self._root(group, step),
                max_workspace_bytes=group["max_workspace_bytes"],
                cuda_graph=group["cuda_graph"],
                take_all=group["kernels"] == "triton",
            )
        self._step_plainly([lists.entry(i) for i in rest], layout, group, step)

    def _why_not_kernels(self, device: torch.device, layout: MatrixLayout, group: dict[str, Any]) -> str:
        """Why a whole group goes the plain path; "" if the kernels may take it."""
        if group["kernels"] == "torch":
            return "kernels='torch'"
        if group["map_dtype"] != "auto" or layout.flatten:
            return "they are for linear layers and map_dtype='auto'"
        return why_not(device)

    def _kernel_rule(self, group: dict[str, Any]) -> KernelRule:
        """What the kernels need to know of a param group; a subclass adds its map."""
        return KernelRule(
            beta=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            weight=self.gradient_weight(group),
        )

    def _step_plainly(self, entries: list[Matrices], layout: MatrixLayout, group: dict[str, Any], step: float) -> None:
        stacks: dict[tuple[Any, ...], list[Matrices]] = defaultdict(list)
        for entry in entries:
            for part in entry.parts(layout):
                fan_out, fan_in = to_matrices(part.param, layout).shape[-2:]
                stacks[fan_out, fan_in, part.param.dtype, part.momentum.dtype, part.param.device].append(part)
        for (fan_out, fan_in, *_), parts in stacks.items():
            matrix_bytes = STACK_COPIES * fan_out * fan_in * state_dtype(parts[0].param).itemsize
            scale = self._scale(fan_out, fan_in, group)
            max_bytes = group["max_workspace_bytes"]
            if parts[0].param.device.type == "cpu":
                max_bytes = min(max_bytes, CPU_STACK_BYTES)
            for stack in chunks(parts, max(1, max_bytes // matrix_bytes)):
                step_stack(self, stack, layout, group, scale=scale, root=self._root(group, step))

    def _matrix_state(self, p: Tensor, layout: MatrixLayout, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state.update(new_state(p, layout, group, has_second_moment=self.has_second_moment))
        if p.is_cuda and "lookahead_scale" not in state:  # also after a checkpoint from another device
            state["lookahead_scale"] = torch.zeros(state["skipped"].numel(), dtype=torch.float32, device=p.device)
        return state

    # ---- the rule: see plain_step.Rule ----

    def gradient_weight(self, group: dict[str, Any]) -> float:
        """w, negative to step along the gradient."""
        return (1 - group["momentum"] if self.momentum_is_average else 1) * (-1 if group["maximize"] else 1)

    def map_input(self, lookahead: Tensor, group: dict[str, Any]) -> Tensor:
        """What the map looks at: the lookahead itself."""
        return lookahead

    def wire_dtypes(
        self, group: dict[str, Any], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.dtype, torch.dtype]:
        """That of the state into the map, and that of the map, if it is smaller, out of it."""
        map_dtype = self._map_dtype(dtype, device, group)
        return dtype, map_dtype if map_dtype.itemsize < dtype.itemsize else dtype

    def map_lookahead(self, x: Tensor, group: dict[str, Any]) -> Tensor:
        """Direction of whole matrices, (b, fan_out, fan_in), finite, in the state's dtype; ``x`` is not modified."""
        raise NotImplementedError

    def adapt(self, direction: Tensor, second_moment: Tensor, group: dict[str, Any], root: float | Tensor) -> Tensor:
        """For a rule with a second moment: update it in place and divide by its root."""
        raise NotImplementedError

    def rms_divisor(self, rms: Tensor, group: dict[str, Any]) -> Tensor:
        """For a rule with a second moment: what a direction of this root mean square is divided by."""
        raise NotImplementedError

    def _operations(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        """About how many floating-point operations the map of a matrix takes on a GPU."""
        raise NotImplementedError

    def _root(self, group: dict[str, Any], step: float) -> float:
        """Root of the second moment's bias in step ``step``: sqrt(1 - beta2^t), or 1."""
        return 1.0

    def _scale(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        """Factor from direction to update for a matrix of this shape."""
        return update_scale(fan_out, fan_in, rule=group["update_scale"], update_rms=group["update_rms"])

    def _map_dtype(self, dtype: torch.dtype, device: torch.device, group: dict[str, Any]) -> torch.dtype:
        """Precision of the map; "auto" is bfloat16 for float32 state where the device multiplies it natively."""
        if group["map_dtype"] != "auto":
            return MAP_DTYPES[group["map_dtype"]]
        return torch.bfloat16 if dtype == torch.float32 and has_fast_bfloat16(device) else dtype

    def describe_plan(self) -> str:
        """Which rank maps which matrix, as a Markdown table, and their load; known after the first step."""
        plans: dict[int, Plan] = self.__dict__.get("_plans", {})
        rows: list[MatrixRow] = []
        for group in self.param_groups:
            _, _, shared = plans.get(id(group), (None, None, None))
            if shared is not None:
                rows += shared.describe([parameter_name(group, i).strip("'") for i in range(len(group["params"]))])
        if not rows:
            return "Nothing is shared out between ranks, or no step has been taken yet."
        return table_of(rows)

    # ---- checkpoints ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the same optimizer over the same parameters; nothing changes if it is refused.

        As in torch, the hyperparameters of the checkpoint are taken over; a warning names each one that differs. What
        says how a step is computed and kept here, and not what it is (``RUN_KEYS``), stays this run's. Momentum gets
        the form that this run asks for, also under bfloat16 parameters; no tensor is shared with ``state_dict``.

        Raises:
            ValueError: if the checkpoint comes from another optimizer, lists other parameters, or has state of other
                shapes or layouts than the parameters, naming both.
        """
        check_checkpoint(state_dict["param_groups"], self.param_groups)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        owners = [(group, i, p) for group in self.param_groups for i, p in enumerate(group["params"])]
        for saved_id, (group, i, p) in zip(saved_ids, owners, strict=True):
            check_state(state_dict["state"].get(saved_id, {}), p, parameter_name(group, i))
        of_this_run = [{key: group[key] for key in RUN_KEYS & group.keys()} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, of_this_run, strict=True):
            group.update(kept)
            for key, value in self.defaults.items():  # options that are younger than the checkpoint
                if key != "differentiable":  # torch's __setstate__ puts it among the defaults
                    group.setdefault(key, value)
        for name in ("_group_states", "_fast_path", "_int8_plans"):  # they hold on to the tensors that are replaced
            self.__dict__.pop(name, None)
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        for saved_id, (p, group) in zip(saved_ids, parameters, strict=True):
            saved: dict[str, Any] = state_dict["state"].get(saved_id, {})
            if not saved:
                continue
            # torch has cast every tensor but the step to the parameter's dtype.
            state: dict[str, Any] = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in self.state[p].items()
            }
            if group["role"] == "matrix":
                restore(state, saved, p, group)
            self.state[p] = state


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are native: on GPUs, and on CPUs with AVX512-BF16 or AMX."""
    if device.type == "cpu":
        queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, query, bool)() for query in queries)
    return device.type == "cuda"
