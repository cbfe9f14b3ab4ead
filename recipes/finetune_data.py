"""The data of fine-tuning, blocks of text or rows of conversations, and the steps that they make."""

import functools

from chat_rows import Examples, collate, examples_fingerprint, holds_chats, read_examples
from data_sources import DataSource, data_sources, fraction_of_short, read_documents, split_hash
from document_sources import data_facts
from finetune_arguments import FineTuningArguments
from prepared_data import prepare_text
from recipe_error import RecipeError
from step_plan import Plan
from task import TrainingData
from text_blocks import TextBlocks
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

#: Files together smaller than this are looked through for a section to hold out.
SHORT_TEXT_BYTES = 2**22


def read_data(
    arguments: FineTuningArguments,
    training: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> TrainingData:
    """Read text as blocks, or conversations as rows.

    Raises:
        RecipeError: for data that cannot be read, or of which nothing is left for a side.
    """
    train, validation = data_sources(
        "text",
        train_data=arguments.train_data,
        validation_data=arguments.validation_data,
        column=arguments.text_column,
    )
    size, words, show = arguments.block_size, config.vocab_size, not training.disable_tqdm
    if len(tokenizer) > words:
        raise RecipeError(f"the tokenizer of --model has {len(tokenizer):,} words, the model {words:,}")
    if arguments.text_column is None and are_chats(train, validation):
        fraction = arguments.validation_fraction if validation is None else 0.0
        rows, held_out = read_examples(train, tokenizer, size, validation_fraction=fraction, show_progress=show)
        if validation is not None:
            held_out, _ = read_examples(validation, tokenizer, size, show_progress=show)
        for side, flag, missing in (
            (rows, "--train_data", not rows),
            (held_out, "--validation_data", not held_out and (validation is not None or fraction > 0)),
        ):
            if missing:
                purpose, other = ("train on", "") if side is rows else ("hold out", ", another --validation_fraction,")
                raise RecipeError(
                    f"{flag}: no row is left to {purpose}; give more rows{other} or a larger --block_size: rows "
                    "with nothing to predict in their first tokens are left out"
                )
        return TrainingData(
            lambda seed, length: Examples(rows, seed=seed, length=length),
            Examples(held_out) if held_out else None,
            collate,
            examples_fingerprint(rows, held_out),
            len(rows),
            {
                side: {"rows": len(of), "tokens": sum(len(row.tokens) for row in of)}
                for side, of in (("train", rows), ("validation", held_out))
            },
        )
    if tokenizer.eos_token_id is None:
        raise RecipeError("the tokenizer of --model has no eos token, which closes each document")
    data = prepare_text(
        train,
        validation,
        tokenizer,
        validation_fraction=fraction_of_text(train, arguments.validation_fraction if validation is None else 0.0),
        workers=arguments.preprocessing_workers,
        cache_dir=arguments.cache_dir,
        show_progress=show,
    )
    blocks = functools.partial(TextBlocks, block_size=size, vocab_size=words)
    return TrainingData(
        lambda seed, length: blocks(data.train, seed=seed, length=length),
        None if data.validation is None else blocks(data.validation, seed=None, length=None),
        collate,
        data.fingerprint,
        blocks(data.train, seed=None, length=None).blocks,
        data_facts(data),
    )


def fraction_of_text(source: DataSource, fraction: float) -> float:
    """Return the part of the sections to hold out: of a short text at least one, if it has two."""
    if fraction == 0 or source.holds_tokens or sum(path.stat().st_size for path in source.files) > SHORT_TEXT_BYTES:
        return fraction
    return fraction_of_short([split_hash(piece.text) for piece in read_documents(source, "text")], fraction)


def are_chats(train: DataSource, validation: DataSource | None) -> bool:
    """Tell whether the sources hold conversations.

    Raises:
        RecipeError: if one does and the other does not.
    """
    chats = holds_chats(train)
    if validation is not None and holds_chats(validation) != chats:
        forms = ("conversations", "text") if chats else ("text", "conversations")
        raise RecipeError(
            f"--train_data {train.files[0]} holds {forms[0]}, --validation_data {validation.files[0]} {forms[1]}: "
            "give both alike"
        )
    return chats


def plan_steps(arguments: FineTuningArguments, training: TrainingArguments, data: TrainingData) -> Plan:
    """Work out the steps; a step of rows of different lengths counts as many tokens as the mean of them."""
    per_device, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    sequences = per_device * accumulation * training.world_size * max(1, training.n_gpu)
    count = data.samples_a_pass
    assert count is not None
    facts = data.facts["train"]
    tokens = round(facts["tokens"] / facts["rows"]) if "rows" in facts else arguments.block_size
    steps = training.max_steps if training.max_steps > 0 else int(training.num_train_epochs * count / sequences)
    return Plan(
        sequences * tokens, sequences, per_device, accumulation, max(1, steps), max(1, round(count / sequences))
    )
