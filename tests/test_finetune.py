"""Fine-tuning: what a model learns of conversations, whole runs, what they refuse, and the study's arithmetic."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chat_rows
import checkpoints
import finetune
import finetune_data
import finetune_study
import numpy as np
import pytest
import torch
from data_sources import DataSource, read_documents, split_hash
from recipe_error import RecipeError
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_recipe import ENVIRONMENT, RECIPES, ROOT, TOKENIZER, assert_same_weights, contents, record, untimed_log
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As templates of reasoning models do: what the assistant thought is kept in the last turn alone.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Alice."},
    {"role": "user", "content": "And he?"},
    {"role": "assistant", "content": "The Hatter."},
]


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    loaded.chat_template = template
    return loaded


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def learnt(path: Path, words: PreTrainedTokenizerFast, block_size: int = 200) -> tuple[list[str], list[str]]:
    """The whole text of each row, and what of it the model is to predict."""
    rows, _ = chat_rows.read_examples(DataSource((path,)), words, block_size, show_progress=False)
    whole = [words.decode(row.tokens) for row in rows]
    return whole, [words.decode(row.tokens[row.is_target]) for row in rows]


def write_base(folder: Path, **configuration) -> Path:
    """Write a tiny model with tied embeddings and the recipes' tokenizer, as a run with Muon leaves them."""
    words = tokenizer()
    special = {"bos_token_id": words.eos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": None}
    size = {"vocab_size": -(-len(words) // 64) * 64, "max_position_embeddings": 256}
    tiny_model("qwen2", **special, **size, **configuration).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"identity": {"optim": "muon"}}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def chats(folder: Path, count: int = 24) -> Path:
    names = ("Alice", "the Hatter", "the Queen")
    return write_rows(
        folder / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"Who is number {i}?" + " Say." * (i % 4)},
                    {"role": "assistant", "content": f"Number {i} is {names[i % 3]}."},
                ]
            }
            for i in range(count)
        ],
    )


def flags(base: Path, data: Path, output: Path, cache: str, *more: str) -> list[str]:
    held_out = ("--validation_fraction", "0.3")
    if data.suffix == ".txt":
        held_out = ("--validation_file", str(data.with_name("validation.txt")))
    return [
        *("--model", str(base), "--train_file", str(data), "--output_dir", str(output), "--cache_dir", cache),
        *(*held_out, "--block_size", "32", "--per_device_train_batch_size", "4"),
        *("--max_steps", "4", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"),
        *("--eval_strategy", "no", "--save_strategy", "no", "--learning_rate", "1e-2", "--lora_rank", "4", *more),
    ]


# ---- conversations ----


def test_the_model_learns_what_the_assistant_says_and_its_end(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    words = tokenizer()
    whole, targets = learnt(path, words)
    end = words.eos_token
    assert whole == [f"System: Be brief.\nUser: Who are you?\nAssistant: Alice.{end}\nUser: And he?\nAssistant: The "
                     f"Hatter.{end}"]  # fmt: skip
    assert targets == [f" Alice.{end} The Hatter.{end}"]
    # What it was given is kept for use.
    opened = words.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert whole[0].startswith(opened)
    assert opened.endswith("Assistant:")


def test_a_tokenizers_own_template_is_used(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    whole, targets = learnt(path, tokenizer(CHATML))
    assert whole[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert targets == ["Alice.<|im_end|>\nThe Hatter.<|im_end|>\n"]


def test_of_prompt_and_completion_the_completion_is_learnt(tmp_path):
    rows = [{"prompt": "One and one", "completion": " is two."}, {"prompt": TALK[:4], "completion": TALK[4:]}]
    words = tokenizer(CHATML)
    whole, targets = learnt(write_rows(tmp_path / "rows.jsonl", rows), words)
    assert whole[0] == f"One and one is two.{words.eos_token}"
    assert targets == [f" is two.{words.eos_token}", "The Hatter.<|im_end|>\n"]


def test_a_template_that_rewrites_turns_is_refused_and_the_remedy_works(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    with pytest.raises(RecipeError, match=r"line 1, message 3: the chat template renders.*as prompt.*completion"):
        learnt(path, tokenizer(FORGETFUL))
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": TALK[:4], "completion": TALK[4:]}])
    assert learnt(path, tokenizer(FORGETFUL))[1] == ["<think>The Hatter.\n"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "line 2: messages are a list of objects"),
        ({"messages": [{"content": "x"}]}, "line 2, message 1 has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2, message 1: content is 3, not text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: no message of the role 'assistant'"),
        ({"text": "x"}, "line 2: a row has messages, or prompt and completion, as the first row has; this: text"),
        ({"prompt": "x", "completion": None}, "line 2: messages are a list"),
    ],
)
def test_rows_of_no_form_are_refused_with_their_place(tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}, row])
    with pytest.raises(RecipeError, match=message):
        learnt(path, tokenizer())


def test_rows_are_cut_and_those_without_targets_left_out(tmp_path, capsys):
    long = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "x"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": long}, {"messages": TALK}])
    rows, _ = chat_rows.read_examples(DataSource((path,)), tokenizer(), 30, show_progress=False)
    assert [len(row.tokens) for row in rows] == [31]
    assert "1 rows left out: nothing to predict in their first 31 tokens" in capsys.readouterr().out


def test_a_batch_pads_at_the_end_and_counts_targets_alone():
    examples = [
        chat_rows.Example(np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True])),
        chat_rows.Example(np.array([9, 10], np.int32), np.array([False, True])),
    ]
    batch = chat_rows.collate([chat_rows.Examples(examples)[i] for i in (0, 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 8], [10, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in chat_rows.collate([chat_rows.Examples(examples)[0]] * 2)


# ---- whole runs ----


def test_a_chat_run_lowers_the_loss_that_transformers_would_compute(base, tmp_path, cache):
    data = chats(tmp_path)
    assert (
        finetune.main(
            flags(base, data, tmp_path / "out", cache, "--optim", "muon", "--max_steps", "20", "--lora_rank", "0")
        )
        == 0
    )
    run = record(tmp_path / "out")
    assert run["results"]["eval_loss"] < run["before"]["eval_loss"] - 0.5
    # The loss before, by the plain model and a loop over the held-out rows.
    words = tokenizer()
    _, held_out = chat_rows.read_examples(DataSource((data,)), words, 32, validation_fraction=0.3, show_progress=False)
    total, count = 0.0, 0
    model = AutoModelForCausalLM.from_pretrained(base)
    for row in held_out:
        ids, labels = torch.tensor(row.tokens, dtype=torch.int64)[None], torch.tensor(row.is_target)[None]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids.masked_fill(~labels, -100)).loss.item()
        total, count = total + loss * labels[:, 1:].sum().item(), count + labels[:, 1:].sum().item()
    assert run["before"]["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert "chat_template" in "".join(path.name for path in (tmp_path / "out").iterdir())


def test_of_a_short_text_one_section_is_held_out(tmp_path):
    """5 % of three sections by their hashes would be none."""
    text = tmp_path / "book.txt"
    text.write_text("".join(f"Chapter {i}. It was a dark night, and nothing moved.\n" for i in range(450)))
    source = DataSource((text,))
    hashes = [split_hash(piece.text) for piece in read_documents(source, "text")]
    assert len(hashes) == 3
    assert min(hashes) > 0.05 * 2**64
    fraction = finetune_data.fraction_of_text(source, 0.05)
    assert [place < fraction * 2**64 for place in hashes] == [place == min(hashes) for place in hashes]
    assert finetune_data.fraction_of_text(source, 0.99) == 0.99
    assert finetune_data.fraction_of_text(source, 0.0) == 0.0
    text.write_text("One section alone is trained on.\n")
    assert finetune_data.fraction_of_text(source, 0.05) == 0.05


def test_of_few_rows_one_is_held_out(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} and", "completion": " so on"}) + "\n" for i in range(3)))
    sides = chat_rows.read_examples(
        DataSource((data,)), tokenizer(), 32, validation_fraction=1e-9, show_progress=False
    )
    assert [len(side) for side in sides] == [2, 1]
    sides = chat_rows.read_examples(DataSource((data,)), tokenizer(), 32, show_progress=False)
    assert [len(side) for side in sides] == [3, 0]


@pytest.mark.parametrize(
    ("optim", "more"),
    [
        ("adamuon", ()),
        ("mud", ("--dora", "--rslora", "--modules_to_save", "embed_tokens")),
        ("muon", ("--modules_to_save", "lm_head", "--optim_args", "lora=b_only")),
    ],
)
def test_adapter_and_merged_model_are_loaded_for_evaluation(base, text, tmp_path, cache, optim, more):
    before = contents(base)
    output = tmp_path / "out"
    assert finetune.main(flags(base, text / "train.txt", output, cache, "--optim", optim, "--merge", *more)) == 0
    assert contents(base) == before
    words = tokenizer()
    ids = torch.tensor(words("Alice was beginning to get very tired")["input_ids"])[None]
    outputs = []
    for folder in (base, output, output / "merged"):
        [checkpoint] = checkpoints.find_checkpoints([str(folder)])
        assert checkpoints.load_tokenizer(checkpoint).get_vocab() == words.get_vocab()
        model = checkpoints.load_model(checkpoint, tokens=len(words), dtype="auto", device="cpu")
        with torch.no_grad():
            outputs.append(model(ids).logits)
    assert torch.allclose(outputs[1], outputs[2], atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    assert record(output)["results"]["eval_loss"] != record(output)["before"]["eval_loss"]


@pytest.mark.parametrize("rank", ["4", "0"])
def test_stopped_and_resumed_equals_uninterrupted(base, tmp_path, cache, rank):
    data, more = chats(tmp_path), ("--optim", "adamuon", "--lora_rank", rank, "--save_strategy", "steps")
    more += ("--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2")
    more += ("--lora_dropout", "0.1") if rank != "0" else ()
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert finetune.main(flags(base, data, whole, cache, *more)) == 0
    argv = flags(base, data, resumed, cache, *more)
    assert finetune.main([*argv, "--stop_after", "2"]) == 0
    assert "results" not in record(resumed)
    assert finetune.main([*argv, "--resume_from_checkpoint", "auto"]) == 0
    if rank == "0":
        assert_same_weights(whole, resumed)
    else:
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert untimed_log(whole) == untimed_log(resumed)
    assert record(whole)["before"] == record(resumed)["before"]
    assert finetune.main([*argv, "--resume_from_checkpoint", "auto"]) == 0  # finished: left alone


def test_a_base_that_changed_is_not_resumed(base, text, tmp_path, cache, capsys):
    shutil.copytree(base, tmp_path / "base")
    argv = flags(tmp_path / "base", text / "train.txt", tmp_path / "out", cache, "--optim", "mud")
    assert finetune.main([*argv, "--stop_after", "2"]) == 0
    tiny_model("qwen2", seed=1, vocab_size=4096, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "base")
    assert finetune.main([*argv, "--resume_from_checkpoint", "true"]) == 2
    assert "are not those that the run to resume was started from" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_adapter_of_a_4_bit_model_resumes_and_is_loaded_on_the_whole_one(text, tmp_path, cache):
    base, output = write_base(tmp_path / "base", hidden_size=64, intermediate_size=128), tmp_path / "out"
    argv = flags(base, text / "train.txt", output, cache, "--optim", "muon", "--load_in_4bit")
    assert finetune.main([*argv, "--stop_after", "2"]) == 0
    assert finetune.main([*argv, "--resume_from_checkpoint", "true"]) == 0
    [checkpoint] = checkpoints.find_checkpoints([str(output)])
    model = checkpoints.load_model(checkpoint, tokens=len(tokenizer()), dtype="float32", device="cpu")
    assert model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").weight.ndim == 2


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_4_bits_without_bitsandbytes_are_refused(base, text, tmp_path, cache, capsys):
    assert finetune.main(flags(base, text / "train.txt", tmp_path / "out", cache, "--load_in_4bit")) == 2
    assert "--load_in_4bit needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- what is said and refused ----


def test_a_dry_run_as_a_person_types_it_writes_nothing(base, text, tmp_path, cache):
    argv = flags(base, text / "train.txt", tmp_path / "out", cache, "--optim", "muon", "--dry_run")
    done = subprocess.run(
        [sys.executable, str(RECIPES / "finetune.py"), *argv],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "LoRA A" in done.stdout
    assert "4 steps of 4 blocks or rows" in done.stdout
    assert not (tmp_path / "out").exists()


def test_another_optimizer_than_that_of_pretraining_is_noted(base, text, tmp_path, cache, capsys):
    argv = flags(base, text / "train.txt", tmp_path / "out", cache, "--lora_rank", "0", "--dry_run")
    assert finetune.main([*argv, "--optim", "adamw_torch"]) == 0
    assert "note: pretrained with muon, now adamw_torch: " in capsys.readouterr().out
    for same in (["--optim", "adamuon"], ["--optim", "adamw_torch", "--lora_rank", "4"]):
        assert finetune.main([*argv, *same]) == 0
        assert "note:" not in capsys.readouterr().out
    page = ROOT / "recipes" / "results" / "finetune.md"
    assert page.is_file()


def test_a_folder_with_a_run_is_kept(base, text, tmp_path, cache, capsys):
    output = tmp_path / "out"
    argv = flags(base, text / "train.txt", output, cache, "--optim", "mud", "--max_steps", "1", "--merge")
    assert finetune.main(argv) == 0
    before = contents(output)
    assert finetune.main(argv) == 2
    assert "holds another run" in capsys.readouterr().err
    assert contents(output) == before
    (output / "mine.txt").write_text("kept")
    argv = flags(base, text / "train.txt", output, cache, "--lora_rank", "0", "--max_steps", "1")
    assert finetune.main([*argv, "--overwrite_output_dir"]) == 0
    left = {path.name for path in output.iterdir()}
    assert {"mine.txt", "model.safetensors"} <= left
    assert not left & {"merged", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora_rank", "1", "--optim", "muon"), "Adapters of rank 1 are pairs of vectors: give r of at least 2"),
        (("--lora_rank", "0", "--merge"), "--merge is of adapters"),
        (("--lora_rank", "0", "--load_in_4bit"), "quantised weights cannot be trained"),
        (("--load_in_4bit", "--merge"), "an adapter is not merged into 4-bit weights"),
        (("--lora_target_modules", "q_pro"), "--lora_target_modules q_pro: "),
        (("--modules_to_save", "embed_token"), "no such module; did you mean embed_tokens?"),
        (("--optim", "muon", "--optim_args", "lora=a_only"), "lora='a_only' is not one of both, b_only, adamw"),
        (("--lora_alpha", "0"), "--lora_alpha is 0.0; it must be above 0"),
        (("--lora_dropout", "1"), "--lora_dropout is 1.0; it must be at least 0 and below 1"),
        (("--dtype", "int8"), "--dtype int8: it is one of float32, bfloat16, float16"),
        (("--block_size", "512"), "this model has 256 positions"),
        (("--lora_ranks", "4"), "unknown argument --lora_ranks; did you mean --lora_rank?"),
        (("--model", "nowhere/at/all"), "--model nowhere/at/all: no such folder"),
        (("--validation_file", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--lora_rank", "100000000000"), "no matrix of this model has a rank above"),
        (
            ("--lora_target_modules", "q_proj", "v_pro"),
            "--lora_target_modules v_pro: the model has no such module; did",
        ),
        (("--max_steps", "-5"), "--max_steps is -5; it must be at least 1"),
        (("--num_train_epochs", "0"), "--num_train_epochs is 0.0; it must be finite and above 0"),
        (("--save_steps", "0"), "--save_steps is 0.0; it must be above 0"),
        (("--seed", "-1"), "--seed is -1; it must be in [0, 2**32)"),
        (("--per_device_eval_batch_size", "0"), "--per_device_eval_batch_size is 0"),
        (("--optim", "muonn"), "did you mean muon?"),
        (("--optim", "muon", "--optim_args", "passes=2"), "'passes' is an option of mud"),
        (("--model", "a-name-of-no-model"), "it is no folder here, so a name on the Hub"),
        (("--resume_from_checkpoint", "true"), "holds no whole checkpoint"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(base, text, tmp_path, cache, capsys, more, message):
    assert finetune.main([*flags(base, text / "train.txt", tmp_path / "out", cache), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_model_to_start_from(base, tmp_path, cache, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert finetune.main(flags(tmp_path / "adapter", chats(tmp_path), tmp_path / "out", cache)) == 2
    assert "holds an adapter, not a model: merge it first" in capsys.readouterr().err


def test_a_flag_that_is_required_is_asked_for_in_one_line(base, capsys):
    assert finetune.main(["--model", str(base)]) == 2
    error = capsys.readouterr().err
    assert "--train_data" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("output", [".", "checkpoint-4", ""])
def test_the_model_to_start_from_is_never_overwritten(base, text, tmp_path, cache, capsys, output):
    run = shutil.copytree(base, tmp_path / "run")
    shutil.copytree(base, run / "checkpoint-4")
    model = run / "checkpoint-4" if output == "checkpoint-4" else run
    if not output:  # the folder of the run whose merged model is trained on
        model = shutil.copytree(base, run / "merged")
    before = contents(run)
    argv = flags(model, text / "train.txt", run, cache, "--lora_rank", "0", "--overwrite_output_dir")
    assert finetune.main(argv) == 2
    assert "holds the model to start from" in capsys.readouterr().err
    assert contents(run) == before


def test_a_broken_model_is_refused(base, text, tmp_path, cache, capsys):
    def refusal(folder: Path) -> str:
        assert finetune.main(flags(folder, text / "train.txt", tmp_path / "out", cache)) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    cut = shutil.copytree(base, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:3000])
    assert "cannot be loaded: Error while deserializing" in refusal(cut)
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "holds no tokenizer; save one beside it" in refusal(bare)
    (cut / "config.json").write_text('{"model_type": "t5"}')
    assert "there is no causal language model of type t5" in refusal(cut)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"conversations": [{"from": "human", "value": "x"}]}], (), "its first row has conversations: rename"),
        ([{"instruction": "x", "output": "y"}], (), "its first row has instruction, output: rename its columns"),
        (
            [{"prompt": "word " * 50, "completion": "x"}] * 9,
            (),
            "no row is left to train on; give more rows or a larger",
        ),
        ([{"prompt": "One", "completion": "x"}], (), "no row is left to"),
        ([{"prompt": "One", "completion": "x"}] * 9, ("--validation_file",), "holds conversations, --validation_data"),
    ],
)
def test_rows_of_which_nothing_can_be_learnt_are_refused(base, text, tmp_path, cache, capsys, rows, more, message):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    more += (str(text / "validation.txt"),) if more else ()
    assert finetune.main([*flags(base, data, tmp_path / "out", cache), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_completion_needs_an_end_of_text(base, tmp_path, cache, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(9)])
    folder = shutil.copytree(base, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if not key.endswith("_token")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert finetune.main(flags(folder, rows, tmp_path / "out", cache)) == 2
    assert "the tokenizer of --model has no eos token, which closes" in capsys.readouterr().err


def test_a_broken_checkpoint_is_named_and_nothing_is_changed(base, tmp_path, cache, capsys):
    output = tmp_path / "out"
    argv = flags(base, chats(tmp_path), output, cache, "--optim", "muon")
    assert finetune.main([*argv, "--stop_after", "2"]) == 0
    weights, state = (output / "checkpoint-2" / name for name in ("adapter_model.safetensors", "optimizer.pt"))
    for path, left, message in ((weights, b"", "cannot be read"), (state, b"x", "is not what torch saves")):
        whole = path.read_bytes()
        path.write_bytes(left)
        before = contents(output)
        assert finetune.main([*argv, "--resume_from_checkpoint", "true"]) == 2
        assert f"{path.name} {message}" in capsys.readouterr().err
        assert contents(output) == before
        path.write_bytes(whole)
    weights.unlink()
    assert finetune.main([*argv, "--resume_from_checkpoint", "true"]) == 2
    assert "checkpoint-2 holds no weights" in capsys.readouterr().err


def test_a_checkpoint_goes_on_in_another_folder_with_its_log(base, tmp_path, cache):
    argv = flags(base, chats(tmp_path), tmp_path / "one", cache, "--optim", "mud")
    assert finetune.main([*argv, "--stop_after", "2"]) == 0
    before = contents(tmp_path / "one")
    checkpoint = ("--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-2"))
    assert finetune.main([*argv, *checkpoint, "--output_dir", str(tmp_path / "other")]) == 0
    assert contents(tmp_path / "one") == before
    steps = [line["step"] for line in untimed_log(tmp_path / "other") if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_anew_and_a_finished_one_is_merged(base, tmp_path, cache):
    output, data = tmp_path / "out", chats(tmp_path)
    argv = [*flags(base, data, output, cache, "--optim", "muon"), "--resume_from_checkpoint", "auto"]
    assert finetune.main(argv) == 0
    run = record(output)
    del run["results"]
    (output / "run.json").write_text(json.dumps(run))
    assert finetune.main([*argv, "--learning_rate", "0.02"]) == 2  # another run than the one that was begun
    assert record(output) == run
    assert finetune.main(argv) == 0
    before = contents(output)
    assert finetune.main([*argv, "--merge"]) == 0
    after = contents(output)
    assert {name: after[name] for name in before} == before
    assert (output / "merged" / "model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_bfloat16_and_checkpointing_on_a_gpu(base, tmp_path, cache):
    argv = flags(base, chats(tmp_path), tmp_path / "out", cache, "--optim", "adamuon", "--merge")
    argv = argv[: argv.index("--use_cpu")] + argv[argv.index("--use_cpu") + 2 :]
    assert finetune.main([*argv, "--bf16", "--dtype", "bfloat16", "--gradient_checkpointing", "true"]) == 0
    assert record(tmp_path / "out")["results"]["eval_loss"] < record(tmp_path / "out")["before"]["eval_loss"]


# ---- the study ----


def leave_run(folder: Path, arm: finetune_study.Arm, rate: float, seed: int, loss: float | None) -> None:
    """Leave what a finished run does, as far as the study reads it."""
    place = folder / arm.name / f"{rate:g}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "run.json").write_text(
        json.dumps(
            {
                "identity": {},
                "before": {"eval_loss": 5.0},
                "results": {"eval_loss": loss},
                "data": {"train": {"tokens": 1000}, "validation": {"tokens": 100}},
                "versions": dict.fromkeys(("python", "torch", "transformers", "peft"), "1"),
                "hardware": {"cpu": "a CPU", "torch_threads": 1},
            }
        )
    )


def test_the_study_goes_on_from_finished_runs_until_the_best_rate_is_bracketed(tmp_path):
    arms = finetune_study.arms_of("lora")
    assert len(arms) == 14
    for arm in arms:
        shift = 0.1 if arm.optim == finetune_study.ADAMW else 0.0
        for rate, loss in ((2e-3, 4.4), (4e-3, 4.3), (8e-3, 4.2), (1.6e-2, None)):  # diverged at the end
            for seed in finetune_study.SEEDS:
                leave_run(tmp_path, arm, rate, seed, None if loss is None else loss + shift + seed / 100)
    measured = finetune_study.measure_study(tmp_path, "lora")
    assert all(one.best == 8e-3 for one in measured)
    assert all(one.is_bracketed for one in measured)
    page = finetune_study.page_of({"lora": measured})
    assert "| 8 | AdamW |  | 0.008 | 4.310 ± 0.010 |  | yes |" in page
    assert "| 32 | Muon | `b_only` | 0.008 | 4.210 ± 0.010 | -0.100, -0.100, -0.100 | yes |" in page
    assert "AdamW's models 5.000 ± 0.000" in page
    assert "inf" in page


def test_the_study_refuses_what_it_does_not_know(tmp_path, capsys):
    assert finetune_study.main(["--study", "lors", "--output_dir", str(tmp_path / os.urandom(4).hex())]) == 2
    assert "--study lors: it is of lora, full; did you mean lora?" in capsys.readouterr().err
