"""DeepSpeed ZeRO and FSDP1 are refused, with the remedy, on every way to an optimizer."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import arguments, token_rows
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import Trainer, TrainerControl, TrainerState

from hf_matrix_optim import AdaMuon, MatrixTrainer, Muon, create_optimizer, explain, param_groups_for
from hf_matrix_optim.options import OPTIMIZER_NAMES, MUDOptions, MuonOptions
from hf_matrix_optim.tripwire import OptimizerTripwire

FSDP1 = re.escape("does not run under FSDP1, which flattens parameters and cuts through matrices: use FSDP2")
DEEPSPEED_REMEDY = re.escape("use FSDP2 (fsdp_version 2) or plain DDP, or DeepSpeed's own Muon") + ".*deepspeed_config"
DEEPSPEED = f"does not run under DeepSpeed ZeRO, .*{DEEPSPEED_REMEDY}"

#: What a user without Trainer calls, and what it raises under an engine.
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "create_optimizer": lambda model: create_optimizer("mud", model, lr=1e-3),
    "param_groups_for": param_groups_for,
    "explain": explain,
}


def linear_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


# ---- DeepSpeed through Trainer and accelerate ----

#: "true" after ``accelerate launch --use_deepspeed`` and after ``Accelerator(deepspeed_plugin=...)``.
BY_ACCELERATE = "ACCELERATE_USE_DEEPSPEED"


@pytest.mark.parametrize("attribute", ["deepspeed", "deepspeed_plugin"])
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_trainer_refuses_deepspeed(tmp_path, attribute: str, name: str) -> None:
    args = arguments(tmp_path, optim=name)
    model = tiny_model("llama")
    assert Trainer.get_optimizer_cls_and_kwargs(args, model)[1]["params"]
    setattr(args, attribute, {"zero_optimization": {"stage": 2}})  # late: earlier only where deepspeed is installed
    with pytest.raises(NotImplementedError, match=f"optim={name!r} {DEEPSPEED}"):
        Trainer.get_optimizer_cls_and_kwargs(args, model)


def test_trainer_refuses_deepspeed_that_only_accelerate_knows(tmp_path, monkeypatch) -> None:
    trainer = Trainer(tiny_model("llama"), arguments(tmp_path, optim="adamuon"), train_dataset=token_rows())
    monkeypatch.setenv(BY_ACCELERATE, "true")
    with pytest.raises(NotImplementedError, match=f"optim='adamuon' {DEEPSPEED}"):
        trainer.train()


def test_matrix_trainer_refuses_deepspeed_at_once(tmp_path) -> None:
    """With an optimizer block in its configuration, DeepSpeed would not ask Trainer for an optimizer."""
    args = arguments(tmp_path, max_grad_norm=0)
    args.deepspeed = {"optimizer": {"type": "Muon"}}
    with pytest.raises(NotImplementedError, match=f"optim='mud' {DEEPSPEED}"):
        MatrixTrainer(tiny_model("llama"), args, train_dataset=token_rows(), optimizer_options=MUDOptions())
    MatrixTrainer(tiny_model("llama"), args, train_dataset=token_rows())  # asks for none of ours


def test_the_tripwire_refuses_deepspeeds_optimizer_with_the_remedy(tmp_path) -> None:
    args = arguments(tmp_path, optim="muon")
    args.deepspeed = {"optimizer": {"type": "Muon"}}
    optimizer = torch.optim.AdamW(linear_layers().parameters())
    with pytest.raises(RuntimeError, match=f"{DEEPSPEED_REMEDY}.*, for which --optim stays at its default"):
        OptimizerTripwire().on_train_begin(args, TrainerState(), TrainerControl(), optimizer=optimizer)


@pytest.mark.parametrize("way", WAYS)
def test_accelerate_under_deepspeed_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_layers()
    monkeypatch.setenv(BY_ACCELERATE, "false")
    WAYS[way](model)
    monkeypatch.setenv(BY_ACCELERATE, "true")
    with pytest.raises(NotImplementedError, match=DEEPSPEED):
        WAYS[way](model)


def test_accelerate_under_deepspeed_is_refused_with_groups_made_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_layers()
    Muon(matrices_of(model), lr=1e-3)
    monkeypatch.setenv(BY_ACCELERATE, "true")
    with pytest.raises(
        ValueError, match=f"number 0 of its group .*runs this process under DeepSpeed.*{DEEPSPEED_REMEDY}"
    ):
        Muon(matrices_of(model), lr=1e-3)
    Muon([{"params": matrices_of(model), "role": "adamw"}], lr=1e-3)  # element by element: pieces are as good


# ---- DeepSpeed's parameters ----


class DeepSpeedEngine(nn.Module):
    """Has the name of DeepSpeed's, which holds the model as ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedEngineBelow(DeepSpeedEngine):
    """DeepSpeed's engines for pipelines and for mixed training are subclasses."""


def as_zero3(model: nn.Module) -> nn.Module:
    """Give parameters what ``deepspeed.zero.Init`` gives them: an id, their shape aside, and no elements."""
    for i, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape = i, p.shape
        p.data = torch.empty(0)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", [DeepSpeedEngine, DeepSpeedEngineBelow, as_zero3])
def test_parameters_of_deepspeed_are_refused(way: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(NotImplementedError, match=DEEPSPEED):
        WAYS[way](wrap(linear_layers()))


def test_a_single_parameter_of_zero3_that_is_whole_for_now_is_refused() -> None:
    model = linear_layers()
    model[2].weight.ds_id = 0
    with pytest.raises(NotImplementedError, match=DEEPSPEED):
        create_optimizer("muon", model, lr=1e-3)


@pytest.mark.parametrize("optimizer_class", [Muon, AdaMuon])
def test_parameters_of_zero3_are_refused_in_a_matrix_group(optimizer_class: type[Muon]) -> None:
    with pytest.raises(ValueError, match=rf"shape \(0,\) is not a matrix.*DeepSpeed ZeRO.*{DEEPSPEED_REMEDY}"):
        optimizer_class(as_zero3(linear_layers()).parameters(), lr=1e-3)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_parameters_that_become_flat_after_construction_are_refused_by_the_step(name: str) -> None:
    """As DeepSpeed's ZeRO-1 and 2 do to an optimizer, and zero_allow_untested_optimizer is set by accelerate."""
    optimizer = create_optimizer(name, linear_layers(), lr=1e-3)
    flat = nn.Parameter(torch.randn(50))
    flat.grad = torch.randn(50)
    (group,) = (group for group in optimizer.param_groups if group["role"] == "matrix")
    group["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(ValueError, match=rf"has become flat, of shape \(50,\), as DeepSpeed ZeRO.*{DEEPSPEED_REMEDY}"):
        optimizer.step()
    assert torch.equal(flat, before)


# ---- FSDP1 ----


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp1(module: nn.Module, use_orig_params: bool) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused(one_rank, tmp_path, use_orig_params: bool) -> None:
    whole, partly = fsdp1(linear_layers(), use_orig_params), linear_layers()
    partly[2] = fsdp1(partly[2], use_orig_params)
    for model in (whole, partly, whole.module):
        for way in WAYS.values():
            with pytest.raises(NotImplementedError, match=FSDP1):
                way(model)
    args = arguments(tmp_path, optim="muon")
    with pytest.raises(NotImplementedError, match=f"optim='muon' {FSDP1}"):
        Trainer.get_optimizer_cls_and_kwargs(args, whole)
    trainer = MatrixTrainer(linear_layers(), arguments(tmp_path), optimizer_options=MuonOptions())
    with pytest.raises(NotImplementedError, match=f"optim='muon' {FSDP1}"):
        trainer.create_optimizer(whole)
    if not use_orig_params:
        with pytest.raises(ValueError, match=r"shape \(59,\) is not a matrix.*FSDP1.*use FSDP2"):
            Muon(whole.parameters(), lr=1e-3)


def test_fsdp2_is_not_refused(one_rank) -> None:
    model = linear_layers()
    expected = [group["param_names"] for group in param_groups_for(copy.deepcopy(model))]
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert [group["param_names"] for group in create_optimizer("mud", model, lr=1e-3).param_groups] == expected
