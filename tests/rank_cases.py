"""Cases for several gloo processes; ``test_trainer_ranks.py`` starts them. Each function runs on every rank."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny_models import tiny_model
from tiny_training import OPTIMIZER_NAMES, StepRecorder, arguments, optimizer_of, state_tensors, token_rows
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import Trainer

from hf_matrix_optim import MatrixTrainer, OptimizerDiagnostics, create_optimizer
from hf_matrix_optim.options import OPTIONS_CLASSES, MuonOptions
from hf_matrix_optim.qk_clip import QKClip

STEPS = 6
#: Without biases, whose gradients are nothing but rounding where softmax cancels them.
DDP_MODEL = "llama"
DDP_ARGUMENTS: dict[str, Any] = {
    "optim_args": "map_dtype=float32",
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,
    "max_steps": STEPS,
}


def assert_same_on_all_ranks(tensors: dict[str, Tensor]) -> None:
    gathered: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, tensors)
    for other in gathered:
        assert other.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[name]), name


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- DDP, through Trainer ----


def ddp_training(folder: Path, name: str) -> None:
    """Leaves the weights for a comparison with one process and batches of twice the size."""
    args = arguments(folder, optim=name, **DDP_ARGUMENTS)
    trainer = Trainer(tiny_model(DDP_MODEL), args, train_dataset=token_rows(48))
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert_same_on_all_ranks(state_tensors(trainer.model, optimizer_of(trainer)))
    if dist.get_rank() == 0:
        torch.save(trainer.model.state_dict(), folder / f"ddp_{name}.pt")


def ddp_resume(folder: Path) -> None:
    """Rank 0 saves the optimizer; both go on from it bit by bit."""
    values = {"optim": "adamuon_v1", "save_strategy": "steps", "save_steps": 3, **DDP_ARGUMENTS}
    runs = []
    for checkpoint in (None, str(folder / "ddp_resume" / "checkpoint-3")):
        trainer = Trainer(tiny_model("gpt2"), arguments(folder / "ddp_resume", **values), train_dataset=token_rows(48))
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(state_tensors(trainer.model, optimizer_of(trainer)))
        dist.barrier()
    whole, resumed = runs
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert_same_on_all_ranks(resumed)


def ddp_adamw_only(folder: Path) -> None:
    recorder = StepRecorder()
    trainer = MatrixTrainer(
        tiny_model(DDP_MODEL),
        arguments(folder, max_grad_norm=0.05),
        train_dataset=token_rows(48),
        optimizer_options=MuonOptions(),
        clip="adamw_only",
        callbacks=[recorder],
    )
    trainer.train()
    adamw = {n for g in optimizer_of(trainer).param_groups if g["role"] == "adamw" for n in g["param_names"]}
    norm = torch.stack([grad.norm() for name, grad in recorder.gradients[0].items() if name in adamw]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.05), rtol=1e-4, atol=0)
    assert_same_on_all_ranks(state_tensors(trainer.model, optimizer_of(trainer)))


class PickyModel(nn.Module):
    """Each rank uses a layer of its own, and one layer is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(dist.get_world_size() + 1))
        self.out = nn.Linear(8, 96)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(self.layers[dist.get_rank()](self.embedding(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def ddp_unused_parameters(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    model = PickyModel()
    before = copy.deepcopy(model.state_dict())
    args = arguments(folder, optim=name, weight_decay=0.1, ddp_find_unused_parameters=True)
    trainer = Trainer(model, args, train_dataset=token_rows(48))
    trainer.train()
    tensors = state_tensors(model, optimizer_of(trainer))
    assert_same_on_all_ranks(tensors)
    unused = f"layers.{dist.get_world_size()}."
    for parameter_name, value in before.items():
        is_unused = parameter_name.startswith(unused)
        assert torch.equal(tensors[parameter_name], value) == is_unused, parameter_name
        assert any(key.startswith(f"{parameter_name}: ") for key in tensors) == (not is_unused)


# ---- FSDP2, by fully_shard ----


class UnevenModel(nn.Module):
    """Rows that two ranks cannot share evenly, a single row, a stack of three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.down = nn.Linear(7, 5, bias=False)
        self.stack = nn.Parameter(torch.randn(3, 5, 5))
        self.row = nn.Linear(5, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(torch.tanh(self.norm(self.up(self.embedding(tokens)))))
        mixed = torch.einsum("eoi,...i->...eo", self.stack, hidden).tanh().sum(dim=-2)
        return (self.row(mixed) - 1).square().mean()


def uneven_model() -> UnevenModel:
    torch.manual_seed(0)
    return UnevenModel()


def uneven_optimizer(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    choice = OPTIONS_CLASSES[name](include=("up.weight", "down", "stack", "row"), map_dtype="float32", **options)
    return create_optimizer(name, model, lr=1e-3, weight_decay=0.1, eps=1e-5, options=choice)


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    for child in (model.up, model.down):
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, is_sharded: bool) -> None:
    """Steps on 4 rows of 3 tokens; a rank of a sharded model sees its share of the rows."""
    for step in steps:
        tokens = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(step))
        if is_sharded:
            tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: full(parameter.detach()) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}: {key}"] = full(value)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_close_to(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def fsdp_equals_one_process(folder: Path, name: str, is_hybrid: bool = False) -> None:
    plain, model = uneven_model(), uneven_model()
    optimizer = uneven_optimizer(name, plain)
    train_steps(plain, optimizer, range(20), is_sharded=False)

    shape, names = ((2, 1), ("replicate", "shard")) if is_hybrid else ((dist.get_world_size(),), ("shard",))
    sharded(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    sharded_optimizer = uneven_optimizer(name, model)
    train_steps(model, sharded_optimizer, range(20), is_sharded=True)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for parameter in model.parameters():
        momentum = sharded_optimizer.state[parameter].get("momentum_buffer")
        assert momentum is None or momentum.placements == parameter.placements
    tensors = full_state(model, sharded_optimizer)
    assert_same_on_all_ranks(tensors)
    assert_close_to(full_state(plain, optimizer), tensors)


def fsdp_swaps_parameters(folder: Path) -> None:
    """As accelerate does: the optimizer is made, given its own state dict, and only then the model is sharded."""
    plain, model = uneven_model(), uneven_model()
    optimizer = uneven_optimizer("adamuon_v1", plain)
    train_steps(plain, optimizer, range(5), is_sharded=False)

    early = uneven_optimizer("adamuon_v1", model)
    early.load_state_dict(early.state_dict())
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [[names[parameter] for parameter in group["params"]] for group in early.param_groups]
    sharded(model)
    new = dict(model.named_parameters())
    for group, group_names in zip(early.param_groups, order, strict=True):
        group["params"] = [new[name] for name in group_names]
    train_steps(model, early, range(5), is_sharded=True)
    assert_close_to(full_state(plain, optimizer), full_state(model, early))


# ---- diagnostics ----


def measured_step(model: nn.Module, optimizer: Any, *, is_sharded: bool) -> dict[str, float]:
    """The diagnostics of a fourth step, with one matrix that is skipped."""
    train_steps(model, optimizer, range(3), is_sharded=is_sharded)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=True)
    tokens = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(9))
    model(tokens.chunk(dist.get_world_size())[dist.get_rank()] if is_sharded else tokens).backward()
    gradient = dict(model.named_parameters())["up.weight"].grad
    gradient.mul_(float("nan"))
    diagnostics.before_step()
    optimizer.step()
    diagnostics.after_step()
    return diagnostics.values()


def fsdp_diagnostics_equal_one_process(folder: Path, is_hybrid: bool = False) -> None:
    """Shards that are uneven, empty, cut between matrices (the stack), and copied."""
    plain, model = uneven_model(), uneven_model()
    expected = measured_step(plain, uneven_optimizer("muon", plain), is_sharded=False)
    shape, names = ((2, 1), ("replicate", "shard")) if is_hybrid else ((dist.get_world_size(),), ("shard",))
    sharded(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    found = measured_step(model, uneven_optimizer("muon", model), is_sharded=True)
    assert expected["diagnostics/skipped_matrices"] == 1
    assert expected["diagnostics/matrices"] == 6
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-3, abs=1e-6, nan_ok=True), key
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    assert all(repr(other) == repr(found) for other in gathered)


def trainer_fsdp2_diagnostics(folder: Path) -> None:
    """FSDP2 and DDP log the same, also the bound of the attention logits, and on every rank."""
    values = {"optim": "muon", "optim_args": "map_dtype=float32,diagnostics=3", "weight_decay": 0.1}
    histories = [fsdp2_training(folder, "FULL_STATE_DICT", **values).state.log_history]
    args = arguments(folder, **{**DDP_ARGUMENTS, **values})
    ddp = MatrixTrainer(tiny_model(DDP_MODEL), args, train_dataset=token_rows(48))
    ddp.train()
    histories.append(ddp.state.log_history)
    logs = [[entry for entry in history if "diagnostics/step" in entry] for history in histories]
    assert len(logs[0]) == len(logs[1]) == 2
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        assert "diagnostics/attention_logit_bound_max" in one
        for key in one.keys() - {"diagnostics/optimizer_time_share"}:
            if key.startswith("diagnostics/"):
                assert one[key] == pytest.approx(other[key], rel=1e-3), key


# ---- FSDP2 and FSDP1, through Trainer ----


class Fsdp2Trainer(MatrixTrainer):
    """Takes accelerate's way to FSDP2, which accelerate itself offers on GPUs only; on a CPU it falls back to DDP."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        PartialState().distributed_type = DistributedType.FSDP
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


def fsdp2_training(folder: Path, state_dict_type: str, **values: Any) -> Fsdp2Trainer:
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
        "state_dict_type": state_dict_type,
    }
    clip = values.pop("clip", "all")
    checkpoint = values.pop("checkpoint", None)
    args = arguments(folder, fsdp=True, fsdp_config=config, **{**DDP_ARGUMENTS, **values})
    trainer = Fsdp2Trainer(tiny_model(DDP_MODEL), args, train_dataset=token_rows(48), clip=clip)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.accelerator.is_fsdp2
    finally:
        PartialState().distributed_type = DistributedType.MULTI_CPU
    assert all(isinstance(p, DTensor) for group in optimizer_of(trainer).param_groups for p in group["params"])
    return trainer


def trainer_fsdp2_equals_ddp(folder: Path, clip: str) -> None:
    values = {"optim": "muon", "max_grad_norm": 0.05}
    trainer = fsdp2_training(folder, "FULL_STATE_DICT", clip=clip, **values)
    found = full_state(trainer.model, optimizer_of(trainer))
    assert_same_on_all_ranks(found)
    args = arguments(folder, **{**DDP_ARGUMENTS, **values})
    ddp = MatrixTrainer(tiny_model(DDP_MODEL), args, train_dataset=token_rows(48), clip=clip)
    ddp.train()
    assert isinstance(ddp.model_wrapped, nn.parallel.DistributedDataParallel)
    assert_close_to(full_state(ddp.model, optimizer_of(ddp)), found)
    for one, other in zip(trainer.state.log_history[:STEPS], ddp.state.log_history[:STEPS], strict=True):
        torch.testing.assert_close(one["grad_norm"], other["grad_norm"], rtol=1e-4, atol=0)
        assert one["matrix_learning_rate"] == other["matrix_learning_rate"]


def trainer_fsdp2_resumes(folder: Path, state_dict_type: str) -> None:
    output = folder / f"fsdp2_{state_dict_type}"
    values = {"optim": "adamuon_v1", "save_strategy": "steps", "save_steps": 3}
    whole = fsdp2_training(output, state_dict_type, **values)
    expected = full_state(whole.model, optimizer_of(whole))
    dist.barrier()
    resumed = fsdp2_training(output, state_dict_type, checkpoint=str(output / "checkpoint-3"), **values)
    found = full_state(resumed.model, optimizer_of(resumed))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def trainer_refuses_fsdp1(folder: Path) -> None:
    """Trainer makes the optimizer from the model that FSDP1 has wrapped."""
    for trainer_class, values in ((Trainer, {}), (MatrixTrainer, {"optimizer_options": MuonOptions()})):
        args = arguments(folder, optim="muon")
        trainer = trainer_class(tiny_model(DDP_MODEL), args, train_dataset=token_rows(), **values)
        flat = FullyShardedDataParallel(trainer.model, device_id=torch.device("cpu"))
        with pytest.raises(NotImplementedError, match=r"FSDP1.*fsdp_version 2"):
            trainer.create_optimizer(flat)


# ---- torch.distributed.checkpoint of sharded state ----


def checkpoint_zero_step(folder: Path, name: str) -> None:
    model = sharded(uneven_model())
    before = {key: full(value).clone() for key, value in model.state_dict().items()}
    saved = get_optimizer_state_dict(model, uneven_optimizer(name, model))
    for key, value in model.state_dict().items():
        assert torch.equal(full(value), before[key]), key
    assert saved["state"].keys() == before.keys()
    for key, state in saved["state"].items():
        assert all(full(value).isfinite().all() for value in state.values()), key
        moments = [full(value) for part, value in state.items() if part != "step"]
        assert not any(moment.count_nonzero() for moment in moments), key


def checkpoint_resumes(folder: Path, name: str) -> None:
    """3 steps, saved to a folder and loaded into new objects, and 3 more equal 6 steps bit by bit."""
    whole = sharded(uneven_model())
    optimizer = uneven_optimizer(name, whole)
    train_steps(whole, optimizer, range(3), is_sharded=True)
    state = {"model": get_model_state_dict(whole), "optimizer": get_optimizer_state_dict(whole, optimizer)}
    dcp.save(state, checkpoint_id=str(folder / f"dcp_{name}"))
    gathered = StateDictOptions(full_state_dict=True)
    box = [get_model_state_dict(whole, options=gathered), get_optimizer_state_dict(whole, optimizer, options=gathered)]
    dist.broadcast_object_list(box, src=0)
    weights, moments = copy.deepcopy(box)  # on rank 0 the step counters are those of the optimizer
    train_steps(whole, optimizer, range(3, 6), is_sharded=True)
    expected = full_state(whole, optimizer)

    resumed = sharded(uneven_model())
    fresh = uneven_optimizer(name, resumed)
    loaded = {"model": get_model_state_dict(resumed), "optimizer": get_optimizer_state_dict(resumed, fresh)}
    dcp.load(loaded, checkpoint_id=str(folder / f"dcp_{name}"))
    set_model_state_dict(resumed, loaded["model"])
    set_optimizer_state_dict(resumed, fresh, loaded["optimizer"])
    train_steps(resumed, fresh, range(3, 6), is_sharded=True)
    found = full_state(resumed, fresh)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key

    # Two ranks to one: every rank goes on alone, from the whole state of rank 0.
    alone = uneven_model()
    alone_optimizer = uneven_optimizer(name, alone)
    set_model_state_dict(alone, weights)
    set_optimizer_state_dict(alone, alone_optimizer, moments)
    train_steps(alone, alone_optimizer, range(3, 6), is_sharded=False)
    assert_close_to(expected, full_state(alone, alone_optimizer))


# ---- QK-Clip ----


def clipped(model: nn.Module, rows: slice, optimizer: torch.optim.Optimizer, clip: QKClip) -> dict[str, float]:
    """Three steps on some of 4 rows a step; what was clipped in them."""
    for step in range(3):
        tokens = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(step))[rows]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = clip.drain()
    clip.detach()
    return report


def qk_clip_equals_one_process(folder: Path, engine: str) -> None:
    """The logits of both ranks' rows count on both. 27 rows of 3 heads: FSDP2 cuts through a head, unevenly."""
    sizes = {"hidden_size": 27, "num_attention_heads": 3, "word_embed_proj_dim": 27, "dropout": 0.0}
    models = [tiny_model("opt", **sizes) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                parameter *= 12 if "q_proj" in name or "k_proj" in name else 1
    choice = MuonOptions(map_dtype="float32", qk_clip=0.3)
    optimizer = create_optimizer("muon", models[0], lr=1e-3, eps=1e-5, options=choice)
    expected = clipped(models[0], slice(None), optimizer, optimizer.qk_clip)
    assert 6 <= expected["qk_clip/clipped_heads"] < 18

    trained = models[1]
    if engine == "ddp":
        trained = nn.parallel.DistributedDataParallel(trained)
    else:
        shape, names = ((2, 1), ("replicate", "shard")) if engine == "hsdp" else ((2,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in trained.model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(trained, mesh=mesh)
    sharded_optimizer = create_optimizer("muon", trained, lr=1e-3, eps=1e-5, options=choice)
    assert all(isinstance(p, DTensor) == (engine != "ddp") for p in trained.parameters())
    half = slice(0, 2) if dist.get_rank() == 0 else slice(2, 4)
    found = clipped(trained, half, sharded_optimizer, sharded_optimizer.qk_clip)
    assert found["qk_clip/clipped_heads"] == expected["qk_clip/clipped_heads"]
    torch.testing.assert_close(found["qk_clip/max_logit"], expected["qk_clip/max_logit"], rtol=1e-4, atol=0)
    tensors = full_state(models[1], sharded_optimizer)
    assert_same_on_all_ranks(tensors)
    assert_close_to(full_state(models[0], optimizer), tensors)


def qk_clip_refuses_tensor_parallel(folder: Path) -> None:
    model = tiny_model("llama")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for layer in model.model.layers:
        styles = {"self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel()}
        parallelize_module(layer, mesh, styles)
    with pytest.raises(NotImplementedError, match=r"cut over the device mesh \('tp',\)"):
        QKClip(model, 100.0)


def trainer_fsdp2_qk_clip_equals_ddp(folder: Path) -> None:
    values = {"optim": "muon", "optim_args": "map_dtype=float32,qk_clip=0.01"}
    trainer = fsdp2_training(folder, "FULL_STATE_DICT", **values)
    found = full_state(trainer.model, optimizer_of(trainer))
    assert_same_on_all_ranks(found)
    ddp = Trainer(
        tiny_model(DDP_MODEL), arguments(folder, **{**DDP_ARGUMENTS, **values}), train_dataset=token_rows(48)
    )
    ddp.train()
    assert_close_to(full_state(ddp.model, optimizer_of(ddp)), found)
    for one, other in zip(trainer.state.log_history[:STEPS], ddp.state.log_history[:STEPS], strict=True):
        assert one["qk_clip/clipped_heads"] == other["qk_clip/clipped_heads"]
        assert one["qk_clip/clipped_heads"] > 0
        torch.testing.assert_close(one["qk_clip/max_logit"], other["qk_clip/max_logit"], rtol=1e-4, atol=0)


CASES: dict[str, Callable[[Path], None]] = {
    **{f"ddp_{name}": partial(ddp_training, name=name) for name in OPTIMIZER_NAMES},
    "ddp_resume": ddp_resume,
    "ddp_adamw_only": ddp_adamw_only,
    **{f"ddp_unused_parameters_{name}": partial(ddp_unused_parameters, name=name) for name in OPTIMIZER_NAMES},
    **{f"fsdp_{name}": partial(fsdp_equals_one_process, name=name) for name in OPTIMIZER_NAMES},
    "fsdp_hybrid": partial(fsdp_equals_one_process, name="muon", is_hybrid=True),
    "fsdp_swaps_parameters": fsdp_swaps_parameters,
    "fsdp_diagnostics": fsdp_diagnostics_equal_one_process,
    "fsdp_diagnostics_hybrid": partial(fsdp_diagnostics_equal_one_process, is_hybrid=True),
    "trainer_fsdp2_diagnostics": trainer_fsdp2_diagnostics,
    "trainer_fsdp2_clip_all": partial(trainer_fsdp2_equals_ddp, clip="all"),
    "trainer_fsdp2_clip_adamw_only": partial(trainer_fsdp2_equals_ddp, clip="adamw_only"),
    "trainer_fsdp2_resumes_full": partial(trainer_fsdp2_resumes, state_dict_type="FULL_STATE_DICT"),
    "trainer_fsdp2_resumes_sharded": partial(trainer_fsdp2_resumes, state_dict_type="SHARDED_STATE_DICT"),
    **{f"qk_clip_{engine}": partial(qk_clip_equals_one_process, engine=engine) for engine in ("ddp", "fsdp", "hsdp")},
    "qk_clip_refuses_tensor_parallel": qk_clip_refuses_tensor_parallel,
    "trainer_fsdp2_qk_clip": trainer_fsdp2_qk_clip_equals_ddp,
    "trainer_refuses_fsdp1": trainer_refuses_fsdp1,
    **{f"checkpoint_zero_step_{name}": partial(checkpoint_zero_step, name=name) for name in OPTIMIZER_NAMES},
    **{f"checkpoint_resumes_{name}": partial(checkpoint_resumes, name=name) for name in OPTIMIZER_NAMES},
}
