"""Fifteen benchmarks on any Hugging Face checkpoints, through lm-evaluation-harness.

python eval/run.py --checkpoint 'out/*/checkpoint-*' --data-dir benchmarks-data
python eval/run.py compare out/eval
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval_error import EvalError
from suite import BENCHMARKS, SUITE, select

COMMANDS = ("run", "compare", "prepare", "show", "list")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """Parse a whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def not_negative(text: str) -> int:
    """Parse a whole number, zero or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python eval/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    names = f"names of benchmarks, separated by blanks or commas, or all: {', '.join(BENCHMARKS)}"
    data_help = "folder with the data sets, ORG/NAME/CONFIG/SPLIT.parquet or .jsonl; without it: the Hub"

    run = commands.add_parser(
        "run", help="score checkpoints (the default command)", description="Score benchmarks on checkpoints."
    )
    run.add_argument(
        "--checkpoint", nargs="+", required=True, help="folders, globs, names on the Hub; models or PEFT adapters"
    )
    run.add_argument("--tasks", nargs="+", default=["all"], help=names)
    run.add_argument("--skip", nargs="+", default=[], help="benchmarks to leave out")
    run.add_argument("--data-dir", type=Path, help=data_help)
    run.add_argument("--output", type=Path, default=Path("out/eval"), help="folder of results (default: %(default)s)")
    run.add_argument("--limit", type=positive, help="questions of each leaf task (MMLU has 57), for trying things")
    run.add_argument("--shots", type=not_negative, help="solved examples in a prompt, instead of each benchmark's own")
    run.add_argument("--batch-size", type=positive, default=8, help="sequences in a batch (default: %(default)s)")
    run.add_argument("--max-length", type=positive, help="context in tokens, instead of the model's own")
    run.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved")
    run.add_argument("--device", help="such as cpu or cuda:0 (default: cuda if there is one)")
    run.add_argument("--gpus", help="numbers of GPUs, such as 0,1: one process each")
    run.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, for checkpoints without one")
    run.add_argument(
        "--allow-code", action="store_true", help="run the programs that a model writes for MBPP; see eval/README.md"
    )
    run.add_argument("--traceback", action="store_true", help="print where an unexpected error came from")

    compare = commands.add_parser(
        "compare", help="table, paired tests, figure", description="Compare results of `run`."
    )
    compare.add_argument("results", nargs="+", type=Path, help="folders of results")
    compare.add_argument("--baseline", help="part of the name of the checkpoint to compare with (default: the first)")
    compare.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=PATTERN",
        help="seeds of one optimizer: checkpoints whose name matches the pattern (with * and ?); repeat for each",
    )
    compare.add_argument(
        "--output", type=Path, help="folder for compare.md, .csv, .png (default: the first of results)"
    )

    prepare = commands.add_parser("prepare", help="fill --data-dir, online", description="Download the data sets.")
    prepare.add_argument("--data-dir", type=Path, required=True, help="folder to fill; what is there is kept")
    prepare.add_argument("--tasks", nargs="+", default=["all"], help=names)
    prepare.add_argument("--skip", nargs="+", default=[], help="benchmarks to leave out")

    show = commands.add_parser("show", help="print a prompt", description="Print the exact prompt; loads no model.")
    show.add_argument("task", help="name of a benchmark, or of a leaf task of one, such as mmlu_anatomy")
    show.add_argument("--data-dir", type=Path, help=data_help)
    show.add_argument("--shots", type=not_negative, help="solved examples, instead of the benchmark's own")
    show.add_argument("--document", type=not_negative, default=0, help="number of the question, from 0")

    listing = commands.add_parser("list", help="list the benchmarks", description="List the benchmarks.")
    listing.add_argument("--data-dir", type=Path, help="also say what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 if something could not be done."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "run")
    arguments = build_parser().parse_args(argv)
    if getattr(arguments, "data_dir", None) is not None and arguments.command != "prepare":
        # Before `datasets` is imported: with a folder given, nothing is asked of the Hub for data.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        if not arguments.data_dir.is_dir():
            print(f"error: --data-dir {arguments.data_dir}: no such folder", file=sys.stderr)
            return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return COMMAND_FUNCTIONS[arguments.command](arguments)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Score checkpoints; see ``--help``."""
    from checkpoints import find_checkpoints
    from jobs import Settings, run_jobs
    from offline_data import DataFolder
    from result_files import check_writable
    from task_loading import missing_data
    from tqdm import tqdm

    benchmarks = select(arguments.tasks, arguments.skip)
    for benchmark in benchmarks:
        if benchmark.runs_code and not arguments.allow_code:
            raise EvalError(
                f"{benchmark.title} runs programs that the model writes, within limits but in no sandbox: give "
                f"--allow-code, or leave it out with --skip {benchmark.name}"
            )
    if arguments.tokenizer is not None and not arguments.tokenizer.is_dir():
        raise EvalError(f"--tokenizer {arguments.tokenizer}: no such folder")
    check_writable(arguments.output)
    devices = chosen_devices(arguments.device, arguments.gpus)
    checkpoints = find_checkpoints(arguments.checkpoint)
    settings = Settings(
        **{name: getattr(arguments, name) for name in Settings.__dataclass_fields__},
    )
    data = DataFolder(arguments.data_dir) if arguments.data_dir else None
    if lines := missing_data(benchmarks, data):
        shown = "\n  ".join(lines)
        raise EvalError(f"{len(lines)} of the data cannot be had; no model was loaded:\n  {shown}")

    jobs, done = plan(checkpoints, benchmarks, settings, data, arguments.output)
    if done:
        print(f"{done} of {done + len(jobs)} results are there already and hold", file=sys.stderr)
    failures = []
    with tqdm(total=len(jobs), unit="benchmark", desc="Benchmarks", disable=not jobs) as bar:
        for report in run_jobs(jobs, settings, devices):
            bar.update()
            if report.result is None:
                failures.append(f"{report.job}: {report.error}")
                tqdm.write(f"error: {failures[-1]}", file=sys.stderr)
            else:
                tqdm.write(one_line(report.result), file=sys.stderr)
    from comparison_tables import score_table

    if scores := score_table(arguments.output, [checkpoint.file_stem for checkpoint in checkpoints], benchmarks):
        print(scores)
    if failures:
        print(f"{len(failures)} of {len(jobs)} failed; the same command goes on with them", file=sys.stderr)
    return 1 if failures else 0


def plan(
    checkpoints: Sequence[Any], benchmarks: Sequence[Any], settings: Any, data: Any, output: Path
) -> tuple[list[Any], int]:
    """Return the jobs whose results are not there, and the number of those that are."""
    from importlib.metadata import version

    from jobs import Job
    from result_files import is_done, result_path
    from scoring import SHOTS_SEED
    from task_loading import needs, task_digest

    fixed = {
        benchmark.name: {
            "benchmark": benchmark.name,
            "task_hash": task_digest(benchmark),
            "data_hash": data.digest(needs(benchmark)) if data else "Hub",
            "shots": benchmark.shots if settings.shots is None else settings.shots,
            "shots_seed": SHOTS_SEED,
            "limit": settings.limit,
            "max_length": settings.max_length,
            "dtype": settings.dtype,
            "lm_eval": version("lm_eval"),
        }
        for benchmark in benchmarks
    }
    jobs, done = [], 0
    for checkpoint in checkpoints:
        digest = checkpoint.digest(settings.tokenizer)
        for benchmark in benchmarks:
            path = result_path(output, checkpoint.file_stem, benchmark.name)
            job = Job(checkpoint, benchmark, path, {"checkpoint_hash": digest, **fixed[benchmark.name]})
            if is_done(path, job.key):
                done += 1
            else:
                jobs.append(job)
    return jobs, done


def chosen_devices(device: str | None, gpus: str | None) -> list[str]:
    """Return torch's names of the devices to use.

    Raises:
        EvalError: for a device that is not there.
    """
    import torch

    if gpus is not None:
        if device is not None:
            raise EvalError("give --device or --gpus, not both")
        numbers = [part.strip() for part in gpus.split(",")]
        count = torch.cuda.device_count()
        for number in numbers:
            if not number.isdigit() or int(number) >= count:
                hint = "" if count else "; use --device cpu"
                raise EvalError(f"--gpus {gpus}: there is no GPU {number!r}; this machine has {count}{hint}")
        if len(set(numbers)) < len(numbers):
            raise EvalError(f"--gpus {gpus}: a GPU is named twice")
        return [f"cuda:{int(number)}" for number in numbers]
    if device is None:
        return ["cuda" if torch.cuda.is_available() else "cpu"]
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EvalError(f"--device {device}: {str(error).splitlines()[0]}; use --device cpu") from error
    return [device]


def one_line(result: dict[str, Any]) -> str:
    """Say how a job ended."""
    error = result["standard_error"]
    text = f"{result['checkpoint']['label']}  {result['title']}: {100 * result['score']:.2f}"
    text += "" if error is None else f" ± {100 * error:.2f}"
    text += f"  ({result['documents']:,} questions, {result['shots']} shots, {result['documents_per_second']:.1f}/s"
    fit = result["fit"]
    if fit["shots_dropped"]:
        text += f"; {fit['shots_dropped']:,} shots dropped in {fit['documents_with_fewer_shots']:,} questions"
    if fit["documents_cut"]:
        text += f"; {fit['documents_cut']:,} questions cut at the left"
    if fit["max_gen_toks"] < fit["max_gen_toks_asked"]:
        text += f"; at most {fit['max_gen_toks']} new tokens, not {fit['max_gen_toks_asked']}"
    return text + ")"


def compare(arguments: argparse.Namespace) -> int:
    """Compare results; see ``--help``."""
    from comparison import compare_results

    print(compare_results(arguments.results, arguments.baseline, arguments.group, arguments.output))
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    """Download data sets; see ``--help``."""
    from download_data import fill
    from result_files import check_writable

    benchmarks = select(arguments.tasks, arguments.skip)
    check_writable(arguments.data_dir, "--data-dir")
    lines = fill(arguments.data_dir, benchmarks)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lines else 0


def show(arguments: argparse.Namespace) -> int:
    """Print a prompt; see ``--help``."""
    from offline_data import DataFolder
    from show import show_prompt

    data = DataFolder(arguments.data_dir) if arguments.data_dir else None
    print(show_prompt(arguments.task, data, shots=arguments.shots, document=arguments.document))
    return 0


def list_benchmarks(arguments: argparse.Namespace) -> int:
    """Print the suite; see ``--help``."""
    print(f"{'name':15} {'shots':>5} {'questions':>9} {'chance':>6}  {'metric':30} data")
    for benchmark in SUITE:
        from offline_data import DataFolder
        from task_loading import needs

        wanted = needs(benchmark)
        text = wanted[0].dataset
        if arguments.data_dir:
            missing = [need for need in wanted if DataFolder(arguments.data_dir).missing(need)]
            text += (
                ": missing" if len(missing) == len(wanted) else f": {len(missing)} missing" if missing else ": there"
            )
        print(
            f"{benchmark.name:15} {benchmark.shots:5} {benchmark.documents:9,} {100 * benchmark.chance:6.1f}  "
            f"{benchmark.metric:30} {text}"
        )
    return 0


COMMAND_FUNCTIONS = {"run": run, "compare": compare, "prepare": prepare, "show": show, "list": list_benchmarks}

if __name__ == "__main__":
    sys.exit(main())
