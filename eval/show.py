"""The exact prompt of a question, without a model."""

from typing import Any

from eval_error import EvalError
from offline_data import DataFolder
from scoring import SHOTS_SEED
from suite import BENCHMARKS, Benchmark, select
from task_loading import leaf_configs, load_benchmark, quiet


def show_prompt(name: str, data: DataFolder | None, *, shots: int | None = None, document: int = 0) -> str:
    """Return the prompt of one question, its answers and its key, as a model gets them where all fits.

    Args:
        name: a benchmark, or a leaf task of one.
        data: folder of the data; None for the Hub.
        shots: solved examples; None for the benchmark's.
        document: number of the question, from 0. The solved examples are those drawn for this one in a whole run.

    Raises:
        EvalError: for an unknown name, or a question that there is not.
    """
    benchmark = benchmark_of(name)
    leaves = leaf_configs(benchmark)
    leaf = name if name in leaves else next(iter(leaves))
    task = load_benchmark(benchmark, data, leaf)["tasks"][leaf]
    count = len(task.eval_docs)
    if document >= count:
        raise EvalError(f"--document {document}: {task.task_name} has {count:,} questions, counted from 0")
    task.set_config("num_fewshot", benchmark.shots if shots is None else shots)
    task.set_fewshot_seed(SHOTS_SEED)
    with quiet():
        task.build_all_requests(limit=document + 1)
    requests = [request for request in task.instances if request.doc_id == document]
    parts = [
        f"== {task.task_name}, question {document} of {count:,}, {task.config.num_fewshot} solved examples, "
        f"scored by {benchmark.metric}"
    ]
    if benchmark.private:
        parts.append("== its authors ask that no question be published in plain text")
    prompts = dict.fromkeys(request.args[0] for request in requests)
    parts += [f"== prompt\n{prompt}" for prompt in prompts]
    if requests[0].request_type == "generate_until":
        parts.append(f"== generation\n{requests[0].args[1]}")
    else:
        parts.append("== answers\n" + "\n".join(repr(answer) for answer in dict.fromkeys(r.args[1] for r in requests)))
    key: Any = task.doc_to_text(requests[0].doc) if task.multiple_input else task.doc_to_target(requests[0].doc)
    parts.append(f"== key\n{key}")
    return "\n".join(parts)


def benchmark_of(name: str) -> Benchmark:
    """Return the benchmark that a name means: its own, or that of one of its leaf tasks."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    for benchmark in BENCHMARKS.values():
        own = name.startswith(benchmark.task.removesuffix("-valid"))  # the others' YAML need not be read
        if name == benchmark.task or (own and name in leaf_configs(benchmark)):
            return benchmark
    return select([name])[0]
