"""Protein language models that predict masked residues."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from block_attention import FULL_BLOCK, PADDED_BLOCK, register_block_attention
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
from masked_proteins import CLS, EOS, ESM_VOCABULARY, MASK, PAD, MaskedProteins, collate_proteins
from prepared_data import prepare_proteins
from recipe_arguments import Preset, RecipeArguments
from recipe_error import RecipeError
from task import Task, TrainingData
from token_stream import ProteinStream
from transformers import (
    AutoModelForMaskedLM,
    EsmTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)


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
        check_stream(train, arguments)
        size = arguments.block_size
        fraction, held_out = held_out_of_stream(
            train,
            validation,
            None,
            arguments,
            lambda source: prepare_proteins(source, None, cache_dir=arguments.cache_dir),
            arguments.validation_samples or HELD_OUT_OF_A_STREAM,
        )

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
