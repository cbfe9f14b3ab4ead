"""From the suite's benchmarks to lm-evaluation-harness' tasks, without its 20-second index of all of them."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval_error import EvalError
from offline_data import DataFolder, Need, file_digest
from suite import Benchmark

OWN_TASKS = Path(__file__).parent / "tasks"
NOT_ON_HUB = "clue/fewclue_chid"  # our name for FewCLUE's CHID
HUB_PROBLEMS = {
    "GatedRepoError": "is gated: accept its conditions on its page on the Hub and set HF_TOKEN",
    "DatasetNotFoundError": "is not on the Hub, or is gated: accept its conditions there and set HF_TOKEN",
    "RepositoryNotFoundError": "is not on the Hub under this name",
    "OfflineModeIsEnabled": "is not in the local cache, and the Hub is switched off by HF_HUB_OFFLINE",
    "ConnectionError": "cannot be had: the Hub is not reachable",
    "ConnectError": "cannot be had: the Hub is not reachable",
}


def task_folder(benchmark: Benchmark) -> Path:
    """Return the folder of a benchmark's YAML files."""
    if benchmark.own:
        return OWN_TASKS / benchmark.folder
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / benchmark.folder


@cache
def task_manager(benchmark: Benchmark) -> Any:
    """Return a TaskManager that knows this benchmark's tasks only."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(task_folder(benchmark)), include_defaults=False)


def leaf_configs(benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """Return the YAML of each leaf task, by name, without loading any data.

    Raises:
        EvalError: if this version of lm-evaluation-harness has no such task.
    """
    index = task_manager(benchmark).task_index
    if benchmark.task not in index:
        raise EvalError(
            f"lm-eval {version('lm_eval')} has no task {benchmark.task!r}; the suite is written for 0.4.13: "
            "pip install lm-eval==0.4.13"
        )
    leaves: dict[str, dict[str, Any]] = {}
    names = [benchmark.task]
    while names:
        entry = index[names.pop(0)]
        members = (entry.cfg or {}).get("task")
        if entry.kind.name == "TAG":
            names.extend(sorted(entry.tags))
        elif isinstance(members, list):
            names.extend(member if isinstance(member, str) else member["task"] for member in members)
        else:
            leaves[entry.name] = entry.cfg
    return leaves


def eval_split(config: Mapping[str, Any]) -> str:
    """Return the split whose questions are scored."""
    return str(config.get("test_split") or config["validation_split"])


def shots_split(config: Mapping[str, Any]) -> str:
    """Return the split of the solved examples, as the harness chooses it."""
    named = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    return str(named or config["test_split"])


def needs(benchmark: Benchmark) -> list[Need]:
    """Return the data that a benchmark reads."""
    found = {
        Need(
            config["dataset_path"],
            config.get("dataset_name"),
            tuple(dict.fromkeys((eval_split(config), shots_split(config)))),
        )
        for config in leaf_configs(benchmark).values()
    }
    return sorted(found, key=str)


def task_digest(benchmark: Benchmark) -> str:
    """Hash the files that define a benchmark: YAML, functions, and the program runner where it has one."""
    folder = task_folder(benchmark)
    files = [file for file in folder.iterdir() if file.suffix in (".yaml", ".py") or file.name.endswith("_yaml")]
    if benchmark.runs_code:
        files.append(Path(__file__).parent / "code_runner.py")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name}\0{file_digest(file)}\0".encode())
    return digest.hexdigest()


def missing_data(benchmarks: list[Benchmark], data: DataFolder | None) -> list[str]:
    """Return one line for each data set that cannot be had, without loading any.

    Without a folder the Hub is asked for each data set, unless HF_HUB_OFFLINE says not to: then the local cache is
    tried when a benchmark loads.
    """
    wanted = {need: None for benchmark in benchmarks for need in needs(benchmark)}
    if data is not None:
        return [line for need in wanted if (line := data.missing(need))]
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return []
    lines = [
        f"{NOT_ON_HUB} is not on the Hub: give --data-dir, with a folder that `prepare` has filled"
        for need in wanted
        if need.dataset == NOT_ON_HUB
    ]
    for dataset in dict.fromkeys(need.dataset for need in wanted if need.dataset != NOT_ON_HUB):
        try:
            HfApi().auth_check(dataset, repo_type="dataset")
        except Exception as error:  # httpx' and huggingface_hub's errors; each becomes its line
            lines.append(f"{dataset} {hub_problem(error)}")
            if "Connect" in type(error).__name__:
                lines.append("(give --data-dir, or set HF_HUB_OFFLINE=1 to use what is in the local cache)")
                break
    return lines


def hub_problem(error: BaseException) -> str:
    """Say in one line why a data set could not be had from the Hub."""
    for kind in type(error).__mro__:
        if kind.__name__ in HUB_PROBLEMS:
            return HUB_PROBLEMS[kind.__name__]
    return f"cannot be had: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def load_benchmark(benchmark: Benchmark, data: DataFolder | None, leaf: str | None = None) -> dict[str, Any]:
    """Load a benchmark's tasks with their data.

    Args:
        benchmark: which.
        data: the folder to read from; None for the Hub and its cache.
        leaf: name of the one leaf task to load; None for all.

    Returns:
        What ``TaskManager.load`` returns: ``tasks``, ``groups`` and ``group_map`` by name.

    Raises:
        EvalError: in one line, if the data is absent, gated or does not have the columns that the task reads.
    """
    with quiet(), nullcontext() if data is None else data.answering(needs(benchmark)):
        try:
            loaded: dict[str, Any] = task_manager(benchmark).load([leaf or benchmark.task])
        except EvalError:
            raise
        except Exception as error:  # what a task's templates and functions raise; huggingface_hub's and httpx' own
            text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            if data is not None:
                raise EvalError(
                    f"{benchmark.title}: its data has not the form that its task reads ({text})"
                ) from error
            raise EvalError(
                f"{benchmark.title}: its data set {hub_problem(error)}; or give --data-dir, with a folder that "
                "`prepare` has filled"
            ) from error
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness' and ``datasets``' reports and the bars it draws for each of the 201 leaf tasks."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")}
    levels = {name: logger.level for name, logger in loggers.items()}
    bars = datasets.are_progress_bars_disabled()
    own_tqdm = lm_eval.api.task.tqdm

    def no_bar(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **{**kwargs, "disable": True})

    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = no_bar
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = own_tqdm
        if not bars:
            datasets.enable_progress_bars()
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


@contextmanager
def compiled_templates() -> Iterator[None]:
    """Compile a prompt's Jinja templates once; the harness does it for every field of every solved example.

    With 25 solved examples that is most of the time of a small model's run.
    """
    from lm_eval.utils import env

    env.from_string = lru_cache(maxsize=4096)(env.from_string)
    try:
        yield
    finally:
        del env.from_string
