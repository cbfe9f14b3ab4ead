"""The presets of the recipes: published configurations and sizes, the papers' numbers, and what is typed over them."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch
from model_flops import peak_flops
from recipe_arguments import RecipeArguments, parse_arguments
from step_plan import Plan, apply_schedule, plan_steps
from tasks import TASK_CLASSES
from tiny_recipe import FAMILIES, RECIPES, ROOT, TOKENIZER
from transformers import GPT2LMHeadModel, PretrainedConfig, Starcoder2ForCausalLM
from transformers.pytorch_utils import Conv1D

PRESETS = {family: importlib.import_module(family).PRESETS for family in FAMILIES}
ALL = [(family, name) for family, presets in PRESETS.items() for name in presets]

# layers, width, heads, key-value heads, intermediate size, parameters
QWEN2_5 = {
    "0.5b": (24, 896, 14, 2, 4864, 494_032_768),
    "1.5b": (28, 1536, 12, 2, 8960, 1_543_714_304),
    "3b": (36, 2048, 16, 2, 11008, 3_085_938_688),
    "7b": (28, 3584, 28, 4, 18944, 7_615_616_512),
}
# words x width, four width^2 of attention and eight of the MLP a layer, and two norms a layer and one at the end
GPT2 = {
    "small": (12, 768, 12, 12, 3072, 123_606_528),
    "medium": (24, 1024, 16, 16, 4096, 353_601_536),
    "large": (36, 1280, 20, 20, 5120, 772_364_800),
    "xl": (48, 1600, 25, 25, 6400, 1_555_356_800),
}
ESM2 = {
    "8m": (6, 320, 20, 20, 1280, 7_512_474),
    "35m": (12, 480, 20, 20, 1920, 33_501_394),
    "150m": (30, 640, 20, 20, 2560, 148_140_154),
    "650m": (33, 1280, 20, 20, 5120, 651_043_254),
}


def config_of(family: str, name: str) -> PretrainedConfig:
    preset = PRESETS[family][name]
    task = TASK_CLASSES[preset.task]()
    tokenizer = str(TOKENIZER) if preset.task == "causal_lm" else None
    arguments = RecipeArguments(preset=name, tokenizer=tokenizer, block_size=1)
    return task.build_config(preset, task.load_tokenizer(arguments), arguments)


def meta_model(family: str, name: str) -> Any:
    preset = PRESETS[family][name]
    with torch.device("meta"):
        return TASK_CLASSES[preset.task]().new_model(config_of(family, name), None)


@pytest.mark.parametrize(
    ("family", "name", "published"),
    [(family, name, row) for family, table in (("qwen2_5", QWEN2_5), ("gpt2", GPT2), ("esm2", ESM2))
     for name, row in table.items()],
)  # fmt: skip
def test_presets_have_the_published_configurations(family: str, name: str, published: tuple[int, ...]) -> None:
    config, model = config_of(family, name), meta_model(family, name)
    layers, width, heads, key_value_heads, intermediate, parameters = published
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert getattr(config, "num_key_value_heads", heads) == key_value_heads
    assert config.intermediate_size == intermediate
    assert config.initializer_range == 0.02
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", QWEN2_5)
def test_qwen2_5_is_not_the_default_of_its_class(name: str) -> None:
    config = config_of("qwen2_5", name)
    assert config.vocab_size == (152064 if name == "7b" else 151936)
    assert config.tie_word_embeddings == (name != "7b")
    assert config.rope_parameters["rope_theta"] == 1e6
    assert (config.rms_norm_eps, config.hidden_act) == (1e-6, "silu")
    assert not config.use_sliding_window
    model = PRESETS["qwen2_5"][name].model
    assert model["bos_token_id"] == model["eos_token_id"] == 151643


@pytest.mark.parametrize("name", [name for name in PRESETS["gpt2"] if name != "hf-small"])
def test_gpt2_has_rotary_positions_and_no_linear_biases(name: str) -> None:
    config, model = config_of("gpt2", name), meta_model("gpt2", name)
    assert isinstance(model, Starcoder2ForCausalLM)
    assert config.vocab_size == (2048 if name == "tiny" else 50304)
    assert config.rope_parameters["rope_theta"] == 10_000
    assert (config.norm_epsilon, config.hidden_act, config.sliding_window) == (1e-5, "gelu", None)
    assert config.attention_dropout == config.residual_dropout == config.embedding_dropout == 0
    assert config.tie_word_embeddings
    assert [module for module in model.modules() if getattr(module, "bias", None) is not None] == [
        module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)
    ]


def test_hf_small_is_the_original_with_conv1d() -> None:
    model = meta_model("gpt2", "hf-small")
    assert isinstance(model, GPT2LMHeadModel)
    assert model.num_parameters() == 124_439_808
    assert sum(isinstance(module, Conv1D) for module in model.modules()) == 48
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize("name", PRESETS["esm2"])
def test_esm2_trains_all_but_its_contact_head(name: str) -> None:
    config, model = config_of("esm2", name), meta_model("esm2", name)
    assert (config.vocab_size, config.mask_token_id, config.pad_token_id) == (33, 32, 1)
    assert (config.position_embedding_type, config.token_dropout) == ("rotary", True)
    assert (config.layer_norm_eps, config.max_position_embeddings) == (1e-5, 1026)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"esm.contact_head.regression.weight", "esm.contact_head.regression.bias"}


@pytest.mark.parametrize(("family", "name"), ALL)
def test_presets_parse(family: str, name: str) -> None:
    _, arguments, training, given = parse_arguments(family, PRESETS[family], ["--preset", name])
    plan = plan_steps(arguments, training, given, blocks=10**9)
    apply_schedule(arguments, training, plan.steps)
    assert given == {"preset"}
    assert plan.tokens_per_step == PRESETS[family][name].defaults["tokens_per_step"]
    assert plan.sequences_per_device == training.per_device_train_batch_size
    assert not training.logging_nan_inf_filter
    assert training.adam_beta2 == 0.95
    if arguments.max_tokens is not None:
        assert 0.999 < plan.steps * plan.tokens_per_step / arguments.max_tokens <= 1


def test_what_the_papers_say_of_their_runs() -> None:
    def parsed(family: str, name: str) -> Any:
        _, arguments, training, given = parse_arguments(family, PRESETS[family], ["--preset", name])
        return arguments, training, plan_steps(arguments, training, given, blocks=10**9)

    for name in ("small", "medium", "large", "xl"):
        arguments, training, plan = parsed("gpt2", name)
        assert (plan.sequences_per_step, plan.tokens_per_step, plan.steps) == (480, 491_520, 100_000)
        assert (training.learning_rate, training.warmup_steps, training.max_grad_norm) == (6e-4, 2000, 1.0)
        assert (arguments.schedule, arguments.decay, arguments.block_size) == ("warmup_stable", 0, 1024)
        assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.1)
    for name, batch, block in (("mud-small", 24, 4096), ("mud-medium", 12, 2048), ("mud-large", 8, 2048)):
        arguments, training, plan = parsed("gpt2", name)
        assert (plan.sequences_per_step, arguments.block_size, arguments.schedule) == (batch, block, "cosine")
    arguments, training, plan = parsed("qwen2_5", "1.5b")
    assert (arguments.max_tokens, arguments.block_size, training.learning_rate) == (100e9, 8192, 6e-4)
    arguments, training, plan = parsed("esm2", "150m")
    assert (plan.sequences_per_step, arguments.block_size, plan.steps, training.warmup_steps) == (8, 512, 5000, 500)
    assert (arguments.validation_samples, arguments.schedule, arguments.floor) == (2500, "cosine", 0.1)
    assert arguments.dataset_name == "tattabio/OMG_prot50"


def test_what_is_typed_replaces_the_preset() -> None:
    argv = ["--preset", "1.5b", "--max_steps", "7", "--train_data", "a.txt", "--gradient_accumulation_steps", "4"]
    _, arguments, training, given = pretrain.parse_arguments("qwen2_5", PRESETS["qwen2_5"], argv)
    assert (arguments.dataset_name, arguments.dataset_config, arguments.max_tokens) == (None, None, None)
    assert plan_steps(arguments, training, given, None) == Plan(
        tokens_per_step=4 * 8192,
        sequences_per_step=4,
        sequences_per_device=1,
        gradient_accumulation_steps=4,
        steps=7,
        steps_per_pass=None,
    )
    assert training.output_dir == "out/qwen2_5-1.5b-adamw_torch_fused-seed42"
    assert training.run_name == "qwen2_5-1.5b-adamw_torch_fused-seed42"


def test_a_schedule_that_is_typed_comes_without_the_presets_floor() -> None:
    argv = ["--preset", "tiny", "--schedule", "warmup_stable", "--decay", "0.25"]
    _, arguments, training, _ = pretrain.parse_arguments("qwen2_5", PRESETS["qwen2_5"], argv)
    assert (arguments.schedule, arguments.decay, arguments.floor) == ("warmup_stable", 0.25, 0.0)
    apply_schedule(arguments, training, 100)
    assert training.lr_scheduler_type == "warmup_stable_decay"
    assert training.lr_scheduler_kwargs["num_decay_steps"] == 25
    argv = ["--preset", "tiny", "--lr_scheduler_type", "polynomial"]
    _, arguments, training, _ = pretrain.parse_arguments("qwen2_5", PRESETS["qwen2_5"], argv)
    apply_schedule(arguments, training, 100)
    assert (arguments.schedule, training.lr_scheduler_type) == (None, "polynomial")


def shown_commands() -> list[str]:
    pages = [(folder / "README.md").read_text(encoding="utf-8").replace("\\\n", " ") for folder in (RECIPES, ROOT)]
    lines = {line.split("#")[0].strip() for page in pages for line in page.splitlines()}
    script = re.compile(rf"(python|torchrun) .*recipes/({'|'.join(FAMILIES)})\.py")
    return sorted(line for line in lines if script.match(line))


@pytest.mark.parametrize("command", shown_commands())
def test_the_commands_of_the_pages_are_understood(command: str) -> None:
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.startswith("recipes/"))
    if "--help" in words:
        return
    family, argv = Path(words[script]).stem, words[script + 1 :]
    preset, arguments, training, given = parse_arguments(family, PRESETS[family], argv)
    assert preset is PRESETS[family][arguments.preset]
    assert {"preset", "optim"} <= given
    plan = plan_steps(arguments, training, given, 50_000)
    apply_schedule(arguments, training, plan.steps)
    assert plan.steps > 0


def test_the_pages_show_every_family() -> None:
    commands = shown_commands()
    assert len(commands) > 10
    assert all(any(f"recipes/{family}.py" in command for command in commands) for family in FAMILIES)


def shown_rows() -> dict[tuple[str, str], list[str]]:
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `") and " M |" in line]
    return {tuple(row[0].strip("`").split(" ", 1)): row[1:] for row in rows}


def hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def test_the_page_shows_every_preset() -> None:
    assert list(shown_rows()) == ALL


@pytest.mark.parametrize(("family", "name"), [pair for pair in ALL if pair[1] != "tiny"])
def test_the_page_shows_what_a_preset_costs(family: str, name: str) -> None:
    _, arguments, training, given = parse_arguments(family, PRESETS[family], ["--preset", name])
    plan = plan_steps(arguments, training, given, 50_000)  # images of CIFAR-10; the others count steps or tokens
    config = config_of(family, name)
    tokens = plan.steps * plan.tokens_per_step
    flops = tokens * TASK_CLASSES[PRESETS[family][name].task]().flops_per_token(config, arguments.block_size)
    peak = peak_flops("H100")
    assert peak is not None
    parameters = sum(parameter.numel() for parameter in meta_model(family, name).parameters())
    assert shown_rows()[family, name] == [
        f"{parameters / 1e6:,.1f} M",
        f"{arguments.block_size:,}",
        f"{plan.tokens_per_step:,}",
        f"{plan.steps:,}",
        f"{tokens:.2e}",
        f"{flops:.2e}",
        hours(flops / (0.4 * peak) / 3600),
    ]
