"""What differs between the things a recipe can train: tokenizer, configuration, model, data and loss."""

import functools
import hashlib
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from block_attention import FULL_BLOCK, PADDED_BLOCK, refuse_padding, register_block_attention
from convnet import ConvNetForImageClassification
from data_sources import DataSource, Kind, data_sources
from document_tokens import load_tokenizer, tokenizer_fingerprint
from image_data import (
    DIGITS,
    EvaluationImages,
    ImageSplit,
    TrainingImages,
    collate_images,
    load_digits,
    load_hub_images,
)
from masked_proteins import CLS, EOS, ESM_VOCABULARY, MASK, PAD, MaskedProteins, collate_proteins
from model_flops import counted_flops, transformer_flops_per_token
from prepared_data import PreparedData, prepare_held_out, prepare_proteins, prepare_text
from recipe_arguments import Preset, RecipeArguments
from recipe_error import RecipeError
from recipe_trainer import leave_out_logits_while_training, token_loss
from text_blocks import TextBlocks, collate_text
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    EsmTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

Batch = dict[str, Tensor]
HELD_OUT_OF_A_STREAM = 2500  # documents, where --validation_samples does not say


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


def chosen_sources(arguments: RecipeArguments, kind: Kind) -> tuple[DataSource, DataSource | None]:
    """Resolve what the flags name."""
    return data_sources(
        kind,
        train_data=arguments.train_data,
        validation_data=arguments.validation_data,
        dataset_name=arguments.dataset_name,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
        column=arguments.text_column,
    )


def prepared_tokens_bound(arguments: RecipeArguments) -> int | None:
    """The number of training tokens to prepare at most."""
    return None if arguments.max_prepared_tokens is None else int(arguments.max_prepared_tokens)


def data_facts(data: PreparedData) -> dict[str, Any]:
    """What ``run.json`` says about prepared data."""
    return {
        side: {
            name: values[name] for name in ("documents", "tokens", "unigram_entropy") if values.get(name) is not None
        }
        for side in ("train", "validation")
        if isinstance(values := data.meta.get(side), Mapping)
    }


def check_block(block_size: int, config: PretrainedConfig, positions: int) -> None:
    """Refuse a block larger than the model.

    Raises:
        RecipeError: naming both.
    """
    if block_size > positions:
        raise RecipeError(
            f"--block_size is {block_size:,}; this model has {positions:,} positions, so it can be no larger"
        )


class CausalLanguageModeling(Task):
    """Predict the next token; every position of a block is a target."""

    attention = FULL_BLOCK

    def load_tokenizer(self, arguments: RecipeArguments) -> PreTrainedTokenizerBase:
        """Load a tokenizer that can close documents.

        Raises:
            RecipeError: if it cannot be loaded or has no end-of-text token.
        """
        return load_tokenizer(str(arguments.tokenizer))

    def build_config(
        self, preset: Preset, tokenizer: PreTrainedTokenizerBase | None, arguments: RecipeArguments
    ) -> PretrainedConfig:
        """Build the configuration; without a ``vocab_size`` it takes the tokenizer's, rounded up to 64.

        Without a tokenizer the preset's own words are left as they are.

        Raises:
            RecipeError: if the tokenizer has more words than the model, or a block more positions.
        """
        values = dict(preset.model)
        if tokenizer is not None:
            values.setdefault("vocab_size", -(-len(tokenizer) // 64) * 64)
            values["bos_token_id"] = values["eos_token_id"] = tokenizer.eos_token_id
        config = preset.config_class(**values)
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise RecipeError(
                f"the tokenizer has {len(tokenizer):,} words, the model of this preset {config.vocab_size:,}"
            )
        check_block(arguments.block_size, config, config.max_position_embeddings)
        return config

    def new_model(self, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
        register_block_attention()
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        refuse_padding(model)
        leave_out_logits_while_training(model)
        return model

    def prepare(
        self,
        arguments: RecipeArguments,
        training: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        config: PretrainedConfig,
    ) -> TrainingData:
        assert tokenizer is not None
        train, validation = chosen_sources(arguments, "text")
        size, words = arguments.block_size, config.vocab_size
        evaluation = {"seed": None, "length": arguments.validation_samples, "vocab_size": words}
        if arguments.streaming:
            return self._stream(arguments, training, tokenizer, train, validation, evaluation)
        data = prepare_text(
            train,
            validation,
            tokenizer,
            validation_fraction=arguments.validation_fraction,
            max_tokens=prepared_tokens_bound(arguments),
            workers=arguments.preprocessing_workers,
            cache_dir=arguments.cache_dir,
            show_progress=not training.disable_tqdm,
        )
        return TrainingData(
            lambda seed, length: TextBlocks(data.train, size, seed=seed, length=length, vocab_size=words),
            None if data.validation is None else TextBlocks(data.validation, size, **evaluation),
            collate_text,
            data.fingerprint,
            TextBlocks(data.train, size, seed=None, length=None).blocks,
            data_facts(data),
        )

    def _stream(
        self,
        arguments: RecipeArguments,
        training: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        train: DataSource,
        validation: DataSource | None,
        evaluation: Mapping[str, Any],
    ) -> TrainingData:
        from token_stream import TextStream

        check_stream(train, arguments)
        size = arguments.block_size
        fraction = 0.0 if validation is not None else arguments.validation_fraction
        held_out = None
        if validation is not None:
            held_out = prepare_text(validation, None, tokenizer, cache_dir=arguments.cache_dir).train
        elif fraction:
            held_out = prepare_held_out(
                train, tokenizer, fraction, max_documents=HELD_OUT_OF_A_STREAM, cache_dir=arguments.cache_dir
            )

        def stream(seed: int, length: int) -> Any:
            return TextStream(
                train,
                tokenizer,
                size,
                validation_fraction=fraction,
                rank=training.process_index,
                world_size=training.world_size,
                seed=seed,
                shuffle_buffer=arguments.shuffle_buffer,
            )

        return TrainingData(
            stream,
            None if held_out is None else TextBlocks(held_out, size, **evaluation),
            collate_text,
            stream_fingerprint(train, tokenizer_fingerprint(tokenizer), fraction, arguments.shuffle_buffer),
            None,
        )

    def loss(self, training: TrainingArguments) -> None:
        if training.label_smoothing_factor:
            raise RecipeError("--label_smoothing_factor: a language model is trained here without")


class MaskedLanguageModeling(Task):
    """Predict the residues of a protein that are masked."""

    attention = PADDED_BLOCK

    def load_tokenizer(self, arguments: RecipeArguments) -> PreTrainedTokenizerBase:
        """Make ESM-2's tokenizer, which is saved with the model; the data are encoded without it.

        Raises:
            RecipeError: if another is asked for.
        """
        if arguments.tokenizer is not None:
            raise RecipeError("--tokenizer: proteins are read with ESM-2's own vocabulary; leave the flag out")
        with tempfile.TemporaryDirectory() as folder:
            vocabulary = Path(folder) / "vocab.txt"
            vocabulary.write_text("\n".join(ESM_VOCABULARY), encoding="utf-8")
            return EsmTokenizer(str(vocabulary), model_max_length=1024)

    def build_config(
        self, preset: Preset, tokenizer: PreTrainedTokenizerBase | None, arguments: RecipeArguments
    ) -> PretrainedConfig:
        """Build the configuration with ESM-2's vocabulary.

        Raises:
            RecipeError: if a block has more positions than the model.
        """
        own = {"vocab_size": len(ESM_VOCABULARY), "mask_token_id": MASK, "pad_token_id": PAD}
        config = preset.config_class(**{**own, "bos_token_id": CLS, "eos_token_id": EOS, **preset.model})
        check_block(arguments.block_size, config, config.max_position_embeddings - PAD - 1)
        return config

    def new_model(self, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
        if attention == FULL_BLOCK:
            raise ValueError(f"proteins are padded to one length; {PADDED_BLOCK} is their default")
        register_block_attention()
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        for parameter in model.esm.contact_head.parameters():
            parameter.requires_grad = False  # it is fitted on structures, and gets no gradient here
        return model

    def prepare(
        self,
        arguments: RecipeArguments,
        training: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        config: PretrainedConfig,
    ) -> TrainingData:
        train, validation = chosen_sources(arguments, "proteins")
        size, samples = arguments.block_size, arguments.validation_samples
        if arguments.streaming:
            return self._stream(arguments, training, train, validation)
        data = prepare_proteins(
            train,
            validation,
            validation_fraction=arguments.validation_fraction,
            max_tokens=prepared_tokens_bound(arguments),
            cache_dir=arguments.cache_dir,
            show_progress=not training.disable_tqdm,
        )
        return TrainingData(
            lambda seed, length: MaskedProteins(data.train, size, seed=seed, length=length),
            None if data.validation is None else MaskedProteins(data.validation, size, seed=None, length=samples),
            collate_proteins,
            data.fingerprint,
            len(data.train),
            data_facts(data),
        )

    def _stream(
        self,
        arguments: RecipeArguments,
        training: TrainingArguments,
        train: DataSource,
        validation: DataSource | None,
    ) -> TrainingData:
        from token_stream import ProteinStream

        check_stream(train, arguments)
        size = arguments.block_size
        fraction = 0.0 if validation is not None else arguments.validation_fraction
        held_out = None
        if validation is not None:
            held_out = prepare_proteins(validation, None, cache_dir=arguments.cache_dir).train
        elif fraction:
            documents = arguments.validation_samples or HELD_OUT_OF_A_STREAM
            held_out = prepare_held_out(train, None, fraction, max_documents=documents, cache_dir=arguments.cache_dir)

        def stream(seed: int, length: int) -> Any:
            return ProteinStream(
                train,
                size,
                validation_fraction=fraction,
                rank=training.process_index,
                world_size=training.world_size,
                seed=seed,
                shuffle_buffer=arguments.shuffle_buffer,
            )

        return TrainingData(
            stream,
            None
            if held_out is None
            else MaskedProteins(held_out, size, seed=None, length=arguments.validation_samples),
            collate_proteins,
            stream_fingerprint(train, "proteins", fraction, arguments.shuffle_buffer),
            None,
        )


class ImageClassification(Task):
    """Name what is in a picture."""

    unit = "images"
    has_perplexity = False

    def load_tokenizer(self, arguments: RecipeArguments) -> None:
        if arguments.tokenizer is not None:
            raise RecipeError("--tokenizer: images have none; leave the flag out")

    def build_config(
        self, preset: Preset, tokenizer: PreTrainedTokenizerBase | None, arguments: RecipeArguments
    ) -> PretrainedConfig:
        if arguments.attention is not None:
            raise RecipeError("--attention: a convolutional network has none; leave the flag out")
        return preset.config_class(**preset.model)

    def new_model(self, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
        return ConvNetForImageClassification(config)

    def prepare(
        self,
        arguments: RecipeArguments,
        training: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        config: PretrainedConfig,
    ) -> TrainingData:
        """Load the images.

        Raises:
            RecipeError: for files, a stream, or images of another size or number of classes than the model's.
        """
        if arguments.train_data is not None or arguments.validation_data is not None or arguments.streaming:
            raise RecipeError(
                f"images are read by --dataset_name: a data set of the Hub, a folder of one, or {DIGITS}"
            )
        name = str(arguments.dataset_name)
        split: ImageSplit = (
            load_digits(arguments.validation_fraction)
            if name == DIGITS
            else load_hub_images(name, arguments.dataset_config, arguments.dataset_split)
        )
        shape = (config.channels, config.image_size, config.image_size)
        if split.train.pixels.shape[1:] != shape or split.num_labels != config.num_labels:
            raise RecipeError(
                f"{name} has images of {split.train.pixels.shape[1:]} in {split.num_labels} classes, the model of "
                f"this preset reads {shape} in {config.num_labels}: give another --preset or data set"
            )
        # a digit is another thing in the mirror
        changes: dict[str, Any] = {"shift": 1, "mirror": False} if name == DIGITS else {"shift": 2, "mirror": True}
        return TrainingData(
            lambda seed, length: TrainingImages(split.train, seed=seed, length=length, **changes),
            None if split.validation is None else EvaluationImages(split.validation, arguments.validation_samples),
            collate_images,
            split.fingerprint,
            len(split.train.labels),
            {"train": {"images": len(split.train.labels)}},
        )

    def flops_per_token(self, config: PretrainedConfig, block_size: int) -> float:
        with torch.device("meta"):
            model = self.new_model(config, None)
            return counted_flops(model, torch.empty(1, config.channels, config.image_size, config.image_size))

    def initialise(self, model: PreTrainedModel, data: TrainingData) -> None:
        """Whiten patches of the first training images."""
        model.set_whitening(data.training(0, 1).images.pixels[:5000])


def check_stream(source: DataSource, arguments: RecipeArguments) -> None:
    """Refuse a stream of tokens that are prepared already.

    Raises:
        RecipeError: naming the file.
    """
    if source.holds_tokens:
        raise RecipeError(f"--streaming: {source.files[0]} holds tokens already; leave the flag out")
    if arguments.max_prepared_tokens is not None:
        raise RecipeError("--max_prepared_tokens: nothing is prepared with --streaming; give --max_tokens")


def stream_fingerprint(source: DataSource, *parts: object) -> str:
    """Hash what a stream reads."""
    return hashlib.sha256(repr((source, parts)).encode()).hexdigest()


TASK_CLASSES: dict[str, type[Task]] = {
    "causal_lm": CausalLanguageModeling,
    "masked_lm": MaskedLanguageModeling,
    "image_classification": ImageClassification,
}
