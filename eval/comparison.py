"""Compares results, on the same questions and prompts only, question by question."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison_tables import (
    Results,
    Row,
    difference_markdown,
    draw,
    near_chance,
    notes,
    score_markdown,
    seed_markdown,
)
from eval_error import EvalError
from paired_tests import PairedDifference, holm, paired_difference
from result_files import check_writable, read_results, write_text
from suite import SUITE, Benchmark

SAME_KEYS = ("task_hash", "lm_eval", "shots", "shots_seed", "limit")


def compare_results(
    folders: Sequence[Path], baseline: str | None = None, groups: Sequence[str] = (), output: Path | None = None
) -> str:
    """Compare all results below folders; write ``compare.md``, ``compare.csv`` and ``compare.png``.

    Args:
        folders: of results.
        baseline: part of the label of the checkpoint to compare with; None for the first.
        groups: ``NAME=PATTERN`` each: the seeds of one optimizer.
        output: folder of the three files; None for the first of ``folders``.

    Returns:
        The Markdown.

    Raises:
        EvalError: if results cannot be compared, naming which and why.
    """
    results = by_checkpoint(read_results(list(folders)))
    columns = [benchmark for benchmark in SUITE if any(benchmark.name in of for of in results.values())]
    for benchmark in columns:
        of_each = {label: of[benchmark.name] for label, of in results.items() if benchmark.name in of}
        check_comparable(benchmark, of_each)
    common = [benchmark for benchmark in columns if all(benchmark.name in of for of in results.values())]
    reference = choose_baseline(list(results), baseline)
    parts = ["# Benchmarks", *notes(results, columns, common), score_markdown(results, columns, common)]
    rows = csv_rows(results, columns, reference)
    if groups:
        parts += seed_markdown(results, common, groups)
    elif len(results) > 1:
        parts += difference_markdown(rows, results, columns, common, reference)
    markdown = "\n\n".join(parts) + "\n"
    folder = output or folders[0]
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.md", markdown)
    write_text(folder / "compare.csv", csv_text(rows))
    draw(results, columns, folder / "compare.png")
    return markdown


def by_checkpoint(found: Sequence[dict[str, Any]]) -> Results:
    """Sort results by checkpoint; two checkpoints of one label get longer names."""
    stems: dict[str, set[str]] = {}
    for result in found:
        stems.setdefault(result["checkpoint"]["label"], set()).add(result["checkpoint"]["file_stem"])
    results: Results = {}
    for result in found:
        checkpoint = result["checkpoint"]
        label = checkpoint["label"] if len(stems[checkpoint["label"]]) == 1 else checkpoint["file_stem"]
        if result["benchmark"] in results.setdefault(label, {}):
            raise EvalError(f"there are two results of {result['title']} on {label}: give one folder of results")
        results[label][result["benchmark"]] = result
    for label, of in results.items():
        digests = {result["key"]["checkpoint_hash"] for result in of.values()}
        if len(digests) > 1:
            raise EvalError(f"{label} changed between its benchmarks: run them again, with the same command")
    return results


def check_comparable(benchmark: Benchmark, of: Mapping[str, dict[str, Any]]) -> None:
    """Refuse results on other questions, other prompts or scored in another way.

    Raises:
        EvalError: naming the two checkpoints and the difference.
    """
    (first, reference), *others = of.items()
    for label, result in others:
        for key in SAME_KEYS:
            if result["key"][key] != reference["key"][key]:
                values = f"{reference['key'][key]!r} for {first} and {result['key'][key]!r} for {label}"
                raise EvalError(f"{benchmark.title}: {key} is {values}; run both with the same settings")
        pairs = list(zip(questions(reference), questions(result), strict=False))
        differing = sum(a != b for a, b in pairs) + abs(reference["documents"] - result["documents"])
        if differing:
            dropped = [each["fit"]["shots_dropped"] for each in (reference, result)]
            tokens = [each["fit"]["max_gen_toks"] for each in (reference, result)]
            raise EvalError(
                f"{benchmark.title}: {differing:,} prompts or keys of {first} and {label} differ (solved examples "
                f"dropped: {dropped[0]:,} and {dropped[1]:,}; new tokens: {tokens[0]} and {tokens[1]}); run both with "
                "the same data, --shots and --max-length"
            )


def questions(result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return (leaf, number, prompt hash, key hash) of each question, in order."""
    return [
        (name, *row)
        for name, leaf in sorted(result["leaves"].items())
        for row in zip(leaf["doc_id"], leaf["prompt_hash"], leaf["target_hash"], strict=True)
    ]


def question_scores(result: Mapping[str, Any]) -> list[float]:
    """Return the score of each question, in the order of ``questions``."""
    return [score for _, leaf in sorted(result["leaves"].items()) for score in leaf["score"]]


def choose_baseline(labels: Sequence[str], wanted: str | None) -> str:
    """Return the label that a part of it names.

    Raises:
        EvalError: if none or several have that part.
    """
    if wanted is None:
        return labels[0]
    matching = [label for label in labels if wanted == label] or [label for label in labels if wanted in label]
    if len(matching) != 1:
        what = "is part of no checkpoint's name" if not matching else f"is part of {len(matching)} names"
        raise EvalError(f"--baseline {wanted} {what}; there are: {', '.join(labels)}")
    return matching[0]


def csv_rows(results: Results, columns: Sequence[Benchmark], reference: str) -> list[Row]:
    """Return a row for each result, with its difference from the baseline's; Holm over a checkpoint's benchmarks."""
    rows = []
    for label, of in results.items():
        shared = [b for b in columns if label != reference and b.name in of and b.name in results[reference]]
        tests: dict[str, tuple[PairedDifference, float]] = {}
        if shared:
            paired = [
                paired_difference(question_scores(of[b.name]), question_scores(results[reference][b.name]))
                for b in shared
            ]
            adjusted = holm([test.p for test in paired])
            tests = {b.name: each for b, each in zip(shared, zip(paired, adjusted, strict=True), strict=True)}
        for benchmark in columns:
            if (result := of.get(benchmark.name)) is None:
                continue
            row = (
                benchmark.name,
                label,
                result["documents"],
                result["score"],
                result["standard_error"],
                result["chance"],
                near_chance(result),
            )
            if benchmark.name not in tests:
                rows.append(Row(*row))
                continue
            test, adjusted_p = tests[benchmark.name]
            error = None if math.isnan(test.standard_error) else test.standard_error
            rows.append(Row(*row, reference, test.difference, error, test.wins, test.losses, test.p, adjusted_p))
    return rows


def csv_text(rows: Sequence[Row]) -> str:
    """Return rows as CSV; empty where there is no value."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return stream.getvalue()
