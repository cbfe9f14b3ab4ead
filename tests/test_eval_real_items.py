"""All fifteen benchmarks with real items on a real checkpoint, and the harness' own command line beside ours.

Takes some minutes and needs data that is not in the repository: set BENCHMARK_ITEMS to a folder with ``benchmarks/``
(with its ``make_hub.py``) and ``models/stories260K/``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import result_files
import run
from scoring import short_hash
from suite import SUITE

ITEMS = Path(os.environ.get("BENCHMARK_ITEMS", "no-folder-given")).resolve()
CHECKPOINT = ITEMS / "models/stories260K"
STOCK = [benchmark for benchmark in SUITE if not benchmark.own]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="BENCHMARK_ITEMS names no folder with real items"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    benchmarks = ITEMS / "benchmarks"
    subprocess.run([sys.executable, benchmarks / "make_hub.py", benchmarks, folder, "--gpqa"], check=True)
    return folder


def results_of(output, data, *options):
    arguments = ["--checkpoint", str(CHECKPOINT), "--data-dir", str(data), "--output", str(output), "--limit", "1"]
    assert run.main([*arguments, "--device", "cpu", *options]) == 0
    return {result["benchmark"]: result for result in result_files.read_results([output])}


def test_all_fifteen_run_in_the_context_of_the_model(data, tmp_path):
    found = results_of(tmp_path, data, "--allow-code")
    assert list(found) == sorted(benchmark.name for benchmark in SUITE)
    assert {name: result["documents"] for name, result in found.items() if result["documents"] > 1} == {
        "mmlu": 57,
        "mmlu_pro": 14,
        "cmmlu": 67,
        "ceval": 52,
    }
    for result in found.values():
        assert 0.0 <= result["score"] <= 1.0
        assert result["fit"]["max_gen_toks"] <= 128
    assert found["arc_challenge"]["fit"]["shots_dropped"] > 0


def test_scores_are_those_of_the_harness_own_command_line(data, tmp_path):
    found = results_of(
        tmp_path / "ours", data, "--shots", "2", "--max-length", "8192", "--tasks", *(b.name for b in STOCK)
    )
    program = Path(sys.executable).parent / "lm-eval"
    subprocess.run(
        [
            *(program, "run", "--model", "hf", "--model_args", f"pretrained={CHECKPOINT},max_length=8192"),
            *("--tasks", ",".join(benchmark.task for benchmark in STOCK)),
            *("--num_fewshot", "2", "--limit", "1", "--batch_size", "8", "--device", "cpu"),
            *("--log_samples", "--output_path", tmp_path / "bare"),
        ],
        cwd=data,  # where `datasets` finds ORG/NAME as folders
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        check=True,
    )
    (path,) = tmp_path.glob("bare/*/results_*.json")
    bare = json.loads(path.read_text())["results"]
    for benchmark in STOCK:
        result = found[benchmark.name]
        assert result["fit"]["shots_dropped"] == 0
        for metric, value in result["metrics"].items():
            assert bare[benchmark.task].get(metric, value) == pytest.approx(value, abs=1e-12), (benchmark.name, metric)
        assert bare[benchmark.task][benchmark.metric] == pytest.approx(result["score"], abs=1e-12)
        metric, filter_name = benchmark.metric.split(",")
        for leaf, ours in result["leaves"].items():
            (samples,) = tmp_path.glob(f"bare/*/samples_{leaf}_2*.jsonl")
            rows = [row for row in map(json.loads, samples.read_text().splitlines()) if row["filter"] == filter_name]
            assert [float(row[metric]) for row in rows] == ours["score"]
            arguments = [[list(each.values()) for each in row["arguments"].values()] for row in rows]
            if isinstance(arguments[0][0][1], str):  # else the number of new tokens is spelled out in ours
                assert [short_hash(each) for each in arguments] == ours["prompt_hash"]
