"""The fifteen benchmarks on invented rows: keys, solved examples, splits, extractors, prompts that fit."""

import re
import socket

import datasets
import pytest
from checkpoints import find_checkpoints, load_model, load_tokenizer
from eval_error import EvalError
from eval_fixtures import EVAL_ROWS, PromptReader, Scripted, save_checkpoint, shared_data
from jinja2 import Environment
from lm_eval.models.huggingface import HFLM
from loaded_lm import LoadedLM
from offline_data import DataFolder
from paired_tests import average
from scoring import score
from show import show_prompt
from suite import BENCHMARKS, SUITE, select
from task_loading import eval_split, leaf_configs, load_benchmark, missing_data, needs, shots_split

# AdaMuon, second paper (arXiv 2507.11005v2), table 2, in the suite's order
PAPER = {
    "AdamW": ("30.67 5.14 20.96 24.40 19.70 37.80 47.69 54.38 71.16 22.28 43.96 29.34 31.30 4.80 2.88", 29.76),
    "Muon": ("31.05 5.43 23.71 31.96 22.22 37.90 47.85 56.27 72.20 26.13 50.55 28.76 29.97 6.00 4.02", 31.60),
    "AdaMuon": ("30.70 6.43 23.51 29.90 26.77 39.70 49.68 55.88 71.38 28.01 54.70 28.93 31.10 8.20 4.70", 32.64),
}
LEAVES = {"mmlu": 57, "mmlu_pro": 14, "cmmlu": 67, "ceval": 52}
PAPER_SHOTS = (5, 5, 5, 25, 5, 5, 10, 5, 5, 7, 5, 5, 5, 3, 4)


@pytest.fixture(scope="module")
def data():
    return DataFolder(shared_data())


@pytest.fixture(scope="module")
def loaded(data):
    return {benchmark.name: load_benchmark(benchmark, data) for benchmark in SUITE}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def loaded_lm(folder, **options):
    (checkpoint,) = find_checkpoints([str(folder)])
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, tokens=len(tokenizer), dtype="float32", device="cpu")
    return LoadedLM(model, tokenizer, batch_size=4, **options)


def test_the_suite_is_that_of_the_paper():
    assert len(SUITE) == 15
    assert tuple(benchmark.shots for benchmark in SUITE) == PAPER_SHOTS
    assert {benchmark.name: len(leaf_configs(benchmark)) for benchmark in SUITE} == {
        benchmark.name: LEAVES.get(benchmark.name, 1) for benchmark in SUITE
    }
    for digits, mean in PAPER.values():
        scores = [float(digit) for digit in digits.split()]
        assert len(scores) == 15
        assert round(average(scores, [0.0] * 15)[0], 2) == mean


@pytest.mark.parametrize("benchmark", SUITE, ids=lambda benchmark: benchmark.name)
def test_a_model_that_is_always_right_has_1_and_one_that_is_always_wrong_0(benchmark, loaded):
    for right in (True, False):
        scores = score(PromptReader(right), benchmark, loaded[benchmark.name], allow_code=True)
        assert scores.score == float(right)
        assert scores.macro_average == float(right)
        assert scores.documents == sum(len(task.eval_docs) for task in loaded[benchmark.name]["tasks"].values())
        assert scores.documents == (8 if benchmark.name == "gpqa" else EVAL_ROWS * len(leaf_configs(benchmark)))


@pytest.mark.parametrize("benchmark", SUITE, ids=lambda benchmark: benchmark.name)
@pytest.mark.parametrize("shots", [None, 1])
def test_prompts_hold_the_solved_examples_of_their_own_split(benchmark, loaded, shots):
    reader = PromptReader(right=True)
    score(reader, benchmark, loaded[benchmark.name], shots=shots, allow_code=True)
    (config, *_) = leaf_configs(benchmark).values()
    wanted = benchmark.shots if shots is None else shots
    asked, solved = eval_split(config), shots_split(config)
    assert reader.whole
    for text in reader.whole:
        splits = re.findall(r"FRAGE-(\w+)", text)
        assert len(splits) == wanted + 1
        assert splits[-1] == asked
        assert set(splits[:-1]) == {solved}
        questions = re.findall(r"FRAGE-\w+ \S+ \d+", text)
        assert len(set(questions)) == len(questions)  # never the question itself among its solved examples
    if benchmark.name != "gpqa":
        assert asked != solved


def test_gpqa_has_one_order_of_options_with_a_cold_cache(data):
    benchmark = BENCHMARKS["gpqa"]
    datasets.disable_caching()
    try:
        cold = load_benchmark(benchmark, data)
        assert score(PromptReader(True), benchmark, cold).score == 1.0
        assert score(PromptReader(False), benchmark, cold).score == 0.0
        (task,) = cold["tasks"].values()
        assert task.eval_docs[:]["choices"] == task.eval_docs[:]["choices"]
        assert len(set(task.eval_docs[:]["answer"])) > 1
    finally:
        datasets.enable_caching()


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        (" It is so.\n#### 10", 1.0, 1.0),
        (" #### 1,0", 1.0, 1.0),  # commas are no part of a number
        (" The answer is $10.", 0.0, 1.0),
        (" 10 apples, no: 11", 0.0, 0.0),
        (" 11 apples, no: 10", 0.0, 1.0),
        (" #### 10\nand 12 more", 1.0, 0.0),
        (" -10", 0.0, 0.0),
        (" ten", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_numbers_are_read_from_answers_of_gsm8k(answer, strict, flexible, loaded):
    scores = score(Scripted(lambda prompt: answer), BENCHMARKS["gsm8k"], loaded["gsm8k"], limit=1)
    assert scores.metrics == {"exact_match,flexible-extract": flexible, "exact_match,strict-match": strict}
    assert scores.score == flexible


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" Thus the answer is (A).", 1.0),
        (" the answer is A", 1.0),
        (" the answer is (B), no, the answer is (A)", 0.0),  # the first counts
        (" the answer is (A), no, the answer is (B)", 1.0),
        (" the answer: A", 0.0),
        (" the answer is a", 0.0),
        (" A", 0.0),
        ("", 0.0),
    ],
)
def test_letters_are_read_from_answers_of_mmlu_pro(answer, right, loaded):
    biology = {"tasks": {"mmlu_pro_biology": loaded["mmlu_pro"]["tasks"]["mmlu_pro_biology"]}}
    assert score(Scripted(lambda prompt: answer), BENCHMARKS["mmlu_pro"], biology, limit=1).score == right


def test_chid_reads_a_passage_with_quotes_and_asks_for_its_fluency(loaded):
    (task,) = loaded["chid"]["tasks"].values()
    choices = task.doc_to_choice(task.eval_docs[0])
    assert len(choices) == 7
    assert choices[0].startswith("FRAGE-test")
    assert "\"'richtig0'\"" in choices[0]
    assert all(choice.endswith("\n这个句子是通顺的。") for choice in choices)
    assert task.doc_to_text(task.eval_docs[0]) == "以下句子是否通顺？\n"  # noqa: RUF001
    assert set(score(PromptReader(True), BENCHMARKS["chid"], loaded["chid"]).metrics) == {"acc,none", "acc_norm,none"}


def test_whole_solved_examples_are_dropped_until_a_prompt_fits(loaded, tmp_path):
    benchmark, tasks = BENCHMARKS["mmlu"], {"tasks": {"a": loaded["mmlu"]["tasks"]["mmlu_anatomy"]}}
    whole = [PromptReader(True) for _ in range(4)]
    for shots, reader in enumerate(whole):
        score(reader, benchmark, tasks, shots=shots)
    lengths = [max(len(text) for text in reader.whole) for reader in whole]
    lm = loaded_lm(save_checkpoint(tmp_path, context=512), max_length=lengths[2])  # a byte is a token, or two are
    seen = []
    run, lm.loglikelihood = lm.loglikelihood, lambda requests: seen.extend(requests) or run(requests)
    scores = score(lm, benchmark, tasks)
    assert scores.fit.documents_with_fewer_shots == EVAL_ROWS
    assert scores.fit.shots_dropped == EVAL_ROWS * (5 - 2)
    assert scores.fit.documents_cut == 0
    assert {request.args[0] for request in seen} == set(whole[2].prompts)
    assert not hasattr(tasks["tasks"]["a"].sampler.sample, "__wrapped__")
    after = PromptReader(True)
    score(after, benchmark, tasks, shots=2)
    assert after.prompts == whole[2].prompts  # and nothing is left of the fitting


def test_prompts_that_fit_are_those_of_the_harness(loaded, tiny):
    for name in ("hellaswag", "winogrande", "gsm8k", "gpqa"):
        reader = PromptReader(True)
        reference = score(reader, BENCHMARKS[name], loaded[name])
        ours = score(loaded_lm(tiny, max_length=8192), BENCHMARKS[name], loaded[name])
        for leaf, rows in reference.leaves.items():
            assert ours.leaves[leaf]["target_hash"] == rows["target_hash"]
            if name != "gsm8k":  # its requests carry the number of new tokens
                assert ours.leaves[leaf]["prompt_hash"] == rows["prompt_hash"]
        assert ours.fit.shots_dropped == 0


def test_remembered_tokens_are_the_harness_tokens(tiny):
    lm = loaded_lm(tiny)
    bos = lm.tokenizer.decode(lm.prefix_token_id)
    texts = [
        "Question: who?\nAnswer:",
        " It was he. ",
        "Gr\u00fc\u00dfe, \u4f60\u597d",
        "\n\n",
        "",
        bos + "begins with BOS",
        bos,
    ]
    wanted = [HFLM.tok_encode(lm, text) for text in texts]
    calls = []
    tokenizer, lm.tokenizer = lm.tokenizer, Counted(lm.tokenizer, calls)
    lm.remember(texts)
    lm.remember(texts)
    assert len(calls) == 1
    assert [lm.tok_encode(text) for text in texts] == wanted
    lm.tokenizer = tokenizer
    assert lm.tok_encode(texts[0], add_special_tokens=True) == tokenizer.encode(texts[0], add_special_tokens=True)
    lm.begin()
    assert [lm.tok_encode(text) for text in texts] == wanted


class Counted:
    """A tokenizer that notes the calls for many texts."""

    def __init__(self, tokenizer, calls):
        self.tokenizer, self.calls = tokenizer, calls

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **kwargs):
        self.calls.append(texts)
        return self.tokenizer(texts, **kwargs)


def test_templates_are_compiled_once(loaded, monkeypatch):
    compiled = []
    compile_template = Environment.compile

    def compile_and_note(environment, source, *args, **kwargs):
        compiled.append(source)
        return compile_template(environment, source, *args, **kwargs)

    monkeypatch.setattr(Environment, "compile", compile_and_note)
    score(PromptReader(True), BENCHMARKS["arc_challenge"], loaded["arc_challenge"], shots=2)
    assert len(compiled) == len(set(compiled)) > 0


@pytest.mark.parametrize("name", ["mmlu_pro", "triviaqa", "chid", "piqa"])
def test_a_context_of_64_tokens_is_enough_to_run(name, loaded, tmp_path):
    lm = loaded_lm(save_checkpoint(tmp_path, context=64))
    tasks = loaded[name]["tasks"]
    few = {"tasks": {leaf: tasks[leaf] for leaf in list(tasks)[:2]}}
    scores = score(lm, BENCHMARKS[name], few)
    assert scores.fit.shots_dropped == BENCHMARKS[name].shots * scores.documents
    assert scores.fit.documents_with_fewer_shots == scores.documents
    if name != "piqa":
        assert scores.fit.documents_cut == scores.documents
    if name in ("mmlu_pro", "triviaqa"):
        assert scores.fit.max_gen_toks == 16
        assert scores.fit.max_gen_toks_asked == (2048 if name == "mmlu_pro" else 256)
        for task in few["tasks"].values():
            assert task.config.generation_kwargs.get("max_gen_toks", 256) == scores.fit.max_gen_toks_asked
    if name == "chid":
        assert scores.fit.answers_cut == 7 * scores.documents


def test_generation_settings_of_a_checkpoint_do_not_count(loaded, tiny):
    lm, other = loaded_lm(tiny), loaded_lm(tiny)
    config = other.model.generation_config
    config.max_new_tokens, config.repetition_penalty, config.do_sample = 1, 9.0, True
    seen = []
    for each in (lm, other):
        run = each.generate_until
        each.generate_until = lambda requests, run=run: seen.append(run(requests)) or seen[-1]
        score(each, BENCHMARKS["gsm8k"], loaded["gsm8k"])
    assert seen[0] == seen[1]
    assert max(len(answer) for answer in seen[0]) > 1
    assert other.model.generation_config is config
    assert config.repetition_penalty == 9.0


def test_mbpp_is_not_run_without_leave(loaded):
    with pytest.raises(ValueError, match="unsafe"):
        score(PromptReader(True), BENCHMARKS["mbpp"], loaded["mbpp"])


def test_show_prints_the_prompt_of_a_whole_run(data, loaded):
    reader = PromptReader(True)
    score(reader, BENCHMARKS["hellaswag"], loaded["hellaswag"])
    shown = show_prompt("hellaswag", data, document=1)
    assert reader.prompts[-1] in shown
    assert "== key\n1" in shown
    assert "10 solved examples" in shown
    assert "mmlu_anatomy" in show_prompt("mmlu_anatomy", data, shots=0)
    assert "== ceval-valid_law, question 0 of 2, 5 solved" in show_prompt("ceval-valid_law", data)
    assert "max_gen_toks" in show_prompt("mbpp", data)
    with pytest.raises(EvalError, match="has 2 questions"):
        show_prompt("piqa", data, document=2)
    with pytest.raises(EvalError, match="did you mean piqa"):
        show_prompt("piqua", data)


def test_names_are_checked():
    assert [benchmark.name for benchmark in select(["gsm8k", "mmlu"])] == ["mmlu", "gsm8k"]
    assert len(select(["all"], skip=["mbpp"])) == 14
    assert select(["piqa,hellaswag,", "mmlu"], ["mmlu,gsm8k"]) == [BENCHMARKS["hellaswag"], BENCHMARKS["piqa"]]
    with pytest.raises(EvalError, match="no benchmark 'helaswag'; did you mean hellaswag"):
        select(["helaswag"])
    with pytest.raises(EvalError, match="no benchmark is left"):
        select(["mbpp"], skip=["mbpp"])


def test_all_that_is_missing_is_named_and_other_data_refused(data, tmp_path):
    assert missing_data(list(SUITE), data) == []
    lines = missing_data(list(SUITE), DataFolder(tmp_path))
    assert len(lines) == sum(len(needs(benchmark)) for benchmark in SUITE)
    assert all("\n" not in line and str(tmp_path) in line for line in lines)
    with data.answering(needs(BENCHMARKS["piqa"])), pytest.raises(EvalError, match="not among the data sets"):
        datasets.load_dataset("openai/gsm8k", "main")


def test_a_folder_is_read_without_the_network(data, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: asked.append(host) or [])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    load_benchmark(BENCHMARKS["piqa"], data)
    assert asked == []
    assert datasets.config.HF_HUB_OFFLINE is False


def test_without_a_folder_and_the_hub_the_remedy_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EvalError, match="PIQA: its data set cannot be had: .* not reachable; or give --data-dir"):
        load_benchmark(BENCHMARKS["piqa"], None)


def test_rows_of_another_form_are_one_line(data, tmp_path):
    place = tmp_path / "openai/gsm8k/main"
    place.mkdir(parents=True)
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_text('{"frage": "?"}\n' * 8)
    folder = DataFolder(tmp_path)
    with pytest.raises(EvalError, match="GSM8K: its data has not the form"):
        score(PromptReader(True), BENCHMARKS["gsm8k"], load_benchmark(BENCHMARKS["gsm8k"], folder))
    (place / "test.jsonl").write_text("no json\n")
    with pytest.raises(EvalError, match=r"test\.jsonl cannot be read"):
        load_benchmark(BENCHMARKS["gsm8k"], folder)


def test_the_digest_follows_the_contents(data, tmp_path):
    need = needs(BENCHMARKS["gsm8k"])
    place = tmp_path / "openai/gsm8k/main"
    place.mkdir(parents=True)
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_bytes((data.path / f"openai/gsm8k/main/{split}.jsonl").read_bytes())
    assert DataFolder(tmp_path).digest(need) == data.digest(need)
    with (place / "test.jsonl").open("a") as stream:
        stream.write(" \n")
    assert DataFolder(tmp_path).digest(need) != data.digest(need)
