"""The folder of one training run: what may be written where, and the ``run.json`` that says what was run."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recipe_error import RecipeError
from recipe_trainer import TRAINER_STATE_FILE
from run_log import LOG_FILE
from safetensors import SafetensorError, safe_open
from torch import nn

RUN_FILE = "run.json"
PARTIAL_RUN_FILE = ".run.json.partial"
AUTO = "auto"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "peft", "hf-matrix-optim")
# What a run writes besides its checkpoints. --overwrite_output_dir removes these only, and only beside a run.json.
RUN_FILES = (
    RUN_FILE,
    LOG_FILE,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "adapter_config.json",
    "README.md",  # PEFT's card of an adapter
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
MERGED = "merged"  # folder of a model with its adapter merged in


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the contents of a folder's ``run.json``, or None if it has none or is no folder.

    Raises:
        RecipeError: if the file is not the JSON object that a run writes.
    """
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{folder / RUN_FILE} is not JSON: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("identity"), dict):
        raise RecipeError(f"{folder / RUN_FILE} is not a run of this program")
    return run


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Write ``run.json`` so that a reader finds the old contents or the new, never a part."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / PARTIAL_RUN_FILE
    partial.write_text(json.dumps(run, indent=2, sort_keys=True, default=str, allow_nan=True) + "\n", encoding="utf-8")
    os.replace(partial, folder / RUN_FILE)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, the latest first."""
    numbered = [
        (int(number), path)
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and (number := path.name.removeprefix("checkpoint-")).isdigit()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end: its state, which is written last, can be read."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint that was written to its end; None if there is none."""
    return next((str(path) for path in checkpoints(folder) if is_whole(path)), None)


def is_finished(folder: Path) -> bool:
    """Tell whether a folder's run has come to its end."""
    run = read_run(folder)
    return run is not None and "results" in run


def checkpoint_to_resume(folder: Path, resume: str | None) -> str | None:
    """Resolve ``--resume_from_checkpoint``.

    Args:
        folder: the output folder.
        resume: "true" is the folder's last whole checkpoint, "auto" the same if there is one, "false" or None is none;
            anything else is the path of a checkpoint.

    Raises:
        RecipeError: if there is no such checkpoint.
    """
    if resume is None or resume.lower() in ("false", "no", "0"):
        return None
    if resume.lower() not in ("true", "yes", "1", AUTO):
        if not is_whole(Path(resume)):
            raise RecipeError(f"--resume_from_checkpoint {resume}: no whole checkpoint of a run there")
        run_folder = Path(resume).absolute().parent  # the folder of a finished run looks like a checkpoint
        if read_run(run_folder) is None or not (run_folder / LOG_FILE).is_file():
            raise RecipeError(
                f"--resume_from_checkpoint {resume}: {run_folder} is not the folder of a run; name a checkpoint-N "
                "inside the folder of its run, or give true for the last one of --output_dir"
            )
        check_readable(Path(resume))
        return resume
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None and resume.lower() != AUTO:
        raise RecipeError(
            f"--resume_from_checkpoint true: {folder} holds no whole checkpoint; leave the flag out to start, or give "
            "auto to start where there is none"
        )
    if checkpoint is not None:
        check_readable(Path(checkpoint))
    return checkpoint


def check_readable(checkpoint: Path) -> None:
    """Refuse a checkpoint whose weights are missing, or whose files are cut off or something else; reads their ends.

    Raises:
        RecipeError: naming the file.
    """
    remedy = "remove this checkpoint to go on from the one before it"
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    has_parts = any(path.is_dir() for path in checkpoint.iterdir())  # a sharded model is in a folder of its own
    if not has_parts and not any(path.suffix in (".safetensors", ".bin") for path in files if "args" not in path.name):
        raise RecipeError(f"{checkpoint} holds no weights: {remedy}")
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    continue
        except SafetensorError as error:
            raise RecipeError(f"{path} cannot be read ({error}): {remedy}") from error
        if path.name in ("optimizer.pt", "scheduler.pt") and not zipfile.is_zipfile(path):
            raise RecipeError(f"{path} is not what torch saves: {remedy}")


def is_checkpoint_of(folder: Path, checkpoint: str | None) -> bool:
    """Tell whether a checkpoint lies in a folder, so that a run resumed from it goes on there."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()


class FolderState(NamedTuple):
    """What an output folder holds for a run.

    Attributes:
        checkpoint: to resume from; None to begin at the beginning.
        finished: ``run.json`` of a run that "auto" found finished.
        begun: ``run.json`` of one that "auto" found without a checkpoint; it went no further.
    """

    checkpoint: str | None
    finished: dict[str, Any] | None
    begun: dict[str, Any] | None


def look_into(folder: Path, resume: str | None, *, overwrite: bool) -> FolderState:
    """Find where a run goes on, and refuse a folder that it would spoil; writes nothing.

    Args:
        folder: the output folder.
        resume: ``--resume_from_checkpoint``.
        overwrite: ``--overwrite_output_dir``.

    Raises:
        RecipeError: as ``checkpoint_to_resume`` and ``check_output_folder``.
    """
    checkpoint = checkpoint_to_resume(folder, resume)
    is_auto = str(resume).lower() == AUTO
    finished = read_run(folder) if is_auto and is_finished(folder) else None
    begun = read_run(folder) if is_auto and finished is None and checkpoint is None else None
    if finished is None:
        overwrite = overwrite or begun is not None
        check_output_folder(folder, resume=is_checkpoint_of(folder, checkpoint), overwrite=overwrite)
    return FolderState(checkpoint, finished, begun)


def check_writable(folder: Path, flag: str = "--output_dir") -> None:
    """Refuse a folder that files cannot be written to, or that cannot be made; makes nothing.

    Raises:
        RecipeError: naming the flag and the folder.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"{flag} {folder} is a file; give another folder")
        with tempfile.TemporaryFile(
            dir=next(place for place in (folder, *folder.absolute().parents) if place.exists())
        ):
            pass
    except OSError as error:
        raise RecipeError(f"{flag} {folder} cannot be written to: {error.strerror}; give another folder") from error


def check_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a new run would spoil; writes nothing.

    Raises:
        RecipeError: if the folder is a file, holds a run without ``resume`` or ``overwrite``, or holds other things.
    """
    check_writable(folder)
    if not folder.is_dir() or all(file.name == PARTIAL_RUN_FILE for file in folder.iterdir()):
        return
    if resume and overwrite:
        raise RecipeError("give --resume_from_checkpoint or --overwrite_output_dir, not both")
    if read_run(folder) is None:
        raise RecipeError(f"{folder} holds files that no run of this program wrote: give another --output_dir")
    if not (resume or overwrite):
        raise RecipeError(
            f"{folder} holds another run: give --resume_from_checkpoint true to go on with it, --overwrite_output_dir "
            "to replace it, or another --output_dir"
        )


def clear_run(folder: Path) -> None:
    """Remove an earlier run's files and checkpoints from its folder and leave everything else.

    Its ``run.json`` is first replaced by one of no run: a process killed here leaves nothing that looks finished, and
    no checkpoint that the next run would take for its own.
    """
    if not (folder / RUN_FILE).is_file():
        return
    write_run(folder, {"identity": {}})
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    if (folder / MERGED / "config.json").is_file():
        shutil.rmtree(folder / MERGED)
    for name in (*RUN_FILES, *WEIGHT_FILES):
        for file in folder.glob(name):
            if file.name != RUN_FILE:
                file.unlink()


def clear_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints that were not written to their end."""
    for checkpoint in checkpoints(folder):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def check_same_run(earlier: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose model, data, order or optimizer are not what is asked for now.

    Raises:
        RecipeError: naming every difference.
    """
    saved = with_inner_keys(json.loads(json.dumps(earlier["identity"], default=str)))
    wanted = with_inner_keys(json.loads(json.dumps(identity, default=str)))
    differences = [
        f"{key} was {saved.get(key)!r} and is now {wanted.get(key)!r}"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if differences:
        raise RecipeError(
            f"the run to resume was started differently: {'; '.join(differences)}. Resume it with its own settings, "
            "or start a new run in another --output_dir"
        )


def with_inner_keys(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of inner dicts beside the others, as ``model.hidden_size``."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat |= {f"{key}.{inner}": of for inner, of in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def weights_hash(model: nn.Module) -> str:
    """Hash the names and values of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def package_versions() -> dict[str, str | None]:
    """Return the versions that a result depends on; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def hardware() -> dict[str, Any]:
    """Describe the processors a run used."""
    return {
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of the checkout these recipes lie in, with ``+changes`` if it has any; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed.strip() else "")
