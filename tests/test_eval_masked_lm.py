"""Masked models on proteins: the loss against a plain computation, the same residues for all, and bad FASTA files."""

import gzip
import json
import math

import masked_lm
import pytest
import torch
import transformers
from checkpoints import find_checkpoints
from eval_error import EvalError

LETTERS = "LAGVSERTIDPKQNFYMHWC"
ALPHABET = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "X", "B", "U", "Z", "O", ".", "-", "<null_1>", "<mask>"]
PROTEINS = [
    ("P1 size=3", LETTERS * 3),
    ("P2", LETTERS[::-1] * 5),
    ("P3", "MKTAYIAKQRQISFVKSHFSRQ"),
    ("P4", "ACDEFGH" * 9),
]


def save_esm(folder, *, seed=0, uniform=False):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(ALPHABET))
    transformers.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.EsmConfig(
        vocab_size=len(ALPHABET),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
        token_dropout=True,
        initializer_range=0.5,
    )
    transformers.set_seed(seed)
    model = transformers.EsmForMaskedLM(config)
    if uniform:
        for weight in (model.lm_head.decoder.weight, model.lm_head.bias):
            torch.nn.init.zeros_(weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "held_out.fasta"
    path.write_text("".join(f">{name}\n{sequence[:30]}\n{sequence[30:].lower()}\n\n" for name, sequence in PROTEINS))
    return path


def evaluate(folder, entries, **changes):
    (found,) = find_checkpoints([str(folder)])
    options = {"rate": 0.3, "seed": 0, "max_length": None, "batch_size": 2, "dtype": "float32", "device": "cpu"}
    return masked_lm.evaluate_checkpoint(found, entries, **{**options, **changes})


def test_fasta_is_read(fasta, tmp_path):
    wanted = [(name.split()[0], sequence) for name, sequence in PROTEINS]
    assert masked_lm.read_fasta(fasta) == wanted
    packed = tmp_path / "held_out.fasta.gz"
    packed.write_bytes(gzip.compress(fasta.read_bytes()))
    assert masked_lm.read_fasta(packed) == wanted
    for text, message in (
        ("MKV\n", "line 1 comes before any '>'"),
        (">a\nMK1V\n", "no residue: 'MK1V'"),
        (">a\n>b\nMKV\n", "a has no residues"),
        ("", "holds no sequence"),
    ):
        (tmp_path / "bad.fasta").write_text(text)
        with pytest.raises(EvalError, match=message):
            masked_lm.read_fasta(tmp_path / "bad.fasta")
    with pytest.raises(EvalError, match="cannot be read"):
        masked_lm.read_fasta(tmp_path / "none.fasta")


def test_the_loss_is_that_of_one_protein_at_a_time(tmp_path):
    folder = save_esm(tmp_path / "esm")
    found = evaluate(folder, PROTEINS)
    tokenizer = transformers.EsmTokenizer.from_pretrained(folder)
    model = transformers.EsmForMaskedLM.from_pretrained(folder).eval()
    losses, hits, sums = [], [], []
    for _, sequence in PROTEINS:
        ids = torch.tensor(tokenizer(sequence)["input_ids"])
        inputs, labels = masked_lm.mask(ids, tokenizer, rate=0.3, seed=0)
        chosen = labels != -100
        assert torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(inputs[~chosen], ids[~chosen])
        assert not chosen[0]
        assert not chosen[-1]
        with torch.no_grad():
            logits = model(input_ids=inputs[None]).logits[0][chosen]
        each = torch.nn.functional.cross_entropy(logits, ids[chosen], reduction="none")
        losses += each.tolist()
        hits += (logits.argmax(-1) == ids[chosen]).tolist()
        sums.append(float(each.sum()))
    assert found["masked_tokens"] == len(losses) > 30
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found["sequence_losses"] == pytest.approx(sums, rel=1e-4)
    assert evaluate(folder, PROTEINS, batch_size=4)["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert evaluate(folder, PROTEINS, seed=1)["loss"] != pytest.approx(found["loss"], rel=1e-3)


def test_a_model_that_knows_nothing_has_the_loss_of_guessing(tmp_path):
    found = evaluate(save_esm(tmp_path / "esm", uniform=True), PROTEINS)
    assert found["loss"] == pytest.approx(math.log(len(ALPHABET)), rel=1e-5)
    assert found["perplexity"] == pytest.approx(len(ALPHABET), rel=1e-4)
    assert found["loss_standard_error"] == pytest.approx(0.0, abs=1e-5)


def test_long_proteins_are_cut_and_counted(tmp_path):
    folder = save_esm(tmp_path / "esm")
    found = evaluate(folder, PROTEINS, max_length=40)
    assert found["proteins_cut"] == 3
    cut = [(name, sequence[:39]) for name, sequence in PROTEINS]
    assert found["proteins"] == 4
    assert sum(found["sequence_masked_tokens"]) == found["masked_tokens"] < 0.5 * 40 * len(cut)
    assert evaluate(folder, [("J", "MKJAV" * 9)])["unknown_tokens"] == 9


def test_the_command_keeps_results_and_compares_on_the_same_residues(tmp_path, fasta, capsys):
    names = [str(save_esm(tmp_path / f"esm-{seed}", seed=seed)) for seed in (0, 1)]
    arguments = [
        "--checkpoint",
        str(tmp_path / "esm-*"),
        "--fasta",
        str(fasta),
        "--device",
        "cpu",
        "--mask-rate",
        "0.3",
    ]
    arguments += ["--output", str(tmp_path / "out"), "--dtype", "float32"]
    assert masked_lm.main(arguments) == 0
    printed = capsys.readouterr().out
    a, b = (evaluate(name, masked_lm.read_fasta(fasta), batch_size=16) for name in names)
    assert a["sequence_masked_tokens"] == b["sequence_masked_tokens"]
    difference, error = masked_lm.paired_loss(b, a)
    assert difference == pytest.approx(b["loss"] - a["loss"])
    assert f"{difference:+.4f} ± {error:.4f}" in printed
    paths = sorted((tmp_path / "out").rglob("*.json"))
    assert len(paths) == 2
    assert json.loads(paths[0].read_text())["loss"] == pytest.approx(a["loss"], rel=1e-6)
    before = [path.stat().st_mtime_ns for path in paths]
    assert masked_lm.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert masked_lm.main([*arguments, "--seed", "2"]) == 0
    assert all(path.stat().st_mtime_ns > old for path, old in zip(paths, before, strict=True))
    capsys.readouterr()
    assert masked_lm.main([*arguments, "--mask-rate", "0"]) == 1
    assert capsys.readouterr().err == "error: --mask-rate 0.0 is not in (0, 1]\n"
    for seed in (-1, 2**64):
        assert masked_lm.main([*arguments, "--seed", str(seed)]) == 1
        assert capsys.readouterr().err == f"error: --seed {seed} is not in [0, 2^64)\n"
    assert masked_lm.main([*arguments, "--max-length", "2"]) == 1
    assert "--max-length 2 has no room for a residue: give at least 3" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_takes_one_from_elsewhere(tmp_path, fasta, capsys):
    bare, whole = save_esm(tmp_path / "bare"), save_esm(tmp_path / "whole")
    for name in ("vocab.txt", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        (bare / name).unlink(missing_ok=True)
    arguments = [
        "--checkpoint",
        str(bare),
        "--fasta",
        str(fasta),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
    ]
    assert masked_lm.main(arguments) == 1
    assert "bare holds no tokenizer: give --tokenizer FOLDER" in capsys.readouterr().err
    assert masked_lm.main([*arguments, "--tokenizer", str(tmp_path / "none")]) == 1
    assert "none: no such folder" in capsys.readouterr().err
    assert masked_lm.main([*arguments, "--tokenizer", str(whole)]) == 0
    (path,) = (tmp_path / "out").rglob("*.json")
    expected = evaluate(whole, masked_lm.read_fasta(fasta), rate=0.15, batch_size=16, dtype="auto")["loss"]
    assert json.loads(path.read_text())["loss"] == pytest.approx(expected)


def test_a_causal_model_is_refused(tmp_path):
    from eval_fixtures import save_checkpoint

    with pytest.raises(EvalError, match="no mask token"):
        evaluate(save_checkpoint(tmp_path / "causal"), PROTEINS)
