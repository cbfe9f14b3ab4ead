"""The command line: results that resume, checkpoints of every kind, errors in one line, work on several devices."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import download_data
import huggingface_hub
import jobs
import peft
import pytest
import result_files
import run
import tokenizers
import transformers
from checkpoints import by_numbers, find_checkpoints, load_model, load_tokenizer
from eval_error import EvalError
from eval_fixtures import RIGHT, save_checkpoint, save_tokenizer, shared_data
from eval_workers import work_or_die
from loaded_lm import LoadedLM
from offline_data import DataFolder
from scoring import score
from suite import BENCHMARKS, SUITE
from task_loading import load_benchmark, missing_data, needs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data():
    return shared_data()


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "run/checkpoint-900")


def command(data, output, *checkpoints, tasks=("piqa", "gsm8k")):
    return [
        *("--checkpoint", *map(str, checkpoints)),
        *("--tasks", *tasks),
        *("--data-dir", str(data), "--output", str(output), "--device", "cpu"),
    ]


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def test_results_are_kept_and_what_changed_is_done_again(data, checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    again = command(data, output, checkpoint)
    assert run.main(again) == 0
    printed = capsys.readouterr()
    assert "| PIQA | 50.0 |" in printed.out
    assert "| **average of 2** |" in printed.out
    first = times(output)
    assert set(first) == {"piqa.json", "gsm8k.json"}

    assert run.main(again) == 0
    assert times(output) == first
    assert "2 of 2 results are there already" in capsys.readouterr().err

    (path,) = output.rglob("gsm8k.json")  # a file cut short
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    assert run.main(again) == 0
    assert json.loads(path.read_text())["leaves"] == json.loads(text)["leaves"]
    second = times(output)
    assert second["piqa.json"] == first["piqa.json"]
    assert second["gsm8k.json"] > first["gsm8k.json"]

    assert run.main([*again, "--limit", "1"]) == 0
    assert all(times(output)[name] > second[name] for name in second)
    third = times(output)
    assert run.main([*again, "--limit", "1", "--batch-size", "3"]) == 0  # no part of what a score depends on
    assert times(output) == third

    save_checkpoint(checkpoint, seed=1)  # other weights
    assert run.main([*again, "--limit", "1"]) == 0
    assert all(times(output)[name] > third[name] for name in third)
    assert not [path for path in output.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_other_data_is_another_result(data, checkpoint, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data / "openai", own / "openai")
    again = command(own, tmp_path / "out", checkpoint, tasks=("gsm8k",))
    assert run.main(again) == 0
    first = times(tmp_path / "out")
    with (own / "openai/gsm8k/main/test.jsonl").open("a") as stream:
        stream.write(json.dumps({"question": f"FRAGE-test what is {RIGHT}3?", "answer": "#### 3"}) + "\n")
    assert run.main(again) == 0
    assert times(tmp_path / "out") != first
    (result,) = result_files.read_results([tmp_path / "out"])
    assert result["documents"] == 3


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    result_files.write_result(path, {"key": 1})

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        result_files.write_result(path, {"key": 2})
    assert result_files.read_result(path)["key"] == 1
    assert os.listdir(tmp_path) == ["result.json"]


def test_results_hold_hashes_and_no_question(data, checkpoint, tmp_path):
    arguments = command(data, tmp_path / "out", checkpoint, tasks=("gpqa", "mmlu_pro"))
    assert run.main([*arguments, "--max-length", "128"]) == 0
    texts = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*.json")}
    for text in texts.values():
        assert "FRAGE" not in text
        assert RIGHT not in text
    result = json.loads(texts["mmlu_pro.json"])
    assert len(result["leaves"]) == 14
    assert result["documents"] == 28
    assert result["documents_published"] == 12032
    assert result["score"] == sum(sum(leaf["score"]) for leaf in result["leaves"].values()) / 28
    assert result["fit"]["documents_with_fewer_shots"] > 0
    assert set(result["versions"]) >= {"lm_eval", "torch", "transformers"}


def test_all_missing_data_is_listed_before_a_model_is_read(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("no model")
    (tmp_path / "data").mkdir()
    arguments = ["--checkpoint", str(tmp_path / "model"), "--data-dir", str(tmp_path / "data"), "--allow-code"]
    assert run.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "no model was loaded" in error
    assert "Traceback" not in error
    for name in ("cais/mmlu", "Idavidrein/gpqa", "clue/fewclue_chid", "openai/gsm8k", "ceval/ceval-exam"):
        assert name in error


def error_of(arguments, capsys):
    assert run.main(arguments) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


def test_bad_input_is_one_clear_line(data, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such folder" in error_of(command(data, out, tmp_path / "nowhere"), capsys)
    assert "no folder matches" in error_of(command(data, out, tmp_path / "no*"), capsys)
    assert "give '" in error_of(command(data, out, checkpoint.parent), capsys)  # the checkpoints inside it
    assert "did you mean piqa" in error_of(command(data, out, checkpoint, tasks=("piqqa",)), capsys)
    assert "--allow-code" in error_of(command(data, out, checkpoint, tasks=("all",)), capsys)
    assert "no such folder" in error_of(command(tmp_path / "none", out, checkpoint), capsys)
    assert "no GPU '9'" in error_of([*command(data, out, checkpoint)[:-2], "--gpus", "9"], capsys)
    assert error_of([*command(data, out, checkpoint), "--device", "tpu9"], capsys).endswith("; use --device cpu")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written to" in error_of(command(data, blocked / "out", checkpoint), capsys)
    text = error_of(["prepare", "--data-dir", str(blocked / "data")], capsys)
    assert text.startswith(f"error: --data-dir {blocked / 'data'} cannot be written to")
    assert not out.exists()  # nothing was begun
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    assert "give --tokenizer" in error_of(command(data, out, checkpoint, tasks=("piqa",)), capsys)
    for name in ("model.safetensors", "config.json"):
        (checkpoint / name).write_text("broken")
        save_tokenizer(checkpoint)
        assert run.main(command(data, out, checkpoint, tasks=("piqa",))) == 1
        printed = capsys.readouterr()
        assert "cannot be loaded" in printed.err
        assert printed.out == ""  # no table without a result
    (checkpoint / "model.safetensors").unlink()
    assert "holds no weights" in error_of(command(data, out, checkpoint), capsys)
    assert not list(out.rglob("*.json"))


def test_weights_of_another_model_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    (found,) = find_checkpoints([str(checkpoint)])
    with pytest.raises(EvalError, match="such as model.layers.1"):
        load_model(found, tokens=10, dtype="float32", device="cpu")


def test_globs_go_by_number_and_a_checkpoint_is_taken_once(tmp_path, capsys):
    for step in (1000, 900, 20):
        save_checkpoint(tmp_path / f"run/checkpoint-{step}")
    (tmp_path / "run/checkpoint-notes.txt").write_text("")
    (tmp_path / "run/checkpoint-0").mkdir()
    names = [str(tmp_path / "run/checkpoint-*"), str(tmp_path / "run/checkpoint-20")]
    found = find_checkpoints(names)
    assert [checkpoint.folder.name for checkpoint in found] == ["checkpoint-20", "checkpoint-900", "checkpoint-1000"]
    assert found[0].label == "run/checkpoint-20"
    assert "checkpoint-0 left out" in capsys.readouterr().err
    with pytest.raises(EvalError, match="none of 1 folders holds a model"):
        find_checkpoints([str(tmp_path / "run/checkpoint-0*")])
    assert len({checkpoint.file_stem for checkpoint in found}) == 3
    assert sorted(["a-10/b-9", "a-9/b-10", "a-9/b-9"], key=by_numbers) == ["a-9/b-9", "a-9/b-10", "a-10/b-9"]


def test_a_hub_name_is_found_in_the_cache_and_its_absence_is_one_line(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny/snapshots/abc"
    save_checkpoint(snapshot)
    (tmp_path / "models--someone--tiny/refs").mkdir()
    (tmp_path / "models--someone--tiny/refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (found,) = find_checkpoints(["someone/tiny"])
    assert found.label == "someone/tiny"
    assert found.folder == snapshot
    with pytest.raises(EvalError, match=r"someone/other: no such folder, and not to be had from the Hub \(\w+: .*\)$"):
        find_checkpoints(["someone/other"])


def test_a_tokenizer_is_read_as_it_was_saved(checkpoint):
    (found,) = find_checkpoints([str(checkpoint)])
    raw = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "In 1212 there  were 12\n\n  houses, don't you think? 你好"
    assert load_tokenizer(found)(text)["input_ids"] == raw.encode(text).ids
    by_model = transformers.AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    assert by_model != raw.encode(text).ids  # why the class is looked up
    own = ROOT / "recipes/data/tokenizer"
    raw = tokenizers.Tokenizer.from_file(str(own / "tokenizer.json"))
    assert load_tokenizer(found, own)(text)["input_ids"] == raw.encode(text).ids


def test_an_adapters_folder_is_the_adapter(data, checkpoint, tmp_path, capsys):
    (base,) = find_checkpoints([str(checkpoint)])
    tokenizer = load_tokenizer(base)
    plain = load_model(base, tokens=len(tokenizer), dtype="float32", device="cpu")
    transformers.set_seed(3)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(plain, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapted.save_pretrained(tmp_path / "adapter")
    benchmark, folder = BENCHMARKS["hellaswag"], DataFolder(data)
    loaded = load_benchmark(benchmark, folder)
    object_lm = LoadedLM(adapted, tokenizer, batch_size=4)
    seen = []
    for lm in (object_lm, None, None):
        if lm is None:
            name = tmp_path / "adapter" if len(seen) == 1 else checkpoint
            (found,) = find_checkpoints([str(name)])
            assert (found.base == checkpoint) == (len(seen) == 1)
            model = load_model(found, tokens=len(tokenizer), dtype="float32", device="cpu")
            lm = LoadedLM(model, load_tokenizer(found), batch_size=4)
        answers = []
        ask = lm.loglikelihood
        lm.loglikelihood = lambda r, ask=ask, to=answers: to.extend(ask(r)) or list(to)
        scores = score(lm, benchmark, loaded)
        seen.append((answers, scores.score))
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[2][0]  # and it changes something
    assert run.main(command(data, tmp_path / "out", tmp_path / "adapter", tasks=("gsm8k",))) == 0
    shutil.rmtree(checkpoint)
    assert "its base model" in error_of(command(data, tmp_path / "out", tmp_path / "adapter"), capsys)


def test_two_workers_give_the_scores_of_one(data, tmp_path):
    names = [save_checkpoint(tmp_path / f"seed-{seed}", seed=seed) for seed in (0, 1)]
    settings = jobs.Settings(data_dir=data, batch_size=4)
    benchmarks = [BENCHMARKS[name] for name in ("hellaswag", "gsm8k")]
    results = []
    for count in (1, 2):
        planned, done = run.plan(
            find_checkpoints(list(map(str, names))), benchmarks, settings, DataFolder(data), tmp_path / f"out-{count}"
        )
        assert (len(planned), done) == (4, 0)
        reports = list(jobs.run_jobs(planned, settings, ["cpu"] * count))
        assert [report.error for report in reports] == [None] * 4
        found = result_files.read_results([tmp_path / f"out-{count}"])
        results.append([(r["checkpoint"], r["benchmark"], r["leaves"], r["metrics"]) for r in found])
    assert results[0] == results[1]


def test_a_worker_that_dies_is_reported_and_the_others_go_on(data, checkpoint, tmp_path):
    settings = jobs.Settings(data_dir=data)
    benchmarks = list(SUITE)[:4]
    planned, _ = run.plan(
        find_checkpoints([str(checkpoint)]), benchmarks, settings, DataFolder(data), tmp_path / "out"
    )
    for devices, ended, undone in ((["lives", "dies"], 1, 0), (["dies", "dies"], 2, 2)):
        reports = list(jobs.run_jobs(planned, settings, devices, work=work_or_die))
        assert sorted(str(report.job) for report in reports) == sorted(map(str, planned))
        errors = [report.error for report in reports if report.error]
        assert errors.count("its process ended with exit code 9") == ended
        assert errors.count("not run: no worker process is left") == undone
        assert len(errors) == ended + undone


def test_a_gated_and_an_absent_data_set_are_one_line_each(monkeypatch):
    def refuse(self, repo_id, *, repo_type):
        response = SimpleNamespace(headers={}, request=None)
        kind = {
            "Idavidrein/gpqa": huggingface_hub.errors.GatedRepoError,
            "baber/piqa": huggingface_hub.errors.RepositoryNotFoundError,
        }.get(repo_id)
        if kind is not None:
            raise kind("two\nlines", response=response)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    gated, absent, chid = sorted(missing_data(list(SUITE), None))
    assert chid.startswith("clue/fewclue_chid is not on the Hub: give --data-dir")
    assert gated.startswith("Idavidrein/gpqa is gated: accept its conditions")
    assert absent == "baber/piqa is not on the Hub under this name"


def test_prepare_fills_a_folder_that_is_then_enough(data, tmp_path, monkeypatch, capsys):
    real, asked = datasets.load_dataset, []

    def network(path, name=None, *, split, data_files=None):
        asked.append((path, name, split))
        if path == "openai/gsm8k":
            raise datasets.exceptions.DatasetNotFoundError("gated")
        if path == "haonan-li/cmmlu":
            raise RuntimeError("Dataset scripts are no longer supported")
        known = {"json": "clue/fewclue_chid", "lmlmcat/cmmlu": "haonan-li/cmmlu"}.get(path, path)
        assert data_files is None or data_files[split].startswith("https://")
        files = DataFolder(data).files(known, name, split)
        return real("json", data_files={split: [*map(str, files)]}, split=split)

    monkeypatch.setattr(datasets, "load_dataset", network)
    names = ("triviaqa", "chid", "gsm8k")
    arguments = ["prepare", "--data-dir", str(tmp_path), "--tasks", *names]
    assert run.main(arguments) == 1
    error = capsys.readouterr().err
    assert "error: openai/gsm8k is not on the Hub, or is gated" in error
    assert asked.count(("openai/gsm8k", "main", "test")) == 1
    there = [BENCHMARKS[name] for name in names[:2]]
    assert missing_data(there, DataFolder(tmp_path)) == []
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "openai").exists()
    (law,) = (need for need in needs(BENCHMARKS["cmmlu"]) if need.config == "college_law")
    assert len(download_data.download(law, "dev")) == 7  # by its other name
    asked.clear()
    assert run.main(arguments) == 1
    assert [path for path, *_ in asked] == ["openai/gsm8k"]  # the rest is there
    monkeypatch.setattr(datasets, "load_dataset", real)
    assert len(load_benchmark(BENCHMARKS["triviaqa"], DataFolder(tmp_path))["tasks"]) == 1


def test_the_script_runs_by_itself(data):
    script = ROOT / "eval/run.py"
    result = subprocess.run(
        [sys.executable, str(script), "list", "--data-dir", str(data)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == list(BENCHMARKS)
    assert all(line.endswith(": there") for line in result.stdout.splitlines()[1:])
    for words in (["--help"], ["run", "--help"], ["compare", "--help"]):
        result = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr


def test_its_readme_names_the_suite_and_commands_that_parse():
    text = (ROOT / "eval/README.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    rows = [row for row in rows if row[1].strip("`") in BENCHMARKS]
    assert [row[1].strip("`") for row in rows] == list(BENCHMARKS)
    for title, name, shots, questions, chance, metric, _ in rows:
        benchmark = BENCHMARKS[name.strip("`")]
        assert (title, shots, questions) == (benchmark.title, str(benchmark.shots), f"{benchmark.documents:,}")
        assert float(chance) == pytest.approx(100 * benchmark.chance, abs=0.05)
        assert metric.split(",")[0] == benchmark.metric.split(",")[0]
    commands = [line for line in text.splitlines() if line.startswith("python eval/run.py ")]
    assert len(commands) >= 6
    for line in commands:
        words = shlex.split(line, comments=True)[2:]
        arguments = run.build_parser().parse_args(words if words[0] in run.COMMANDS else ["run", *words])
        assert set(getattr(arguments, "tasks", ["all"])) <= {"all", *BENCHMARKS}
