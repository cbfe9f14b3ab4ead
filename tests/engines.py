"""Trainers of one tiny model on every engine that runs on CPUs, and what a run on several ranks must leave behind.

``one`` is a single process; ``config_*`` are models that transformers shards when it loads them, by its
``DistributedConfig``; ``fsdp2`` is accelerate's way. Every step sees the same ``ROWS_A_STEP`` rows, whatever the
number of ranks.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from rank_cases import DDP_ARGUMENTS, Fsdp2Trainer, assert_same_on_all_ranks, full, full_state
from tiny_models import tiny_model
from tiny_training import arguments, groups_of, optimizer_of, token_rows
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.distributed import DistributedConfig

from hf_matrix_optim.distributed_step import warn_once

STEPS = 6
#: Divisible by 1, 2 and 3 ranks, and by two micro-batches on two of them.
ROWS_A_STEP = 12
#: What distinguishes a run: its model, and arguments of Trainer.
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"model": "tied"},
    "biases": {"model": "qwen2_untied"},
    "experts": {"model": "qwen3_moe"},
    "lora": {"model": "lora"},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.05},
    "bfloat16": {"model": "bfloat16"},
}


def rank_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def configs() -> dict[str, dict[str, int]]:
    """Sizes of DistributedConfig by engine, for all ranks there are."""
    ranks = rank_count()
    found = {
        "config_fsdp": {"fsdp_size": ranks},
        "config_tp": {"tp_size": ranks},
        "config_replicas": {"fsdp_size": 1, "dp_replicate_size": ranks},
        "config_experts": {"fsdp_size": ranks, "ep_size": ranks},
    }
    if ranks == 4:
        found["config_hybrid"] = {"fsdp_size": 2, "dp_replicate_size": 2}
        found["config_fsdp_tp"] = {"fsdp_size": 2, "tp_size": 2}
    return found


def model_of(situation: str) -> nn.Module:
    name = SITUATIONS[situation].get("model", "llama")
    if name == "tied":
        return tiny_model("llama", tie_word_embeddings=True)
    if name == "bfloat16":
        return tiny_model("llama").to(torch.bfloat16)
    return with_adapters(tiny_model("llama")) if name == "lora" else tiny_model(name)


def with_adapters(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


def loaded_in_shards(folder: Path, engine: str, situation: str) -> nn.Module:
    """The same weights, sharded by transformers while it loads them; adapters come later and stay plain tensors."""
    base = model_of("plain" if situation == "lora" else situation)
    saved = folder / f"weights_{engine}_{situation}"
    if dist.get_rank() == 0:
        base.save_pretrained(saved)
    dist.barrier()
    model = type(base).from_pretrained(saved, distributed_config=DistributedConfig(**configs()[engine])).train()
    return with_adapters(model) if situation == "lora" else model


class TensorParallelTrainer(Trainer):
    """accelerate allows tensor parallel models on GPUs only; its check is the only thing that a CPU lacks."""

    def create_accelerator_and_postprocess(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ParallelismConfig, "_validate_accelerator", lambda self, accelerator: None)
            super().create_accelerator_and_postprocess()


def trainer_of(engine: str, folder: Path, situation: str, *, callbacks: Any = None, **values: Any) -> Trainer:
    """A Trainer whose steps see the same rows on every engine.

    Args:
        engine: "one", "ddp", "fsdp2", "fsdp2_sharded" (checkpoints in shards) or a key of ``configs()``.
        folder: of the run.
        situation: a key of ``SITUATIONS``.
        callbacks: of the Trainer.
        values: training arguments.
    """
    extra = {key: value for key, value in SITUATIONS[situation].items() if key != "model"}
    values = {**DDP_ARGUMENTS, "max_steps": STEPS, **extra, **values}
    if engine.startswith("fsdp2"):
        values |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "cpu_ram_efficient_loading": False,
                "state_dict_type": "SHARDED_STATE_DICT" if engine == "fsdp2_sharded" else "FULL_STATE_DICT",
            },
        }
    ranks_with_rows = 1 if engine in ("one", "config_tp") else rank_count()
    if engine == "config_fsdp_tp":
        ranks_with_rows //= 2
    values["per_device_train_batch_size"] = (
        ROWS_A_STEP // ranks_with_rows // values.get("gradient_accumulation_steps", 1)
    )
    args = arguments(folder / f"{engine}_{situation}", **values)
    is_config = engine.startswith("config_")
    model = loaded_in_shards(folder, engine, situation) if is_config else model_of(situation)
    trainer_class = TensorParallelTrainer if is_config else Fsdp2Trainer if engine.startswith("fsdp2") else Trainer
    return trainer_class(model, args, train_dataset=token_rows(ROWS_A_STEP * STEPS), callbacks=callbacks)


def train(trainer: Trainer, checkpoint: str | bool | None = None) -> None:
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        if isinstance(trainer, Fsdp2Trainer):  # accelerate's state outlives the trainer
            PartialState().distributed_type = DistributedType.MULTI_CPU if rank_count() > 1 else DistributedType.NO


def result_of(trainer: Trainer) -> dict[str, Any]:
    """All weights and all state, whole, and the losses; a collective for sharded ones."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tensors": full_state(trainer.model, optimizer_of(trainer)), "losses": losses}


def assert_close_results(expected: dict[str, Any], found: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses and tensors within ``tolerance`` (0: bit by bit), except counts that ranks keep for themselves."""
    assert len(found["losses"]) == len(expected["losses"]) > 0
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), atol=tolerance, rtol=0)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        other = found["tensors"][name]
        if tolerance == 0:
            assert torch.equal(other, tensor), name
        else:
            torch.testing.assert_close(
                other, tensor, atol=tolerance, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )


# ---- what must hold on every rank after a run ----


def assert_shared_out(trainer: Trainer, besides: str = "") -> None:
    """The plan lists every matrix of every matrix group, and each rank maps some of them.

    Args:
        trainer: after a step.
        besides: part of the names of matrices that lie whole on one rank each, as experts do.
    """
    groups = groups_of(trainer, "matrix")
    names = {name for group in groups for name in group["param_names"] if not besides or besides not in name}
    lines = optimizer_of(trainer).describe_plan().splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert {row[0].split("[")[0] for row in rows} == names
    assert len({row[3] for row in rows}) == rank_count(), {row[3] for row in rows}


def assert_laid_out_like_parameters(trainer: Trainer) -> None:
    optimizer = optimizer_of(trainer)
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state[p]
            for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if key in state:
                    assert type(state[key]) is (DTensor if isinstance(p, DTensor) else Tensor), (name, key)
                    assert getattr(state[key], "placements", None) == getattr(p, "placements", None), (name, key)
                    assert state[key].shape == p.shape, (name, key)
            assert "momentum_buffer" in state or "exp_avg" in state, name


def assert_same_weights_everywhere(trainer: Trainer) -> dict[str, Any]:
    """Returns ``result_of``."""
    result = result_of(trainer)
    assert_same_on_all_ranks(result["tensors"])
    return result


def assert_engine_is_what_it_says(trainer: Trainer, engine: str) -> None:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    sharded = [p for p in trained if isinstance(p, DTensor)]
    if engine == "ddp":
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        assert not sharded
    elif engine == "config_tp":
        assert sharded
        assert all(p.device_mesh.size() == rank_count() for p in sharded)
    elif engine != "one" and not (engine.startswith("config_") and isinstance(trainer.model, peft.PeftModel)):
        assert len(sharded) == len(trained)


@contextmanager
def warnings_of_the_step() -> Iterator[list[str]]:
    """What the package warns of, also where it has warned of the same before in this process."""
    warn_once.cache_clear()
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("transformers.hf_matrix_optim")
    logger.addHandler(handler)
    try:
        yield seen
    finally:
        logger.removeHandler(handler)


def initial_weights(situation: str) -> dict[str, Tensor]:
    return {name: full(p.detach()).clone() for name, p in model_of(situation).named_parameters()}
