"""What ``diagnostics`` costs: the time to measure one step, over the training steps between two of them.

    python benchmarks/diagnostics_overhead.py                                       # the demo's model on this machine
    python benchmarks/diagnostics_overhead.py --models gpt2-large --optimizers muon,mud --json diagnostics.json

One process trains a model in a bare loop (forward, backward, clipping, step) and times each step, and beside it what
``OptimizerDiagnostics`` does before and after ``optimizer.step()`` and to bring its values to the host. The device is
waited for around every part, which Trainer does not: the times are upper bounds. Medians over the steps.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from device_timing import check_device, check_output, environment, first_line, release_memory, timed
from optimizer_step import MODELS
from train_throughput import Workload, chosen_workloads
from training_loops import OptimizerChoice, TokenRows, build_config, build_model, collate, novel_tokens

from hf_matrix_optim import OptimizerDiagnostics


def measure(workload: Workload, choice: OptimizerChoice, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a training step and of measuring one, and the share of the latter at every ``--every`` steps."""
    config = build_config(workload.model, workload.context)
    model = build_model(config, args.device, args.attention, args.seed)
    optimizer = choice.build(model, 3e-4)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=args.per_layer)
    rows = TokenRows(
        args.tokens, config, workload.context, workload.batch * (args.steps + args.warmup), from_novels=True
    )
    training, measuring = [], []
    for step in range(args.warmup + args.steps):
        batch = collate([rows[step * workload.batch + i] for i in range(workload.batch)])
        batch = {key: tensor.to(args.device) for key, tensor in batch.items()}

        def forward_and_backward(batch: dict[str, torch.Tensor] = batch) -> None:
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        parts = [forward_and_backward, diagnostics.before_step, optimizer.step, diagnostics.after_step]
        times = [timed(part, args.device)[0] for part in (*parts, diagnostics.values)]
        optimizer.zero_grad()
        if step >= args.warmup:
            training.append(times[0] + times[2])
            measuring.append(times[1] + times[3] + times[4])
    training_step, measured_step = statistics.median(training), statistics.median(measuring)
    return {
        "model": str(workload),
        "optimizer": choice.text,
        "matrices": diagnostics.values()["diagnostics/matrices"],
        "training_milliseconds": training_step,
        "measuring_milliseconds": measured_step,
        "share": measured_step / (args.every * training_step + measured_step),
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", default="demo", help=f"names separated by commas: {', '.join(MODELS)}. Default: demo")
    add("--optimizers", default="muon", help="names separated by commas, with options after colons. Default: muon")
    add("--every", type=int, default=50, help="measure every so many steps. Default: %(default)s")
    add("--per_layer", action=argparse.BooleanOptionalAction, default=False, help="a value for each layer too")
    add("--batch", type=int, help="sequences of a step. Default: that of train_throughput.py")
    add("--context", help="tokens of a sequence. Default: that of train_throughput.py")
    add("--steps", type=int, default=20, help="timed steps. Default: %(default)s")
    add("--warmup", type=int, default=3, help="steps before them. Default: %(default)s")
    add("--attention", default="sdpa", help="attention implementation of transformers. Default: %(default)s")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of autocast. Default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda. Default: %(default)s")
    add("--seed", type=int, default=0, help="of the weights. Default: %(default)s")
    add("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    for name in ("every", "steps", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least 1")
    check_output(parser, args.json)
    args.device = check_device(parser, args.device)
    try:
        args.optimizers = [OptimizerChoice(text) for text in dict.fromkeys(args.optimizers.split(","))]
        for choice in args.optimizers:
            choice.check(["bare"])
            if choice.name == "adamw":
                raise ValueError("adamw has no diagnostics: choose an optimizer of this package")
        args.workloads = list(chosen_workloads(args.models, args.batch, args.context))
        args.tokens = novel_tokens()
    except ValueError as error:
        parser.error(first_line(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    results = []
    print(f"| model | optimizer | matrices | training step, ms | measuring, ms | share at every {args.every} steps |")
    print("|---|---|---:|---:|---:|---:|")
    for workload in args.workloads:
        for choice in args.optimizers:
            result = measure(workload, choice, args)
            release_memory(args.device)
            results.append(result)
            print(
                f"| {result['model']} | {result['optimizer']} | {result['matrices']} | "
                f"{result['training_milliseconds']:.1f} | {result['measuring_milliseconds']:.1f} | "
                f"{result['share']:.2%} |",
                flush=True,
            )
    if args.json is not None:
        content = {"settings": {"every": args.every, "dtype": args.dtype}, **environment(args.device)}
        args.json.write_text(json.dumps({**content, "results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
