"""The tables and the figure of a comparison."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from eval_error import EvalError
from paired_tests import average, holm
from result_files import read_result, result_path
from scoring_statistics import mean, standard_error
from suite import SUITE, Benchmark

Results = dict[str, dict[str, dict[str, Any]]]  # checkpoint -> benchmark -> result


@dataclass(frozen=True)
class Row:
    """One line of the CSV file; fractions, not percent."""

    benchmark: str
    checkpoint: str
    questions: int
    score: float
    standard_error: float | None
    chance: float
    within_2_se_of_chance: bool
    baseline: str = ""
    difference: float | None = None
    difference_standard_error: float | None = None
    wins: int | None = None
    losses: int | None = None
    mcnemar_p: float | None = None
    holm_p: float | None = None


def error_of(result: Mapping[str, Any]) -> float:
    """Return the standard error of a score, NaN if there is none (a single question)."""
    return math.nan if result["standard_error"] is None else float(result["standard_error"])


def near_chance(result: Mapping[str, Any]) -> bool:
    """Whether a score lies within two standard errors, its own or that of guessing, of guessing."""
    chance = result["chance"]
    guessing = math.sqrt(chance * (1 - chance) / result["documents"])
    return bool(abs(result["score"] - chance) <= 2 * max(guessing, result["standard_error"] or 0.0))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column at the left, the others at the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float, error: float | None, *, sign: bool = False) -> str:
    """Return "12.34 ± 0.56"."""
    text = f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"
    return text if error is None or math.isnan(error) else f"{text} ± {100 * error:.2f}"


def _cut_name(result: dict[str, Any]) -> str | None:
    """What only the first questions were asked of; None if its ``limit`` left all in."""
    limit, leaves = result["key"]["limit"], result["leaves"].values()
    if limit is None or all(len(leaf["score"]) < limit for leaf in leaves):
        return None
    if result["documents"] == result["documents_published"]:
        return None
    return f"{result['title']} (each of its tasks)" if len(leaves) > 1 else str(result["title"])


def notes(results: Results, columns: Sequence[Benchmark], common: Sequence[Benchmark]) -> list[str]:
    """Say what limits the numbers below."""
    every = [result for of in results.values() for result in of.values()]
    lines = [
        "Percent ± standard error over questions. ≈ marks a score within two standard errors of guessing.",
    ]
    cut: dict[int, set[str]] = defaultdict(set)
    for result in every:
        if name := _cut_name(result):
            cut[result["key"]["limit"]].add(name)
    for limit, names in sorted(cut.items()):
        lines.append(
            f"**Only the first {limit:,} questions of {', '.join(sorted(names))} were asked: no result, a trial.**"
        )
    short = {
        result["title"]: f"{result['title']} {result['documents']:,} of {result['documents_published']:,}"
        for result in every
        if _cut_name(result) is None and result["documents"] != result["documents_published"]
    }
    if short:
        lines.append(f"Not the published number of questions: {'; '.join(short.values())}.")
    standard = {benchmark.name: benchmark.shots for benchmark in columns}
    if other := {r["title"]: r["shots"] for r in every if r["shots"] != standard[r["benchmark"]]}:
        lines.append(f"Not the suite's number of shots: {', '.join(f'{title} {n}' for title, n in other.items())}.")
    if dropped := sorted({result["title"] for result in every if result["fit"]["shots_dropped"]}):
        lines.append(f"Solved examples were dropped to fit the context: {', '.join(dropped)}.")
    if cut := sorted({result["title"] for result in every if result["fit"]["documents_cut"]}):
        lines.append(f"Some questions were cut at the left, without any solved example: {', '.join(cut)}.")
    if capped := sorted({r["title"] for r in every if r["fit"]["max_gen_toks"] < r["fit"]["max_gen_toks_asked"]}):
        lines.append(f"Fewer new tokens than the task asks for, a quarter of the context: {', '.join(capped)}.")
    if len({result["model_dtype"] for result in every}) > 1:
        lines.append("The weights were not all of one dtype.")
    if len(common) < len(SUITE):
        lines.append(
            f"{len(common)} of the suite's {len(SUITE)} benchmarks are there for every checkpoint; averages are over "
            "these."
        )
    return ["\n".join(f"- {line}" for line in lines)]


def score_markdown(results: Results, columns: Sequence[Benchmark], common: Sequence[Benchmark]) -> str:
    """Return the table of scores, with the average over the columns that all checkpoints have."""
    rows = []
    for benchmark in columns:
        cells = []
        for of in results.values():
            result = of.get(benchmark.name)
            if result is None:
                cells.append("-")
                continue
            cell = percent(result["score"], result["standard_error"]) + (" ≈" if near_chance(result) else "")
            if len(result["leaves"]) > 1:
                cell += f" (macro {100 * result['macro_average']:.2f})"
            cells.append(cell)
        rows.append([benchmark.title, f"{100 * benchmark.chance:.1f}", *cells])
    if common:
        averages = []
        for of in results.values():
            value, error = average(
                [of[benchmark.name]["score"] for benchmark in common],
                [error_of(of[benchmark.name]) for benchmark in common],
            )
            averages.append(percent(value, error))
        guess = mean([benchmark.chance for benchmark in common])
        rows.append([f"**average of {len(common)}**", f"{100 * guess:.1f}", *averages])
    return table(["benchmark", "chance", *results], rows)


def difference_markdown(
    rows: Sequence[Row], results: Results, columns: Sequence[Benchmark], common: Sequence[Benchmark], reference: str
) -> list[str]:
    """Return a table of differences from the baseline for each other checkpoint."""
    titles = {benchmark.name: benchmark.title for benchmark in columns}
    parts = [
        "One run per checkpoint: the errors are over questions. They tell these two models apart, not two optimizers; "
        "for that give several seeds with `--group`."
    ]
    for label in results:
        mine = [row for row in rows if row.checkpoint == label and row.difference is not None]
        if not mine:
            continue
        lines = [
            [
                titles[row.benchmark],
                percent(row.difference or 0.0, row.difference_standard_error, sign=True),
                f"{row.wins:,} : {row.losses:,}",
                f"{row.mcnemar_p:.3g}",
                f"{row.holm_p:.3g}" + (" \\*" if (row.holm_p or 0.0) < 0.05 else ""),
            ]
            for row in mine
        ]
        shared = [row for row in mine if row.benchmark in {benchmark.name for benchmark in common}]
        if shared:
            value, error = average(
                [row.difference or 0.0 for row in shared],
                [math.nan if (e := row.difference_standard_error) is None else e for row in shared],
            )
            lines.append([f"**average of {len(shared)}**", percent(value, error, sign=True), "", "", ""])
        parts += [
            f"## {label} minus {reference}",
            table(["benchmark", "difference", "wins : losses", "McNemar p", f"Holm p ({len(mine)} tests)"], lines),
        ]
    return [*parts, "Paired on the same questions; exact McNemar test on those that only one has right. \\* p < 0.05."]


def seed_markdown(results: Results, common: Sequence[Benchmark], groups: Sequence[str]) -> list[str]:
    """Return the comparison of groups of seeds: the first group is the baseline.

    Raises:
        EvalError: for a group that is misspelt, has fewer than two checkpoints, or shares one with another group.
    """
    from scipy import stats

    members: dict[str, list[str]] = {}
    for group in groups:
        name, separator, pattern = group.partition("=")
        if not separator or not name or not pattern:
            raise EvalError(f"--group {group}: write NAME=PATTERN, such as muon='muon-seed*'")
        members[name] = [label for label in results if fnmatch(label, pattern) or fnmatch(label, f"*{pattern}*")]
        if len(members[name]) < 2:
            raise EvalError(
                f"--group {group}: {len(members[name])} checkpoints match, seeds need two or more; there are: "
                f"{', '.join(results)}"
            )
    flat = [label for labels in members.values() for label in labels]
    if twice := sorted({label for label in flat if flat.count(label) > 1}):
        raise EvalError(f"{twice[0]} is in two groups")
    if not common:
        raise EvalError("no benchmark is there for every checkpoint")

    def values(name: str, benchmark: Benchmark | None) -> list[float]:
        of = [results[label] for label in members[name]]
        if benchmark is not None:
            return [result[benchmark.name]["score"] for result in of]
        return [mean([result[each.name]["score"] for each in common]) for result in of]

    rows = []
    baseline, *others = members
    columns: list[Benchmark | None] = [*common, None]
    tests = {
        name: [stats.ttest_ind(values(name, b), values(baseline, b), equal_var=False) for b in columns]
        for name in others
    }
    adjusted = {name: holm([number(test.pvalue) for test in tests[name][:-1]]) for name in others}
    for index, benchmark in enumerate(columns):
        cells = [benchmark.title if benchmark else f"**average of {len(common)}**"]
        cells += [percent(mean(values(name, benchmark)), standard_error(values(name, benchmark))) for name in members]
        for name in others:
            interval = tests[name][index].confidence_interval()
            difference = mean(values(name, benchmark)) - mean(values(baseline, benchmark))
            cells.append(f"{100 * difference:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]")
            cells.append(f"{adjusted[name][index]:.3g}" if benchmark else f"{number(tests[name][index].pvalue):.3g}")
        rows.append(cells)
    header = ["benchmark", *(f"{name} ({len(labels)} seeds)" for name, labels in members.items())]
    for name in others:
        header += [f"{name} minus {baseline}, 95 %", "p"]
    return [
        "## Over seeds",
        "± is the standard error over seeds; intervals and p of Welch's t-test over seeds, p by Holm over the "
        f"{len(common)} benchmarks (the average's by itself).",
        table(header, rows),
    ]


def number(p: float) -> float:
    """Return a p value, 1.0 where the test has none because nothing varies."""
    return 1.0 if math.isnan(p) else float(p)


def score_table(output: Path, stems: Sequence[str], benchmarks: Sequence[Benchmark]) -> str:
    """Return the scores of checkpoints as a Markdown table, a dash where there is no result; "" if there is none."""
    results: Results = {}
    for stem in stems:
        found = {b.name: result for b in benchmarks if (result := read_result(result_path(output, stem, b.name)))}
        label = next(iter(found.values()))["checkpoint"]["label"] if found else stem
        results[label if label not in results else stem] = found
    if not any(results.values()):
        return ""
    common = [benchmark for benchmark in benchmarks if all(benchmark.name in of for of in results.values())]
    return score_markdown(results, benchmarks, common)


def draw(results: Results, columns: Sequence[Benchmark], path: Path) -> None:
    """Draw scores with two standard errors, and the chance level of each benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.45 * len(columns)), layout="constrained")
    for row, benchmark in enumerate(columns):
        axes.plot([100 * benchmark.chance] * 2, [row - 0.35, row + 0.35], color="grey", linestyle=":")
    for index, (label, of) in enumerate(results.items()):
        shift = 0.5 * ((index + 0.5) / len(results) - 0.5)
        rows = [row for row, benchmark in enumerate(columns) if benchmark.name in of]
        found = [of[columns[row].name] for row in rows]
        axes.errorbar(
            [100 * result["score"] for result in found],
            [row + shift for row in rows],
            xerr=[200 * (result["standard_error"] or 0.0) for result in found],
            fmt="o",
            markersize=4,
            label=label,
        )
    shots = [next(of[b.name]["shots"] for of in results.values() if b.name in of) for b in columns]
    names = [f"{benchmark.title} ({count} shots)" for benchmark, count in zip(columns, shots, strict=True)]
    axes.set_yticks(range(len(columns)), names)
    axes.invert_yaxis()
    axes.set_xlabel("score in percent, ± two standard errors over questions; dotted: chance")
    axes.legend(fontsize="small")
    partial = path.with_name(f".{path.name}.partial.png")
    figure.savefig(partial, dpi=150)
    pyplot.close(figure)
    partial.replace(path)
