"""Benchmark data from a folder, read in place of the Hub, while tasks load and only then.

The folder holds one folder a data set, named as on the Hub: ``ORG/NAME/``. In it, first match wins:

1. a Hub snapshot, whose ``README.md`` lists the files of each configuration under ``configs:``,
2. ``CONFIG/SPLIT.parquet`` or ``CONFIG/SPLIT-00000-of-00002.parquet``,
3. ``CONFIG/SPLIT.jsonl``, ``.json`` or ``.csv``, also with ``.gz``, ``.xz`` or ``.zst``.

``CONFIG`` is ``default`` where the data set has none. Splits are always named: where ``datasets`` guesses them from a
folder it merges ``dev`` into ``validation``, and the solved examples of C-Eval leak into its questions.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from eval_error import EvalError

BUILDERS = {"parquet": "parquet", "jsonl": "json", "json": "json", "csv": "csv"}
FILE_NAME = r"{split}(-\d+-of-\d+)?\.({suffixes})(\.gz|\.xz|\.zst)?"


@dataclass(frozen=True)
class Need:
    """What a task reads: a data set's splits in one configuration."""

    dataset: str
    config: str | None
    splits: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dataset} ({self.config or 'default'}: {', '.join(self.splits)})"


@dataclass(frozen=True)
class DataFolder:
    """The folder of ``--data-dir``."""

    path: Path

    def files(self, dataset: str, config: str | None, split: str) -> list[Path]:
        """Return the files of one split, sorted; empty if there are none."""
        folder = self.path / dataset
        listed = snapshot_files(folder, config or "default", split)
        if listed is not None:
            return listed
        below = folder / (config or "default")
        if not below.is_dir():
            return []
        for suffixes in ("parquet", "jsonl|json", "csv"):
            name = re.compile(FILE_NAME.format(split=re.escape(split), suffixes=suffixes))
            found = sorted(file for file in below.iterdir() if name.fullmatch(file.name))
            if found:
                return found
        return []

    def missing(self, need: Need) -> str | None:
        """Return one line that names the splits that are not there and the remedy, or None."""
        absent = [split for split in need.splits if not self.files(need.dataset, need.config, split)]
        if not absent:
            return None
        place = self.path / need.dataset / (need.config or "default")
        return (
            f"{need.dataset}: no {' and no '.join(absent)} split at {place}; put {absent[0]}.parquet or "
            f"{absent[0]}.jsonl there, or fill the folder with `prepare --data-dir {self.path}`"
        )

    def digest(self, needs: Sequence[Need]) -> str:
        """Hash the contents of all files of the needs."""
        digest = hashlib.sha256()
        for need in sorted(needs, key=str):
            for split in need.splits:
                digest.update(f"{need.dataset}\0{need.config}\0{split}\0".encode())
                for file in self.files(need.dataset, need.config, split):
                    digest.update(bytes.fromhex(file_digest(file)))
        return digest.hexdigest()

    @contextmanager
    def answering(self, needs: Sequence[Need]) -> Iterator[None]:
        """Answer ``datasets.load_dataset`` for the data sets of the needs from this folder; refuse all others."""
        import datasets

        wanted = {(need.dataset, need.config): need for need in needs}
        original = datasets.load_dataset

        def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
            need = wanted.get((path, name))
            if need is None:
                raise EvalError(f"{path} ({name or 'default'}) is not among the data sets of the benchmarks asked for")
            return datasets.DatasetDict({split: self._load(original, need, split) for split in need.splits})

        offline = datasets.config.HF_HUB_OFFLINE
        datasets.load_dataset = load_dataset
        datasets.config.HF_HUB_OFFLINE = True  # it would count each load of a file at the Hub
        try:
            yield
        finally:
            datasets.load_dataset = original
            datasets.config.HF_HUB_OFFLINE = offline

    def _load(self, load_dataset: Callable[..., Any], need: Need, split: str) -> Any:
        files = self.files(need.dataset, need.config, split)
        if not files:
            raise EvalError(self.missing(need))
        suffix = re.search(r"\.(parquet|jsonl|json|csv)(\.\w+)?$", files[0].name)
        if suffix is None:
            raise EvalError(f"{files[0]}: only .parquet, .jsonl, .json and .csv files are read")
        # One call a split: json files are typed by their contents, and a list that is always empty in one split has
        # another type there. CSV cells stay text: an option "0.50" must not become 0.5, nor "NA" nothing.
        try:
            options = text_columns(files[0]) if suffix[1] == "csv" else {}
            return load_dataset(BUILDERS[suffix[1]], data_files={split: [*map(str, files)]}, split=split, **options)
        except Exception as error:  # `datasets` raises its own, pyarrow's and pandas' errors here
            raise EvalError(f"{files[0]} cannot be read: {str(error).splitlines()[0]}") from error


def text_columns(file: Path) -> dict[str, Any]:
    """Return the options that make ``datasets`` read every cell of a CSV file as text."""
    import datasets
    import pandas

    names = pandas.read_csv(file, nrows=0).columns
    return {"features": datasets.Features(dict.fromkeys(names, datasets.Value("string"))), "keep_default_na": False}


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def snapshot_files(folder: Path, config: str, split: str) -> list[Path] | None:
    """Return the files that a Hub snapshot's README lists for a split, or None if there is no such list.

    Raises:
        EvalError: if the README's header is not YAML.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    header = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    try:
        configs = (yaml.safe_load(header[1]) or {}).get("configs") if header else None
    except yaml.YAMLError as error:
        raise EvalError(f"{folder / 'README.md'}: its header is not YAML: {error}") from error
    for entry in configs or []:
        if entry.get("config_name", "default") == config:
            data_files = entry.get("data_files") or []
            if isinstance(data_files, str):
                data_files = [{"split": "train", "path": data_files}]
            patterns = [file["path"] for file in data_files if file.get("split") == split]
            flat = [name for pattern in patterns for name in (pattern if isinstance(pattern, list) else [pattern])]
            return sorted({file for name in flat for file in (folder / entry.get("data_dir", "")).glob(name)})
    return None
