"""The recipe's data: text to blocks, the split, the order, and the bundled sample and tokenizer."""

import gzip
import itertools
import json
import lzma
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pretrain
import pytest
import qwen2_5
import torch
import train_tokenizer
from packed_text import (
    BlockPacker,
    OrderedBlocks,
    TextSource,
    collate_blocks,
    find_text_files,
    is_held_out,
    packed_text,
    sections,
)
from tiny_recipe import ALICE, NOVELS, THURSDAY, TOKENIZER
from transformers import AutoTokenizer, GPT2Config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def test_blocks_concatenate_to_the_token_stream(tmp_path: Path, cache: str, tokenizer: Any) -> None:
    documents = [f"{paragraph}\n" for paragraph in ALICE.splitlines()[:700]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in [*documents, "  "]))
    packed = packed_text(TextSource((file,)), None, tokenizer, 32, 0.0, cache_dir=cache)
    stream = [token for document in documents for token in [*tokenizer(document).input_ids, tokenizer.eos_token_id]]
    blocks = packed.train["input_ids"][:]
    assert packed.validation is None
    assert len(blocks) == len(stream) // 32 > 700
    assert np.concatenate(list(blocks)).tolist() == stream[: len(stream) // 32 * 32]


def test_the_packer_carries_what_is_left_between_batches() -> None:
    documents = [list(range(start, start + length)) for start, length in ((0, 3), (3, 0), (3, 9), (12, 1), (13, 6))]
    whole = BlockPacker(4, held_out=False)({"input_ids": documents, "held_out": [False] * 5})["input_ids"]
    packer = BlockPacker(4, held_out=False)
    single = [packer({"input_ids": [document], "held_out": [False]})["input_ids"] for document in documents]
    assert whole.tolist() == np.arange(16).reshape(4, 4).tolist()
    assert np.concatenate(single).tolist() == whole.tolist()


@pytest.mark.parametrize("name", sorted(file.name for file in (NOVELS / "train").iterdir()))
def test_a_novel_in_sections_has_the_tokens_of_the_whole(tokenizer: Any, name: str) -> None:
    novel = (NOVELS / "train" / name).read_text(encoding="utf-8")
    pieces = list(sections(novel))
    assert "".join(pieces) == novel
    assert max(map(len, pieces)) <= 8192
    assert len(pieces) > 10
    assert list(itertools.chain(*tokenizer(pieces).input_ids)) == tokenizer(novel).input_ids


@pytest.mark.parametrize("text", ["", "a", "x" * 100, "a b " * 40, "\n" * 100, "word\n" * 30, "word\n\n  " * 30])
def test_sections_lose_nothing(text: str) -> None:
    pieces = list(sections(text, 16))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 16


def test_held_out_sections_leave_no_text_run_together(tmp_path: Path, cache: str, tokenizer: Any) -> None:
    (tmp_path / "alice.txt").write_text(ALICE, encoding="utf-8")
    packed = packed_text(TextSource((tmp_path / "alice.txt",)), None, tokenizer, 2, 0.4, cache_dir=cache)
    sides: dict[bool, list[int]] = {False: [], True: []}
    pieces = list(sections(ALICE))
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        held_out = is_held_out(piece, 0.4)
        sides[held_out] += tokenizer(piece).input_ids
        if following is None or is_held_out(following, 0.4) != held_out:
            sides[held_out].append(tokenizer.eos_token_id)
    assert packed.validation is not None
    for side, blocks in ((False, packed.train), (True, packed.validation)):
        stream = np.concatenate(list(blocks["input_ids"][:])).tolist()
        assert stream == sides[side][: len(stream)]
        assert len(sides[side]) - len(stream) < 2
        assert stream.count(tokenizer.eos_token_id) > 1


def test_the_split_is_disjoint_and_depends_on_the_document_alone() -> None:
    documents = [f"document {number}" for number in range(4000)]
    held_out = {document for document in documents if is_held_out(document, 0.1)}
    assert 300 < len(held_out) < 500
    assert held_out == {document for document in reversed(documents) if is_held_out(document, 0.1)}
    assert held_out < {document for document in documents if is_held_out(document, 0.2)}
    # Fixed for good: a later version that splits differently would put old validation text into training.
    assert [is_held_out(document, 0.1) for document in documents].index(True) == 40
    assert not any(is_held_out(document, 0.0) for document in documents)


def test_every_kind_of_file_gives_the_same_blocks(tmp_path: Path, cache: str, tokenizer: Any) -> None:
    rows = {"body": [line for line in ALICE.splitlines()[:60] if line]}
    table = datasets.Dataset.from_dict(rows)
    table.to_json(tmp_path / "rows.jsonl")
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress((tmp_path / "rows.jsonl").read_bytes()))
    (tmp_path / "rows.json").write_text(json.dumps([{"body": row} for row in rows["body"]]))
    streams = []
    for name in ("rows.jsonl", "rows.parquet", "rows.csv", "rows.jsonl.gz", "rows.jsonl.xz", "rows.json"):
        source = TextSource((tmp_path / name,), text_column="body")
        packed = packed_text(source, None, tokenizer, 16, 0.2, cache_dir=cache)
        assert packed.validation is not None
        streams.append((packed.train["input_ids"][:].tolist(), packed.validation["input_ids"][:].tolist()))
    assert all(stream == streams[0] for stream in streams)
    assert len(streams[0][1]) > 3


def test_folders_and_globs_are_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt.gz", "sub/c.jsonl", "notes.md", "d.txt.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"words") if name.endswith(".gz") else b"words")
    names = [str(file.relative_to(tmp_path)) for file in find_text_files([str(tmp_path)])]
    assert names == ["a.txt.gz", "b.txt", "sub/c.jsonl"]
    globbed = find_text_files([str(tmp_path / "*.txt"), str(tmp_path / "**" / "*.jsonl"), str(tmp_path / "b.txt")])
    assert [file.name for file in globbed] == ["b.txt", "c.jsonl"]


def test_changed_text_is_not_served_from_the_cache(tmp_path: Path, cache: str, tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    streams = []
    for text in (ALICE[:4000], ALICE[4000:8000], ALICE[4000:8000]):
        file.write_text(text, encoding="utf-8")
        packed = packed_text(TextSource((file,)), None, tokenizer, 8, 0.0, cache_dir=cache)
        streams.append(packed.train["input_ids"][:].tolist())
    assert streams[0] != streams[1] == streams[2]


def test_two_workers_give_the_same_blocks(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ALICE.splitlines()))
    source = TextSource((tmp_path / "rows.jsonl",))
    one, two = (
        packed_text(source, None, tokenizer, 16, 0.1, workers=workers, cache_dir=str(tmp_path / str(workers)))
        for workers in (1, 2)
    )
    assert one.train["input_ids"][:].tolist() == two.train["input_ids"][:].tolist()


def test_samples_are_a_function_of_seed_and_number() -> None:
    blocks = datasets.Dataset.from_dict({"input_ids": np.arange(40).reshape(10, 4)}).with_format("numpy")
    samples = OrderedBlocks(blocks, seed=7, length=25)
    order = [int(samples[index]["input_ids"][0]) // 4 for index in range(25)]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    again = OrderedBlocks(blocks, seed=7, length=25)
    assert [int(again[index]["input_ids"][0]) // 4 for index in reversed(range(25))] == order[::-1]
    other = OrderedBlocks(blocks, seed=8, length=25)
    assert [int(other[index]["input_ids"][0]) // 4 for index in range(10)] != order[:10]
    with pytest.raises(IndexError):
        samples[25]


def test_labels_are_the_input() -> None:
    batch = collate_blocks([{"input_ids": np.array(ids, dtype=np.int32)} for ids in ([1, 2, 3], [4, 5, 6])])
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()


@pytest.mark.parametrize("text", ["", " two  spaces\n\n\ttab", "naïve café — “q”", "漢字 🙂 \x00", "<|endoftext|> a"])
def test_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_reloads_beside_any_config_to_the_same_ids(tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer(ALICE + THURSDAY).input_ids
    for config in (pretrain.build_config(qwen2_5.PRESETS["tiny"], tokenizer, 128), GPT2Config()):
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder)(ALICE + THURSDAY).input_ids == ids
    assert len(tokenizer) == 2048
    assert tokenizer.eos_token_id == 0


def test_tokenizer_is_what_its_script_makes(tokenizer: Any) -> None:
    made = train_tokenizer.train_tokenizer(sorted((NOVELS / "train").glob("*.txt")), 2048)
    assert made.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_notice_lists_every_file_of_the_sample() -> None:
    notice = (NOVELS / "NOTICE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+/\w+\.txt) \| \w+ \| ([\d,]+) ", notice, re.MULTILINE)
    files = {str(file.relative_to(NOVELS)): file.read_bytes() for file in NOVELS.rglob("*.txt")}
    sizes = {name: len(content.decode("utf-8")) for name, content in files.items()}
    assert {name: int(size.replace(",", "")) for name, size in rows} == sizes
    assert b"\r" not in b"".join(files.values())
    assert 0.8e6 < sum(map(len, files.values())) < 1.2e6
