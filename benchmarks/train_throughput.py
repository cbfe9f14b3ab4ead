"""Tokens per second of training with Hugging Face Trainer and in a bare PyTorch loop, under each optimizer.

    python benchmarks/train_throughput.py                                            # a small model on this machine
    python benchmarks/train_throughput.py --models gpt2-large,esm2-150m --json train.json
    python benchmarks/train_throughput.py --models gpt2-large --context 2048 --optimizers adamw,mud,mud:kernels=torch

Both loops train the same model on the same batches with the same optimizer, learning rates, clipping, precision and
attention; ``mean_loss`` shows it. A run is warmed up and then timed in windows of steps; the device is waited for
between windows only. Optimizers and loops take turns, in one process. The table gives the median over all windows,
their range, the ratio to AdamW under the same loop, the ratio of Trainer to the bare loop, and the time of
``optimizer.step()`` on the device.

Trainer logs, saves and reports nothing here, and draws no bar. Its other settings are its defaults, among them
``logging_nan_inf_filter``, which waits for the device in every step (``--no-nan_filter`` switches it off).

Model FLOPs utilization (MFU) counts for each token 6 operations a weight of the linear layers, and 12 x layers x width
x context for attention, not halved for causal masks, over ``--peak_tflops``.

The file of ``--json`` is written after every run. It holds ``results``, one for each model and context, each with
``runs`` (``optimizer``, ``loop``, ``round``, ``window_seconds``, ``optimizer_milliseconds`` of the timed steps,
``peak_memory_bytes``, ``mean_loss`` of all steps; or ``error``) and their ``summary``, and what was run where.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_timing import check_device, check_output, environment, first_line, release_memory
from optimizer_step import MODELS
from training_loops import (
    LOOPS,
    OptimizerChoice,
    TokenRows,
    WindowClock,
    build_config,
    build_model,
    flops_per_token,
    novel_tokens,
    read_tokens,
)

from hf_matrix_optim.options import OPTIMIZER_NAMES

DEFAULT_OPTIMIZERS = "adamw,muon,adamuon,mud"
DENSE_BFLOAT16_TFLOPS = {"H100 80GB HBM3": 989.0, "H200": 989.0}  # NVIDIA's data sheets

#: Batch (sequences) and contexts (tokens) of each model.
WORKLOADS: dict[str, tuple[int, tuple[int, ...]]] = {
    "demo": (4, (128,)),
    "gpt2-small": (8, (1024,)),
    "gpt2-medium": (8, (1024,)),
    "gpt2-large": (8, (2048, 1024)),
    "qwen2.5-0.5b": (8, (1024,)),
    "qwen2.5-1.5b": (4, (1024,)),
    "esm2-150m": (8, (512,)),
}


@dataclass(frozen=True)
class Workload:
    """A model at one batch and context."""

    model: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.model} {self.batch} x {self.context}"


def run_once(
    workload: Workload, rows: TokenRows, choice: OptimizerChoice, loop: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Build the model, train it over ``rows``, and return what was measured."""
    clock = WindowClock(args.device, args.warmup, args.steps)
    model = build_model(build_config(workload.model, workload.context), args.device, args.attention, args.seed)
    mean_loss = LOOPS[loop](model, rows, workload.batch, choice, clock, args)
    return {
        "window_seconds": clock.window_seconds,
        "optimizer_milliseconds": clock.optimizer_milliseconds(),
        "peak_memory_bytes": clock.peak_memory_bytes,
        "mean_loss": mean_loss,
    }


def summarize(result: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over all windows of each optimizer and loop, and their ratios."""
    tokens_per_window = result["batch"] * result["context"] * args.steps
    speeds: dict[tuple[str, str], list[float]] = {}
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        if "error" not in run:
            key = run["optimizer"], run["loop"]
            runs.setdefault(key, []).append(run)
            speeds.setdefault(key, []).extend(tokens_per_window / seconds for seconds in run["window_seconds"])
    medians = {key: statistics.median(values) for key, values in speeds.items()}

    def ratio(key: tuple[str, str], other: tuple[str, str]) -> float | None:
        return medians[key] / medians[other] if other in medians else None

    rows = []
    for (optimizer, loop), speed in medians.items():
        key = optimizer, loop
        step_milliseconds = 1e3 * result["batch"] * result["context"] / speed
        optimizer_milliseconds = statistics.median(ms for run in runs[key] for ms in run["optimizer_milliseconds"])
        memory = [run["peak_memory_bytes"] for run in runs[key] if run["peak_memory_bytes"] is not None]
        rows.append(
            {
                "optimizer": optimizer,
                "loop": loop,
                "tokens_per_second": speed,
                "lowest_tokens_per_second": min(speeds[key]),
                "highest_tokens_per_second": max(speeds[key]),
                "ratio_to_adamw": ratio(key, ("adamw", loop)),
                "ratio_to_bare": ratio(key, (optimizer, "bare")) if loop == "trainer" else None,
                "step_milliseconds": step_milliseconds,
                "optimizer_milliseconds": optimizer_milliseconds,
                "optimizer_share": optimizer_milliseconds / step_milliseconds,
                "peak_memory_bytes": max(memory, default=None),
                "model_flops_utilization": (
                    speed * result["flops_per_token"] / args.peak_tflops / 1e12 if args.peak_tflops else None
                ),
                "mean_loss": statistics.median(run["mean_loss"] for run in runs[key]),
            }
        )
    return rows


def table(result: dict[str, Any], settings: dict[str, Any]) -> str:
    """Markdown of one model and context."""

    def shown(value: float | None, form: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value / unit, form)

    peak = f", MFU of an assumed {settings['peak_tflops']:.0f} TFLOP/s" if settings["peak_tflops"] else ""
    lines = [
        f"{result['model']} {result['batch']} x {result['context']}: {result['parameters'] / 1e6:.1f} M parameters, "
        f"{settings['precision']}, {settings['attention']}, {'' if settings['compile'] else 'not '}compiled, "
        f"{settings['device']}, torch {settings['versions']['torch']}, transformers "
        f"{settings['versions']['transformers']}, {settings['date']}; {settings['rounds']} x "
        f"{settings['windows']} windows of {settings['steps']} steps{peak}",
        "",
        "| optimizer | loop | tokens/s | range | x AdamW | Trainer / bare | step ms | optimizer ms | share | peak GiB "
        "| MFU | mean loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["summary"]:
        cells = [
            row["optimizer"],
            row["loop"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['lowest_tokens_per_second']:,.0f} - {row['highest_tokens_per_second']:,.0f}",
            shown(row["ratio_to_adamw"], ".3f"),
            shown(row["ratio_to_bare"], ".3f"),
            f"{row['step_milliseconds']:.1f}",
            f"{row['optimizer_milliseconds']:.2f}",
            f"{row['optimizer_share']:.1%}",
            shown(row["peak_memory_bytes"], ".1f", 2**30),
            shown(row["model_flops_utilization"], ".1%"),
            f"{row['mean_loss']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    errors = {f"{run['optimizer']} ({run['loop']})": run["error"] for run in result["runs"] if "error" in run}
    if errors:
        lines += ["", f"Failed: {'; '.join(f'{what}: {error}' for what, error in errors.items())}"]
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything in turns, writing ``--json`` after each run and printing a table after each model and context."""
    everything: dict[str, Any] = {"settings": settings_of(args), "results": []}
    for workload, rows in args.workloads:
        config = build_config(workload.model, workload.context)
        model = build_model(config, torch.device("meta"), args.attention, args.seed)
        result: dict[str, Any] = {
            **vars(workload),
            "parameters": model.num_parameters(),
            "flops_per_token": flops_per_token(model, workload.context),
            "runs": [],
            "summary": [],
        }
        everything["results"].append(result)
        for turn in range(1, args.rounds + 1):
            for choice in args.optimizers:
                for loop in args.loops:
                    run: dict[str, Any] = {"optimizer": choice.text, "loop": loop, "round": turn}
                    try:
                        run.update(run_once(workload, rows, choice, loop, args))
                        outcome = f"{statistics.median(run['window_seconds']) / args.steps * 1e3:.1f} ms a step"
                    except Exception as error:  # one run that fails must not cost the others
                        run["error"] = outcome = f"{type(error).__name__}: {first_line(error)}"
                    result["runs"].append(run)
                    result["summary"] = summarize(result, args)
                    if args.compile:
                        torch._dynamo.reset()  # the next model's code would count as a recompilation of this one's
                    release_memory(args.device)
                    if args.json:
                        args.json.write_text(json.dumps(everything, indent=1) + "\n")
                    print(f"{workload}, round {turn}: {choice.text}, {loop}: {outcome}", file=sys.stderr, flush=True)
        print(f"\n{table(result, everything['settings'])}\n", flush=True)
    return everything


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on beside model, batch, context, optimizer and loop."""
    same = ("steps", "windows", "rounds", "warmup", "compile", "attention", "nan_filter", "max_grad_norm", "seed")
    return {
        **{name: getattr(args, name) for name in same},
        "precision": "bfloat16 autocast" if args.dtype == "bfloat16" else "float32",
        "learning_rate": args.learning_rate,
        "peak_tflops": args.peak_tflops,
        "tokens": "novels" if args.tokens is None else args.tokens.name,
        **environment(args.device),
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shapes = "; ".join(
        f"{name} {batch} x {', '.join(map(str, contexts))}" for name, (batch, contexts) in WORKLOADS.items()
    )
    add("--models", default="demo", help=f"names separated by commas: {', '.join(MODELS)}. Default: demo")
    add(
        "--optimizers",
        default=DEFAULT_OPTIMIZERS,
        help=f"names separated by commas (adamw, {', '.join(OPTIMIZER_NAMES)}), with options after colons as in "
        "mud:kernels=torch. Default: %(default)s",
    )
    add("--loop", choices=("both", *LOOPS), default="both", help="which loop to time. Default: both")
    add("--batch", type=int, help=f"sequences of a step. Default, batch x context: {shapes}")
    add("--context", help="tokens of a sequence; several numbers are separated by commas")
    add("--steps", type=int, default=10, help="steps of a window. Default: %(default)s")
    add("--windows", type=int, default=3, help="timed windows of a run. Default: %(default)s")
    add("--warmup", type=int, default=5, help="steps before the first window. Default: %(default)s")
    add("--rounds", type=int, default=2, help="turns of every optimizer and loop. Default: %(default)s")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    add("--attention", default="sdpa", help="attention implementation of transformers. Default: %(default)s")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="bfloat16 is autocast over float32 weights. Default: %(default)s",
    )
    add(
        "--nan_filter",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Trainer's logging_nan_inf_filter, which waits for the device in every step. Default: on, as Trainer's",
    )
    add("--max_grad_norm", type=float, default=1.0, help="clip gradients to this norm; 0 does not. Default: 1")
    add("--learning_rate", type=float, default=3e-4, help="peak of a cosine schedule. Default: %(default)s")
    add("--tokens", type=Path, help=".npy of integers or .bin of uint16, flat. Default: the bundled novels")
    add("--peak_tflops", type=float, help="of the device, in TFLOP/s, for the MFU. Default: 989 on H100 SXM and H200")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda. Default: %(default)s")
    add("--seed", type=int, default=0, help="of the weights. Default: %(default)s")
    add("--json", type=Path, help="write every window's seconds and the summary to this file")
    args = parser.parse_args(argv)

    for name in ("steps", "windows", "warmup", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least 1")
    for name in ("max_grad_norm", "learning_rate"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least 0")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        parser.error(f"--peak_tflops {args.peak_tflops}: it must be above 0")
    check_output(parser, args.json)
    args.device = check_device(parser, args.device)
    args.loops = list(LOOPS) if args.loop == "both" else [args.loop]
    if "trainer" in args.loops and args.device.type == "cuda" and torch.cuda.device_count() > 1:
        parser.error("Trainer would use all GPUs of this machine: set CUDA_VISIBLE_DEVICES to one of them")
    if args.peak_tflops is None and args.device.type == "cuda":
        name = torch.cuda.get_device_name(args.device)
        args.peak_tflops = next((peak for device, peak in DENSE_BFLOAT16_TFLOPS.items() if device in name), None)
    try:
        args.optimizers = [OptimizerChoice(text) for text in dict.fromkeys(args.optimizers.split(","))]
        for choice in args.optimizers:
            choice.check(args.loops)
        workloads = list(chosen_workloads(args.models, args.batch, args.context))
        tokens = novel_tokens() if args.tokens is None else read_tokens(args.tokens)
        args.workloads = [(workload, rows_of(workload, tokens, args)) for workload in workloads]
    except ValueError as error:
        parser.error(str(error))
    for workload in workloads:
        config = build_config(workload.model, workload.context)
        try:
            build_model(config, torch.device("meta"), args.attention, args.seed)
        except (ValueError, ImportError) as error:
            parser.error(f"--attention {args.attention}: {workload.model}: {first_line(error)} Use sdpa or eager")
    return args


def chosen_workloads(models: str, batch: int | None, contexts: str | None) -> list[Workload]:
    """The models at their contexts; ``batch`` and ``contexts`` replace those of ``WORKLOADS``.

    Raises:
        ValueError: for a model that does not exist and a number that is none or too small.
    """
    workloads = []
    for model in dict.fromkeys(models.split(",")):
        if model not in WORKLOADS:
            raise ValueError(f"unknown model {model!r}: choose from {', '.join(WORKLOADS)}")
        usual_batch, usual_contexts = WORKLOADS[model]
        try:
            lengths = usual_contexts if contexts is None else tuple(int(text) for text in contexts.split(","))
        except ValueError:
            raise ValueError(f"--context {contexts}: give whole numbers separated by commas") from None
        size = usual_batch if batch is None else batch
        if size < 1 or min(lengths) < 2:
            raise ValueError(f"--batch must be at least 1 and --context 2, not {size} and {min(lengths)}")
        workloads += [Workload(model, size, length) for length in lengths]
    return workloads


def rows_of(workload: Workload, tokens: np.ndarray, args: argparse.Namespace) -> TokenRows:
    """The rows of one run."""
    length = workload.batch * (args.warmup + args.steps * args.windows)
    config = build_config(workload.model, workload.context)
    return TokenRows(tokens, config, workload.context, length, from_novels=args.tokens is None)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    everything = measure(args)
    return 1 if any("error" in run for result in everything["results"] for run in result["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
