"""Tests between models, what they refuse to compare, and the three files."""

import csv
import itertools
import json
import math
import random

import pytest
import run
from comparison import compare_results
from eval_error import EvalError
from paired_tests import average, holm, mcnemar, paired_difference
from result_files import write_result
from scipy import stats
from scoring_statistics import mean, standard_error
from suite import BENCHMARKS, SUITE


def write(folder, label, benchmark, scores, *, seed="x", dropped=0, limit=None, **changes):
    """Write an invented result, as ``run`` writes it."""
    scores = list(map(float, scores))
    key = {
        "checkpoint_hash": label,
        "benchmark": benchmark,
        "task_hash": "t",
        "data_hash": "d",
        "shots": 5,
        "shots_seed": 1234,
        "limit": limit,
        "max_length": None,
        "dtype": "auto",
        "lm_eval": "0.4.13",
    }
    result = {
        "key": {**key, **{name: changes[name] for name in changes.keys() & key.keys()}},
        "benchmark": benchmark,
        "title": BENCHMARKS[benchmark].title,
        "metric": BENCHMARKS[benchmark].metric,
        "chance": BENCHMARKS[benchmark].chance,
        "shots": 5,
        "documents_published": BENCHMARKS[benchmark].documents,
        "documents": len(scores),
        "checkpoint": {"name": label, "label": label, "file_stem": label.replace("/", "_")},
        "model_dtype": "float32",
        "score": mean(scores),
        "standard_error": standard_error(scores),
        "macro_average": mean(scores),
        "fit": {
            "documents_with_fewer_shots": dropped,
            "shots_dropped": dropped,
            "documents_cut": 0,
            "answers_cut": 0,
            "max_gen_toks_asked": 0,
            "max_gen_toks": 0,
        },
        "leaves": {
            benchmark: {
                "shots": 5,
                "doc_id": [*range(len(scores))],
                "prompt_hash": [f"{seed}{index}" for index in range(len(scores))],
                "target_hash": ["k"] * len(scores),
                "score": scores,
            }
        },
    }
    write_result(folder / label.replace("/", "_") / f"{benchmark}.json", result)


def answers(rate, count=200, seed=0):
    draw = random.Random(seed)
    return [draw.random() < rate for _ in range(count)]


def test_mcnemar_is_scipys_exact_test_on_discordant_pairs():
    for wins, losses in itertools.product(range(12), repeat=2):
        expected = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
        assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(900, 1100) == pytest.approx(stats.binomtest(900, 2000, 0.5).pvalue, rel=1e-9)


def test_holm_is_the_closed_test_of_bonferroni():
    draw = random.Random(1)
    for size in range(1, 7):
        ps = [draw.random() ** 4 for _ in range(size)]
        for index, adjusted in enumerate(holm(ps)):
            # closed testing: the worst Bonferroni p of all intersections that hold this hypothesis
            groups = (g for n in range(1, size + 1) for g in itertools.combinations(range(size), n) if index in g)
            closed = max(min(1.0, len(group) * min(ps[i] for i in group)) for group in groups)
            assert adjusted == pytest.approx(closed)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_differences_are_paired():
    a, b = [1, 1, 0, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1, 0, 0]
    found = paired_difference(a, b)
    assert (found.wins, found.losses) == (3, 1)
    assert found.difference == 0.25
    test = stats.ttest_rel(a, b)
    assert found.difference / found.standard_error == pytest.approx(test.statistic)
    assert found.p == pytest.approx(stats.binomtest(3, 4).pvalue)
    with pytest.raises(ValueError, match="shorter"):
        paired_difference(a, b[:-1])
    assert standard_error(a) == pytest.approx(stats.sem(a))
    assert math.isnan(standard_error([1.0]))
    value, error = average([0.2, 0.4, 0.9], [0.03, 0.04, 0.0])
    assert (value, error) == (pytest.approx(0.5), pytest.approx(0.05 / 3))


def test_the_three_files_hold_scores_differences_and_chance(tmp_path, capsys):
    for benchmark in SUITE:
        write(tmp_path, "adamw", benchmark.name, answers(benchmark.chance + 0.3))
        write(tmp_path, "muon", benchmark.name, answers(benchmark.chance + 0.5))
    write(tmp_path, "muon", "piqa", answers(0.5, seed=3))
    assert run.main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "compare.md").read_text().strip()
    assert "| **average of 15** |" in printed
    assert "## muon minus adamw" in printed
    assert "Holm p (15 tests)" in printed
    assert "One run per checkpoint" in printed
    piqa = next(line for line in printed.splitlines() if line.startswith("| PIQA"))
    assert piqa.count("≈") == 1
    with (tmp_path / "compare.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 30
    found = {(row["benchmark"], row["checkpoint"]): row for row in rows}
    row = found["gsm8k", "muon"]
    wanted = paired_difference(answers(0.5), answers(0.3))
    assert float(row["difference"]) == wanted.difference
    assert float(row["mcnemar_p"]) == wanted.p
    assert (int(row["wins"]), int(row["losses"])) == (wanted.wins, wanted.losses)
    assert float(row["holm_p"]) >= wanted.p
    assert row["within_2_se_of_chance"] == "False"
    assert found["piqa", "muon"]["within_2_se_of_chance"] == "True"
    assert found["gsm8k", "adamw"]["difference"] == ""
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    scores = [float(found[b.name, "muon"]["score"]) for b in SUITE]
    errors = [float(found[b.name, "muon"]["standard_error"]) for b in SUITE]
    value, error = average(scores, errors)
    assert f"{100 * value:.2f} ± {100 * error:.2f}" in printed
    # a second comparison reads results, not its own files
    assert compare_results([tmp_path], baseline="muon", output=tmp_path / "other").count("## adamw minus muon") == 1
    assert len(list((tmp_path / "other").iterdir())) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "y", "dropped": 7}, r"200 prompts or keys of a and b differ \(solved examples dropped: 0 and 7"),
        ({"count": 150}, "50 prompts or keys"),
        ({"shots": 0}, "shots is 5 for a and 0 for b"),
        ({"limit": 200}, "limit is None for a and 200 for b"),
        ({"task_hash": "other"}, "task_hash"),
        ({"lm_eval": "0.4.9"}, "lm_eval is '0.4.13' for a and '0.4.9' for b"),
    ],
)
def test_what_differs_is_not_compared(changes, message, tmp_path):
    write(tmp_path, "a", "piqa", answers(0.6))
    write(tmp_path, "b", "piqa", answers(0.6, changes.pop("count", 200)), **changes)
    with pytest.raises(EvalError, match=message):
        compare_results([tmp_path])
    assert not (tmp_path / "compare.md").exists()


def test_what_limits_a_comparison_is_said(tmp_path):
    write(tmp_path, "a", "piqa", answers(0.7), limit=200)
    write(tmp_path, "a", "gsm8k", answers(0.1), dropped=3, limit=200)
    write(tmp_path, "b", "piqa", answers(0.8), limit=200)
    text = compare_results([tmp_path])
    assert "Only the first 200 questions of GSM8K, PIQA were asked" in text
    assert "Not the suite's number of shots: GSM8K 5." in text  # four there
    assert "dropped to fit the context: GSM8K" in text
    assert "1 of the suite's 15 benchmarks are there for every checkpoint" in text
    assert "| **average of 1** |" in text
    write(tmp_path / "whole", "a", "piqa", answers(0.7))
    assert "PIQA 200 of 1,838" in compare_results([tmp_path / "whole"])
    for task, limit in (("piqa", None), ("gsm8k", 100), ("hellaswag", 150)):
        write(tmp_path / "parts", "a", task, answers(0.7), limit=limit)
    text = compare_results([tmp_path / "parts"])
    assert [line for line in text.splitlines() if "Only" in line] == [
        "- **Only the first 100 questions of GSM8K were asked: no result, a trial.**",
        "- **Only the first 150 questions of HellaSwag were asked: no result, a trial.**",
    ]
    write(tmp_path / "more", "a", "piqa", answers(0.7), limit=2500)  # more than there are
    text = compare_results([tmp_path / "more"])
    assert "Only" not in text
    assert "PIQA 200 of 1,838" in text


def test_results_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(EvalError, match="no such folder"):
        compare_results([tmp_path / "none"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(EvalError, match="holds no result"):
        compare_results([tmp_path])
    write(tmp_path, "a", "piqa", answers(0.7))
    write(tmp_path, "a", "gsm8k", answers(0.7), checkpoint_hash="older")
    with pytest.raises(EvalError, match="a changed between its benchmarks"):
        compare_results([tmp_path])
    write(tmp_path, "a", "gsm8k", answers(0.7))
    write(tmp_path, "ab", "gsm8k", answers(0.7))
    with pytest.raises(EvalError, match="--baseline c is part of no checkpoint's name"):
        compare_results([tmp_path], baseline="c")
    compare_results([tmp_path], baseline="a")  # the whole name goes before parts
    write(tmp_path / "copy", "a", "piqa", answers(0.7))
    with pytest.raises(EvalError, match="two results of PIQA on a"):
        compare_results([tmp_path])
    (damaged,) = (tmp_path / "copy").rglob("piqa.json")
    damaged.write_text(damaged.read_text()[:-9])
    with pytest.raises(EvalError, match=f"{damaged} cannot be read .*; run that benchmark again"):
        compare_results([tmp_path])


def test_seeds_are_compared_over_seeds(tmp_path):
    rates = {"adamw": (0.50, 0.55, 0.52), "muon": (0.60, 0.66, 0.61)}
    for name, each in rates.items():
        for seed, rate in enumerate(each):
            for benchmark in ("piqa", "gsm8k"):
                write(tmp_path, f"{name}-seed{seed}/checkpoint-9", benchmark, [i < 1000 * rate for i in range(1000)])
    text = compare_results([tmp_path], groups=["adamw=adamw-*", "muon=muon-*"])
    test = stats.ttest_ind(rates["muon"], rates["adamw"], equal_var=False)
    interval = test.confidence_interval()
    line = next(line for line in text.splitlines() if line.startswith("| **average of 2** | ") and "[" in line)
    difference = 100 * (mean(rates["muon"]) - mean(rates["adamw"]))
    assert f"{difference:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]" in line
    assert line.endswith(f"| {test.pvalue:.3g} |")
    assert f"{100 * mean(rates['muon']):.2f} ± {100 * stats.sem(rates['muon']):.2f}" in line
    piqa = [line for line in text.splitlines() if line.startswith("| PIQA")][-1]
    assert piqa.endswith(f"| {min(1.0, 2 * test.pvalue):.3g} |")  # Holm over two benchmarks with the same p
    assert "One run per checkpoint" not in text
    for group, message in (
        ("muon", "write NAME=PATTERN"),
        ("muon=muon-seed0*", "1 checkpoints match, seeds need two"),
    ):
        with pytest.raises(EvalError, match=message):
            compare_results([tmp_path], groups=[group])
    with pytest.raises(EvalError, match="is in two groups"):
        compare_results([tmp_path], groups=["a=muon*", "b=*seed*"])


def test_files_are_plain_json(tmp_path):
    write(tmp_path, "a", "piqa", [1, 0])
    (path,) = tmp_path.rglob("piqa.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["score"] == 0.5
