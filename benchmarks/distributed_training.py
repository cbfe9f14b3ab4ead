"""Tokens per second a GPU of training with Trainer on several GPUs; ``distributed_step.py --trainer`` calls it."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from device_timing import release_memory
from distributed_results import left_to_run
from process_group import FailedOnAllRanksError, Processes
from training_loops import OptimizerChoice, TokenRows, WindowClock, build_config, build_model, train_with_trainer

#: Rows of random tokens, which begin again where they end: speed does not depend on them.
ROWS = 64
#: More of ``TrainingArguments``; accelerate's FSDP2 wraps each decoder layer by itself.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"ddp_find_unused_parameters": False},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
}


def random_rows(model: str, context: int, length: int) -> TokenRows:
    """Rows of random tokens of the model's vocabulary."""
    config = build_config(model, context)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, ROWS * context)
    return TokenRows(tokens, config, context, length, from_novels=False)


def loop_settings(args: argparse.Namespace) -> argparse.Namespace:
    """What ``training_loops`` wants to know."""
    return argparse.Namespace(
        device=args.device,
        dtype="bfloat16",
        compile=False,
        nan_filter=args.nan_filter,
        max_grad_norm=1.0,
        learning_rate=3e-4,
        windows=args.windows,
        seed=0,
    )


def train_once(choice: OptimizerChoice, rows: TokenRows, args: argparse.Namespace) -> dict[str, Any]:
    """Build the model and train it; returns this rank's measurements."""
    clock = WindowClock(args.device, args.warmup, args.window_steps)
    model = build_model(build_config(args.trainer_model, args.context), args.device, "sdpa", 0)
    engine = {key: value.copy() if isinstance(value, dict) else value for key, value in ENGINES[args.engine].items()}
    mean_loss = train_with_trainer(model, rows, args.batch, choice, clock, loop_settings(args), **engine)
    return {
        "window_seconds": clock.window_seconds,
        "optimizer_milliseconds": clock.optimizer_milliseconds(),
        "peak_memory_bytes": clock.peak_memory_bytes,
        "mean_loss": mean_loss,
    }


def result_of(args: argparse.Namespace) -> dict[str, Any]:
    """Trainer's settings, and no runs yet."""
    return {
        "model": args.trainer_model,
        "engine": args.engine,
        "batch": args.batch,
        "context": args.context,
        "nan_filter": args.nan_filter,
        "window_steps": args.window_steps,
        "windows": args.windows,
        "runs": [],
    }


def train_all(
    ranks: Processes, args: argparse.Namespace, write: Callable[[dict[str, Any]], None], saved: dict[str, Any]
) -> dict[str, Any]:
    """Train with each optimizer; ``write`` is called with what there is after each.

    Args:
        saved: what an earlier run may have left, see ``distributed_results``.
    """
    steps = args.warmup + args.window_steps * args.windows
    rows = random_rows(args.trainer_model, args.context, args.batch * ranks.size * steps)
    result = saved["trainer"] or result_of(args)
    write(result)
    asked = {(choice.text,): choice for choice in args.trainer_optimizers}
    for choice in left_to_run(result["runs"], asked, ("optimizer",)):
        run: dict[str, Any] = {"optimizer": choice.text}
        try:
            every = ranks.together(partial(train_once, choice, rows, args))
            seconds = [max(windows) for windows in zip(*(each["window_seconds"] for each in every), strict=True)]
            tokens = args.batch * args.context * args.window_steps
            memory = [each["peak_memory_bytes"] for each in every]
            run |= {
                "tokens_per_second_a_rank": [tokens / each for each in seconds],
                "window_seconds": seconds,
                "optimizer_milliseconds": max(statistics.median(each["optimizer_milliseconds"]) for each in every),
                "peak_memory_bytes": None if None in memory else max(memory),
                "mean_loss": every[0]["mean_loss"],
            }
            outcome = f"{statistics.median(run['tokens_per_second_a_rank']):,.0f} tokens/s a rank"
        except FailedOnAllRanksError as error:
            run["error"] = outcome = str(error)
        result["runs"].append(run)
        write(result)
        release_memory(args.device)
        ranks.say(f"{args.trainer_model}, Trainer, {args.engine}: {choice.text}: {outcome}")
    return result


def table(result: dict[str, Any], world_size: int) -> str:
    """Markdown."""
    done = [run for run in result["runs"] if "error" not in run]
    medians = {run["optimizer"]: statistics.median(run["tokens_per_second_a_rank"]) for run in done}
    lines = [
        f"Trainer, {result['model']}, {result['engine']} on {world_size} ranks, {result['batch']} x "
        f"{result['context']} tokens a rank and step, bfloat16, torch {torch.__version__}",
        "",
        "| optimizer | tokens/s a rank | range | x AdamW | optimizer ms | peak GiB | mean loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in done:
        speeds, memory = run["tokens_per_second_a_rank"], run["peak_memory_bytes"]
        cells = [
            run["optimizer"],
            f"{medians[run['optimizer']]:,.0f}",
            f"{min(speeds):,.0f} - {max(speeds):,.0f}",
            f"{medians[run['optimizer']] / medians['adamw']:.3f}" if "adamw" in medians else "",
            f"{run['optimizer_milliseconds']:.2f}",
            "" if memory is None else f"{memory / 2**30:.1f}",
            f"{run['mean_loss']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{run['optimizer']}: {run['error']}" for run in result["runs"] if "error" in run]
    return "\n".join([*lines, *(["", f"Failed: {'; '.join(failed)}"] if failed else [])])
