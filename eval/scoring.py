"""One benchmark on one model: as lm-evaluation-harness does it, with prompts that fit and a complete result."""

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from loaded_lm import LoadedLM
from scoring_statistics import mean, standard_error
from suite import Benchmark
from task_loading import compiled_templates, quiet
from transformers import GenerationConfig

#: Seeds of the harness' own command line, so that the same solved examples are drawn.
PYTHON_SEED, NUMPY_SEED, TORCH_SEED, SHOTS_SEED = 0, 1234, 1234, 1234
GENERATION_SHARE = 4  # at most a quarter of the context is generated


@dataclass
class Fit:
    """What was done to make prompts fit the model's context.

    Attributes:
        documents_with_fewer_shots: questions that got fewer solved examples.
        shots_dropped: solved examples left out, over all questions.
        documents_cut: questions that do not fit without any solved example; the harness cuts them at the left.
        answers_cut: answers that are longer than the context by themselves; scored by their last tokens.
        max_gen_toks_asked: new tokens that the task asks for, 0 if it generates none.
        max_gen_toks: new tokens that it gets.
    """

    documents_with_fewer_shots: int = 0
    shots_dropped: int = 0
    documents_cut: int = 0
    answers_cut: int = 0
    max_gen_toks_asked: int = 0
    max_gen_toks: int = 0


@dataclass
class Scores:
    """A benchmark's scores on one model.

    Attributes:
        score: mean of the metric over all questions, in [0, 1].
        standard_error: of that mean, over questions; NaN for a single one.
        macro_average: mean of the subjects' means.
        metrics: every metric of the task by ``metric,filter``, mean over all questions.
        leaves: by leaf task: documents, shots, and a list a question of prompt hash, target hash and score.
        fit: see Fit.
        seconds: time for building prompts, running the model and scoring.
    """

    score: float
    standard_error: float
    macro_average: float
    metrics: dict[str, float]
    leaves: dict[str, dict[str, Any]]
    fit: Fit = field(default_factory=Fit)
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """Number of questions."""
        return sum(len(leaf["score"]) for leaf in self.leaves.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values; NaN, which is no JSON, becomes None."""
        plain = asdict(self)
        plain["standard_error"] = None if math.isnan(self.standard_error) else self.standard_error
        return {**plain, "documents": self.documents, "documents_per_second": self.documents / self.seconds}


def score(
    lm: Any,
    benchmark: Benchmark,
    loaded: Mapping[str, Any],
    *,
    shots: int | None = None,
    limit: int | None = None,
    allow_code: bool = False,
) -> Scores:
    """Score a benchmark.

    Args:
        lm: the model as the harness sees it. Prompts are made to fit if it is a ``LoadedLM``.
        benchmark: which.
        loaded: its tasks, from ``load_benchmark``.
        shots: solved examples; None for the benchmark's.
        limit: questions of each leaf task; None for all.
        allow_code: run programs that the model wrote, where the benchmark asks for that.

    Raises:
        ValueError: for a benchmark that runs code, without ``allow_code``.
    """
    shots = benchmark.shots if shots is None else shots
    start = time.perf_counter()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    torch.manual_seed(TORCH_SEED)
    fit = Fit()
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(compiled_templates())
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(SHOTS_SEED)
        if isinstance(lm, LoadedLM):
            lm.begin()
            stack.enter_context(clean_generation_config(lm.model))
            for task in loaded["tasks"].values():
                stack.enter_context(capped_generation(task, lm, fit))
                stack.enter_context(fitting_shots(task, lm, fit))
        results = evaluator.evaluate(
            lm=lm,
            task_dict=dict(loaded),
            limit=limit,
            bootstrap_iters=1,  # all metrics are means: their errors have a closed form
            log_samples=True,
            confirm_run_unsafe_code=allow_code,
        )
    fit.answers_cut = getattr(lm, "answers_cut", 0)
    summary = summarize(benchmark, results["samples"], shots)
    summary.fit = fit
    summary.seconds = time.perf_counter() - start
    return summary


def summarize(benchmark: Benchmark, samples: Mapping[str, list[dict[str, Any]]], shots: int) -> Scores:
    """Reduce the harness' samples, which hold whole prompts, to scores and hashes."""
    metric, filter_name = benchmark.metric.split(",")
    leaves: dict[str, dict[str, Any]] = {}
    by_metric: dict[str, list[float]] = {}
    for name, rows in sorted(samples.items()):
        chosen = [row for row in rows if row["filter"] == filter_name]
        leaves[name] = {
            "shots": shots,
            "doc_id": [row["doc_id"] for row in chosen],
            "prompt_hash": [short_hash(row["arguments"]) for row in chosen],
            "target_hash": [short_hash(row["target"]) for row in chosen],
            "score": [float(row[metric]) for row in chosen],
        }
        for row in rows:
            for each in row["metrics"]:
                by_metric.setdefault(f"{each},{row['filter']}", []).append(float(row[each]))
    values = by_metric[benchmark.metric]
    return Scores(
        score=mean(values),
        standard_error=standard_error(values),
        macro_average=mean([mean(leaf["score"]) for leaf in leaves.values()]),
        metrics={name: mean(each) for name, each in sorted(by_metric.items())},
        leaves=leaves,
    )


def short_hash(value: Any) -> str:
    """Return 12 hexadecimal digits of the hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


@contextmanager
def clean_generation_config(model: Any) -> Iterator[None]:
    """Replace the checkpoint's generation settings by none but its token ids, and put them back.

    The harness passes its own; a checkpoint's ``max_new_tokens`` would go before them and its ``repetition_penalty``
    beside them.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    saved = [module.generation_config for module in owners]
    for module, config in zip(owners, saved, strict=True):
        ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        module.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        for module, config in zip(owners, saved, strict=True):
            module.generation_config = config


@contextmanager
def capped_generation(task: Any, lm: LoadedLM, fit: Fit) -> Iterator[None]:
    """Let a task generate at most a quarter of the model's context: the harness refuses models below 2,049 tokens."""
    kwargs = task.config.generation_kwargs
    if task.OUTPUT_TYPE != "generate_until":
        yield
        return
    asked = int(kwargs.get("max_gen_toks", lm.max_gen_toks))
    granted = min(asked, max(1, lm.max_length // GENERATION_SHARE))
    fit.max_gen_toks_asked, fit.max_gen_toks = asked, granted
    saved = dict(kwargs)
    kwargs["max_gen_toks"] = granted
    try:
        yield
    finally:
        kwargs.clear()
        kwargs.update(saved)


@contextmanager
def fitting_shots(task: Any, lm: LoadedLM, fit: Fit) -> Iterator[None]:
    """Drop a prompt's last solved examples, whole ones, until it fits; the harness would cut one in the middle.

    The examples are drawn as the harness draws them: where nothing is dropped, the prompts are the same.
    """
    build: Callable[..., Any] = task.fewshot_context
    sampler = task.sampler
    draw: Callable[..., Any] = sampler.sample

    def fitted(doc: Any, num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        drawn: list[Any] = []

        def draw_once(n: int, *sample_args: Any, **sample_kwargs: Any) -> list[Any]:
            if not drawn:
                drawn.extend(draw(n, *sample_args, **sample_kwargs))
            return drawn[:n]

        sampler.sample = draw_once
        try:
            context = build(doc, num_fewshot, *args, **kwargs)
            if fits(task, lm, doc, context):
                return context
            # `high` solved examples do not fit, `low` may. Mostly one or two are too many: down from the top in
            # growing steps, then by halves.
            high, low = num_fewshot, max(num_fewshot - 1, 0)
            while low > 0 and not fits(task, lm, doc, build(doc, low, *args, **kwargs)):
                high, low = low, max(low - 2 * (num_fewshot - low), 0)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (
                    (middle, high) if fits(task, lm, doc, build(doc, middle, *args, **kwargs)) else (low, middle)
                )
            context = build(doc, low, *args, **kwargs)
        finally:
            sampler.sample = draw
        fit.documents_with_fewer_shots += num_fewshot > low
        fit.shots_dropped += num_fewshot - low
        fit.documents_cut += low == 0 and not fits(task, lm, doc, context)
        return context

    task.fewshot_context = fitted
    try:
        yield
    finally:
        del task.fewshot_context
        if "sample" in vars(sampler):
            del sampler.sample


def fits(task: Any, lm: LoadedLM, doc: Any, context: Any) -> bool:
    """Whether each request of a question fits: prompt and answer, or prompt and new tokens."""
    built = task.construct_requests(doc=doc, ctx=context, metadata=(task.task_name, 0, 1))
    requests = built if isinstance(built, list) else [built]
    if requests[0].request_type == "generate_until":
        prompt, kwargs = requests[0].args
        return bool(len(lm.tok_encode(prompt)) + kwargs["max_gen_toks"] <= lm.max_length)
    # The last token is predicted, not read. The longest text first: nearly always the others are shorter in tokens too
    texts = sorted({prompt + answer for prompt, answer in (request.args for request in requests)}, key=len)
    lm.remember(texts)
    return all(len(lm.tok_encode(text)) <= lm.max_length + 1 for text in reversed(texts))
