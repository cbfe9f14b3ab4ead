"""Time, memory and share of the floor of ``optimizer.step()``: this package, torch and others that are installed.

    python benchmarks/optimizer_step.py                                  # the demo's model on this machine
    python benchmarks/optimizer_step.py --model gpt2-large --device cuda
    python benchmarks/optimizer_step.py --model path/to/config.json --optimizers adamw,muon,mud_graph --json steps.json

Every optimizer steps the same parameters with the same gradients (rank 32 plus noise, as gradients of large batches
are), in turns, so that what disturbs the machine disturbs all of them. The table gives medians, the spread between the
quartiles, and ratios to torch's fused AdamW and torch.optim.Muon of the same run.

"host ms" is how long ``step()`` takes to return on a GPU, which works on behind it: where it is close to the median,
the host is the limit. GB/s and TFLOP/s are the bytes and operations that the rule needs (``step_floor.py``), not those
that a program spends, over the median; the floor is those bytes at the speed of a large copy plus those operations at
the speed of a large product, both measured on the device at the start of the run. Where everything fits into a CPU's
cache, a step can be faster than that.

The file of ``--json`` holds ``milliseconds`` and, on a GPU, ``host_milliseconds`` (a list an optimizer, every timed
step) and ``workspace_bytes`` (peak of the memory that an optimizer takes beside its state); ``counts``
(``bytes``, ``flops`` and ``floor_milliseconds`` of a step), ``peaks``, ``absent`` and ``failed`` (optimizers that were
not run, and why), and what was run where.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contenders import OPTIMIZERS, Contender, Groups, all_of, fresh, matrices_of
from device_timing import (
    check_device,
    check_output,
    environment,
    first_line,
    graph_pool_bytes,
    release_memory,
    synchronize,
    timed,
)
from step_floor import matrix_shapes, measure_peaks, state_bytes_of, step_counts
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, EsmConfig, GPT2Config, PretrainedConfig, Qwen2Config

from hf_matrix_optim.partition import param_groups_for

GRADIENT_RANK = 32
DEFAULT_OPTIMIZERS = "adamw,torch_muon,muon,adamuon,mud"


def qwen2_5(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=151936,
        tie_word_embeddings=True,
    )


def gpt2(layers: int, heads: int, width: int) -> GPT2Config:
    return GPT2Config(n_layer=layers, n_head=heads, n_embd=width)


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "demo": lambda: Qwen2Config(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
    ),
    "gpt2-small": lambda: gpt2(12, 12, 768),
    "gpt2-medium": lambda: gpt2(24, 16, 1024),
    "gpt2-large": lambda: gpt2(36, 20, 1280),
    "qwen2.5-0.5b": lambda: qwen2_5(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": lambda: qwen2_5(1536, 8960, 28, 12, 2),
    "esm2-150m": lambda: EsmConfig(
        vocab_size=33,
        hidden_size=640,
        num_hidden_layers=30,
        num_attention_heads=20,
        intermediate_size=2560,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
    ),
}


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a name in ``MODELS``, or of a config.json, a folder or a Hub name.

    Raises:
        ValueError: if there is none.
    """
    if name in MODELS:
        return MODELS[name]()
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} is not one of {', '.join(MODELS)}, and not a configuration either: {first_line(error)}"
        ) from None


def meta_groups(config: PretrainedConfig, scope: str) -> Groups:
    """Param groups of the model without memory; for scope "matrices" the matrix groups alone."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return [group for group in param_groups_for(model) if scope == "all" or group["role"] == "matrix"]


def random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A float32 weight on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device).mul_(0.02)


def random_gradient(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A float32 gradient on the generator's device: of a matrix, rank ``GRADIENT_RANK`` plus noise."""
    device = generator.device
    grad = torch.randn(shape, generator=generator, device=device)
    if len(shape) == 2:
        left = torch.randn(shape[0], GRADIENT_RANK, generator=generator, device=device)
        right = torch.randn(GRADIENT_RANK, shape[1], generator=generator, device=device)
        grad = 0.1 * grad + left @ right / GRADIENT_RANK**0.5
    return grad * 1e-3


def build_groups(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, scope: str) -> Groups:
    """``meta_groups`` with random weights and gradients."""
    groups = meta_groups(config, scope)
    generator = torch.Generator(device).manual_seed(0)
    for group in groups:
        group["params"] = [nn.Parameter(random_weight(p.shape, generator).to(dtype)) for p in group["params"]]
    for p in all_of(groups):
        p.grad = random_gradient(p.shape, generator).to(dtype)
    return groups


@dataclass
class Measured:
    """The timed steps of one optimizer over all rounds."""

    milliseconds: list[float] = field(default_factory=list)
    host_milliseconds: list[float] = field(default_factory=list)
    workspace_bytes: int = 0
    counts: dict[str, float] = field(default_factory=dict)


def measure_round(contender: Contender, groups: Groups, args: argparse.Namespace, into: Measured) -> None:
    """Build the optimizer, warm it up, and add its timed steps to ``into``."""
    device = args.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    optimizer = contender(fresh(groups))
    for _ in range(args.warmup):
        optimizer.step()
    into.counts = step_counts(contender, optimizer, groups)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(args.steps):
        milliseconds, host_milliseconds = timed(optimizer.step, device)
        into.milliseconds.append(milliseconds)
        into.host_milliseconds.append(host_milliseconds)
    if device.type == "cuda":
        beside_state = torch.cuda.max_memory_allocated(device) - before - state_bytes_of(optimizer, all_of(groups))
        into.workspace_bytes = beside_state + graph_pool_bytes(device)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every optimizer of ``args.optimizers``; returns what ``--json`` writes."""
    device = args.device
    peaks = measure_peaks(device)
    groups = build_groups(args.config, device, getattr(torch, args.dtype), args.scope)
    measured = {name: Measured() for name in args.optimizers}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for name in args.optimizers:
            if name in failed:
                continue
            try:
                measure_round(OPTIMIZERS[name], groups, args, measured[name])
            except Exception as error:  # one optimizer's failure must not cost the times of the others
                failed[name] = f"{type(error).__name__}: {first_line(error)}"
            release_memory(device)
    done = {name: found for name, found in measured.items() if name not in failed}
    return {
        "model": args.model,
        "scope": args.scope,
        "parameters": sum(p.numel() for p in all_of(groups)),
        "matrix_parameters": len(matrices_of(groups)),
        "matrices": len(matrix_shapes(groups, split=True)),
        "dtype": args.dtype,
        **environment(device),
        "peaks": vars(peaks),
        "milliseconds": {name: found.milliseconds for name, found in done.items()},
        "host_milliseconds": {n: found.host_milliseconds for n, found in done.items() if device.type == "cuda"},
        "workspace_bytes": {n: found.workspace_bytes for n, found in done.items() if device.type == "cuda"},
        "counts": {
            name: {**found.counts, "floor_milliseconds": peaks.floor_milliseconds(found.counts)}
            for name, found in done.items()
        },
        "absent": args.absent,
        "failed": failed,
    }


def rounded(number: float) -> str:
    """A number of three digits or more where it is large, two decimals where it is small."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def table(result: dict[str, Any]) -> str:
    """Markdown: median, spread, ratios, rates and share of the floor."""
    times, peaks = result["milliseconds"], result["peaks"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    steps = f"{len(next(iter(times.values())))} steps each" if times else "nothing was timed"
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.2f} M parameters ({result['scope']}; {result['matrices']} "
        f"matrices), {result['dtype']}, {result['device']}, {result['threads']} threads, torch "
        f"{result['versions']['torch']}, {result['date']}; {steps}",
        f"Measured peaks: copy {rounded(peaks['copy_bytes_per_second'] / 1e9)} GB/s, {peaks['product']} product "
        f"{rounded(peaks['product_flops_per_second'] / 1e12)} TFLOP/s",
        "",
        "| optimizer | median ms | quartiles ms | x AdamW | x torch Muon | host ms | GB/s | TFLOP/s | floor ms "
        "| of floor | workspace MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratios = [
            f"{medians[name] / medians[other]:.2f}" if other in medians else "" for other in ("adamw", "torch_muon")
        ]
        counts = result["counts"][name]
        workspace, host = (result[key].get(name) for key in ("workspace_bytes", "host_milliseconds"))
        cells = [
            OPTIMIZERS[name].label or name,
            f"{medians[name]:.2f}",
            f"{low:.2f} - {high:.2f}",
            *ratios,
            f"{statistics.median(host):.2f}" if host else "",
            rounded(counts["bytes"] / medians[name] / 1e6),
            rounded(counts["flops"] / medians[name] / 1e9) if counts["flops"] else "",
            f"{counts['floor_milliseconds']:.2f}",
            f"{counts['floor_milliseconds'] / medians[name]:.0%}",
            "" if workspace is None else f"{workspace / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for heading in ("absent", "failed"):
        if result[heading]:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in result[heading].items())
            lines += ["", f"{heading.capitalize()}: {reasons}"]
    return "\n".join(lines)


def chosen_optimizers(
    parser: argparse.ArgumentParser, text: str, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """Names to run, and those left out of "all" with the reason; stops the program at a name that cannot run."""
    reasons = {name: contender.why_not(device) for name, contender in OPTIMIZERS.items()}
    if text == "all":
        return [name for name in OPTIMIZERS if not reasons[name]], {n: why for n, why in reasons.items() if why}
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in OPTIMIZERS:
            parser.error(f"unknown optimizer {name!r}: choose from {', '.join(OPTIMIZERS)}, or all")
        if reasons[name]:
            parser.error(f"optimizer {name!r} cannot run: {reasons[name]}")
    return names, {}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"{', '.join(MODELS)}, or a config.json, folder or Hub name")
    parser.add_argument(
        "--optimizers",
        default=DEFAULT_OPTIMIZERS,
        help=f"names separated by commas ({', '.join(OPTIMIZERS)}), or all: those that can run here. "
        "Default: %(default)s",
    )
    parser.add_argument("--scope", choices=("matrices", "all"), default="matrices", help="which parameters to step")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed, a round")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every optimizer")
    parser.add_argument("--json", type=Path, help="write the raw times (milliseconds) to this file")
    args = parser.parse_args(argv)
    for name in ("warmup", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least 1")
    if args.steps * args.rounds < 2:
        parser.error("--steps 1 --rounds 1: one of them must be at least 2, for the quartiles")
    check_output(parser, args.json)
    args.device = check_device(parser, args.device)
    args.optimizers, args.absent = chosen_optimizers(parser, args.optimizers, args.device)
    try:
        args.config = load_config(args.model)
    except ValueError as error:
        parser.error(f"--model: {error}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    result = measure(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
