"""What sharing matrices between ranks costs at scale: map time, messages and memory of a rank, from a model.

    python benchmarks/communication.py                                           # assumed links, rates of one H100
    python benchmarks/communication.py --measured two_gpus.json --gpus 8,16 --optimizers muon,adamuon,mud

The plan is the package's own: its owners, its rounds. For P elements of hidden matrices, S ranks with the shards of a
copy, R copies (N = S R ranks), and ``into`` and ``out`` bytes an element on the way to a matrix's owner and back:

- a rank sends (S-1)/S P/N (into + out) bytes to owners and back, and (R-1)/R P/S out to the other copies. DDP is
  S = 1, FSDP2 R = 1, HSDP both. Gathering everything on every rank instead (``full_tensor``) is (N-1)/N P times 12
  bytes of float32 parameter, gradient and momentum, 16 with a second moment;
- the busiest rank decides how long a message takes: where matrices do not divide evenly, the owner of most of them,
  and in the exchange between copies what is padded to the longest share;
- the map takes operations / rate, of the owner with the most operations (``step_floor.step_flops``);
- state is 4 bytes an element held (8 with a second moment). "buffers" are the messages of the rounds that are under
  way at a time; the map's own temporaries, which ``max_workspace_bytes`` bounds, come on top.

Among more GPUs than a node has, an all-to-all sends each byte to one GPU, through its own adapter and at the same time
inside the node; an all-gather enters a node once, through all its adapters. Nothing of it is overlapped, so a step
can be faster than map plus messages. Uneven shards count as even.

The file of ``--measured`` is that of ``distributed_step.py --json``. What it holds replaces what is assumed; the
output says which was which.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from contenders import Groups
from device_timing import first_line
from optimizer_step import load_config, meta_groups, qwen2_5
from step_floor import step_bytes, step_flops
from transformers import LlamaConfig, PretrainedConfig

from hf_matrix_optim.distributed_step import most_matrices
from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.sharding.plan import MatrixJob, Round, rounds_of
from hf_matrix_optim.sharding.shard_layout import Ranks, ShardLayout, pieces_of

RULES = ("muon", "adamuon", "mud")
MOMENTS = {"adamw": 2, "muon": 1, "adamuon": 2, "mud": 1}
WORKSPACE_BYTES = 2**30  # the package's default of max_workspace_bytes


def qwen2_5_7b() -> PretrainedConfig:
    config = qwen2_5(3584, 18944, 28, 28, 4)
    config.vocab_size, config.tie_word_embeddings = 152064, False
    return config


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
    )


LARGE_MODELS = {
    "qwen2.5-7b": qwen2_5_7b,
    "llama-13b": lambda: llama(5120, 13824, 40, 40, 40),
    "llama-70b": lambda: llama(8192, 28672, 80, 64, 8),
}


def large_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a model of ``LARGE_MODELS`` or of what ``load_config`` takes, shortened to ``layers``.

    Raises:
        ValueError: if there is no such model, or it has less layers.
    """
    try:
        config = LARGE_MODELS[name]() if name in LARGE_MODELS else load_config(name)
    except ValueError as error:
        raise ValueError(f"none of {', '.join(LARGE_MODELS)}, and {first_line(error)}") from None
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"{name} has {config.num_hidden_layers} layers: it cannot be shortened to {layers}")
        config.num_hidden_layers = layers
    return config


# ---- links ----


@dataclass(frozen=True)
class Curve:
    """How long a collective takes: ``points`` of (bytes that a rank sends to others, seconds), both ascending."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of_rate(cls, bytes_per_second: float) -> "Curve":
        return cls(((1.0, 1.0 / bytes_per_second),))

    def seconds(self, sent: float) -> float:
        """Between two points a straight line; the first one's time below it, the last one's rate above it."""
        if sent <= 0:
            return 0.0
        if sent <= self.points[0][0]:
            return self.points[0][1]
        for (low, least), (high, most) in itertools.pairwise(self.points):
            if sent <= high:
                return least + (most - least) * (sent - low) / (high - low)
        return self.points[-1][1] * sent / self.points[-1][0]


@dataclass(frozen=True)
class Inputs:
    """What the model rests on beside the plan; ``sources`` says where each value comes from.

    ``wire_bytes`` are those of an element to its owner and back, of each rule.
    """

    all_to_all: Curve
    all_gather: Curve
    network_bytes_per_second: float
    gpus_per_node: int
    wire_bytes: dict[str, tuple[int, int]]
    flops_per_second: dict[str, float]
    sources: dict[str, str]

    def seconds(self, collective: str, sent: float, ranks: int, *, in_one_node: bool = True) -> float:
        """Of a message in a group of ranks.

        Args:
            collective: "all_to_all_single" or "all_gather".
            sent: bytes that its busiest rank sends to or gets from others.
            ranks: of the group.
            in_one_node: whether the ranks follow one another, so that a node has several of them.
        """
        near = min(ranks, self.gpus_per_node) if in_one_node else 1
        outside = (ranks - near) / (ranks - 1) if ranks > 1 else 0.0
        if collective == "all_to_all_single":
            inside = self.all_to_all.seconds(sent * (1 - outside))
            return max(inside, sent * outside / self.network_bytes_per_second)
        inside = self.all_gather.seconds(sent) if near > 1 else 0.0
        return max(inside, sent * outside / near / self.network_bytes_per_second)


ASSUMED = Inputs(
    all_to_all=Curve.of_rate(350e9),
    all_gather=Curve.of_rate(350e9),
    network_bytes_per_second=50e9,
    gpus_per_node=8,
    wire_bytes={"muon": (2, 2), "adamuon": (1, 2), "mud": (2, 2)},
    flops_per_second={"muon": 387e12, "adamuon": 402e12, "mud": 379e12},
    sources={
        "links in a node": "assumed: 350 GB/s a GPU, of the 450 GB/s a direction that NVIDIA states for H100's NVLink",
        "network": "assumed: 50 GB/s a GPU, one 400 Gb/s InfiniBand adapter (NDR) a GPU, as in NVIDIA's DGX H100",
        "GPUs of a node": "assumed: 8",
        "bytes on the wire": "as the GPU kernels send: 2 an element to the owner (AdaMuon: 1) and 2 back",
        "rate of the map": "assumed: that of the kernels in one process on one H100 (README.md, Qwen2.5-1.5B, "
        "2026-11-22: median less bytes at copy speed), 387 (muon), 402 (adamuon), 379 (mud) TFLOP/s",
    },
)


def with_measured(inputs: Inputs, measured: dict[str, Any]) -> Inputs:
    """Inputs with what a result of ``distributed_step.py`` holds in place of what is assumed."""
    where = f"{measured['settings']['world_size']} x {measured['settings']['device']}, {measured['settings']['date']}"
    sources, curves = dict(inputs.sources), curves_of(measured.get("links", []))
    if curves:
        sources["links in a node"] = f"measured: {', '.join(curves)} on {where}"
    rates: dict[str, float] = {}
    for result in measured.get("steps", []):  # of several models the last one counts
        for rule, flops in result["flops"].items():
            if seconds := map_seconds_of(result, rule):
                rates[rule] = flops / seconds
    if rates:
        shown = ", ".join(f"{rate / 1e12:.0f} ({rule})" for rule, rate in rates.items())
        others = sorted({*inputs.flops_per_second} - {*rates})
        sources["rate of the map"] = f"measured: {shown} TFLOP/s on {where}" + (
            f"; {', '.join(others)}: {inputs.sources['rate of the map']}" if others else ""
        )
    return replace(
        inputs,
        all_to_all=curves.get("all_to_all_single", inputs.all_to_all),
        all_gather=curves.get("all_gather", inputs.all_gather),
        flops_per_second={**inputs.flops_per_second, **rates},
        sources=sources,
    )


def curves_of(links: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """The curve of each collective that was measured."""
    points: dict[str, list[tuple[float, float]]] = {}
    for link in links:
        seconds = statistics.median(link["milliseconds"]) / 1e3
        points.setdefault(link["collective"], []).append((link["sent_bytes"], seconds))
    return {collective: Curve(tuple(sorted(found))) for collective, found in points.items()}


def elementwise_seconds(rule: str, elements: float, copy_bytes_per_second: float) -> float:
    """Of what a float32 step must read and write beside its map, at the speed of a large copy."""
    held = round(elements)
    return step_bytes(rule, held, 4 * held, 4 * MOMENTS[rule] * held) / copy_bytes_per_second


def map_seconds_of(result: dict[str, Any], rule: str) -> float | None:
    """The map of all matrices by one process: its median step less ``elementwise_seconds``.

    Returns:
        None if there is no such step among the runs.
    """
    for run in result["runs"]:
        if (run["scheme"], run["rule"]) == ("ddp_redundant", rule) and "error" not in run:
            step = statistics.median(run["milliseconds"]) / 1e3
            copy = result["peaks"]["copy_bytes_per_second"]
            return max(0.0, step - elementwise_seconds(rule, result["elements"], copy))
    return None


# ---- the plan ----


@dataclass(frozen=True)
class Plan:
    """How the matrices of a model are shared out between ``shards`` x ``replicas`` ranks."""

    rounds: tuple[Round, ...]
    shards: int
    replicas: int
    elements: int

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas

    def largest_share(self, rule: str) -> float:
        """Of the operations of a rule's map, that of the owner with the most; 1 / ranks is the best there can be."""
        loads: dict[tuple[int, int], float] = {}
        for each in self.rounds:
            flops = step_flops(rule, *sorted(each.jobs[0].fans))
            for replica, counts in enumerate(each.counts):
                for shard, count in enumerate(counts):
                    loads[replica, shard] = loads.get((replica, shard), 0.0) + count * flops
        return max(loads.values()) / sum(loads.values())

    def mean_bytes(self, into: float, out: float) -> float:
        """That a rank sends in a step, by the formula."""
        held = self.elements / self.shards
        to_owners = (self.shards - 1) / self.shards * self.elements / self.ranks * (into + out)
        return to_owners + (self.replicas - 1) / self.replicas * held * out

    def busiest_messages(self, into: float, out: float) -> list[tuple[str, float]]:
        """(collective, bytes of its busiest rank) of a step; "all_gather" is between replicas."""
        messages = []
        for each in self.rounds:
            elements = each.jobs[0].elements
            if self.shards > 1:
                most = max(
                    max(count * (self.shards - 1), sum(counts) - count) * elements / self.shards
                    for counts in each.counts
                    for count in counts
                )
                messages += [("all_to_all_single", most * into), ("all_to_all_single", most * out)]
            if self.replicas > 1:
                longest = max(map(sum, each.counts)) * elements / self.shards
                messages.append(("all_gather", (self.replicas - 1) * longest * out))
        return messages

    def buffer_bytes(self, into: float, out: float) -> float:
        """Of the messages under way on the busiest rank: five rounds in a row, each a stage further.

        Lookaheads of all matrices; the same setting out, and those that arrive; directions that set out, and those
        that arrive; what the replicas send one another; what has arrived, and again without padding if there is any.
        """
        stages = []
        for each in self.rounds:
            elements = each.jobs[0].elements
            every = sum(map(sum, each.counts)) * elements / self.shards
            owned = max(map(max, each.counts)) * elements
            longest = max(map(sum, each.counts)) * elements / self.shards
            to_owner = (every + owned) * into if self.shards > 1 else owned * into
            back = owned * out + (longest * out if self.shards > 1 else 0)
            between = (self.replicas + 1) * longest * out if self.replicas > 1 else longest * out
            arrived = self.replicas * longest * out
            is_padded = self.replicas * longest > every
            stages.append((every * into, to_owner, back, between, arrived + (every * out if is_padded else 0)))
        return max(
            sum(stages[i - late][late] for late in range(5) if 0 <= i - late < len(stages))
            for i in range(len(stages) + 4)
        )


def plan_of(groups: Groups, shards: int, replicas: int) -> Plan:
    """The package's plan on GPUs for matrices that are cut along their first axis (``shards`` > 1)."""
    most_of = partial(most_matrices, max_workspace_bytes=WORKSPACE_BYTES, replicas=replicas, by_kernels=True)
    rounds: list[Round] = []
    elements = 0
    for group in groups:
        layout, jobs = MatrixLayout.from_group(group), []
        for index, p in enumerate(group["params"]):
            cut = ShardLayout(tuple(p.shape), 0 if shards > 1 else None, Ranks(tuple(range(shards))), Ranks())
            jobs += [
                MatrixJob(index, i, piece.fans, piece.axis, piece.extents, ("float32", "float32"))
                for i, piece in enumerate(pieces_of(layout, cut))
            ]
        elements += sum(job.elements for job in jobs)
        rounds += rounds_of(jobs, shards, replicas, most_of)
    return Plan(tuple(rounds), shards, replicas, elements)


# ---- the model ----


@dataclass(frozen=True)
class Scheme:
    """How ranks hold the matrices and step them; ``shards`` of N ranks, in nodes of some size."""

    label: str
    is_shared: bool
    is_sharded: bool
    is_hybrid: bool = False

    def shape(self, gpus: int, gpus_per_node: int) -> tuple[int, int]:
        """(shards, replicas)."""
        shards = 1 if not self.is_sharded else min(gpus, gpus_per_node) if self.is_hybrid else gpus
        return shards, gpus // shards


SCHEMES = {
    "ddp_redundant": Scheme("DDP, every rank all", is_shared=False, is_sharded=False),
    "ddp_share": Scheme("DDP, shared out", is_shared=True, is_sharded=False),
    "fsdp2_full_tensor": Scheme("FSDP2, full_tensor", is_shared=False, is_sharded=True),
    "fsdp2_all_to_all": Scheme("FSDP2, all-to-all", is_shared=True, is_sharded=True),
    "hsdp": Scheme("HSDP, FSDP2 in a node", is_shared=True, is_sharded=True, is_hybrid=True),
}


@dataclass(frozen=True)
class Cost:
    """Of a step, for one rank; ``busiest_bytes`` is what its longest messages add up to."""

    map_seconds: float
    link_seconds: float
    mean_bytes: float
    busiest_bytes: float
    state_bytes: float
    buffer_bytes: float


def cost_of(groups: Groups, rule: str, scheme: Scheme, gpus: int, inputs: Inputs) -> Cost:
    """What a step of a rule costs on a number of GPUs."""
    shards, replicas = scheme.shape(gpus, inputs.gpus_per_node)
    plan = plan_of(groups, shards, replicas)
    flops = sum(len(each.jobs) * step_flops(rule, *sorted(each.jobs[0].fans)) for each in plan.rounds)
    state_bytes = 4.0 * MOMENTS[rule] * plan.elements / shards
    seconds = flops / inputs.flops_per_second[rule]
    if not scheme.is_shared:
        gathered = 4.0 * (2 + MOMENTS[rule])  # float32 parameter, gradient and moments, matrix by matrix
        largest = max(each.jobs[0].elements for each in plan.rounds)
        share = gathered * (shards - 1) / shards
        messages = [("all_gather", share * each.jobs[0].elements) for each in plan.rounds for _ in each.jobs]
        link = sum(inputs.seconds(collective, sent, shards) for collective, sent in messages)
        total = share * plan.elements
        return Cost(seconds, link, total, total, state_bytes, gathered * largest if shards > 1 else 0.0)
    wire = inputs.wire_bytes[rule]
    messages = plan.busiest_messages(*wire)
    return Cost(
        seconds * plan.largest_share(rule),
        sum(
            inputs.seconds(collective, sent, shards)
            if collective == "all_to_all_single"
            else inputs.seconds(collective, sent, replicas, in_one_node=shards == 1)
            for collective, sent in messages
        ),
        plan.mean_bytes(*wire),
        sum(sent for _, sent in messages),
        state_bytes,
        plan.buffer_bytes(*wire),
    )


def table(model: str, groups: Groups, rule: str, args: argparse.Namespace, inputs: Inputs) -> str:
    """Markdown of one model and optimizer."""
    elements = sum(p.numel() for group in groups for p in group["params"])
    matrices = sum(len(group["params"]) for group in groups)
    lines = [
        f"{model}, {rule}: {matrices} hidden matrices, {elements / 1e9:.2f} G elements",
        "",
        "| GPUs | scheme | map ms | messages ms | GB a rank | busiest GB | state GB | buffers GB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for gpus in args.gpus:
        for name in args.schemes:
            if SCHEMES[name].is_hybrid and gpus <= inputs.gpus_per_node:
                continue  # one node: the same as FSDP2
            cost = cost_of(groups, rule, SCHEMES[name], gpus, inputs)
            cells = [
                str(gpus),
                SCHEMES[name].label,
                *(f"{1e3 * seconds:.1f}" for seconds in (cost.map_seconds, cost.link_seconds)),
                *(f"{size / 1e9:.2f}" for size in (cost.mean_bytes, cost.busiest_bytes)),
                *(f"{size / 1e9:.2f}" for size in (cost.state_bytes, cost.buffer_bytes)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")


def names_of(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    """Names separated by commas; stops the program at one that is not known."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            parser.error(f"{option}: unknown {name!r}: choose from {', '.join(known)}")
    return names


def numbers_of(parser: argparse.ArgumentParser, option: str, text: str) -> list[int]:
    """Whole numbers above 0, separated by commas; stops the program at anything else."""
    parts = text.split(",")
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            parser.error(f"{option}: {part!r} is no whole number above 0; separate numbers by commas")
    return [int(part) for part in parts]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models",
        default=",".join(LARGE_MODELS),
        help="separated by commas: these, names of optimizer_step.py, or config.json files. Default: %(default)s",
    )
    add("--optimizers", default="muon", help=f"names separated by commas: {', '.join(RULES)}. Default: %(default)s")
    add("--schemes", default=",".join(SCHEMES), help="names separated by commas. Default: %(default)s")
    add("--gpus", default="8,16,64,512", help="numbers of GPUs separated by commas. Default: %(default)s")
    add("--measured", type=Path, help="file of distributed_step.py --json, for links and rates")
    add("--network_gb_per_second", type=float, help="GB/s a GPU between nodes. Default: 50, assumed")
    add("--gpus_per_node", type=int, help="GPUs with fast links between them. Default: 8, assumed")
    add("--wire_bytes", help="bytes an element to the owner and back, as 4,2. Default: 2,2 (AdaMuon: 1,2)")
    args = parser.parse_args(argv)
    args.optimizers = names_of(parser, "--optimizers", args.optimizers, RULES)
    args.schemes = names_of(parser, "--schemes", args.schemes, list(SCHEMES))
    args.gpus = numbers_of(parser, "--gpus", args.gpus)
    args.inputs = _inputs(parser, args)
    for gpus in args.gpus:
        if gpus > args.inputs.gpus_per_node and gpus % args.inputs.gpus_per_node:
            parser.error(f"--gpus: {gpus} is no multiple of the {args.inputs.gpus_per_node} GPUs of a node")
    try:
        args.groups = {name: meta_groups(large_config(name), "matrices") for name in args.models.split(",")}
    except ValueError as error:
        parser.error(f"--models: {first_line(error)}")
    return args


def _inputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Inputs:
    inputs = ASSUMED
    if args.measured is not None:
        try:
            inputs = with_measured(inputs, json.loads(args.measured.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(
                f"--measured {args.measured} is no file of distributed_step.py --json: "
                f"{type(error).__name__}: {first_line(error)}"
            )
    sources = dict(inputs.sources)
    if args.network_gb_per_second is not None:
        if not 0 < args.network_gb_per_second < math.inf:
            parser.error(f"--network_gb_per_second {args.network_gb_per_second}: it must be above 0")
        sources["network"] = f"given: {args.network_gb_per_second:g} GB/s a GPU"
        inputs = replace(inputs, network_bytes_per_second=args.network_gb_per_second * 1e9)
    if args.gpus_per_node is not None:
        if args.gpus_per_node < 1:
            parser.error(f"--gpus_per_node {args.gpus_per_node}: it must be at least 1")
        sources["GPUs of a node"] = f"given: {args.gpus_per_node}"
        inputs = replace(inputs, gpus_per_node=args.gpus_per_node)
    if args.wire_bytes is not None:
        sizes = numbers_of(parser, "--wire_bytes", args.wire_bytes)
        if len(sizes) != 2:
            parser.error(f"--wire_bytes {args.wire_bytes}: give two numbers, as 4,2")
        sources["bytes on the wire"] = f"given: {sizes[0]} an element to the owner and {sizes[1]} back"
        inputs = replace(inputs, wire_bytes=dict.fromkeys(RULES, (sizes[0], sizes[1])))
    return replace(inputs, sources=sources)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    for model, groups in args.groups.items():
        for rule in args.optimizers:
            print(f"{table(model, groups, rule, args, args.inputs)}\n", flush=True)
    print("\n".join(f"- {name}: {source}" for name, source in args.inputs.sources.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
