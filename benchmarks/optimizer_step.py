"""Time and memory of ``optimizer.step()`` for the optimizers of this package, torch's and others that are installed.

    python benchmarks/optimizer_step.py                                  # the demo's model on this machine
    python benchmarks/optimizer_step.py --model gpt2-large --device cuda
    python benchmarks/optimizer_step.py --model path/to/config.json --optimizers adamw,muon,mud --json steps.json

Every optimizer steps the same parameters with the same gradients (rank 32 plus noise, as gradients of large batches
are), in turns, so that what disturbs the machine disturbs all of them. The table gives medians, the spread between the
quartiles, and the ratio to torch's fused AdamW of the same run.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, EsmConfig, GPT2Config, PretrainedConfig, Qwen2Config

from hf_matrix_optim import MUD, AdaMuon, Muon
from hf_matrix_optim.partition import param_groups_for

GRADIENT_RANK = 32


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


def _torch_muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices_of(groups), lr=1e-3, adjust_lr_fn="match_rms_adamw")


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(all_of(groups), lr=1e-3, fused=True),
    "torch_muon": _torch_muon,
    "muon": lambda groups: Muon(groups, lr=1e-3),
    "adamuon": lambda groups: AdaMuon(groups, lr=1e-3),
    "adamuon_v1": lambda groups: AdaMuon(groups, lr=1e-3, variant="v1"),
    "mud": lambda groups: MUD(groups, lr=1e-3),
    "mud_2_passes": lambda groups: MUD(groups, lr=1e-3, passes=2),
}
LABELS = {"adamw": "torch.optim.AdamW(fused=True)", "torch_muon": "torch.optim.Muon"}


def all_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def matrices_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups if group["role"] == "matrix" for p in group["params"]]


def build_groups(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, scope: str
) -> list[dict[str, Any]]:
    """Param groups of the model with random weights and gradients; for scope "matrices" the matrix groups alone."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    groups = [group for group in param_groups_for(model) if scope == "all" or group["role"] == "matrix"]
    generator = torch.Generator(device).manual_seed(0)
    for group in groups:
        group["params"] = [
            nn.Parameter(torch.randn(p.shape, generator=generator, device=device).mul_(0.02).to(dtype))
            for p in group["params"]
        ]
    for p in all_of(groups):
        grad = torch.randn(p.shape, generator=generator, device=device)
        if p.ndim == 2:
            left = torch.randn(p.size(0), GRADIENT_RANK, generator=generator, device=device)
            right = torch.randn(GRADIENT_RANK, p.size(1), generator=generator, device=device)
            grad = 0.1 * grad + left @ right / GRADIENT_RANK**0.5
        p.grad = (grad * 1e-3).to(dtype)
    return groups


def fresh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups without what an optimizer has added to them."""
    kept = ("params", "param_names", "role", "output_axis", "flatten", "split_sizes", "interleaved", "weight_decay")
    return [{key: group[key] for key in kept if key in group} for group in groups]


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, until the device has finished."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    config = MODELS[args.model]() if args.model in MODELS else AutoConfig.from_pretrained(args.model)
    groups = build_groups(config, device, getattr(torch, args.dtype), args.scope)
    milliseconds: dict[str, list[float]] = {name: [] for name in args.optimizers}
    workspace: dict[str, int] = {}
    for _ in range(args.rounds):
        for name in args.optimizers:
            optimizer = OPTIMIZERS[name](fresh(groups))
            for _ in range(args.warmup):
                optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            milliseconds[name] += [timed(optimizer.step, device) for _ in range(args.steps)]
            if device.type == "cuda":
                workspace[name] = torch.cuda.max_memory_allocated() - before
            del optimizer
            gc.collect()
    return {
        "model": args.model,
        "scope": args.scope,
        "parameters": sum(p.numel() for p in all_of(groups)),
        "matrix_parameters": len(matrices_of(groups)),
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": date.today().isoformat(),
        "milliseconds": milliseconds,
        "workspace_bytes": workspace,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: median, spread and ratios."""
    times = result["milliseconds"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.2f} M parameters ({result['scope']}; "
        f"{result['matrix_parameters']} matrix parameters), {result['dtype']}, {result['device']}, "
        f"{result['threads']} threads, torch {result['versions']['torch']}, {result['date']}; "
        f"{len(next(iter(times.values())))} steps each",
        "",
        "| optimizer | median ms | quartiles ms | x AdamW | x torch Muon | workspace MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratios = [
            f"{medians[name] / medians[other]:.2f}" if other in medians else "" for other in ("adamw", "torch_muon")
        ]
        memory = f"{result['workspace_bytes'][name] / 2**20:.0f}" if name in result["workspace_bytes"] else ""
        lines.append(
            f"| {LABELS.get(name, name)} | {medians[name]:.2f} | {low:.2f} - {high:.2f} | {ratios[0]} | {ratios[1]} "
            f"| {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"{', '.join(MODELS)}, or a config.json, folder or Hub name")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="names separated by commas")
    parser.add_argument("--scope", choices=("matrices", "all"), default="matrices", help="which parameters to step")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed, a round")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every optimizer")
    parser.add_argument("--json", type=Path, help="write the raw times (milliseconds) to this file")
    args = parser.parse_args()
    args.optimizers = args.optimizers.split(",")
    unknown = [name for name in args.optimizers if name not in OPTIMIZERS]
    if unknown:
        parser.error(f"unknown optimizer {unknown[0]!r}: choose from {', '.join(OPTIMIZERS)}")
    if min(args.steps, args.rounds) < 1 or args.steps * args.rounds < 2 or args.warmup < 1:
        parser.error("--warmup, --steps and --rounds must be at least 1, and steps times rounds at least 2")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch sees no GPU; use --device cpu")
    result = measure(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    sys.exit(main())
