"""Cases for several gloo processes; ``test_engines.py`` starts them. Each function runs on every rank.

A run leaves what came out of it in the folder, for comparison with one process and for resumed runs.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines import (
    assert_close_results,
    assert_engine_is_what_it_says,
    assert_laid_out_like_parameters,
    assert_same_weights_everywhere,
    assert_shared_out,
    rank_count,
    result_of,
    train,
    trainer_of,
    warnings_of_the_step,
)
from rank_cases import full
from tiny_training import OPTIMIZER_NAMES, optimizer_of
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import TrainerCallback

SAVING = {"save_strategy": "steps", "save_steps": 3}
#: Engines whose checkpoints Trainer resumes, each with the optimizers with which it is tried.
RESUMABLE = {
    "ddp": ("muon", "adamuon", "mud"),
    "fsdp2": ("muon", "adamuon_v1"),
    "fsdp2_sharded": ("adamuon", "mud"),
}


def result_path(folder: Path, engine: str, situation: str, name: str) -> Path:
    return folder / f"{engine}_{situation}_{name}.pt"


def trained(folder: Path, engine: str, situation: str, name: str) -> None:
    """A whole run, in which the matrices are shared out and all ranks agree."""
    values: dict[str, Any] = SAVING if engine in RESUMABLE and situation == "plain" else {}
    with warnings_of_the_step() as warned:
        trainer = trainer_of(engine, folder / name, situation, optim=name, **values)
        train(trainer)
    assert_engine_is_what_it_says(trainer, engine)
    if situation == "lora" and engine.startswith("config_"):  # plain adapters without DDP: nothing to share out
        assert optimizer_of(trainer).describe_plan().startswith("Nothing")
    elif engine == "config_fsdp_tp":
        assert len(warned) == 1, warned
        assert "gathered whole on every rank" in warned[0]
    else:
        assert_shared_out(trainer, besides="experts" if situation == "experts" else "")
    assert engine == "config_fsdp_tp" or not warned, warned
    assert_laid_out_like_parameters(trainer)
    result = assert_same_weights_everywhere(trainer)
    if dist.get_rank() == 0:
        torch.save(result, result_path(folder, engine, situation, name))
    dist.barrier()


def resumed(folder: Path, engine: str, name: str, killed: bool = False) -> None:
    """From step 3 on: bit by bit the run that was not interrupted, at its number of ranks; close to it at others."""
    run = folder / (f"killed_{engine}" if killed else name)
    output = run / f"{engine}_plain"
    steps = StepCounter()
    trainer = trainer_of(engine, run, "plain", optim=name, callbacks=[steps])
    train(trainer, True if killed else str(output / "checkpoint-3"))
    assert steps.seen == [3, 4, 5]
    if rank_count() > 1:
        assert_engine_is_what_it_says(trainer, engine)
        assert_shared_out(trainer)
    assert_laid_out_like_parameters(trainer)
    result = assert_same_weights_everywhere(trainer)
    expected = torch.load(result_path(folder, engine, "plain", name), weights_only=True)
    assert_close_results(expected, result, 0 if rank_count() == 2 else 1e-5)


class StepCounter(TrainerCallback):
    """Numbers of the steps that a run takes."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


class MomentumRecorder(TrainerCallback):
    """Whole copies of the state at the beginning of training, and after step 3."""

    def __init__(self) -> None:
        self.begin: dict[str, Tensor] = {}
        self.middle: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.begin = self.copies(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.middle = self.copies(kwargs["optimizer"])

    @staticmethod
    def copies(optimizer: Any) -> dict[str, Tensor]:
        return {
            f"{name}: {key}": full(value).clone()
            for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            for key, value in optimizer.state.get(p, {}).items()
        }


def bfloat16_momentum_is_kept(folder: Path, engine: str, name: str) -> None:
    """float32 momentum of bfloat16 parameters: after loading what it was at saving, bit by bit, and so at the end."""
    run = folder / f"bfloat16_{name}"
    whole, again = MomentumRecorder(), MomentumRecorder()
    results = []
    for recorder in (whole, again):
        checkpoint = str(run / f"{engine}_bfloat16" / "checkpoint-3") if recorder is again else None
        trainer = trainer_of(engine, run, "bfloat16", optim=name, callbacks=[recorder], **SAVING)
        train(trainer, checkpoint)
        assert all(p.dtype == torch.bfloat16 for p in trainer.model.parameters())
        results.append(result_of(trainer))
        dist.barrier()
    assert not whole.begin
    assert again.begin.keys() == whole.middle.keys()
    kept = [key for key in again.begin if key.endswith(("momentum_buffer", "skipped"))]
    assert kept
    for key, tensor in again.begin.items():
        assert tensor.dtype == whole.middle[key].dtype, key
        assert torch.equal(tensor, whole.middle[key]), key
        if key.endswith("momentum_buffer"):
            assert tensor.dtype == torch.float32, key
            assert not torch.equal(tensor, tensor.bfloat16().float()), key
    assert_close_results(*results, tolerance=0)


def config_resumes_by_dcp(folder: Path, engine: str, name: str) -> None:
    """Trainer does not save the optimizer of a model that transformers has sharded; torch's own state dicts do."""
    situation = "biases" if engine == "config_tp" else "plain"
    found: list[dict[str, Tensor]] = []
    saved: dict[str, Any] = {}
    for is_resumed in (False, True):
        trainer = trainer_of(engine, folder / f"dcp_{name}", situation, optim=name)
        model, optimizer = trainer.model, trainer.create_optimizer()
        if is_resumed:
            set_model_state_dict(model, saved["model"])
            set_optimizer_state_dict(model, optimizer, saved["optimizer"])
        for step in range(3 if is_resumed else 0, 6):
            if step == 3 and not is_resumed:
                saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
                saved = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, saved)
            tokens = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(MomentumRecorder.copies(optimizer) | {n: full(p.detach()) for n, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key]), key


def cases(ranks: int) -> dict[str, Callable[[Path], None]]:
    """All cases for a number of ranks; those of 1 and 3 resume what two have left."""
    again = {
        f"resumed_{engine}_{name}": partial(resumed, engine=engine, name=name)
        for engine, names in RESUMABLE.items()
        for name in names
    }
    if ranks in (1, 3):
        return again
    runs = RUNS_OF_FOUR if ranks == 4 else RUNS
    found: dict[str, Callable[[Path], None]] = {
        "_".join(run): partial(trained, engine=run[0], situation=run[1], name=run[2]) for run in runs
    }
    if ranks == 4:
        return found
    found |= again
    for engine in ("ddp", "fsdp2"):
        found[f"resumed_after_kill_{engine}"] = partial(resumed, engine=engine, name="muon", killed=True)
    for engine, name in (("fsdp2", "muon"), ("fsdp2_sharded", "adamuon_v1")):
        found[f"bfloat16_{engine}_{name}"] = partial(bfloat16_momentum_is_kept, engine=engine, name=name)
    for engine, name in (("config_fsdp", "muon"), ("config_tp", "adamuon_v1")):
        found[f"dcp_{engine}_{name}"] = partial(config_resumes_by_dcp, engine=engine, name=name)
    return found


#: Engine, situation, optimizer.
RUNS = [
    *((engine, "plain", name) for engine in ("ddp", "fsdp2", "config_fsdp", "config_tp") for name in OPTIMIZER_NAMES),
    *(("fsdp2_sharded", "plain", name) for name in RESUMABLE["fsdp2_sharded"]),
    *(
        (engine, situation, "muon")
        for engine in ("ddp", "fsdp2", "config_fsdp")
        for situation in ("tied", "lora", "checkpointing", "accumulation", "clipped")
    ),
    ("fsdp2", "lora", "adamuon_v1"),
    ("config_replicas", "plain", "muon"),
    ("config_replicas", "accumulation", "adamuon_v1"),
    ("config_tp", "biases", "mud"),
    ("config_tp", "clipped", "muon"),
    ("config_tp", "checkpointing", "muon"),
    ("config_fsdp", "experts", "mud"),
    ("config_experts", "experts", "mud"),
]
RUNS_OF_FOUR = [("config_hybrid", "plain", "adamuon_v1"), ("config_fsdp_tp", "plain", "muon")]
CASES = {**cases(4), **cases(2)}
if dist.is_initialized():
    CASES = cases(dist.get_world_size())
