"""Samples of a run: blocks of text, masked proteins, and streams; each a function of its seed and number."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sources import DataSource, is_held_out, read_documents
from masked_proteins import (
    CLS,
    EOS,
    ESM_VOCABULARY,
    MASK,
    PAD,
    STANDARD,
    MaskedProteins,
    collate_proteins,
    encode_residues,
    mask_sequence,
)
from prepared_data import prepare_proteins
from recipe_error import RecipeError
from text_blocks import TextBlocks, collate_text
from tiny_recipe import ALICE, RECIPES, TOKENIZER
from token_files import ProteinFile, Segment, TokenFile
from token_stream import DocumentStream, ProteinStream, TextStream
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

PROTEINS = DataSource((RECIPES / "data" / "proteins" / "validation.fasta.gz",))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """0 to 40 in two files, the second after 6 bytes of something else."""
    folder = tmp_path_factory.mktemp("tokens")
    np.arange(17, dtype=np.uint16).tofile(folder / "a.bin")
    (folder / "b.bin").write_bytes(b"header" + np.arange(17, 41, dtype=np.uint16).tobytes())
    return TokenFile(
        [Segment(folder / "a.bin", "<u2", 0, 0, 17), Segment(folder / "b.bin", "<u2", 6, 0, 24)], "training"
    )


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> ProteinFile:
    cache = tmp_path_factory.mktemp("cache")
    prepared = prepare_proteins(PROTEINS, None, cache_dir=cache, show_progress=False).train
    assert isinstance(prepared, ProteinFile)
    return prepared


def test_a_block_has_as_many_targets_as_inputs(tokens: TokenFile) -> None:
    blocks = TextBlocks(tokens, 4, seed=None, length=None)
    samples = [blocks[index] for index in range(len(blocks))]
    assert len(samples) == blocks.blocks == 10
    assert np.concatenate([sample["input_ids"] for sample in samples]).tolist() == list(range(40))
    assert np.concatenate([sample["targets"] for sample in samples]).tolist() == list(range(1, 41))
    assert TextBlocks(tokens, 8, seed=None, length=None).blocks == 5
    some = TextBlocks(tokens, 4, seed=None, length=3)
    assert [int(some[index]["input_ids"][0]) for index in range(len(some))] == [0, 12, 24]
    with pytest.raises(RecipeError, match="holds token 40, the model has 40 words"):
        TextBlocks(tokens, 4, seed=None, length=None, vocab_size=40)[9]


def test_blocks_are_a_function_of_seed_and_number(tokens: TokenFile) -> None:
    samples = TextBlocks(tokens, 4, seed=7, length=25)
    order = [int(samples[index]["input_ids"][0]) // 4 for index in range(25)]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    again = pickle.loads(pickle.dumps(samples))  # as a worker gets it
    assert [int(again[index]["input_ids"][0]) // 4 for index in reversed(range(25))] == order[::-1]
    other = TextBlocks(tokens, 4, seed=8, length=25)
    assert [int(other[index]["input_ids"][0]) // 4 for index in range(10)] != order[:10]
    with pytest.raises(IndexError):
        samples[25]


def test_a_causal_model_learns_from_every_target(tokens: TokenFile) -> None:
    """The model's own loss on a collated batch is the cross entropy of all targets, not shifted again."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=41, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    blocks = TextBlocks(tokens, 4, seed=None, length=None)
    batch = collate_text([blocks[0], blocks[5]])
    assert {name: (values.dtype, tuple(values.shape)) for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "shift_labels"), (torch.int64, (2, 4))
    )
    output = model(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_proteins_are_framed_cropped_and_padded() -> None:
    residues = encode_residues("MKTAYIAKQR")
    for length, shape in ((16, 16), (12, 12), (7, 7)):
        sample = mask_sequence(residues, shape, np.random.default_rng(0), 0.15)
        ids, labels = sample["input_ids"], sample["labels"]
        kept = min(10, length - 2)
        assert all(values.dtype == np.int64 and values.shape == (shape,) for values in sample.values())
        assert (ids[0], ids[kept + 1]) == (CLS, EOS)
        assert (ids[kept + 2 :] == PAD).all()
        assert sample["attention_mask"].tolist() == [1] * (kept + 2) + [0] * (shape - kept - 2)
        original = np.where(labels == -100, ids, labels)[1 : kept + 1].tolist()
        assert any(original == residues[start : start + kept].tolist() for start in range(11 - kept))
        assert set(np.flatnonzero(labels != -100)) <= set(range(1, kept + 1))


def test_masks_are_80_10_10_of_15_percent_and_at_least_one() -> None:
    rng = np.random.default_rng(0)
    residues = encode_residues("LAGVSERTIDPKQNFYMHWCXBUZO" * 20)
    samples = [mask_sequence(residues, 512, rng, 0.15) for _ in range(400)]
    ids, labels = (np.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels"))
    drawn = labels != -100
    assert drawn.sum(1).min() >= 75
    assert drawn.sum(1).max() <= 76
    assert drawn[:, 1:501].mean() == pytest.approx(0.15, abs=0.001)
    masked = ids[drawn] == MASK
    replaced = ~masked & (ids[drawn] != labels[drawn])
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert replaced.mean() == pytest.approx(0.1 * 19.2 / 20, abs=0.01)  # some are replaced by themselves
    assert set(ids[drawn][replaced]) == set(STANDARD)
    assert len(STANDARD) == 20
    assert set(ids[~drawn & (ids != PAD)]) <= {CLS, EOS, *range(ESM_VOCABULARY.index("L"), ESM_VOCABULARY.index("."))}
    for _ in range(50):
        assert (mask_sequence(encode_residues("M"), 8, rng, 0.01)["labels"] != -100).sum() == 1


def test_vocabulary_is_that_of_esm2() -> None:
    assert len(ESM_VOCABULARY) == 33
    assert (CLS, PAD, EOS, MASK) == (0, 1, 2, 32)
    assert "".join(ESM_VOCABULARY[4:31]) == "LAGVSERTIDPKQNFYMHWCXBUZO.-"
    assert encode_residues("lAgJ*").tolist() == [4, 5, 6, 24]


def test_training_masks_belong_to_the_sample_and_evaluation_masks_to_the_sequence(proteins: ProteinFile) -> None:
    count = len(proteins)
    samples = MaskedProteins(proteins, 128, seed=3, length=2 * count + 5)
    again = pickle.loads(pickle.dumps(samples))
    for index in (2 * count + 4, 0, 17, count):
        for name, values in samples[index].items():
            assert (again[index][name] == values).all()
    assert (MaskedProteins(proteins, 128, seed=4, length=9)[0]["labels"] != samples[0]["labels"]).any()
    chosen = [samples.order[index] for index in range(2 * count)]
    assert sorted(chosen[:count]) == sorted(chosen[count:]) == list(range(count))
    second = chosen.index(chosen[0], count)
    assert (samples[0]["labels"] != samples[second]["labels"]).any()  # masked anew in the next pass
    whole = MaskedProteins(proteins, 128, seed=None, length=None)
    some = MaskedProteins(proteins, 128, seed=None, length=50)
    assert len(whole) == count
    assert all((some[i]["labels"] == whole[int(some.order[i])]["labels"]).all() for i in range(50))
    batch = collate_proteins([samples[index] for index in range(3)])
    assert {name: (values.dtype, tuple(values.shape)) for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, (3, 128))
    )
    with pytest.raises(RecipeError, match="--block_size is 2"):
        MaskedProteins(proteins, 2, seed=0, length=1)
    with pytest.raises(RecipeError, match="mask fraction is 0"):
        MaskedProteins(proteins, 9, seed=0, length=1, mask_fraction=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_do_not_change_a_sample(proteins: ProteinFile, workers: int) -> None:
    samples = MaskedProteins(proteins, 64, seed=3, length=12)
    plain, split = (
        list(torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=collate_proteins, num_workers=number))
        for number in (0, workers)
    )
    assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, split, strict=True) for name in a)


def text_stream(file: Path, rank: int = 0, world_size: int = 1, **options: Any) -> TextStream:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    fraction = options.pop("validation_fraction", 0.1)
    return TextStream(
        DataSource((file,)), tokenizer, 16, validation_fraction=fraction, rank=rank, world_size=world_size, **options
    )


def take(stream: DocumentStream, count: int) -> list[list[int]]:
    iterator = iter(stream)
    samples = [next(iterator)["input_ids"].tolist() for _ in range(count)]
    iterator.close()  # type: ignore[attr-defined]
    return samples


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [line for line in ALICE.splitlines() if line.strip()][:150]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines, ""]), encoding="utf-8")
    return file


def test_a_stream_packs_the_documents_of_its_rank(rows: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    documents = [piece.text for piece in read_documents(DataSource((rows,)), "text")]
    for rank in (0, 1):
        kept = [text for text in documents[rank::2] if not is_held_out(text, 0.1)]
        stream = [token for text in kept for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
        blocks = take(text_stream(rows, rank, 2), 2 * len(stream) // 16)
        joined = [token for block in blocks for token in block]
        assert joined == (stream * 3)[: len(joined)]  # pass after pass, without a gap


@pytest.mark.parametrize("seen", [0, 1, 57, 200])
def test_a_stream_goes_on_from_its_place(rows: Path, seen: int) -> None:
    whole = take(text_stream(rows, 1, 2), 260)
    first = text_stream(rows, 1, 2)
    iterator = iter(first)
    for _ in range(seen + 7):  # read ahead of what was trained on
        next(iterator)
    state = json.loads(json.dumps(first.state_dict(seen)))
    iterator.close()  # type: ignore[attr-defined]
    resumed = text_stream(rows, 1, 2)
    resumed.load_state_dict(state)
    assert take(resumed, 260 - seen) == whole[seen:]
    with pytest.raises(RecipeError, match="saved by rank 1 of 2 and is read by rank 0 of 1: resume with as many"):
        text_stream(rows).load_state_dict(state)


def test_a_stream_of_proteins_resumes_with_the_same_masks() -> None:
    def stream() -> ProteinStream:
        return ProteinStream(PROTEINS, 64, validation_fraction=0.0, rank=0, world_size=1, seed=5)

    whole = take(stream(), 500)  # two passes over 248 sequences
    assert whole[0] != whole[248]
    first = stream()
    iterator = iter(first)
    for _ in range(300):
        next(iterator)
    state = first.state_dict(290)
    iterator.close()  # type: ignore[attr-defined]
    resumed = stream()
    resumed.load_state_dict(state)
    assert take(resumed, 210) == whole[290:]


def test_a_shuffle_buffer_mixes_and_streams_end_in_one_error(rows: Path, tmp_path: Path) -> None:
    plain, mixed = take(text_stream(rows), 100), take(text_stream(rows, shuffle_buffer=50, seed=1), 100)
    assert plain != mixed
    assert take(text_stream(rows, shuffle_buffer=50, seed=1), 100) == mixed
    (tmp_path / "bad.jsonl").write_text('{"text": "words"}\n{"text": \n')
    with pytest.raises(RecipeError, match=r"bad.jsonl, line 2, is not JSON"):
        take(text_stream(tmp_path / "bad.jsonl", validation_fraction=0.0), 100)
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(RecipeError, match=r"blank.jsonl holds no documents for rank 0"):
        take(text_stream(tmp_path / "blank.jsonl"), 1)
    with pytest.raises(RecipeError, match="give --dataloader_num_workers 0"):
        next(iter(torch.utils.data.DataLoader(text_stream(rows), num_workers=1)))
    with pytest.raises(RecipeError, match="holds tokens already"):
        text_stream(tmp_path / "train.bin")
    wikitext = DataSource((), "Salesforce/wikitext", "wikitext-103-raw-v1", column="text")
    with pytest.raises(RecipeError, match="the rows of Salesforce/wikitext are lines"):
        ProteinStream(wikitext, 64, validation_fraction=0.0, rank=0, world_size=1)
