"""Fine-tune a causal language model on a text or on conversations: all of its weights, or LoRA adapters by PEFT.

    python recipes/finetune.py --model out/tiny --train_data my.txt --optim adamuon --output_dir out/ft
    python recipes/finetune.py --model Qwen/Qwen2.5-0.5B --train_data chats.jsonl --optim muon --merge
    python recipes/finetune.py --model out/tiny --train_data my.txt --lora_rank 0 --optim muon --learning_rate 1e-3

The model is a folder (a run of these recipes, one of its checkpoints, any other) or a name on the Hub. Text is joined
and cut into blocks as in pretraining; of conversations (``chat_rows.py``) the model learns what the assistant says.
The output folder gets the adapter, or the model, with its tokenizer; with ``--merge`` also ``merged/``, a model of its
own. ``run.json`` has the validation loss before and after.
"""

import argparse
import functools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from chat_rows import Examples, collate, examples_fingerprint, holds_chats, read_examples
from data_sources import data_sources
from document_sources import check_block, data_facts
from document_tokens import saved_tokenizer, tokenizer_fingerprint
from prepared_data import prepare_text
from pretrain import RunFlow, accepted_trainer, finish
from recipe_arguments import NOT_GIVEN, check_optim_args, nearest, with_nearest_choice
from recipe_error import REFUSALS, RecipeError
from recipe_trainer import PretrainingTrainer, token_loss
from run_description import explain_model_partition, optimizer_name, run_facts, training_identity
from run_folder import (
    AUTO,
    MERGED,
    check_output_folder,
    check_same_run,
    checkpoint_to_resume,
    clear_partial_checkpoints,
    clear_run,
    is_checkpoint_of,
    is_finished,
    read_run,
    weights_hash,
    write_run,
)
from run_log import RunLog, finite_or_null
from step_plan import Plan, apply_plan
from task import TrainingData
from tasks import CausalLanguageModeling
from text_blocks import TextBlocks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

import hf_matrix_optim  # noqa: F401  makes --optim muon, adamuon, adamuon_v1 and mud known to TrainingArguments

DTYPES = ("float32", "bfloat16", "float16")
DEFAULTS: dict[str, Any] = {
    "output_dir": "out/finetune",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
}
LEARNING_RATES = {True: 2e-4, False: 2e-5}  # with and without adapters
OF_ADAPTERS = ("lora_alpha", "lora_dropout", "lora_target_modules", "dora", "rslora", "modules_to_save", "merge")


@dataclass
class FineTuningArguments:
    """What to fine-tune, and on what; everything else is a flag of ``TrainingArguments``."""

    model: str = field(metadata={"help": "Folder of a model, or its name on the Hub."})
    train_data: list[str] = field(
        metadata={
            "aliases": ["--train_file"],
            "help": "Files, folders or globs: .txt, and .jsonl .json .parquet .csv with a column of texts; or "
            "conversations (.jsonl .json .parquet): messages, or prompt and completion.",
        }
    )
    validation_data: list[str] | None = field(
        default=None,
        metadata={"aliases": ["--validation_file"], "help": "The same for validation, not --validation_fraction."},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Part of the documents or rows held out, by a fixed hash of each; 0 for none."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the text; default: text."})
    block_size: int = field(default=1024, metadata={"help": "Tokens in a block of text; of a conversation, at most."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters; 0 trains all weights instead."})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Their scale is alpha / rank, of rsLoRA alpha / sqrt(rank); default: 2 x rank."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before an adapter, in [0, 1)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Layers that get adapters, by the ends of their names; all-linear: all but the output."},
    )
    dora: bool = field(default=False, metadata={"help": "DoRA: the length of each row is trained apart, by AdamW."})
    rslora: bool = field(default=False, metadata={"help": "rsLoRA: a scale that does not fall with the rank."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole beside the adapters, such as embed_tokens."}
    )
    merge: bool = field(
        default=False, metadata={"help": f"Also save {MERGED}/, the model with its adapter merged in."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Type of the model's weights: {', '.join(DTYPES)}."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the base model in 4-bit NF4; needs bitsandbytes, and adapters."}
    )
    stop_after: int | None = field(
        default=None, metadata={"help": "Stop at this step with a checkpoint, as if interrupted."}
    )
    preprocessing_workers: int = field(default=1, metadata={"help": "Processes that tokenize text."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for prepared text; default: ~/.cache/hf-matrix-optim."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that is in --output_dir."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show settings, partition and steps; read no weight, train nothing."}
    )


class FineTuningTrainer(PretrainingTrainer):
    """The recipes' Trainer; adapters are loaded as stock Trainer loads them."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        has_adapters = hasattr(self.model, "peft_config")
        method = Trainer._load_from_checkpoint if has_adapters else PretrainingTrainer._load_from_checkpoint
        method(self, resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        has_adapters = hasattr(self.model, "peft_config")
        (Trainer if has_adapters else PretrainingTrainer)._load_best_model(self)


def parse(argv: Sequence[str] | None = None) -> tuple[FineTuningArguments, TrainingArguments, frozenset[str]]:
    """Parse a command line; returns our arguments, Trainer's, and the names of the flags that were given.

    Raises:
        RecipeError: for unknown flags, bad values, and flags that exclude each other.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    dataclasses = (FineTuningArguments, TrainingArguments)
    options: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
    parser = HfArgumentParser(
        dataclasses, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    parser.set_defaults(**DEFAULTS)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    flags = [flag.name for dataclass_type in dataclasses for flag in fields(dataclass_type) if flag.init]
    scan = HfArgumentParser(dataclasses, add_help=False, **options)
    scan.set_defaults(**dict.fromkeys(flags, NOT_GIVEN))
    try:
        known, unknown = scan.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error.argument_name}: {with_nearest_choice(error.message)}") from error
    given = frozenset(name for name, value in vars(known).items() if value is not NOT_GIVEN)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise RecipeError(f"unknown argument {flag}{nearest(flag, [f'--{name}' for name in flags])}")
    values = parser.parse_args(argv)
    check_values(values, given)
    parser.set_defaults(learning_rate=LEARNING_RATES[values.lora_rank > 0])
    try:
        arguments, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except REFUSALS as error:
        raise RecipeError(str(error)) from error
    return arguments, training, given


def check_values(arguments: argparse.Namespace, given: frozenset[str]) -> None:
    """Refuse values out of range, and flags that have no effect.

    Raises:
        RecipeError: naming the flag and what to do.
    """
    ranges = (
        *((name, 0, float("inf")) for name in ("lora_rank", "learning_rate", "weight_decay")),
        *((name, 0, 1) for name in ("validation_fraction", "lora_dropout")),
        *((name, 1, float("inf")) for name in ("preprocessing_workers", "stop_after", "gradient_accumulation_steps")),
        ("per_device_train_batch_size", 1, float("inf")),
        ("block_size", 2, float("inf")),
    )
    for name, lowest, end in ranges:
        value = getattr(arguments, name)
        if value is not None and not lowest <= value < end:
            raise RecipeError(f"--{name} is {value}; it must be at least {lowest} and below {end}")
    if arguments.lora_alpha is not None and not 0 < arguments.lora_alpha < float("inf"):
        raise RecipeError(f"--lora_alpha is {arguments.lora_alpha}; it must be above 0 and finite")
    if arguments.dtype not in DTYPES:
        raise RecipeError(f"--dtype {arguments.dtype}: it is one of {', '.join(DTYPES)}")
    if arguments.lora_rank == 0:
        if idle := [name for name in OF_ADAPTERS if name in given and getattr(arguments, name) is not False]:
            raise RecipeError(f"--{idle[0]} is of adapters: leave it out, or give --lora_rank of at least 1")
        if arguments.load_in_4bit:
            raise RecipeError("--load_in_4bit: quantised weights cannot be trained; give --lora_rank of at least 1")
    if arguments.merge and arguments.load_in_4bit:
        raise RecipeError(
            "--merge: an adapter is not merged into 4-bit weights, which would round it; leave one of the two out, "
            "and load the adapter on the full model (peft.PeftModel.from_pretrained(model, folder).merge_and_unload())"
        )
    check_optim_args(arguments.optim, arguments.optim_args)


def finetune(
    arguments: FineTuningArguments, training: TrainingArguments, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Run one fine-tuning, or its dry run, and return the contents of its ``run.json``.

    Everything that can be refused is refused before the output folder is touched.

    Raises:
        RecipeError: for what cannot be done as asked.
    """
    if training.disable_tqdm:
        disable_progress_bar()
    if training.n_gpu > 1 and not arguments.dry_run:
        raise RecipeError(
            f"one process sees {training.n_gpu} GPUs: start one for each (torchrun --nproc_per_node {training.n_gpu} "
            "recipes/finetune.py ...), or set CUDA_VISIBLE_DEVICES=0"
        )
    folder = Path(training.output_dir)
    checkpoint = checkpoint_to_resume(folder, training.resume_from_checkpoint)
    is_own = is_checkpoint_of(folder, checkpoint)
    is_auto = str(training.resume_from_checkpoint).lower() == AUTO
    finished = read_run(folder) if is_auto and is_finished(folder) else None
    if finished is None:
        check_output_folder(folder, resume=is_own, overwrite=arguments.overwrite_output_dir)
    place = base_place(arguments.model)
    tokenizer = saved_tokenizer(place, "--model")
    config = base_config(place)
    check_block(arguments.block_size, config, getattr(config, "max_position_embeddings", arguments.block_size))
    with torch.device("meta"):
        shapes = with_adapters(empty_model(config), arguments)
    try:
        partition = explain_model_partition(shapes, training)
    except REFUSALS as error:
        raise RecipeError(str(error)) from error
    data = read_data(arguments, training, tokenizer, config)
    plan = plan_steps(arguments, training, data)
    has_validation = data.validation is not None
    apply_plan(plan, training, has_validation=has_validation, is_stream=False, given=given)
    run = describe(arguments, training, place, config, tokenizer, plan, data, shapes)
    earlier = finished or (None if checkpoint is None else read_run(Path(checkpoint).parent))
    if earlier is not None:
        check_same_run(earlier, run["identity"])
    if note := optimizer_note(run["pretrained_with"], optimizer_name(training), full=arguments.lora_rank == 0):
        print(note)
    if arguments.dry_run:
        print(json.dumps(run, indent=2, sort_keys=True, default=str))
        print(f"\n{partition}\n\n{plan.steps:,} steps of {plan.sequences_per_step:,} blocks or rows")
        return run
    if finished is not None:
        print(f"{folder} holds this run, finished: nothing is left to do")
        return finished
    return train(run, arguments, training, place, tokenizer, data, plan, checkpoint)


def base_place(name: str) -> str:
    """Return the absolute folder of a model, or its name on the Hub; an adapter's configuration keeps it.

    Raises:
        RecipeError: if there is no such folder, or it holds an adapter.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise RecipeError(f"--model {name}: no such folder; give the folder of a model or its name on the Hub")
        return name
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        merged = folder / MERGED
        remedy = f"give {merged}" if merged.is_dir() else f"merge it first (--merge writes {MERGED}/)"
        raise RecipeError(f"--model {name} holds an adapter, not a model: {remedy}")
    if not (folder / "config.json").is_file():
        inside = max((path.name for path in folder.glob("checkpoint-*")), key=len, default=None)
        hint = f"; it holds {inside}: give {folder / inside}" if inside else ""
        raise RecipeError(f"--model {name} holds no config.json, so no model{hint}")
    return str(folder.resolve())


def base_config(place: str) -> PretrainedConfig:
    """Load the configuration of a model.

    Raises:
        RecipeError: if it cannot be had.
    """
    try:
        return AutoConfig.from_pretrained(place)
    except REFUSALS as error:
        raise RecipeError(f"--model {place} cannot be loaded: {str(error).splitlines()[0]}") from error


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model of a configuration.

    Raises:
        RecipeError: if there is none.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except REFUSALS as error:
        raise RecipeError(f"no causal language model of type {config.model_type}: {error}") from error
    return model


def load_base(arguments: FineTuningArguments, place: str) -> PreTrainedModel:
    """Load the model's weights, in 4 bits if asked for.

    Raises:
        RecipeError: if they cannot be loaded, or lack a weight.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype)}
    if arguments.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    except REFUSALS as error:
        need = " (--load_in_4bit needs bitsandbytes: pip install bitsandbytes)" if arguments.load_in_4bit else ""
        raise RecipeError(f"--model {place} cannot be loaded{need}: {str(error).strip().splitlines()[0]}") from error
    if report["missing_keys"]:
        raise RecipeError(
            f"--model {place} lacks {len(report['missing_keys'])} weights: {min(report['missing_keys'])}"
        )
    if arguments.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():  # bitsandbytes 0.50 repacks weights in evaluation on a CPU, past training
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    loaded: PreTrainedModel = model
    return loaded


def with_adapters(model: PreTrainedModel, arguments: FineTuningArguments) -> Any:
    """Put LoRA adapters on a model and freeze the rest; without a rank the model itself.

    Raises:
        RecipeError: if PEFT is not installed or refuses the modules.
    """
    if arguments.lora_rank == 0:
        return model
    try:
        import peft
    except ImportError as error:
        raise RecipeError("adapters need the package peft (pip install peft), or give --lora_rank 0") from error
    targets = arguments.lora_target_modules
    alpha = 2 * arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha
    configuration = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_rank,
        lora_alpha=alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        use_dora=arguments.dora,
        use_rslora=arguments.rslora,
        modules_to_save=arguments.modules_to_save,
        # Else a tied pair is torn apart, and the merged model is saved without one of the two.
        ensure_weight_tying=bool(arguments.modules_to_save) and model.config.tie_word_embeddings,
    )
    try:
        adapted = peft.get_peft_model(model, configuration)
    except REFUSALS as error:
        raise RecipeError(f"--lora_target_modules {' '.join(targets)}: {error}") from error
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    if missing := [name for name in arguments.modules_to_save or [] if name.split(".")[-1] not in names]:
        raise RecipeError(f"--modules_to_save {missing[0]}: the model has no such module{nearest(missing[0], names)}")
    return adapted


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
    if arguments.text_column is None and holds_chats(train):
        fraction = arguments.validation_fraction if validation is None else 0.0
        rows, held_out = read_examples(train, tokenizer, size, validation_fraction=fraction, show_progress=show)
        if validation is not None:
            held_out, _ = read_examples(validation, tokenizer, size, show_progress=show)
        for side, flag, missing in (
            (rows, "--train_data", not rows),
            (held_out, "--validation_data", not held_out and (validation is not None or fraction > 0)),
        ):
            if missing:
                raise RecipeError(
                    f"{flag}: no row is left{' to hold out' if side is held_out else ''}; give more rows"
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
        validation_fraction=arguments.validation_fraction,
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


def describe(
    arguments: FineTuningArguments,
    training: TrainingArguments,
    place: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    data: TrainingData,
    shapes: Any,
) -> dict[str, Any]:
    """Collect what ``run.json`` says before the run starts; ``identity`` is what a resumed run must share."""
    ours = asdict(arguments)
    adapters = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "dora", "rslora", "modules_to_save")
    settings = ("block_size", "dtype", "load_in_4bit")
    # A frozen weight has no gradient of its own, a third of the work. Attention is not counted.
    per_weight = 6 if arguments.lora_rank == 0 else 4
    return {
        "identity": {
            "recipe": "finetune",
            "preset": "lora" if arguments.lora_rank else "full",
            "base": place,
            "model": config.to_dict(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "data": data.fingerprint,
            **{name: ours[name] for name in (*settings, *adapters)},
            **training_identity(training, plan),
        },
        "pretrained_with": pretrained_with(place),
        "flops_per_token": float(per_weight * shapes.num_parameters(exclude_embeddings=True)),
        "recipe_arguments": ours,
        "data": dict(data.facts),
        "unit": CausalLanguageModeling.unit,
        **run_facts(training, plan),
    }


def pretrained_with(place: str) -> str | None:
    """Return the value of ``--optim`` that a run of these recipes recorded beside a model; None if none did."""
    for folder in (Path(place), Path(place).parent):
        try:
            run = read_run(folder)
        except RecipeError:
            continue
        if run is not None:
            return run["identity"].get("optim")
    return None


def optimizer_note(before: str | None, now: str, *, full: bool) -> str | None:
    """Return one line on what to expect where the optimizer is of another family than that of pretraining."""
    if before is None or not full or before.startswith("adamw") == now.startswith("adamw"):
        return None
    return (
        f"note: pretrained with {before}, now {now}: in a study of a tiny model such a change cost 0.01 nats a token "
        "at most, each at its best learning rate (recipes/results/finetune.md); sweep --learning_rate anew"
    )


def train(
    run: dict[str, Any],
    arguments: FineTuningArguments,
    training: TrainingArguments,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    plan: Plan,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Load, train, evaluate and save what has been checked; returns ``run`` with its results."""
    folder = Path(training.output_dir)
    set_seed(training.seed)
    model = with_adapters(load_base(arguments, place), arguments)
    run["parameters"] = model.num_parameters()
    run["trainable_parameters"] = model.num_parameters(only_trainable=True)
    run["initial_weights_sha256"] = weights_hash(model)
    run["resumed_from"] = checkpoint
    earlier = None if checkpoint is None else read_run(Path(checkpoint).parent)
    if earlier is not None and earlier["initial_weights_sha256"] != run["initial_weights_sha256"]:
        raise RecipeError(f"the weights of {place} are not those that the run to resume was started from")
    order_seed = training.seed if training.data_seed is None else training.data_seed
    run["first_batch_sha256"] = data.first_batch_hash(order_seed, plan.sequences_per_step)
    if training.gradient_checkpointing and arguments.lora_rank:
        model.enable_input_require_grads()
    training.label_names = ["labels"]
    log = RunLog(folder)
    make_trainer = functools.partial(
        FineTuningTrainer,
        model=model,
        args=training,
        train_dataset=data.training(order_seed, plan.steps * plan.sequences_per_step),
        eval_dataset=data.validation,
        data_collator=data.collate,
        processing_class=tokenizer,
        compute_loss_func=functools.partial(token_loss, label_smoothing=training.label_smoothing_factor),
        callbacks=[RunFlow(arguments.stop_after)],
        tokens_per_step=plan.tokens_per_step,
        tokens_per_sample=plan.tokens_per_step // plan.sequences_per_step,
        flops_per_token=run["flops_per_token"],
        log_record=log.append,
    )
    if training.log_level == "passive":  # as it is by default: then the one line about the partition is shown too
        logging.getLogger("transformers.hf_matrix_optim").setLevel(logging.INFO)
    trainer = accepted_trainer(make_trainer, folder)
    resumed_step = 0
    if checkpoint is not None:
        resumed_step = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
        trainer.clock.load(Path(checkpoint))
    if trainer.is_world_process_zero():
        if is_checkpoint_of(folder, checkpoint):
            clear_partial_checkpoints(folder)
        else:
            clear_run(folder)
        log.truncate(resumed_step)
        print(
            f"{run['trainable_parameters']:,} of {run['parameters']:,} parameters, {plan.steps:,} steps, "
            f"{run['identity']['optim']} at learning rate {training.learning_rate:g} -> {folder}"
            + (f", from step {resumed_step:,} on" if resumed_step else "")
        )
    if earlier is not None:
        run["before"] = earlier.get("before")
    elif data.validation is not None:
        run["before"] = {name: finite_or_null(value) for name, value in losses(trainer.evaluate()).items()}
    if trainer.is_world_process_zero():
        write_run(folder, run)
    trainer.accelerator.wait_for_everyone()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < plan.steps:
        print(
            f"stopped after step {trainer.state.global_step:,} of {plan.steps:,}; --resume_from_checkpoint true "
            "goes on"
        )
        return run
    if run.get("before"):
        print(f"validation loss before {run['before']['eval_loss']:.4f}")
    if arguments.merge and trainer.is_world_process_zero():  # before run.json has results: it says that all is there
        trainer.save_model()
        save_merged(arguments, place, folder, tokenizer)
    finish(run, trainer, CausalLanguageModeling(), plan, data, outcome.metrics)
    return run


def losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what of an evaluation is about the model."""
    names = ("eval_loss", "eval_perplexity", "eval_accuracy")
    return {name: metrics[name] for name in names if name in metrics}


def save_merged(arguments: FineTuningArguments, place: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Merge the adapter that was saved in ``folder`` into the model, on the CPU, and save that as ``merged``."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_base(arguments, place), str(folder)).merge_and_unload()
    merged.save_pretrained(folder / MERGED)
    tokenizer.save_pretrained(folder / MERGED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for what was refused."""
    try:
        finetune(*parse(argv))
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume_from_checkpoint auto goes on from the last checkpoint, if any", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
