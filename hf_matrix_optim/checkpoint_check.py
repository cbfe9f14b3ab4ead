"""Whether the param groups of a checkpoint are those of an optimizer; nothing is changed here."""

import logging
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.int8_momentum import BLOCK
from hf_matrix_optim.matrix_layout import MatrixLayout

logger = logging.getLogger(__name__)

#: Options that say how a step is computed and kept on this machine, not what it is.
RUN_KEYS = {"kernels", "cuda_graph", "momentum_dtype", "max_workspace_bytes", "distribute"}
#: Keys that belong to a run, not to what the state means.
_FREE_KEYS = {"params", "param_names", "lr", "initial_lr", "fused"} | RUN_KEYS
#: State that is laid out as its parameter.
_MOMENTS = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def check_checkpoint(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Refuse a checkpoint of another optimizer, of other parameters or of another reading of them.

    A hyperparameter that differs is no reason to refuse: torch optimizers take the checkpoint's. A warning names it.

    Args:
        saved_groups: ``state_dict()["param_groups"]`` of the checkpoint.
        groups: the ``param_groups`` of the optimizer that is to load it.

    Raises:
        ValueError: naming what the checkpoint has and what this optimizer has.
    """
    saved, own = _algorithms(saved_groups), _algorithms(groups)
    if saved != own:
        raise ValueError(
            f"the checkpoint was written by {saved} and cannot be resumed with {own}: choose the optimizer of the "
            "checkpoint, or start a new run from its weights alone"
        )
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} param groups, this optimizer {len(groups)}: the parameters are "
            "split in another way; use the model and the partition options of the checkpoint"
        )
    for index, (saved_group, group) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_group(index, saved_group, group)
        for key in sorted(group.keys() & saved_group.keys() - _FREE_KEYS):
            if _plain(group[key]) != _plain(saved_group[key]):
                logger.warning(
                    "param group %d: the checkpoint's %s=%r replaces %r of this run, as in every torch optimizer",
                    index,
                    key,
                    saved_group[key],
                    group[key],
                )


def check_state(state: dict[str, Any], param: Tensor, name: str) -> None:
    """Refuse moments of another shape than the parameter's, and whole ones where this rank has a shard, or vice versa.

    Args:
        state: of the parameter, in a checkpoint.
        param: the parameter.
        name: what to call it.

    Raises:
        ValueError: naming both shapes or layouts.
    """
    for key in _MOMENTS & state.keys():
        if state[key].shape != param.shape:
            raise ValueError(
                f"{key} of parameter {name} in the checkpoint has shape {tuple(state[key].shape)}, the parameter "
                f"{tuple(param.shape)}: use the model of the checkpoint"
            )
        scale = state.get("momentum_scale")
        if state[key].dtype == torch.int8 and (scale is None or scale.numel() * BLOCK != param.numel()):
            raise ValueError(
                f"{key} of parameter {name} in the checkpoint is int8, without a momentum_scale for each {BLOCK} of "
                f"its {param.numel()} elements: the checkpoint is not complete, use another one"
            )
        saved, own = (getattr(tensor, "placements", None) for tensor in (state[key], param))
        if saved != own:
            raise ValueError(
                f"{key} of parameter {name} in the checkpoint is {_layout(saved)}, the parameter is {_layout(own)}: "
                "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which lays it out anew"
            )


def _layout(placements: Any) -> str:
    return "a whole tensor" if placements is None else f"laid out as {tuple(placements)}"


def _check_group(index: int, saved_group: dict[str, Any], group: dict[str, Any]) -> None:
    remedy = "use the model and the partition options of the checkpoint"
    if saved_group["algorithm"] != group["algorithm"]:
        raise ValueError(
            f"param group {index} of the checkpoint is {saved_group['algorithm']}, of this optimizer "
            f"{group['algorithm']}: {remedy}"
        )
    saved_names, names = saved_group.get("param_names"), group.get("param_names")
    if saved_names is not None and names is not None and list(saved_names) != list(names):
        only_saved = [name for name in saved_names if name not in set(names)]
        only_own = [name for name in names if name not in set(saved_names)]
        difference = f"only in the checkpoint {only_saved[:3]}, only here {only_own[:3]}"
        raise ValueError(
            f"the parameters of group {index} ({group['algorithm']}) differ from the checkpoint's: "
            f"{difference if only_saved or only_own else 'the same names in another order'}; {remedy}"
        )
    layout, saved_layout = MatrixLayout.from_group(group), MatrixLayout.from_group(saved_group)
    if layout != saved_layout:
        raise ValueError(
            f"param group {index} of the checkpoint reads its matrices as {saved_layout}, this optimizer as {layout}: "
            f"{remedy}"
        )


def _algorithms(groups: list[dict[str, Any]]) -> str:
    names = {group.get("algorithm") or _foreign_name(group) for group in groups}
    return " and ".join(sorted(names - {"adamw"})) or "AdamW groups alone"


def _foreign_name(group: dict[str, Any]) -> str:
    """What can be told of the optimizer that wrote a group without our ``algorithm`` key."""
    if "amsgrad" in group:
        return "torch.optim.AdamW (or Adam)"
    if "adjust_lr_fn" in group:
        return "torch.optim.Muon"
    if "dampening" in group:
        return "torch.optim.SGD"
    return f"another optimizer (group keys {', '.join(sorted(group.keys() - {'params'}))})"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
