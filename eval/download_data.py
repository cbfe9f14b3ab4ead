"""Fills the folder of ``--data-dir`` from the Hub, and CHID from its authors' repository. Needs the network, once."""

from pathlib import Path
from typing import Any

from offline_data import DataFolder, Need
from suite import Benchmark
from task_loading import NOT_ON_HUB, hub_problem, needs
from tqdm import tqdm

CHID_URL = "https://raw.githubusercontent.com/CLUEbenchmark/FewCLUE/62a02c6f/datasets/chid/{}.json"
CHID_FILES = {"test": "test_public", "train": "train_0"}
# Tried second: the first may be a script on the Hub, which `datasets` no longer runs.
OTHER_NAME = {"haonan-li/cmmlu": "lmlmcat/cmmlu"}


def fill(folder: Path, benchmarks: list[Benchmark]) -> list[str]:
    """Download what the benchmarks read and is not in the folder yet, as ``ORG/NAME/CONFIG/SPLIT.parquet``.

    Returns:
        One line for each data set that could not be had; the others are there.
    """
    data = DataFolder(folder)
    wanted = list(dict.fromkeys(need for benchmark in benchmarks for need in needs(benchmark)))
    failed: dict[str, str] = {}
    for need in (bar := tqdm(wanted, unit="configuration", desc="Data")):
        bar.set_postfix_str(need.dataset)
        if need.dataset in failed:
            continue
        for split in need.splits:
            if data.files(need.dataset, need.config, split):
                continue
            target = folder / need.dataset / (need.config or "default") / f"{split}.parquet"
            partial = target.with_name(f".{target.name}.partial")
            try:
                rows = download(need, split)
                target.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(str(partial))
            except Exception as error:  # huggingface_hub's, httpx' and datasets' own
                failed[need.dataset] = f"{need.dataset} {hub_problem(error)}"
                partial.unlink(missing_ok=True)
                break
            partial.replace(target)
    return list(failed.values())


def download(need: Need, split: str) -> Any:
    """Return one split from the network."""
    import datasets

    if need.dataset == NOT_ON_HUB:
        url = CHID_URL.format(CHID_FILES[split])
        return datasets.load_dataset("json", data_files={split: url}, split=split)
    try:
        return datasets.load_dataset(need.dataset, need.config, split=split)
    except (RuntimeError, ValueError, FileNotFoundError):  # a script, or no such data set
        if need.dataset not in OTHER_NAME:
            raise
    return datasets.load_dataset(OTHER_NAME[need.dataset], need.config, split=split)
