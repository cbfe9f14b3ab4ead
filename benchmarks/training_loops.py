"""Training with Hugging Face Trainer and in a bare PyTorch loop: the same model, batches and optimizer, and one clock.

The settings that both loops share (``args``) are those of ``train_throughput.py``.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_timing import first_line, synchronize
from optimizer_step import load_config
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from hf_matrix_optim.options import OPTIMIZER_NAMES, parse_options, split_optim_args
from hf_matrix_optim.partition import param_groups_for
from hf_matrix_optim.registration import accepted_names
from hf_matrix_optim.registry import create_optimizer

RECIPE_DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
WEIGHT_DECAY = 0.1
MASKED_SHARE = 0.15


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer as the command line names it: "mud" or "mud:kernels=torch:passes=2"."""

    text: str

    @property
    def name(self) -> str:
        return self.text.partition(":")[0]

    @property
    def optim_args(self) -> str | None:
        return self.text.partition(":")[2].replace(":", ",") or None

    def check(self, loops: list[str]) -> None:
        """Raise ValueError if there is no such optimizer or option, or Trainer does not know it."""
        if self.name == "adamw":
            if self.optim_args:
                raise ValueError(f"adamw takes no options here, and {self.text!r} has some")
        elif self.name not in OPTIMIZER_NAMES:
            raise ValueError(f"unknown optimizer {self.name!r}: choose from adamw, {', '.join(OPTIMIZER_NAMES)}")
        else:
            parse_options(self.name, split_optim_args(self.optim_args))
            if "trainer" in loops and self.name not in accepted_names.values():
                raise ValueError(f"Trainer does not know {self.name!r}: HF_MATRIX_OPTIM=0 is set; unset it")

    @property
    def trainer_name(self) -> str:
        """The value of ``--optim`` that means it."""
        if self.name == "adamw":
            return "adamw_torch_fused"
        return next(value for value, name in accepted_names.items() if name == self.name)

    def build(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer that Trainer would build."""
        if self.name == "adamw":
            groups = param_groups_for(model, weight_decay=WEIGHT_DECAY)
            plain = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
            return torch.optim.AdamW(plain, lr=learning_rate, fused=True)
        options = parse_options(self.name, split_optim_args(self.optim_args))
        return create_optimizer(
            self.name, model, lr=learning_rate, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.999), options=options
        )


# ---- model and data ----


def is_masked_model(config: PretrainedConfig) -> bool:
    return str(config.model_type) == "esm"


def build_config(name: str, context: int) -> PretrainedConfig:
    """The configuration of a model, for training on rows of ``context`` tokens.

    GPT-2 takes the activation ``gelu_pytorch_tanh``: the same function as its ``gelu_new`` in one kernel instead of
    eight. There is no dropout and no cache of keys and values.
    """
    config = load_config(name)
    config.use_cache = False
    if config.max_position_embeddings < context:
        config.max_position_embeddings = context
    if config.model_type == "gpt2":
        config.activation_function = "gelu_pytorch_tanh"
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return config


def build_model(config: PretrainedConfig, device: torch.device, attention: str, seed: int) -> PreTrainedModel:
    """The model on ``device``, float32, with weights that depend on the seed alone."""
    set_seed(seed)
    factory = AutoModelForMaskedLM if is_masked_model(config) else AutoModelForCausalLM
    with device:
        model: PreTrainedModel = factory.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model.train()


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Operations of forward and backward pass a token, as the module's docstring counts them."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))
    config = model.config
    return 6.0 * weights + 12.0 * config.num_hidden_layers * config.hidden_size * context


def read_tokens(path: Path) -> np.ndarray:
    """A flat array of token ids, (tokens,), read as it is needed: .npy of integers, or .bin of unsigned 16-bit ones.

    Raises:
        ValueError: if it is neither.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file")
    if path.suffix == ".bin":
        if path.stat().st_size == 0 or path.stat().st_size % 2:
            raise ValueError(f"{path} is not a file of unsigned 16-bit numbers: it has {path.stat().st_size} bytes")
        return np.memmap(path, dtype=np.uint16, mode="r")
    if path.suffix != ".npy":
        raise ValueError(f"{path} is neither .npy (integers) nor .bin (unsigned 16-bit integers)")
    try:
        tokens: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as .npy: {first_line(error)}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, not a flat array of integers")
    return tokens


def novel_tokens() -> np.ndarray:
    """The bundled novels, (tokens,), by the bundled tokenizer.

    Raises:
        ValueError: if they are not there.
    """
    if not RECIPE_DATA.is_dir():
        raise ValueError(f"the bundled novels are not in {RECIPE_DATA}: run from a clone, or give --tokens")
    tokenizer = Tokenizer.from_file(str(RECIPE_DATA / "tokenizer" / "tokenizer.json"))
    texts = [path.read_text(encoding="utf-8") for path in sorted((RECIPE_DATA / "novels" / "train").glob("*.txt"))]
    return np.concatenate([np.asarray(encoding.ids) for encoding in tokenizer.encode_batch(texts)])


class TokenRows(Dataset[dict[str, Tensor]]):
    """``length`` rows of ``context`` tokens, (context,) int64, with labels; begins again where the tokens end.

    For a masked model, a fixed 15 % of the positions are masked and have labels, and tokens that come from the novels
    stand for the 20 amino acids.

    Raises:
        ValueError: if there are less tokens than one row, or a token is not in the model's vocabulary.
    """

    def __init__(
        self, tokens: np.ndarray, config: PretrainedConfig, context: int, length: int, *, from_novels: bool
    ) -> None:
        count = min(len(tokens) // context, length)
        if count == 0:
            raise ValueError(
                f"there are {len(tokens)} tokens, less than one row of {context}: give more tokens or less context"
            )
        rows = torch.from_numpy(np.asarray(tokens[: count * context], dtype=np.int64)).view(count, context)
        if is_masked_model(config) and from_novels:
            rows = 4 + rows % 20
        if int(rows.min()) < 0 or int(rows.max()) >= config.vocab_size:
            wrong = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
            raise ValueError(f"token {wrong} is not in the vocabulary of {config.vocab_size}: tokenize for this model")
        self.length = length
        self.input_ids = rows
        self.labels = rows.clone()
        self.labels[:, 0] = -100  # no target for a causal model; some versions of Trainer count it all the same
        if is_masked_model(config):
            masked = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < MASKED_SHARE
            masked[:, 0] = True
            self.input_ids = rows.masked_fill(masked, config.mask_token_id)
            self.labels = rows.masked_fill(~masked, -100)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = index % len(self.input_ids)
        return {"input_ids": self.input_ids[row], "labels": self.labels[row]}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows to (batch, context) int64 each."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


# ---- the clock ----


@dataclass(eq=False)
class WindowClock(TrainerCallback):
    """Times windows of steps, and ``optimizer.step()`` in them, waiting for the device between windows alone.

    Attributes:
        warmup: steps before the first window, at least 1.
        steps: of a window.
        window_seconds: what was measured.
        peak_memory_bytes: of the windows; None on a CPU.
    """

    device: torch.device
    warmup: int
    steps: int
    window_seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    _steps_done: int = 0
    _mark: float = 0.0
    _optimizer_marks: list[Any] = field(default_factory=list)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._mark_optimizer()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._mark_optimizer()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._steps_done += 1
        timed = self._steps_done - self.warmup
        if timed < 0 or timed % self.steps:
            return
        synchronize(self.device)
        now = time.perf_counter()
        if timed > 0:
            self.window_seconds.append(now - self._mark)
        if self.device.type == "cuda":
            if timed == 0:
                torch.cuda.reset_peak_memory_stats(self.device)
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self.device)
        self._mark = time.perf_counter()

    def _mark_optimizer(self) -> None:
        if self._steps_done < self.warmup:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._optimizer_marks.append(event)
        else:
            self._optimizer_marks.append(time.perf_counter())

    def optimizer_milliseconds(self) -> list[float]:
        """Of each timed step; to be called after training."""
        synchronize(self.device)
        starts, ends = self._optimizer_marks[::2], self._optimizer_marks[1::2]
        if self.device.type == "cuda":
            return [float(start.elapsed_time(end)) for start, end in zip(starts, ends, strict=True)]
        return [1e3 * (end - start) for start, end in zip(starts, ends, strict=True)]


# ---- the two loops ----


def train_with_trainer(
    model: PreTrainedModel,
    rows: TokenRows,
    batch: int,
    choice: OptimizerChoice,
    clock: WindowClock,
    args: argparse.Namespace,
    **engine: Any,
) -> float:
    """Train over ``rows`` once with Trainer; returns the mean loss.

    Args:
        rows: of all ranks together.
        batch: rows of a rank and step.
        engine: more of ``TrainingArguments``, such as those of FSDP.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=clock.warmup + clock.steps * args.windows,
                per_device_train_batch_size=batch,
                optim=choice.trainer_name,
                optim_args=choice.optim_args,
                learning_rate=args.learning_rate,
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=args.max_grad_norm,
                lr_scheduler_type="cosine",
                bf16=args.dtype == "bfloat16",
                torch_compile=args.compile,
                use_cpu=args.device.type == "cpu",
                train_sampling_strategy="sequential",
                dataloader_pin_memory=args.device.type == "cuda",
                remove_unused_columns=False,
                logging_strategy="no",
                logging_nan_inf_filter=args.nan_filter,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=args.seed,
                **engine,
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        trainer.accelerator.free_memory()
    return float(loss)


def train_bare(
    model: PreTrainedModel,
    rows: TokenRows,
    batch: int,
    choice: OptimizerChoice,
    clock: WindowClock,
    args: argparse.Namespace,
) -> float:
    """Train over ``rows`` once in a plain loop; returns the mean loss."""
    device = args.device
    optimizer = choice.build(model, args.learning_rate)
    steps = len(rows) // batch
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    loader = DataLoader(rows, batch_size=batch, collate_fn=collate, pin_memory=device.type == "cuda")
    forward = torch.compile(model) if args.compile else model
    total = torch.zeros((), device=device)
    for on_host in loader:
        inputs = {key: value.to(device, non_blocking=True) for key, value in on_host.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = forward(**inputs).loss
        loss.backward()
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        clock.on_pre_optimizer_step()
        optimizer.step()
        clock.on_optimizer_step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        clock.on_step_end()
    return float(total) / steps


LOOPS = {"trainer": train_with_trainer, "bare": train_bare}
