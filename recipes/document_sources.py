"""What the flags of text and proteins name, prepared or streamed."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from data_sources import DataSource, Kind, data_sources
from prepared_data import PreparedData, prepare_held_out
from recipe_arguments import RecipeArguments
from recipe_error import RecipeError
from token_files import ProteinFile, TokenFile
from transformers import PretrainedConfig, PreTrainedTokenizerBase

HELD_OUT_OF_A_STREAM = 2500  # documents, where --validation_samples does not say


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


def held_out_of_stream(
    train: DataSource,
    validation: DataSource | None,
    tokenizer: PreTrainedTokenizerBase | None,
    arguments: RecipeArguments,
    prepare: Callable[[DataSource], PreparedData],
    most_documents: int,
) -> tuple[float, TokenFile | ProteinFile | None]:
    """Prepare what a stream is evaluated on.

    Args:
        train: the stream.
        validation: a source of its own, if there is one.
        tokenizer: of text; None for proteins.
        arguments: for the fraction to hold out and the cache.
        prepare: prepares the validation source.
        most_documents: held out of the stream, if there is none.

    Returns:
        The fraction of the stream's documents that are held out of it, and the prepared data, None without any.
    """
    if validation is not None:
        return 0.0, prepare(validation).train
    fraction = arguments.validation_fraction
    if not fraction:
        return fraction, None
    return fraction, prepare_held_out(
        train, tokenizer, fraction, max_documents=most_documents, cache_dir=arguments.cache_dir
    )
