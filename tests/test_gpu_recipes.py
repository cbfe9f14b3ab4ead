"""What only a GPU can show of the recipes: no wait for the device between logs, and the kernels that are taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipe import flags, losses, record, run, write_text
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers import trainer as trainer_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class NoWaiting(TrainerCallback):
    """Makes any wait for the GPU an error from the end of step 4 to the end of step 8."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (4, 8):
            torch.cuda.set_sync_debug_mode("error" if state.global_step == 4 else "default")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(trainer_module, "DEFAULT_CALLBACKS", [*trainer_module.DEFAULT_CALLBACKS, NoWaiting])
    yield
    torch.cuda.set_sync_debug_mode("default")


def gpu_flags(text: Path, cache: str, output: Path, *more: str, family: str) -> list[str]:
    argv = flags(text, cache, output, *more, family=family)
    argv[argv.index("--use_cpu") + 1] = "false"
    return [*argv, "--max_steps", "10", "--logging_steps", "10", "--save_strategy", "no", "--eval_strategy", "no"]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon", "adamuon", "mud"])
@pytest.mark.parametrize("family", ["qwen2_5", "gpt2", "esm2", "cifar10"])
def test_steps_between_logs_do_not_wait(tmp_path: Path, no_waiting: Any, family: str, optim: str) -> None:
    text = write_text(tmp_path)
    argv = gpu_flags(text, str(tmp_path / "cache"), tmp_path / "out", "--optim", optim, family=family)
    argv += ["--bf16", "true", "--dataloader_num_workers", "1"]
    if family != "cifar10":
        argv += ["--per_device_train_batch_size", "2"]
    assert run(argv, family) == 0
    results = record(tmp_path / "out")["results"]
    assert results["timed_steps"] == 9
    assert results["peak_memory_bytes"] > 2**20
    assert 0 < results["optimizer_seconds"] < results["train_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "esm2"])
def test_compiled_steps_are_the_same_and_do_not_wait(tmp_path: Path, no_waiting: Any, family: str) -> None:
    text = write_text(tmp_path)
    curves = []
    for compiled in ("false", "true"):
        output = tmp_path / compiled
        argv = gpu_flags(text, str(tmp_path / "cache"), output, "--torch_compile", compiled, family=family)
        assert run([*argv, "--bf16", "true"], family) == 0
        curves.append(losses(output))
    assert curves[1] == pytest.approx(curves[0], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_causal_run_takes_the_flash_kernel(tmp_path: Path, compiled: str) -> None:
    text = write_text(tmp_path)
    argv = gpu_flags(text, str(tmp_path / "cache"), tmp_path / "out", "--torch_compile", compiled, family="gpt2")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        assert run([*argv, "--bf16", "true", "--max_steps", "3"], "gpt2") == 0
    kernels = {event.key for event in profiler.key_averages()}
    assert any(
        "flash" in kernel.lower() or ("cudnn" in kernel.lower() and "sdpa" in kernel.lower()) for kernel in kernels
    )
