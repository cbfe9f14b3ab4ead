"""Language models that predict the next token."""

from collections.abc import Mapping
from typing import Any

import torch
from block_attention import FULL_BLOCK, refuse_padding, register_block_attention
from data_sources import DataSource
from document_sources import (
    HELD_OUT_OF_A_STREAM,
    check_block,
    check_stream,
    chosen_sources,
    data_facts,
    held_out_of_stream,
    prepared_tokens_bound,
    stream_fingerprint,
)
from document_tokens import load_tokenizer, tokenizer_fingerprint
from prepared_data import prepare_text
from recipe_arguments import Preset, RecipeArguments
from recipe_error import RecipeError
from recipe_trainer import leave_out_logits_while_training
from task import Task, TrainingData
from text_blocks import TextBlocks, collate_text
from token_stream import TextStream
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
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
        check_stream(train, arguments)
        size = arguments.block_size
        fraction, held_out = held_out_of_stream(
            train,
            validation,
            tokenizer,
            arguments,
            lambda source: prepare_text(source, None, tokenizer, cache_dir=arguments.cache_dir),
            HELD_OUT_OF_A_STREAM,
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
