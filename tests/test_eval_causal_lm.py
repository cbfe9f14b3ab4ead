"""Causal models on a text: the loss against plain computations, windows, units of text, pairing, and bad input."""

import bz2
import gzip
import json
import lzma
import math
import re
import shlex
from pathlib import Path

import causal_lm
import pytest
import tokenizers
import torch
import transformers
from checkpoints import find_checkpoints
from eval_error import EvalError
from eval_fixtures import save_checkpoint, save_tokenizer
from text_files import first_words, read_documents, stem_of

TEXT = "The lobster , 12 of 3412 , is blue @-@ black .\nNaïve eyes see 1212 claws .\n" * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2 model of bytes, with a context of 64."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "qwen", context=64)


def loaded(folder):
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def evaluate(folder, documents, **changes):
    (found,) = find_checkpoints([str(folder)])
    options = {"tokenizer": None, "context": 64, "stride": 32, "batch_size": 2, "dtype": "float32", "device": "cpu"}
    return causal_lm.evaluate_checkpoint(found, documents, **{**options, **changes})


def make_uniform(folder):
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    return folder


def test_a_text_of_one_window_has_the_loss_of_the_whole_context(folder):
    model, tokenizer = loaded(folder)
    text = TEXT[:60]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert len(ids) <= 64
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[1:])
    found = evaluate(folder, [text])
    assert found["tokens"] == len(ids) - 1
    assert found["window_tokens"] == [len(ids) - 1]
    assert found["loss"] == pytest.approx(float(wanted), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == ids[1:]).float().mean()))
    assert found["loss_standard_error"] is None


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (64, 32), (64, 1), (7, 3), (10, 10), (1, 1), (5, 4)])
def test_each_token_is_predicted_once_from_its_history(folder, context, stride):
    model, tokenizer = loaded(folder)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    found = evaluate(folder, [TEXT], context=context, stride=stride, batch_size=5)
    # By hand, a token at a time: which tokens lie before it in its window.
    sums, counts, hits = [], [], 0
    for target in range(1, len(ids)):
        number = max(0, math.ceil((target - context) / stride))
        history = ids[number * stride : target]
        assert min(target, context - stride + 1) <= len(history) <= context
        with torch.no_grad():
            logits = model(history[None]).logits[0, -1]
        loss = float(torch.nn.functional.cross_entropy(logits, ids[target]))
        if number == len(sums):
            sums.append(0.0)
            counts.append(0)
        sums[number] += loss
        counts[number] += 1
        hits += int(logits.argmax() == ids[target])
    assert found["window_tokens"] == counts
    assert sum(counts) == found["tokens"] == len(ids) - 1
    assert found["window_losses"] == pytest.approx(sums, rel=1e-5)
    assert found["loss"] == pytest.approx(sum(sums) / (len(ids) - 1), rel=1e-6)
    assert found["accuracy"] == hits / (len(ids) - 1)


def test_windows_cover_every_length():
    for tokens in range(2, 40):
        for context in (1, 2, 5, 8):
            for stride in range(1, context + 1):
                found = causal_lm.windows(tokens, context, stride)
                assert [w.start for w in found] == [stride * number for number in range(len(found))]
                targets = [target for w in found for target in range(w.end + 1 - w.fresh, w.end + 1)]
                assert targets == list(range(1, tokens))
                assert all(0 < w.end - w.start <= context and w.fresh > 0 for w in found)
                assert all(w.end - w.fresh - w.start == context - stride for w in found[1:])
                assert [w for batch in causal_lm.batches(found, 3) for w in batch] == found


def test_a_model_that_knows_nothing_has_the_loss_of_guessing(tmp_path):
    path = make_uniform(save_checkpoint(tmp_path / "uniform", context=64))
    model, _ = loaded(path)
    for context, stride in ((64, 32), (16, 16), (9, 2)):
        found = evaluate(path, [TEXT], context=context, stride=stride)
        assert found["loss"] == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)
        assert found["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
        assert found["loss_standard_error"] == pytest.approx(0.0, abs=1e-5)


def test_units_of_text_by_hand():
    found = causal_lm.summary([4.0, 2.0, 3.0], [1, 0, 1], [4, 2, 2], ["naïve eyes", " see\n"])
    assert (found["tokens"], found["bytes"], found["words"]) == (8, 16, 3)
    assert found["loss"] == 9 / 8
    assert found["bits_per_byte"] == pytest.approx(9 / math.log(2) / 16)
    assert found["loss_per_word"] == pytest.approx(3.0)
    assert found["word_perplexity"] == pytest.approx(math.exp(3))
    assert found["accuracy"] == 2 / 8
    # deviations 4 - 4.5, 2 - 2.25, 3 - 2.25; n / (n - 1) = 3 / 2
    error = math.sqrt(1.5 * (0.25 + 0.0625 + 0.5625)) / 8
    assert found["loss_standard_error"] == pytest.approx(error)
    assert found["bits_per_byte_standard_error"] == pytest.approx(error * 8 / 16 / math.log(2))
    endless = causal_lm.summary([5000.0], [0], [500], ["長" * 500])
    assert endless["word_perplexity"] is None
    assert json.dumps(endless, allow_nan=False)


def test_documents_are_joined_by_the_end_of_text(folder):
    model, tokenizer = loaded(folder)
    ids = tokenizer("blue")["input_ids"] + [tokenizer.eos_token_id] + tokenizer("black eyes")["input_ids"]
    with torch.no_grad():
        wanted = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    found = evaluate(folder, ["blue", "black eyes"])
    assert found["loss"] == pytest.approx(float(wanted), rel=1e-6)
    assert (found["tokens"], found["bytes"], found["words"]) == (len(ids) - 1, 14, 3)


def test_files_are_read(tmp_path):
    data = TEXT.encode()
    rows = "".join(json.dumps({"id": n, "text": line}) + "\n\n" for n, line in enumerate(TEXT.splitlines()))
    for name, content, wanted in (
        ("a.txt", data, [TEXT]),
        ("a.txt", TEXT.replace("\n", "\r\n").encode("utf-8-sig"), [TEXT.replace("\n", "\r\n")]),
        ("wiki.valid.tokens", data, [TEXT]),
        ("wiki.valid.tokens.xz", lzma.compress(data), [TEXT]),
        ("a.txt.gz", gzip.compress(data), [TEXT]),
        ("a.txt.BZ2", bz2.compress(data), [TEXT]),
        ("a.jsonl", rows.encode(), TEXT.splitlines()),
        ("a.jsonl.xz", lzma.compress(rows.encode()), TEXT.splitlines()),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_documents(tmp_path / name) == wanted
    names = ("wiki.valid.tokens.xz", "wiki.test.tokens", "a.jsonl.gz", "plain")
    assert [stem_of(Path(name)) for name in names] == ["wiki.valid", "wiki.test", "a", "plain"]


def test_bad_files_are_refused(tmp_path):
    for name, content, message in (
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8 text (invalid continuation byte at byte 3)"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt", b"a\0b", "holds NUL bytes"),
        ("a.txt.xz", lzma.compress(TEXT.encode())[:-20], "cannot be read"),
        ("a.txt.xz", b"none", "cannot be read"),
        ("a.txt.gz", gzip.compress(TEXT.encode())[:-20], "cannot be read"),
        ("a.txt.bz2", b"none", "cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1 has no column 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 has no column 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 has half a surrogate pair"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EvalError, match=re.escape(f"--text {tmp_path / name}") + ".*" + re.escape(message)):
            read_documents(tmp_path / name)
    with pytest.raises(EvalError, match="cannot be read: .*No such file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(EvalError, match="cannot be read: .*Is a directory"):
        read_documents(tmp_path)


def test_a_limit_counts_words():
    documents = ["one two\nthree ", "four  five six\n"]
    for limit, wanted in (
        (1, ["one"]),
        (2, ["one two"]),
        (3, ["one two\nthree "]),
        (5, ["one two\nthree ", "four  five"]),
        (6, documents),
        (99, documents),
        (None, documents),
    ):
        assert first_words(documents, limit) == wanted


def result(losses, counts, **changes):
    made = causal_lm.summary(losses, [0] * len(counts), counts, [TEXT])
    checkpoint = {"label": f"run/{sum(losses)}"}
    return {**made, "checkpoint": checkpoint, "tokens_hash": "a", "context": 8, "stride": 4, **changes}


def test_differences_are_paired_over_the_same_windows_only():
    a, b = result([4.0, 2.0, 3.0], [4, 2, 2]), result([5.0, 2.5, 2.0], [4, 2, 2])
    difference, error = causal_lm.paired_loss(b, a)
    assert difference == pytest.approx(0.5 / 8)
    wanted = [1 - 4 / 16, 0.5 - 2 / 16, -1 - 2 / 16]
    assert error == pytest.approx(math.sqrt(1.5 * sum(value**2 for value in wanted)) / 8)
    assert "| +0.0625 ± " in causal_lm.report([a, b])
    assert "compare bits a byte" not in causal_lm.report([a, b])
    for change in ({"tokens_hash": "b"}, {"context": 9}, {"stride": 3}):
        other = result([5.0, 2.5, 2.0], [4, 2, 2], **change)
        assert causal_lm.paired_loss(other, a) is None
        lines = causal_lm.report([a, b, other]).splitlines()
        assert "| +0.0625 ± " in lines[3]
        assert "|  | 8 |" in lines[4]
        assert "compare bits a byte" in lines[-1]


def test_the_readme_command_compares_and_keeps_results(tmp_path, monkeypatch, capsys):
    readme = (Path(causal_lm.__file__).parent / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python eval/causal_lm\.py (.*)$", readme, flags=re.MULTILINE)
    arguments = [*shlex.split(command), "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    text = Path("wiki.valid.tokens.xz")
    text.write_bytes(lzma.compress(TEXT.encode()))
    folders = [save_checkpoint(Path(f"out/study/gpt2-small/run-{seed}"), seed=seed, context=64) for seed in (0, 1)]
    assert causal_lm.main(arguments) == 0
    printed = capsys.readouterr().out
    a, b = (evaluate(folder, [TEXT]) for folder in folders)
    difference, error = causal_lm.paired_loss(b, a)
    assert difference == pytest.approx(b["loss"] - a["loss"])
    assert f"| {difference:+.4f} ± {error:.4f} |" in printed
    assert f"| {b['bits_per_byte']:.4f} ± {b['bits_per_byte_standard_error']:.4f} |" in printed
    assert f"{len(TEXT.encode())} bytes, {len(TEXT.split())} words" in printed
    paths = sorted(Path("out/eval").rglob("causal_lm-wiki.valid.json"))
    written = [json.loads(path.read_text()) for path in paths]
    assert sorted(each["loss"] for each in written) == pytest.approx(sorted((a["loss"], b["loss"])), rel=1e-6)
    assert all((each["context"], each["stride"]) == (64, 32) for each in written)

    def times():
        return [path.stat().st_mtime_ns for path in paths]

    before = times()
    assert causal_lm.main([*arguments, "--batch-size", "3"]) == 0
    assert times() == before
    assert capsys.readouterr().out == printed
    for change in (["--stride", "7"], ["--context", "32"], ["--limit", "9"], ["--dtype", "bfloat16"]):
        assert causal_lm.main([*arguments, *change]) == 0
        assert all(new > old for new, old in zip(times(), before, strict=True)), change
        before = times()
    assert causal_lm.main(arguments) == 0
    before = times()
    text.write_bytes(lzma.compress((TEXT + "More .").encode()))
    assert causal_lm.main(arguments) == 0
    assert all(new > old for new, old in zip(times(), before, strict=True))
    assert json.loads(paths[0].read_text())["words"] == len(TEXT.split()) + 2
    before = times()
    make_uniform(folders[0])
    assert causal_lm.main(arguments) == 0
    assert sum(new > old for new, old in zip(times(), before, strict=True)) == 1


def test_another_tokenizer_is_compared_by_bytes(tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    one, other = (save_checkpoint(tmp_path / name, context=64) for name in ("a", "b"))
    raw = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    raw.model = tokenizers.models.BPE(raw.get_vocab(), [])  # digits one by one
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(other)
    names = [str(one), str(other)]
    assert causal_lm.main(["--checkpoint", *names, "--text", str(text), "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    pairs = TEXT.count("12")
    assert f"| {len(TEXT.encode()) - pairs - 1} | 64 |" in lines[2]
    assert f"|  | {len(TEXT.encode()) - 1} | 64 |" in lines[3]
    assert "compare bits a byte" in lines[-1]


def test_bad_input_is_one_clear_line(folder, tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    start = ["--checkpoint", str(folder), "--text", str(text), "--output", str(tmp_path / "out"), "--device", "cpu"]

    def error(*changes):
        assert causal_lm.main([*start, *map(str, changes)]) == 1
        printed = capsys.readouterr()
        assert not printed.out
        line = printed.err.splitlines()[-1]
        assert line.startswith("error: ")
        return line

    assert "--stride 9 would skip tokens: give at most the context, 8" in error("--stride", 9, "--context", 8)
    assert re.search("--stride 65 would skip tokens: .* 64", error("--stride", 65))
    assert "--context 65 is more than the 64 positions" in error("--context", 65)
    assert "none.txt cannot be read" in error("--text", text, tmp_path / "none.txt")
    assert "no such folder" in error("--checkpoint", tmp_path / "nowhere/at/all")
    assert "--tokenizer /nowhere: no such folder" in error("--tokenizer", "/nowhere")
    short = tmp_path / "short.txt"
    short.write_text("a")
    assert "--text is 1 token to the tokenizer" in error("--text", short)
    for flag in ("--stride", "--limit", "--context"):
        for value in ("0", "-3", "x"):
            with pytest.raises(SystemExit, match="2"):
                causal_lm.main([*start, flag, value])
            assert f"argument {flag}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_are_no_causal_models_are_refused(folder, tmp_path):
    bare = save_checkpoint(tmp_path / "bare", context=64)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(EvalError, match="holds no tokenizer: give --tokenizer FOLDER"):
        evaluate(bare, [TEXT])
    assert evaluate(bare, [TEXT], tokenizer=folder)["loss"] == evaluate(folder, [TEXT])["loss"]

    small = save_checkpoint(tmp_path / "small", context=64)
    model = transformers.Qwen2ForCausalLM.from_pretrained(small)
    model.resize_token_embeddings(50)
    model.save_pretrained(small)
    with pytest.raises(EvalError, match="embeddings of 50: not its tokenizer"):
        evaluate(small, [TEXT])

    for name, value, message in (("num_hidden_layers", 2, "lack .* such as model.layers.1"), ("model_type", "t5", "")):
        broken = save_checkpoint(tmp_path / name, context=64)
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**config, name: value, "layer_types": None}))
        with pytest.raises(EvalError, match=message or "cannot be loaded as a causal language model"):
            evaluate(broken, [TEXT])

    nan = save_checkpoint(tmp_path / "nan", context=64)
    model = transformers.Qwen2ForCausalLM.from_pretrained(nan)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    model.save_pretrained(nan)
    with pytest.raises(EvalError, match="not finite in torch.float32"):
        evaluate(nan, [TEXT])

    # transformers loads BERT's weights as a causal model that looks ahead
    sees = tmp_path / "bert"
    rows = len(save_tokenizer(sees))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.set_seed(0)
    config = transformers.BertConfig(vocab_size=rows, max_position_embeddings=64, initializer_range=0.5, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(sees)
    with pytest.raises(EvalError, match="depend on the tokens to be predicted"):
        evaluate(sees, [TEXT])


def test_a_starcoder2_is_evaluated(tmp_path):
    """The form of the recipes' GPT-2."""
    rows = len(save_tokenizer(tmp_path))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Starcoder2Config(
        vocab_size=rows, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.5, **sizes
    )
    transformers.set_seed(0)
    model = transformers.Starcoder2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    (found,) = find_checkpoints([str(tmp_path)])
    assert causal_lm.window_settings(found, None, None) == (32, 16)
    ids = torch.tensor(transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)(TEXT)["input_ids"])
    with torch.no_grad():
        first = model(ids[None, :32]).logits[0]
    wanted = torch.nn.functional.cross_entropy(first, ids[1:33], reduction="sum")
    assert evaluate(tmp_path, [TEXT], context=32, stride=16)["window_losses"][0] == pytest.approx(float(wanted))


def test_an_adapter_is_evaluated_on_its_base(folder, tmp_path):
    import peft

    base, _ = loaded(folder)
    base.name_or_path = str(folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "untrained")
    wanted = evaluate(folder, [TEXT])["window_losses"]
    assert evaluate(tmp_path / "untrained", [TEXT])["window_losses"] == pytest.approx(wanted, rel=1e-6)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    adapted.save_pretrained(tmp_path / "trained")
    assert evaluate(tmp_path / "trained", [TEXT])["window_losses"] != pytest.approx(wanted, rel=1e-3)
