"""Documents to tokens: what is read, how it is split and prepared, what is refused, and the bundled samples."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_sources as data_sources_module
import make_protein_sample
import numpy as np
import prepare
import pyarrow
import pyarrow.parquet
import pytest
import train_tokenizer
from data_sources import Corpus, DataSource, articles, data_sources, find_files, is_held_out, read_documents
from document_files import sections
from masked_proteins import ESM_VOCABULARY
from prepared_data import PreparedData, prepare_held_out, prepare_proteins, prepare_text
from recipe_error import RecipeError
from text_blocks import TextBlocks
from tiny_recipe import ALICE, NOVELS, RECIPES, ROOT, THURSDAY, TOKENIZER, contents
from token_files import token_dtype
from transformers import AutoTokenizer, GPT2Config, Qwen2Config

PROTEINS = RECIPES / "data" / "proteins"
ROWS = [line for line in ALICE.splitlines()[:60] if line]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def write_rows(file: Path, rows: list[str], column: str = "text") -> Path:
    file.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), encoding="utf-8")
    return file


def prepared(file: Path, tokenizer: Any, fraction: float = 0.0, **options: Any) -> PreparedData:
    train, validation = data_sources("text", train_data=[str(file)], column=options.pop("column", None))
    options = {"cache_dir": file.parent / "cache", "show_progress": False, **options}
    return prepare_text(train, validation, tokenizer, validation_fraction=fraction, **options)


def stream_of(rows: list[str], tokenizer: Any) -> list[int]:
    return [token for row in rows for token in [*tokenizer(row).input_ids, tokenizer.eos_token_id]]


def test_tokens_are_the_documents_each_closed(tmp_path: Path, tokenizer: Any) -> None:
    data = prepared(write_rows(tmp_path / "rows.jsonl", [*ROWS, "  ", ""]), tokenizer)
    assert data.validation is None
    assert data.train[0 : len(data.train)].tolist() == stream_of(ROWS, tokenizer)
    assert data.train[:1].dtype == np.uint16
    counts = np.bincount(stream_of(ROWS, tokenizer))
    shares = counts[counts > 0] / counts.sum()
    assert data.meta["train"]["unigram_entropy"] == pytest.approx(-sum(shares * np.log(shares)), rel=1e-12)
    assert (data.meta["train"]["documents"], data.meta["tokenizer"]) == (len(ROWS), str(TOKENIZER))


def test_the_split_is_by_document_and_the_sides_are_whole(tmp_path: Path, tokenizer: Any) -> None:
    data = prepared(write_rows(tmp_path / "rows.jsonl", ROWS), tokenizer, 0.2)
    assert data.validation is not None
    for side, held_out in ((data.train, False), (data.validation, True)):
        rows = [row for row in ROWS if is_held_out(row, 0.2) == held_out]
        assert len(rows) > 3
        assert side[0 : len(side)].tolist() == stream_of(rows, tokenizer)


def test_a_vocabulary_of_65536_words_takes_32_bits() -> None:
    assert [np.dtype(token_dtype(words)) for words in (65_535, 65_536)] == [np.uint16, np.uint32]


def test_every_kind_of_file_gives_the_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    lines = write_rows(tmp_path / "rows.jsonl", ROWS, "body").read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "rows.jsonl.bz2").write_bytes(bz2.compress(lines))
    (tmp_path / "rows.json").write_text(json.dumps([{"n": 1, "body": row} for row in [*ROWS, None]]))
    (tmp_path / "lines.json").write_bytes(b"\n" + lines)
    (tmp_path / "rows.csv").write_text(
        "n,body\n" + "".join(f'1,"{row.replace(chr(34), chr(34) * 2)}"\n' for row in ROWS)
    )
    table = pyarrow.table({"n": [1] * (len(ROWS) + 1), "body": [*ROWS, None]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    files = sorted(file for file in tmp_path.iterdir() if file.is_file())
    results = [prepared(file, tokenizer, 0.2, column="body") for file in files]
    assert len(results) == 8
    assert len({result.fingerprint for result in results}) == 1
    assert results[0].train[:].tolist() == stream_of([row for row in ROWS if not is_held_out(row, 0.2)], tokenizer)


def test_folders_and_globs_are_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt.gz", "sub/c.jsonl", "notes.md", "d.txt.md", "p.fasta"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"words") if name.endswith(".gz") else b"words")
    names = [str(file.relative_to(tmp_path)) for file in find_files([str(tmp_path)], "text")]
    assert names == ["a.txt.gz", "b.txt", "sub/c.jsonl"]
    assert [file.name for file in find_files([str(tmp_path)], "proteins")] == ["p.fasta", "c.jsonl"]
    globbed = find_files([str(tmp_path / "*.txt"), str(tmp_path / "**" / "*.jsonl"), str(tmp_path / "b.txt")], "text")
    assert [file.name for file in globbed] == ["b.txt", "c.jsonl"]


@pytest.mark.parametrize("name", sorted(file.name for file in (NOVELS / "train").iterdir()))
def test_a_novel_in_sections_has_the_tokens_of_the_whole(tokenizer: Any, name: str) -> None:
    novel = (NOVELS / "train" / name).read_text(encoding="utf-8")
    pieces = list(sections([novel]))
    assert "".join(pieces) == novel
    assert max(map(len, pieces)) <= 8192
    assert len(pieces) > 10
    assert list(itertools.chain(*tokenizer(pieces).input_ids)) == tokenizer(novel).input_ids
    parts = [novel[start : start + 5000] for start in range(0, len(novel), 5000)]
    assert list(sections(parts)) == pieces


@pytest.mark.parametrize("text", ["", "a", "x" * 100, "a b " * 40, "\n" * 100, "word\n" * 30, "word\n\n  " * 30])
def test_sections_lose_nothing(text: str) -> None:
    pieces = list(sections([text], 16))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 16
    assert list(sections(text, 16)) == pieces


def test_held_out_sections_leave_no_text_run_together(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "alice.txt").write_text(ALICE, encoding="utf-8")
    data = prepared(tmp_path / "alice.txt", tokenizer, 0.4)
    sides: dict[bool, list[int]] = {False: [], True: []}
    pieces = list(sections([ALICE]))
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        held_out = is_held_out(piece, 0.4)
        sides[held_out] += tokenizer(piece).input_ids
        if following is None or is_held_out(following, 0.4) != held_out:
            sides[held_out].append(tokenizer.eos_token_id)
    assert data.validation is not None
    assert data.train[:].tolist() == sides[False]
    assert data.validation[:].tolist() == sides[True]
    assert all(side.count(tokenizer.eos_token_id) > 1 for side in sides.values())


def test_the_split_is_disjoint_and_depends_on_the_document_alone() -> None:
    documents = [f"document {number}" for number in range(4000)]
    held_out = {document for document in documents if is_held_out(document, 0.1)}
    assert 300 < len(held_out) < 500
    assert held_out == {document for document in reversed(documents) if is_held_out(document, 0.1)}
    assert held_out < {document for document in documents if is_held_out(document, 0.2)}
    # Fixed for good: a later version that splits differently would put old validation text into training.
    assert [is_held_out(document, 0.1) for document in documents].index(True) == 40
    assert not any(is_held_out(document, 0.0) for document in documents)


def test_lines_of_wikitext_are_joined_to_articles() -> None:
    lines = [
        "\n",
        " = One = \n",
        "\n",
        " Text . \n",
        " = 2 is no title after text = \n",
        "\n",
        " = = Part = = \n",
        " More . \n",
    ]
    lines += ["\n", " = Two = \n", "\n", " Text . \n"]
    joined = list(articles(lines))
    assert "".join(joined) == "".join(lines)
    assert [article.lstrip().splitlines()[0] for article in joined] == ["= One = ", "= Two = "]


def test_a_data_set_that_datasets_loads_has_the_tokens_of_the_file(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    file = write_rows(folder / "rows.jsonl", ROWS)
    train, validation = data_sources("text", train_data=None, dataset_name=str(folder))
    assert validation is None
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "show_progress": False}
    by_name = prepare_text(train, None, tokenizer, validation_fraction=0.2, **options)
    assert by_name.fingerprint == prepared(file, tokenizer, 0.2, **options).fingerprint
    # with a limit the data set is streamed, and no more of it is read than wanted
    limited = prepare_text(train, None, tokenizer, max_tokens=100, **options)
    assert limited.train[:].tolist() == stream_of(ROWS, tokenizer)[: len(limited.train)]
    assert 100 <= len(limited.train) < 200
    with pytest.raises(RecipeError, match="no column 'words'; give --text_column one of text"):
        prepare_text(DataSource((), str(folder), column="words"), None, tokenizer, **options)


def test_rows_that_are_lines_become_articles(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    folder = tmp_path / "wikitext"
    folder.mkdir()
    lines = ["", " = One = \n", "", " First .\n", " = = Part = = \n", " More .\n", "", " = Two = \n", "", " Last .\n"]
    write_rows(folder / "rows.jsonl", lines)
    monkeypatch.setitem(data_sources_module.KNOWN_CORPORA, str(folder), Corpus("text", rows_are_lines=True))
    source, _ = data_sources("text", train_data=None, dataset_name=str(folder))
    data = prepare_text(source, None, tokenizer, cache_dir=tmp_path / "cache", show_progress=False)
    articles_of_it = ["\n = One = \n\n First .\n = = Part = = \n More .\n\n", " = Two = \n\n Last .\n"]
    assert data.meta["train"]["documents"] == 2
    assert data.train[:].tolist() == stream_of(articles_of_it, tokenizer)


@pytest.mark.parametrize(
    ("name", "config", "column", "validation_split"),
    [
        ("Skylion007/openwebtext", None, "text", None),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "text", "validation"),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", None),
        ("tattabio/OMG_prot50", None, "sequence", None),
    ],
)
def test_the_corpora_of_the_papers_need_only_their_name(
    name: str, config: str | None, column: str, validation_split: str | None
) -> None:
    train, validation = data_sources("text", train_data=None, dataset_name=name)
    assert train == DataSource((), name, config, "train", column)
    assert (validation.dataset_split if validation else None) == validation_split
    other, _ = data_sources("text", train_data=None, dataset_name=name, dataset_config="other", column="body")
    assert (other.dataset_config, other.column) == ("other", "body")


def test_changed_text_is_prepared_again_and_the_same_text_is_not(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    streams, folders = [], []
    for text in (ALICE[:4000], ALICE[4000:8000], ALICE[4000:8000]):
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
        streams.append(prepared(file, tokenizer).train[:].tolist())
        folders.append({folder.name: folder.stat().st_mtime_ns for folder in (tmp_path / "cache").glob("text-*")})
    assert streams[0] != streams[1] == streams[2]
    assert folders[1] == folders[2]


def test_processes_that_tokenize_keep_the_order(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ALICE.splitlines())
    monkeypatch.setattr("document_tokens.BATCH_CHARACTERS", 5000)
    one, two = (
        prepared(file, tokenizer, 0.1, workers=workers, cache_dir=tmp_path / str(workers)) for workers in (1, 2)
    )
    assert one.fingerprint == two.fingerprint
    assert one.train[:].tolist() == two.train[:].tolist()


def test_prepared_folders_are_read_as_they_are(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    argv = ["--train_data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "made")]
    assert prepare.main([*argv, "--tokenizer", str(TOKENIZER), "--validation_fraction", "0.2"]) == 0
    data = prepared(tmp_path / "rows.jsonl", tokenizer, 0.2)
    again = prepared(tmp_path / "made", tokenizer)
    assert again.validation is not None
    assert data.validation is not None
    assert again.train[:].tolist() == data.train[:].tolist()
    assert again.validation[:].tolist() == data.validation[:].tolist()
    before = contents(tmp_path / "made")
    assert prepare.main([*argv, "--tokenizer", str(TOKENIZER)]) == 2
    assert "made exists: name a new folder" in capsys.readouterr().err
    assert contents(tmp_path / "made") == before
    other = train_tokenizer.train_tokenizer([NOVELS / "train" / "the_sign_of_four.txt"], 300)
    with pytest.raises(RecipeError, match="was prepared with another tokenizer"):
        prepared(tmp_path / "made", other)
    with_folder = next(folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir())
    (with_folder / "meta.json").write_text("{}")
    with pytest.raises(RecipeError, match="has no meta.json of this program: remove it"):
        prepared(tmp_path / "rows.jsonl", tokenizer, 0.2)
    (tmp_path / "made" / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(RecipeError, match=r"train.bin is not as meta.json says .* prepare it again"):
        prepared(tmp_path / "made", tokenizer)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_tokens", "0"], "--max_tokens is 0.0; it must be at least 1"),
        (["--max_tokens", "inf"], "--max_tokens is inf; it must be at least 1 and finite"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--kind", "proteins"], "--tokenizer: proteins are read with ESM-2's own vocabulary"),
    ],
)
def test_prepare_refuses_values_out_of_range(tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    argv = ["--train_data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "made")]
    assert prepare.main([*argv, "--tokenizer", str(TOKENIZER), *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "made").exists()


def test_token_files_of_others_are_read(tmp_path: Path, tokenizer: Any) -> None:
    """nanoGPT's have no header, llm.c's (and modded-nanogpt's) have one of 256 int32."""
    tokens = np.array(stream_of(ROWS, tokenizer), dtype=np.uint16)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.bin").write_bytes(tokens.tobytes())
    (tmp_path / "a" / "val.bin").write_bytes(tokens[:500].tobytes())
    with_validation = prepared(tmp_path / "a", tokenizer)
    assert with_validation.validation is not None
    assert with_validation.train[:].tolist() == tokens.tolist()
    assert with_validation.validation[:].tolist() == tokens[:500].tolist()
    (tmp_path / "one.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (tmp_path / "two.bin").write_bytes(tokens[::-1].tobytes())
    both = prepared(tmp_path / "*.bin", tokenizer, 0.25)
    assert both.validation is not None
    joined = [*tokens.tolist(), *tokens[::-1].tolist()]
    cut = len(joined) - -(-len(joined) // 4)
    assert both.train[:].tolist() == joined[:cut]
    assert both.validation[:].tolist() == joined[cut:]
    middle = len(tokens)
    for start, stop in (
        (0, 1),
        (middle - 3, middle + 4),
        (middle, middle + 1),
        (cut - 2, cut + 9),
        (5, 5),
        (cut, cut),
    ):
        assert both.train[start:stop].tolist() == joined[:cut][start:stop]


def test_tokens_that_no_tokenizer_of_this_size_made_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train.bin").write_bytes(np.array([1, 2, 2048], dtype=np.uint16).tobytes())
    with pytest.raises(RecipeError, match="holds token 2,048, the tokenizer has 2,048 words"):
        prepared(tmp_path / "train.bin", tokenizer)
    (tmp_path / "train.bin").write_bytes(b"\0\0\0")
    with pytest.raises(RecipeError, match="no whole file of 16-bit tokens: it has 3 bytes"):
        prepared(tmp_path / "train.bin", tokenizer)
    large = train_tokenizer.train_tokenizer([NOVELS / "train" / "the_sign_of_four.txt"], 300)
    large.add_tokens([f"<word {number}>" for number in range(65_537)])
    with pytest.raises(RecipeError, match="tokens of 16 bits, the tokenizer has 65,837 words"):
        prepared(tmp_path / "train.bin", large)
    words = prepared(write_rows(tmp_path / "rows.jsonl", ["<word 65536> Watson"]), large)
    assert words.train[:].dtype == np.uint32
    assert words.train[0:1].tolist() == [65_836]


BAD_TEXT = {
    "empty.txt": (b"", "empty.txt is empty: name files that hold text"),
    "empty.jsonl.gz": (gzip.compress(b""), "empty.jsonl.gz is empty"),
    "blank.txt": (b" \n\n \n", "the training data has 0 tokens"),
    "latin.txt": ("café".encode("latin-1"), "latin.txt: it is not UTF-8 text"),
    "program.txt": (b"\x7fELF\2\1\1\0\0\0\0", "program.txt: it holds NUL bytes, so it is not text"),
    "torn.txt.gz": (gzip.compress(ALICE.encode())[:-400], "cannot read .*torn.txt.gz"),
    "torn.jsonl.xz": (lzma.compress(json.dumps({"text": ALICE}).encode())[:-400], "cannot read .*torn.jsonl.xz"),
    "plain.txt.gz": (b"words", "cannot read .*plain.txt.gz: Not a gzipped file"),
    "notes.pdf": (b"words", "notes.pdf is not a kind of file that is read here for text"),
    "rows.jsonl": (b'{"text": "a"}\n{"text": \n', "rows.jsonl, line 2, is not JSON"),
    "list.jsonl": (b"[1, 2]\n", "list.jsonl, line 1: a row must be an object with a field 'text', this is list"),
    "body.jsonl": (b'{"body": "a", "id": 1}\n', "line 1: no column 'text'; give --text_column one of body, id"),
    "number.jsonl": (b'{"text": 7}\n', "line 1: column 'text' holds 7, not text"),
    "rows.parquet": (b"PAR1 no PAR1", "cannot read .*rows.parquet"),
    "rows.csv": (
        b"number,words\n1,one\n",
        "rows.csv, line 2: no column 'text'; give --text_column one of number, words",
    ),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_what_is_not_text_is_one_error_and_leaves_nothing(tmp_path: Path, tokenizer: Any, name: str) -> None:
    content, message = BAD_TEXT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        prepared(tmp_path / name, tokenizer)
    assert not [file for file in (tmp_path / "cache").glob("*") if file.suffix != ".lock"]


def test_sources_that_are_not_there_or_on_both_sides_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "tokens.bin").write_bytes(b"\0\0" * 100)
    cases = {
        "nothing.txt does not exist": {"train_data": [str(tmp_path / "nothing.txt")]},
        "holds no file that is read here for proteins": {"train_data": [str(NOVELS)], "kind": "proteins"},
        "is in --train_data and in --validation_data": {
            "train_data": [str(tmp_path)],
            "validation_data": [str(tmp_path / "rows.jsonl")],
        },
        "token files (.bin) cannot be read together with others": {"train_data": [str(tmp_path / "*")]},
    }
    for message, options in cases.items():
        with pytest.raises(RecipeError, match=re.escape(message)):
            data_sources(**{"kind": "text", **options})  # type: ignore[arg-type]
    tokens, rows = (DataSource((tmp_path / name,)) for name in ("tokens.bin", "rows.jsonl"))
    for train, validation in ((tokens, rows), (rows, tokens)):
        with pytest.raises(RecipeError, match="does not: give both alike"):
            prepare_text(train, validation, tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(RecipeError, match=f"of {len(ROWS)} documents holds out none: raise it"):
        prepared(tmp_path / "rows.jsonl", tokenizer, 1e-9)


def test_less_text_than_a_block_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = prepared(write_rows(tmp_path / "rows.jsonl", ["five small words of text"]), tokenizer)
    count = len(data.train)
    assert TextBlocks(data.train, count - 1, seed=None, length=None).blocks == 1
    with pytest.raises(RecipeError, match=f"the training text has {count} tokens, less than one block"):
        TextBlocks(data.train, count, seed=0, length=3)


LIMITED = """
import resource, sys
import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files is reported by the system in the same way as a full disk."""
    (tmp_path / "alice.txt").write_text(ALICE, encoding="utf-8")
    command = [sys.executable, "-c", LIMITED, "--train_data", str(tmp_path / "alice.txt")]
    command += ["--tokenizer", str(TOKENIZER), "--output_dir", str(tmp_path / "made")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: no room to prepare the data in" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["alice.txt"]


KILLED = """
import sys
import prepare, preparation
write = preparation.SideWriter.write
def slowly(writer, tokens):
    write(writer, tokens)
    writer.stream.flush()
    print("written", flush=True)
    sys.stdin.readline()
preparation.SideWriter.write = slowly
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "alice.txt").write_text(ALICE, encoding="utf-8")
    argv = ["--train_data", str(tmp_path / "alice.txt"), "--tokenizer", str(TOKENIZER)]
    argv += ["--validation_fraction", "0", "--output_dir", str(tmp_path / "made")]
    command = [sys.executable, "-c", KILLED, *argv]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    left = [file.name for file in tmp_path.iterdir() if file.name != "alice.txt"]
    assert left == [".made.partial"]
    assert not (tmp_path / ".made.partial" / "meta.json").exists()
    assert prepare.main(argv) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["alice.txt", "made"]


def test_two_processes_that_prepare_the_same_share_one_folder(tmp_path: Path) -> None:
    (tmp_path / "alice.txt").write_text(ALICE, encoding="utf-8")
    code = (
        "import sys, pathlib, prepared_data as d, data_sources as s, document_tokens as t\n"
        "source = s.DataSource((pathlib.Path(sys.argv[1]),))\n"
        "print(d.prepare_text(source, None, t.load_tokenizer(sys.argv[2]), cache_dir=sys.argv[3]).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "alice.txt"), str(TOKENIZER), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) for _ in range(2)]
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 1


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(RECIPES), str(RECIPES / "data")]
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}


def test_local_and_prepared_data_need_no_datasets(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "import pathlib, prepared_data as d, data_sources as s, document_tokens as t, text_blocks, masked_proteins\n"
        "tokenizer = t.load_tokenizer(sys.argv[2])\n"
        "for _ in range(2):\n"
        "    train, validation = s.data_sources('text', train_data=[sys.argv[1]])\n"
        "    data = d.prepare_text(train, validation, tokenizer, validation_fraction=0.3, cache_dir=sys.argv[3])\n"
        "    text_blocks.TextBlocks(data.train, 16, seed=0, length=9)[8]\n"
        "train, validation = s.data_sources('proteins', train_data=[sys.argv[4]])\n"
        "data = d.prepare_proteins(train, validation, cache_dir=sys.argv[3])\n"
        "masked_proteins.MaskedProteins(data.train, 64, seed=0, length=9)[8]\n"
    )
    (tmp_path / "alice.txt").write_text(ALICE, encoding="utf-8")
    arguments = [
        str(tmp_path / "alice.txt"),
        str(TOKENIZER),
        str(tmp_path / "cache"),
        str(PROTEINS / "train.fasta.gz"),
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def write_fasta(file: Path, records: dict[str, str]) -> Path:
    file.write_text("".join(f">{name} size=1\n{sequence}\n" for name, sequence in records.items()))
    return file


def prepared_proteins(file: Path, fraction: float = 0.0) -> PreparedData:
    train, validation = data_sources("proteins", train_data=[str(file)])
    cache = file.parent / "cache"
    return prepare_proteins(train, validation, validation_fraction=fraction, cache_dir=cache, show_progress=False)


def test_proteins_are_residues_of_esm2(tmp_path: Path, capsys: Any) -> None:
    records = {"a": "mKt\n\nAYI*", "b": "UOBZX", "c": "", "d": "JW"}
    file = write_fasta(tmp_path / "few.fasta", records)
    data = prepared_proteins(file)
    decoded = ["".join(ESM_VOCABULARY[residue] for residue in data.train[index]) for index in range(len(data.train))]
    assert decoded == ["MKTAYI", "UOBZX", "XW"]
    rows = [{"sequence": sequence} for sequence in ("MKTAYI", "UOBZX", "", "JW")]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    assert prepared_proteins(tmp_path / "few.json").fingerprint == data.fingerprint
    argv = ["--kind", "proteins", "--train_data", str(file), "--validation_fraction", "0.7"]
    assert prepare.main([*argv, "--output_dir", str(tmp_path / "made")]) == 0
    made = prepared_proteins(tmp_path / "made")
    assert made.validation is not None
    assert len(made.train) + len(made.validation) == 3
    assert {made.train.name, made.validation.name} == {"training", "validation"}
    with pytest.raises(RecipeError, match="holds proteins, not text"):
        prepared(tmp_path / "made", AutoTokenizer.from_pretrained(TOKENIZER))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (">a x\nMK1T\n", r"few.fasta, record a: '1' at position 3 is no amino acid"),
        (">a\nMKT\n>b\nMK-T\n", r"record b: '-' at position 3 is no amino acid"),
        (">a\nMK*T\n", r"record a: '\*' at position 3"),
        (">a\nMKé\n", r"record a: 'é' at position 3"),
        ("MKT\n>a\nMKT\n", "is not FASTA: line 1 comes before the first line with '>'"),
        (">a\n>b\n", "the training data has 0 tokens"),
    ],
)
def test_fasta_with_bad_letters_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "few.fasta").write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        prepared_proteins(tmp_path / "few.fasta")


def test_held_out_documents_of_a_stream_are_the_first_that_training_leaves_out(tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    held_out = prepare_held_out(DataSource((file,)), tokenizer, 0.3, max_documents=4, cache_dir=tmp_path / "cache")
    rows = [row for row in ROWS if is_held_out(row, 0.3)]
    assert held_out[0 : len(held_out)].tolist() == stream_of(rows[:4], tokenizer)
    assert held_out.name == "validation"


@pytest.mark.parametrize("text", ["", " two  spaces\n\n\ttab", "naïve café — “q”", "漢字 🙂 \x00", "<|endoftext|> a"])
def test_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_reloads_beside_any_config_to_the_same_ids(tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer(ALICE + THURSDAY).input_ids
    for config in (Qwen2Config(), GPT2Config()):
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


def test_the_notice_counts_the_proteins_of_the_sample() -> None:
    notice = (PROTEINS / "NOTICE.md").read_text(encoding="utf-8")
    assert "UniProtKB" in notice
    assert "CC BY 4.0" in notice
    counted, names = {}, {}
    for part in ("train", "validation"):
        pieces = [piece.text for piece in read_documents(DataSource((PROTEINS / f"{part}.fasta.gz",)), "proteins")]
        counted[f"{part}.fasta.gz"] = (len(pieces), sum(map(len, pieces)))
        names[part] = set(pieces)
    rows = re.findall(r"^\| (\w+\.fasta\.gz) \| ([\d,]+) \| ([\d,]+) \|$", notice, re.MULTILINE)
    assert {name: (int(n.replace(",", "")), int(r.replace(",", ""))) for name, n, r in rows} == counted
    assert not names["train"] & names["validation"]


def test_the_protein_sample_is_cut_from_the_start_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_protein_sample, "PARTS", {"train": ("a.fasta.gz", 100), "validation": ("b.fasta.gz", 3)})
    for name in ("a", "b"):
        text = "".join(f">{name}{number} size=2\n{'MKTAY' * number}\n" for number in range(1, 20))
        (tmp_path / f"{name}.fasta.gz").write_bytes(gzip.compress(text.encode()))
    for output in ("first", "second"):
        make_protein_sample.make_sample(tmp_path, tmp_path / output)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    lines = gzip.decompress((tmp_path / "first" / "train.fasta.gz").read_bytes()).decode().splitlines()
    assert max(map(len, lines)) <= 60
    assert [line for line in lines if line.startswith(">")] == [f">a{number} size=2" for number in range(1, 7)]
    assert sum(len(line) for line in lines if not line.startswith(">")) == 5 * 21
    assert "| validation.fasta.gz | 1 | 5 |" in (tmp_path / "first" / "NOTICE.md").read_text()
