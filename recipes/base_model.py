"""The model that fine-tuning starts from: found, loaded, given LoRA adapters, and merged with them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from finetune_arguments import FineTuningArguments
from flag_checks import nearest
from recipe_error import REFUSALS, RecipeError
from run_folder import MERGED
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BROKEN_WEIGHTS = (SafetensorError, pickle.UnpicklingError, EOFError)


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
        which = "" if Path(place).is_dir() else " (it is no folder here, so a name on the Hub)"
        raise RecipeError(f"--model {place} cannot be loaded{which}: {first_line(error)}") from error


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model of a configuration.

    Raises:
        RecipeError: if there is none.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except REFUSALS as error:
        reason = first_line(error).partition(" Model type should be")[0]
        raise RecipeError(
            f"--model: there is no causal language model of type {config.model_type}: {reason}"
        ) from error
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
    except (*REFUSALS, *BROKEN_WEIGHTS) as error:
        need = " (--load_in_4bit needs bitsandbytes: pip install bitsandbytes)" if arguments.load_in_4bit else ""
        raise RecipeError(
            f"--model {place} cannot be loaded{need}: {first_line(error)}; give a whole model"
        ) from error
    if report["missing_keys"]:
        raise RecipeError(
            f"--model {place} lacks {len(report['missing_keys'])} weights, the first {min(report['missing_keys'])}; "
            "give a folder with all weights of the model that its config.json describes"
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
    return adapted


def check_adapters(model: PreTrainedModel, arguments: FineTuningArguments) -> None:
    """Refuse a rank that no matrix of the model has, and names of modules that PEFT would pass over in silence.

    Raises:
        RecipeError: naming the flag and the value.
    """
    rank, targets, whole = arguments.lora_rank, arguments.lora_target_modules, arguments.modules_to_save or []
    if rank == 0:
        return
    largest = max(min(weight.shape) for weight in model.parameters() if weight.ndim == 2)
    if rank > largest:
        raise RecipeError(
            f"--lora_rank is {rank}; no matrix of this model has a rank above {largest}: give less, or 0 to train all "
            "weights"
        )
    names = [name for name, _ in model.named_modules() if name]
    for flag, wanted in (("lora_target_modules", targets), ("modules_to_save", whole)):
        for word in () if list(wanted) == ["all-linear"] else wanted:
            if not any(f".{name}".endswith(f".{word}") for name in names):
                near = nearest(word, {name.split(".")[-1] for name in names})
                raise RecipeError(f"--{flag} {word}: the model has no such module{near}")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def save_merged(arguments: FineTuningArguments, place: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Merge the adapter that was saved in ``folder`` into the model, on the CPU, and save that as ``merged``."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_base(arguments, place), str(folder)).merge_and_unload()
    merged.save_pretrained(folder / MERGED)
    tokenizer.save_pretrained(folder / MERGED)


def is_merged(folder: Path) -> bool:
    """Tell whether ``merged`` was written to its end: the tokenizer is last."""
    return (folder / MERGED / "tokenizer_config.json").is_file()
