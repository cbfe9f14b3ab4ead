"""What differs between the things a recipe can train: tokenizer, configuration, model, data and loss."""

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from model_flops import transformer_flops_per_token
from recipe_arguments import Preset, RecipeArguments
from recipe_trainer import token_loss
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
        training: makes the samples of a run from a seed and their number; sample i is a function of the data, the seed
            and i. A stream ignores both and does not end.
        validation: the samples of an evaluation, None without one.
        collate: samples to a batch.
        fingerprint: hash of all of it.
        samples_a_pass: training samples in one pass, None for a stream.
        facts: what ``run.json`` says about it.
    """

    training: Callable[[int, int], Any]
    validation: Any | None
    collate: Callable[[Any], Batch]
    fingerprint: str
    samples_a_pass: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_stream(self) -> bool:
        """Whether documents are read while training."""
        return self.samples_a_pass is None

    def first_batch_hash(self, seed: int, samples: int) -> str:
        """Hash the first ``samples`` training samples as a batch (of a stream, of this rank)."""
        source = self.training(seed, samples)
        rows: Iterable[Any] = (
            islice(iter(source), samples) if self.is_stream else map(source.__getitem__, range(samples))
        )
        digest = hashlib.sha256()
        for name, values in sorted(self.collate(list(rows)).items()):
            digest.update(name.encode())
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Task(ABC):
    """One kind of training.

    Attributes:
        unit: what ``tokens`` counts.
        has_perplexity: whether exp(loss) has a meaning.
        attention: the default attention implementation.
    """

    unit: ClassVar[str] = "tokens"
    has_perplexity: ClassVar[bool] = True
    attention: ClassVar[str | None] = None

    @abstractmethod
    def load_tokenizer(self, arguments: RecipeArguments) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer; None where there is none."""

    @abstractmethod
    def build_config(
        self, preset: Preset, tokenizer: PreTrainedTokenizerBase | None, arguments: RecipeArguments
    ) -> PretrainedConfig:
        """Build the model's configuration."""

    @abstractmethod
    def new_model(self, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
        """Build a model in float32; on the meta device where that is the default."""

    @abstractmethod
    def prepare(
        self,
        arguments: RecipeArguments,
        training: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        config: PretrainedConfig,
    ) -> TrainingData:
        """Prepare the data."""

    def loss(self, training: TrainingArguments) -> Callable[..., Tensor] | None:
        """Return the loss that replaces the model's own, None to keep that.

        Raises:
            RecipeError: for label smoothing where there is none.
        """
        return functools.partial(token_loss, label_smoothing=training.label_smoothing_factor)

    def flops_per_token(self, config: PretrainedConfig, block_size: int) -> float:
        """Operations a token (an image) costs, forward and backward."""
        with torch.device("meta"):
            model = self.new_model(config, None)
        return transformer_flops_per_token(model, config, block_size)

    def initialise(self, model: PreTrainedModel, data: TrainingData) -> None:  # noqa: B027  most have none
        """Set initial weights that depend on the data."""


def initial_model(
    task: Task, preset: Preset, config: PretrainedConfig, seed: int, attention: str | None
) -> PreTrainedModel:
    """Build the model of a run: float32, with initial weights that depend on the seed alone."""
    set_seed(seed)
    model = task.new_model(config, attention)
    if preset.scale_residual_init:
        scale_residual_init(model, config)
    return model


@torch.no_grad()
def scale_residual_init(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Draw the matrices that write into the residual stream anew, with deviation initializer_range / sqrt(2 layers).

    Source: GPT-2 (Radford et al., 2019), section 2.3.
    """
    deviation = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith((".o_proj", ".c_proj")):
            nn.init.normal_(module.weight, std=deviation)
