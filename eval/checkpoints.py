"""Checkpoints as folders: which there are, what is in them, and the model and tokenizer they hold."""

import glob
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from eval_error import EvalError
from offline_data import file_digest

ADAPTER = "adapter_config.json"
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
# What a score depends on. Not generation_config.json: a clean one is used while evaluating.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate.

    Attributes:
        name: what was asked for: a path, or a name on the Hub.
        folder: where it lies.
        base: folder of the model that an adapter changes; None if this is a whole model.
    """

    name: str
    folder: Path
    base: Path | None = None

    @property
    def label(self) -> str:
        """A short name: the last two parts of the path, or the name on the Hub."""
        if self.name != str(self.folder):
            return self.name
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def file_stem(self) -> str:
        """A name for a folder of results, another one for every path."""
        place = self.name if self.name != str(self.folder) else str(self.folder.resolve())
        return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', self.label)}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"

    def digest(self, tokenizer: Path | None) -> str:
        """Hash the weights, configuration and tokenizer files, of the base model too."""
        digest = hashlib.sha256()
        for folder in filter(None, (self.base, self.folder)):
            for file in sorted(folder.iterdir()):
                if any(fnmatch(file.name, name) for name in (*WEIGHTS, "config.json", ADAPTER, *TOKENIZER_FILES)):
                    digest.update(f"{file.name}\0{file_digest(file)}\0".encode())
        for file in sorted(tokenizer.iterdir()) if tokenizer else []:
            if file.name in TOKENIZER_FILES:
                digest.update(f"{file.name}\0{file_digest(file)}\0".encode())
        return digest.hexdigest()


def find_checkpoints(names: Sequence[str]) -> list[Checkpoint]:
    """Resolve paths, globs and Hub names, in the order given; those of a glob by their numbers.

    Raises:
        EvalError: for a name that is none of these, and for a folder that holds no model.
    """
    found: dict[Path, Checkpoint] = {}
    for name in names:
        paths = [Path(path) for path in sorted(glob.glob(name), key=by_numbers)] if glob.has_magic(name) else []
        if Path(name).is_dir():
            paths = [Path(name)]
        elif glob.has_magic(name):
            folders = [path for path in paths if path.is_dir()]
            paths = [path for path in folders if (path / "config.json").is_file() or (path / ADAPTER).is_file()]
            if not paths:
                what = f"none of {len(folders)} folders holds a model" if folders else "no folder matches"
                raise EvalError(f"--checkpoint {name}: {what}")
            if others := [path.name for path in folders if path not in paths]:
                print(f"--checkpoint {name}: {', '.join(others)} left out, no model there", file=sys.stderr)
        elif not HUB_NAME.fullmatch(name):
            raise EvalError(f"--checkpoint {name}: no such folder, and no name on the Hub (ORGANISATION/MODEL)")
        for folder in paths or [download(name)]:
            checkpoint = Checkpoint(str(folder) if paths else name, folder, base_of(folder))
            check_weights(checkpoint)
            found.setdefault(folder.resolve(), checkpoint)
    return list(found.values())


def by_numbers(path: str) -> list[tuple[int, str]]:
    """Sort key: checkpoint-900 before checkpoint-1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def base_of(folder: Path) -> Path | None:
    """Return the folder of the model that an adapter was trained on, or None if the folder holds no adapter."""
    if not (folder / ADAPTER).is_file():
        return None
    try:
        base = str(json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"] or "")
    except ValueError as error:
        raise EvalError(f"{folder / ADAPTER} is not JSON: {error}") from error
    except (KeyError, TypeError):
        base = ""
    if not base:
        raise EvalError(f"{folder / ADAPTER}: base_model_name_or_path is empty; write the base model's folder there")
    if Path(base).is_dir():
        return Path(base)
    if (folder / base).is_dir():
        return folder / base
    if HUB_NAME.fullmatch(base):
        return download(base)
    raise EvalError(f"{folder / ADAPTER}: its base model {base} is not there")


def check_weights(checkpoint: Checkpoint) -> None:
    """Refuse a folder without a configuration or without weights.

    Raises:
        EvalError: naming what is not there.
    """
    model = checkpoint.base or checkpoint.folder
    if not (model / "config.json").is_file():
        inside = sorted(path.name for path in checkpoint.folder.glob("checkpoint-*"))
        hint = f"; it holds {', '.join(inside[:3])}: give '{checkpoint.folder}/checkpoint-*'" if inside else ""
        raise EvalError(f"{model} holds no config.json, so no model{hint}")
    for folder in filter(None, (checkpoint.base, checkpoint.folder)):
        if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
            raise EvalError(f"{folder} holds no weights (model.safetensors)")


def download(name: str) -> Path:
    """Return the local copy of a model on the Hub, from the cache if it is there.

    Raises:
        EvalError: if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model*.bin"]))
    except Exception as error:  # huggingface_hub's and httpx' own
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise EvalError(
            f"--checkpoint {name}: no such folder, and not to be had from the Hub ({type(error).__name__}: {reason})"
        ) from error
    return folder


def load_tokenizer(checkpoint: Checkpoint, tokenizer: Path | None = None) -> Any:
    """Load the tokenizer that was saved, by the class it was saved as.

    ``AutoTokenizer`` goes by the model's type instead: beside a Qwen2 configuration it reads a custom tokenizer with
    Qwen's pre-tokenizer, and the ids are not those of training.

    Raises:
        EvalError: if there is no tokenizer, or it cannot be read.
    """
    import transformers

    folders = [tokenizer] if tokenizer else [checkpoint.folder, *filter(None, [checkpoint.base])]
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            break
    else:
        raise EvalError(f"{checkpoint.name} holds no tokenizer: give --tokenizer FOLDER")
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        settings = {}
    except ValueError as error:
        raise EvalError(f"{folder / 'tokenizer_config.json'} is not JSON: {error}") from error
    saved_class = getattr(transformers, str(settings.get("tokenizer_class")), None)
    try:
        return (saved_class or transformers.AutoTokenizer).from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises plain Exception
        raise EvalError(f"{folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error


def load_model(
    checkpoint: Checkpoint, *, tokens: int, dtype: str, device: str, kind: Literal["causal", "masked"] = "causal"
) -> Any:
    """Load the model, with its adapter if there is one, ready to score.

    Args:
        checkpoint: which.
        tokens: number of tokens of its tokenizer; a base model with fewer rows gets rows for the adapter's.
        dtype: "auto" for that of the checkpoint, or a floating type of torch by name.
        device: as torch names it.
        kind: of language model.

    Raises:
        EvalError: if the weights cannot be read or are not those of the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto_class = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    source = checkpoint.base or checkpoint.folder
    try:
        model, report = auto_class.from_pretrained(str(source), dtype=weights, output_loading_info=True)
    except Exception as error:  # safetensors', transformers' and torch's own
        first = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise EvalError(f"{source} cannot be loaded as a {kind} language model: {first}") from error
    if report["missing_keys"]:
        raise EvalError(
            f"{source}: its weights lack {len(report['missing_keys'])} tensors of a {type(model).__name__}, "
            f"such as {min(report['missing_keys'])}; a score would be that of random weights"
        )
    if checkpoint.base is not None:
        from peft import PeftModel

        if tokens > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(tokens)
        try:
            model = PeftModel.from_pretrained(model, str(checkpoint.folder))
        except Exception as error:  # peft's, safetensors' and torch's own
            first = str(error).splitlines()[0]
            raise EvalError(f"{checkpoint.folder}: its adapter does not fit {source}: {first}") from error
    return model.to(device).eval()
