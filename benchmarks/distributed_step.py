"""Links, ``optimizer.step()`` and Trainer on several GPUs: matrices that ranks share out, beside other ways.

    torchrun --nproc_per_node 2 benchmarks/distributed_step.py --models qwen2.5-1.5b,qwen2.5-7b --json two.json
    torchrun --nproc_per_node 2 benchmarks/distributed_step.py --models qwen2.5-1.5b,llama-13b --json two.json --resume
    torchrun --nproc_per_node 4 benchmarks/distributed_step.py --no-links --no-step_alone --trainer
    torchrun --nproc_per_node 2 benchmarks/distributed_step.py --device cpu --models demo --link_mib 1    # a trial

Links: all_to_all_single and all_gather_into_tensor, each of some size a rank. GB/s are the bytes that a rank sends to
others over the time of the slowest rank.

The step alone: every rank makes the same hidden matrices (float32) and gradients; DDP is a DistributedDataParallel
module around them, FSDP2 DTensors cut along their first axis. Each contender steps twice and is compared with one
process, matrix by matrix (relative error of the update; the tolerance is beside it); then it is warmed up and timed.
All ranks begin a step together, and the slowest one's time counts; "host" is until ``step()`` returns, which bounds a
step where it is close to the median. "extra" is the peak of the memory beside weights, gradients and state, as torch's
allocator counts it, so without NCCL's own. "sent" is what this package's exchange sends to other ranks, on average.
The estimate is, of the same run, elementwise bytes at copy speed + (one process's step less its elementwise part) x
the largest owner's share + each message at the links' speed, without any overlap: "of estimate" above 100 % is
overlap. One process's step is that of DDP where every rank does all. Ratios are to fused AdamW on the same engine.

--trainer: Trainer's tokens per second a GPU, random tokens, bfloat16 over float32 weights. Its default
``logging_nan_inf_filter`` waits for the GPU before each optimizer step; ``--no-nan_filter`` switches it off.

NVLink multicast is switched off (NCCL_NVLS_ENABLE=0). Rank 0 reports progress and prints the tables; the file of
--json is written after every run and holds ``settings``, ``links``, ``steps`` (for each model ``runs``: milliseconds
of each step, bytes) and ``trainer``; with --resume what it holds already is not measured again.

What fails on all ranks alike is reported, and the next contender is run; any other failure, and one of matrices that
are shared out, ends the run, after --timeout seconds at the latest.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import distributed_training
import torch
import torch.distributed as dist
from communication import (
    RULES,
    Curve,
    curves_of,
    elementwise_seconds,
    large_config,
    map_seconds_of,
    names_of,
    numbers_of,
    plan_of,
)
from contenders import Groups, fresh
from device_timing import check_output, environment, first_line, graph_pool_bytes, release_memory, synchronize, timed
from distributed_contenders import (
    CHECKED_STEPS,
    ENGINES,
    SCHEME_NAMES,
    DistributedContender,
    Held,
    SeededMatrices,
    contenders_of,
    held_state_bytes,
    largest_error,
    recorded_messages,
    with_params,
)
from distributed_results import check_resume, check_training, left_to_run, new_or_saved, saved_steps, write_results
from optimizer_step import meta_groups, rounded
from process_group import FailedOnAllRanksError, OutOfStepError, Processes, RanksParser, check_ranks, processes
from step_floor import copy_bytes_per_second, matrix_shapes, step_flops
from training_loops import OptimizerChoice

import hf_matrix_optim
from hf_matrix_optim.sharding.exchange import all_gather

LINK_REPETITIONS = 10
Writer = Callable[[dict[str, Any]], None]


# ---- links ----


def measure_links(ranks: Processes, args: argparse.Namespace, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each collective at each size that is not saved; nothing with one rank."""
    links = [*saved]
    known = {(link["collective"], link["mib"]) for link in saved}
    for collective in ("all_to_all_single", "all_gather") if ranks.size > 1 else ():
        for mib in (mib for mib in args.link_mib if (collective, mib) not in known):
            total = mib * 2**20 // ranks.size * ranks.size
            every = ranks.together(partial(_time_link, collective, total, ranks))
            milliseconds = [max(step) for step in zip(*every, strict=True)]
            sent = total * (ranks.size - 1) // ranks.size
            link = {"collective": collective, "mib": mib, "sent_bytes": sent, "milliseconds": milliseconds}
            links.append(link)
            ranks.say(f"{collective}, {mib} MiB: {_gigabytes_per_second(link):.2f} GB/s a rank")
    return links


def _time_link(collective: str, total: int, ranks: Processes) -> list[float]:
    output = torch.empty(total, dtype=torch.uint8, device=ranks.device)
    own = total if collective == "all_to_all_single" else total // ranks.size
    payload = torch.ones(own, dtype=torch.uint8, device=ranks.device)
    call = partial(dist.all_to_all_single if own == total else all_gather, output, payload)
    for _ in range(3):
        call()
    found = []
    for _ in range(LINK_REPETITIONS):
        dist.barrier()
        found.append(timed(call, ranks.device)[0])
    return found


def _gigabytes_per_second(link: dict[str, Any]) -> float:
    return float(link["sent_bytes"] / statistics.median(link["milliseconds"]) / 1e6)


def link_table(links: list[dict[str, Any]]) -> str:
    lines = ["| collective | MiB a rank | median ms | quartiles ms | GB/s a rank |", "|---|---:|---:|---:|---:|"]
    for link in links:
        low, median, high = statistics.quantiles(link["milliseconds"], n=4)
        cells = [link["collective"], str(link["mib"]), f"{median:.3f}", f"{low:.3f} - {high:.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{_gigabytes_per_second(link):.2f}'])} |")
    return "\n".join(lines)


# ---- the step alone ----


def measure_steps(
    model: str,
    groups: Groups,
    links: list[dict[str, Any]],
    ranks: Processes,
    args: argparse.Namespace,
    write: Writer,
    saved: dict[str, Any] | None,
) -> dict[str, Any]:
    """All contenders on the matrices of one model; ``write`` is called with what there is after each.

    Args:
        saved: what there is from an earlier run; gone on with.
    """
    result = saved or _nothing_yet(model, groups, ranks, args)
    write(result)
    matrices = SeededMatrices([p.shape for group in groups for p in group["params"]], ranks.device)
    asked = {
        (contender.engine, contender.scheme, contender.rule): contender
        for contender in contenders_of(args.schemes, args.optimizers, kernels=args.kernels, cuda_graph=args.cuda_graph)
    }
    contenders = left_to_run(result["runs"], asked, ("engine", "scheme", "rule"))
    for engine in dict.fromkeys(contender.engine for contender in contenders):
        box: list[Held] = []  # a name of its own would keep the last engine's parameters while the next are made
        problem = ""
        try:
            ranks.together(partial(_make, engine, matrices, box))
        except FailedOnAllRanksError as error:
            problem = str(error)
        for contender in (each for each in contenders if each.engine == engine):
            run = {"engine": engine, "scheme": contender.scheme, "rule": contender.rule, "label": contender.label}
            try:
                if problem:
                    raise FailedOnAllRanksError(problem)
                every = ranks.together(partial(measure_one, contender, box[0], groups, matrices, args))
                run |= merged(every, contender, ranks)
                estimate = estimate_of(run, result, groups, curves_of(links), ranks.size)
                run |= {"estimate_milliseconds": estimate} if estimate else {}
                outcome = f"{statistics.median(run['milliseconds']):.2f} ms"
            except FailedOnAllRanksError as error:
                run["error"] = outcome = str(error)
            result["runs"].append(run)
            write(result)
            release_memory(ranks.device)
            ranks.say(f"{model}, {contender.label}, {contender.rule}: {outcome}")
            if "error" in run and contender.is_shared:
                message = f"the run ends with {contender.label}, {contender.rule}: {outcome}"
                raise OutOfStepError(message, is_known_to_all=True)
        box.clear()
        release_memory(ranks.device)
    return result


def _nothing_yet(model: str, groups: Groups, ranks: Processes, args: argparse.Namespace) -> dict[str, Any]:
    """What does not depend on a contender, and no runs."""
    shapes = matrix_shapes(groups, split=True)
    copies = ranks.together(partial(copy_bytes_per_second, ranks.device))
    release_memory(ranks.device)
    return {
        "model": model,
        "layers": args.layers,
        "matrices": len(shapes),
        "elements": sum(short * long for short, long in shapes),
        "flops": {rule: sum(step_flops(rule, *shape) for shape in shapes) for rule in RULES},
        "peaks": {"copy_bytes_per_second": min(copies)},
        "runs": [],
    }


def _make(engine: str, matrices: SeededMatrices, box: list[Held]) -> None:
    box.append(ENGINES[engine](matrices))


def measure_one(
    contender: DistributedContender, held: Held, groups: Groups, matrices: SeededMatrices, args: argparse.Namespace
) -> dict[str, Any]:
    """This rank's measurements of one contender."""
    device = matrices.device
    held.reset()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    optimizer = contender.build(with_params(groups, held.params))
    for _ in range(CHECKED_STEPS):
        optimizer.step()
    error = largest_error(contender, held, groups, matrices)
    with recorded_messages() as messages:
        optimizer.step()
    for _ in range(args.warmup):
        optimizer.step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    milliseconds, host_milliseconds = [], []
    for _ in range(args.steps):
        dist.barrier()
        whole, host = timed(optimizer.step, device)
        milliseconds.append(whole)
        host_milliseconds.append(host)
    state_bytes, extra = held_state_bytes(optimizer, held.params), None
    if device.type == "cuda":
        beside_state = torch.cuda.max_memory_allocated(device) - before - state_bytes
        extra = max(0, beside_state) + graph_pool_bytes(device)
    return {
        "milliseconds": milliseconds,
        "host_milliseconds": host_milliseconds,
        "error": error,
        "messages": [vars(message) for message in messages],
        "state_bytes": state_bytes,
        "extra_peak_bytes": extra,  # of a step, and what graphs hold between steps
    }


def merged(every: list[dict[str, Any]], contender: DistributedContender, ranks: Processes) -> dict[str, Any]:
    """What the ranks have measured, as one run: the slowest, the largest, the mean of what is sent."""
    error, extra = max(each["error"] for each in every), [each["extra_peak_bytes"] for each in every]
    same_message = list(zip(*(each["messages"] for each in every), strict=True))
    return {
        "milliseconds": [max(step) for step in zip(*(each["milliseconds"] for each in every), strict=True)],
        "rank_milliseconds": [each["milliseconds"] for each in every],
        "host_milliseconds": [max(step) for step in zip(*(each["host_milliseconds"] for each in every), strict=True)],
        "max_relative_error": error if error < float("inf") else None,
        "tolerance": contender.tolerance(ranks.device),
        "is_right": error <= contender.tolerance(ranks.device),
        "extra_peak_bytes": None if None in extra else max(extra),
        "state_bytes": max(each["state_bytes"] for each in every),
        "mean_sent_bytes": sum(message["sent"] for each in every for message in each["messages"]) / ranks.size,
        "busiest_messages": [
            [of_ranks[0]["collective"], max(max(m["sent"], m["received"]) for m in of_ranks)]
            for of_ranks in same_message
        ],
    }


def estimate_of(
    run: dict[str, Any], result: dict[str, Any], groups: Groups, curves: dict[str, Curve], world_size: int
) -> dict[str, float]:
    """Milliseconds that a step which is shared out should take: elementwise, map, messages.

    Returns:
        {} for a step that is not shared out, and where links or one process's step have not been measured.
    """
    map_seconds = map_seconds_of(result, run["rule"])
    needed = {collective for collective, _ in run["busiest_messages"]}
    if not run["busiest_messages"] or map_seconds is None or not needed <= {*curves}:
        return {}
    shards = world_size if run["engine"] == "fsdp2" else 1
    plan = plan_of(groups, shards, world_size // shards)
    copy = result["peaks"]["copy_bytes_per_second"]
    return {
        "elementwise": 1e3 * elementwise_seconds(run["rule"], result["elements"] / shards, copy),
        "map": 1e3 * map_seconds * plan.largest_share(run["rule"]),
        "messages": 1e3 * sum(curves[collective].seconds(sent) for collective, sent in run["busiest_messages"]),
    }


def step_table(result: dict[str, Any], settings: dict[str, Any]) -> str:
    """Markdown of one model."""
    done = [run for run in result["runs"] if "error" not in run]
    medians = {(run["engine"], run["scheme"], run["rule"]): statistics.median(run["milliseconds"]) for run in done}
    layers = "" if result["layers"] is None else f", shortened to layers={result['layers']}"
    graph = ", cuda_graph=true" if settings.get("cuda_graph") else ""
    lines = [
        f"{result['model']}{layers}: "
        f"{result['matrices']} hidden matrices, {result['elements'] / 1e6:.1f} M elements, float32, kernels="
        f"{settings['kernels']}{graph}; {settings['world_size']} x {settings['device']}, torch "
        f"{settings['versions']['torch']}, {settings['date']}; {settings['steps']} steps; copy "
        f"{rounded(result['peaks']['copy_bytes_per_second'] / 1e9)} GB/s",
        "",
        "| ranks hold | optimizer | median ms | quartiles ms | host ms | x AdamW | estimate ms | of estimate "
        "| sent MB | extra MiB | state MiB | error (tolerance) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in done:
        median = statistics.median(run["milliseconds"])
        low, _, high = statistics.quantiles(run["milliseconds"], n=4)
        adamw = medians.get((run["engine"], "adamw", "adamw"))
        estimate, extra = sum(run.get("estimate_milliseconds", {}).values()), run["extra_peak_bytes"]
        error = "not finite" if run["max_relative_error"] is None else f"{run['max_relative_error']:.1e}"
        cells = [
            run["label"],
            run["rule"],
            f"{median:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{statistics.median(run['host_milliseconds']):.2f}",
            f"{median / adamw:.2f}" if adamw else "",
            f"{estimate:.2f}" if estimate else "",
            f"{estimate / median:.0%}" if estimate else "",
            f"{run['mean_sent_bytes'] / 1e6:.1f}" if run["mean_sent_bytes"] else "",
            "" if extra is None else f"{extra / 2**20:.0f}",
            f"{run['state_bytes'] / 2**20:.1f}",
            f"{error} ({run['tolerance']:g}){'' if run['is_right'] else ' **WRONG**'}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{run['label']}, {run['rule']}: {run['error']}" for run in result["runs"] if "error" in run]
    return "\n".join([*lines, *(["", f"Failed: {'; '.join(failed)}"] if failed else [])])


# ---- everything ----


def measure(ranks: Processes, args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for; tables are printed as they are known."""
    everything = new_or_saved(args.json, settings_of(ranks, args), ranks, resume=args.resume)
    if args.trainer:
        check_training(everything, distributed_training.result_of(args))

    def write_all() -> None:
        if args.json and ranks.rank == 0:
            write_results(args.json, everything)

    def show(text: str) -> None:
        if ranks.rank == 0:
            print(f"{text}\n", flush=True)

    if args.links:
        everything["links"] = measure_links(ranks, args, everything["links"])
        write_all()
        show(link_table(everything["links"]) if ranks.size > 1 else "One rank has no links.")
    for model, groups in args.groups.items() if args.step_alone else ():
        saved = saved_steps(everything, model, args.layers)
        everything["steps"].append({})

        def write_steps(result: dict[str, Any]) -> None:
            everything["steps"][-1] = result
            write_all()

        stepped = measure_steps(model, groups, everything["links"], ranks, args, write_steps, saved)
        show(step_table(stepped, everything["settings"]))
    if args.trainer:

        def write_trainer(result: dict[str, Any]) -> None:
            everything["trainer"] = result
            write_all()

        trained = distributed_training.train_all(ranks, args, write_trainer, everything)
        show(distributed_training.table(trained, ranks.size))
    return everything


def settings_of(ranks: Processes, args: argparse.Namespace) -> dict[str, Any]:
    """What results depend on beside model and contender."""
    return {
        "world_size": ranks.size,
        "backend": dist.get_backend(),
        "nvlink_multicast": "off (NCCL_NVLS_ENABLE=0)",
        "warmup": args.warmup,
        "steps": args.steps,
        "kernels": args.kernels,
        "cuda_graph": args.cuda_graph if args.step_alone else None,  # of Trainer's optimizers their names say it
        "package": hf_matrix_optim.__version__,
        **environment(ranks.device),
    }


def is_right(everything: dict[str, Any]) -> bool:
    runs = [run for result in everything["steps"] for run in result["runs"]]
    return all(run.get("is_right") for run in runs) and not any(
        "error" in run for run in (everything["trainer"] or {"runs": []})["runs"]
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = RanksParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--links", action=on_off, default=True, help="measure the links. Default: on")
    add(
        "--link_mib",
        default="1,2,4,8,16,32,64,128,256,512",
        help="sizes of a rank's buffer, in MiB, separated by commas. Default: %(default)s",
    )
    add("--step_alone", action=on_off, default=True, help="measure optimizer.step() alone. Default: on")
    add(
        "--models",
        default="qwen2.5-1.5b",
        help="of the step alone, separated by commas: names of optimizer_step.py, qwen2.5-7b, llama-13b, llama-70b, "
        "or config.json files. Default: %(default)s",
    )
    add("--layers", type=int, help="shorten the models to so many layers, so that they fit. Default: all")
    add("--schemes", default=",".join(SCHEME_NAMES), help="separated by commas. Default: %(default)s")
    add("--optimizers", default=",".join(RULES), help="separated by commas; AdamW always. Default: %(default)s")
    add("--kernels", choices=("auto", "torch"), default="auto", help="of this package's optimizers. Default: auto")
    add("--cuda_graph", action=on_off, default=False, help="replay kernels as graphs in the step alone. Default: off")
    add("--warmup", type=int, default=3, help="steps that are not timed. Default: %(default)s")
    add("--steps", type=int, default=10, help="timed steps, at least 2. Default: %(default)s")
    add("--trainer", action=on_off, default=False, help="measure Trainer. Default: off")
    add("--trainer_model", default="qwen2.5-1.5b", help="a name of optimizer_step.py. Default: %(default)s")
    add("--trainer_optimizers", default="adamw,mud,muon,adamuon", help="as --optimizers of train_throughput.py")
    add(
        "--engine",
        choices=tuple(distributed_training.ENGINES),
        help="of Trainer: fsdp2 is accelerate's, for GPUs. Default: fsdp2 on GPUs, ddp on CPUs",
    )
    add("--batch", type=int, default=8, help="sequences of a rank and step in Trainer. Default: %(default)s")
    add("--context", type=int, default=2048, help="tokens of a sequence. Default: %(default)s")
    add("--window_steps", type=int, default=5, help="Trainer's steps of a timed window. Default: %(default)s")
    add("--windows", type=int, default=3, help="timed windows of Trainer. Default: %(default)s")
    add("--nan_filter", action=on_off, default=True, help="Trainer's logging_nan_inf_filter. Default: on")
    add("--timeout", type=float, default=300.0, help="seconds that a rank waits for the others. Default: 300")
    add("--json", type=Path, help="write all times (milliseconds) and bytes to this file, after every run")
    add("--resume", action="store_true", help="go on with the file of --json: what it holds is not measured again")
    args = parser.parse_args(argv)

    for name, least in (
        ("warmup", 1),
        ("steps", 2),
        ("batch", 1),
        ("context", 2),
        ("window_steps", 1),
        ("windows", 1),
    ):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least {least}")
    if not 0 < args.timeout < 1e6:
        parser.error(f"--timeout {args.timeout}: it must be above 0 seconds and below a million")
    args.link_mib = numbers_of(parser, "--link_mib", args.link_mib)
    args.schemes = names_of(parser, "--schemes", args.schemes, SCHEME_NAMES)
    args.optimizers = names_of(parser, "--optimizers", args.optimizers, RULES)
    check_output(parser, args.json)
    check_resume(parser, args.json, args.resume)
    args.rank, args.device = check_ranks(parser, args.device)
    if args.cuda_graph and (args.device.type == "cpu" or args.kernels == "torch"):
        parser.error("--cuda_graph is for the GPU kernels: leave it out, or use --device cuda and --kernels auto")
    if args.engine is None:
        args.engine = "fsdp2" if args.device.type == "cuda" else "ddp"
    elif args.engine == "fsdp2" and args.device.type == "cpu" and args.trainer:
        parser.error("--engine fsdp2: accelerate cuts models on GPUs alone; use --engine ddp on CPUs")
    try:
        args.groups = (
            {name: fresh(meta_groups(large_config(name, args.layers), "matrices")) for name in args.models.split(",")}
            if args.step_alone
            else {}
        )
        args.trainer_optimizers = [OptimizerChoice(text) for text in dict.fromkeys(args.trainer_optimizers.split(","))]
        for choice in args.trainer_optimizers if args.trainer else ():
            choice.check(["trainer"])
        if args.trainer:
            distributed_training.random_rows(args.trainer_model, args.context, 1)
    except ValueError as error:
        parser.error(first_line(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        with processes(args.device, args.timeout) as ranks:
            everything = measure(ranks, args)
    except RuntimeError as error:  # also what the group says at its end, when a rank has gone
        if args.rank == 0 or not getattr(error, "is_known_to_all", False):
            print(f"distributed_step.py: error: {first_line(error)}", file=sys.stderr, flush=True)
        return 1
    return 0 if is_right(everything) else 1


if __name__ == "__main__":
    sys.exit(main())
