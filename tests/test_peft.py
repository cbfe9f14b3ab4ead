"""PEFT with the real Trainer and with TRL: every kind of adapter trains, is loaded again, is merged, and is scored."""

import importlib.util
import json

import checkpoints
import peft
import pytest
import torch
from peft import PeftModel
from tiny_models import VOCABULARY, random_tokens, tiny_lora_model, tiny_model
from tiny_training import StepRecorder, arguments, groups_of, optimizer_of, token_rows
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_matrix_optim import PartitionOptions, explain, param_groups_for
from hf_matrix_optim.partition import route_parameters

OPTIMIZERS = ("adamuon", "muon", "mud")
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
# name -> (model, arguments of LoraConfig, kinds of parameters beside A and B, all of which are AdamW's)
ADAPTERS = {
    **{f"rank {rank}": ("qwen2", {"r": rank}, set()) for rank in (2, 3, 8, 31, 64)},
    "some of rank 1": ("qwen2", {"rank_pattern": {"q_proj": 1}}, set()),
    "dora": ("qwen2", {"use_dora": True}, {"lora_magnitude_vector"}),
    "rslora": ("qwen2", {"use_rslora": True}, set()),
    "pissa": ("qwen2", {"init_lora_weights": "pissa"}, set()),
    "all linear": ("qwen2", {"target_modules": "all-linear"}, set()),
    "embeddings saved": ("qwen2_untied", {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save"}),
    "tied embeddings saved": (
        "qwen2",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save"},
    ),
    "some tokens": ("qwen2", {"trainable_token_indices": [3, 4, 5]}, {"trainable_tokens_delta"}),
    "of embeddings": (
        "qwen2_untied",
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"lora_embedding_A", "lora_embedding_B"},
    ),
    "conv1d": ("gpt2", CONV1D, set()),
    "conv1d dora": ("gpt2", {**CONV1D, "use_dora": True}, {"lora_magnitude_vector"}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, set()),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}, set()),
}


def adapted(name: str = "qwen2", **lora) -> PeftModel:
    return tiny_lora_model(name, **{"lora_alpha": 8, "target_modules": TARGETS, **lora})


def trained(folder, model, optim="muon", callbacks=(), **values) -> tuple[Trainer, StepRecorder]:
    recorder = StepRecorder()
    trainer = Trainer(
        model,
        arguments(folder, **{"optim": optim, "max_steps": 2, **values}),
        train_dataset=token_rows(),
        callbacks=[recorder, *callbacks],
    )
    trainer.train()
    return trainer, recorder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(random_tokens()).logits


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- kinds of adapters ----


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_trains_is_loaded_and_merged(tmp_path, kind, optim):
    name, lora, others = ADAPTERS[kind]
    model = adapted(name, **lora)
    before = trainable(model)
    roles = {route.name: route.role for route in route_parameters(model) if route.role != "frozen"}
    assert {role for n, role in roles.items() if any(part in n for part in others)} <= {"adamw"}
    for n, p in model.named_parameters():
        if n in roles and (".lora_A." in n or ".lora_B." in n):
            expected = "adamw" if 1 in p.shape or "experts" in n else "matrix"
            assert roles[n] == expected, n
    trainer, _ = trained(tmp_path, model, optim)
    for n, p in model.named_parameters():
        assert n not in before or not torch.equal(p, before[n]), f"{n} was not trained"
    trainer.save_model()
    expected = logits(model)
    loaded = PeftModel.from_pretrained(tiny_model(name), str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(expected, logits(tiny_model(name)))
    assert torch.allclose(logits(loaded.merge_and_unload()), expected, atol=1e-5)


def test_a_checkpoint_of_adapters_resumes_bitwise_with_its_saved_embeddings(tmp_path):
    lora = {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True, "lora_dropout": 0.1}
    values = {"optim": "mud", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(tmp_path, adapted("qwen2_untied", **lora), **values)
    resumed = Trainer(adapted("qwen2_untied", **lora), arguments(tmp_path, **values), train_dataset=token_rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, left), right in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name


# ---- rank 1 and methods without matrices ----


def test_adapters_of_rank_1_alone_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="Adapters of rank 1 are pairs of vectors: give r of at least 2"):
        trained(tmp_path, adapted(r=1))
    assert "LoRA of rank 1" in explain(adapted(r=1))


def test_rank_1_can_be_included_and_takes_normalised_steps(tmp_path):
    model = adapted(r=1)
    _, recorder = trained(tmp_path, model, optim_args="include=lora_B", lr_scheduler_type="constant", max_steps=1)
    name = next(n for n in recorder.before[0] if "lora_B" in n)
    step = recorder.after[0][name] - recorder.before[0][name]
    gradient = recorder.gradients[0][name]
    # The polar factor of one column is the column over its norm, and the scale gives it the size of AdamW's.
    assert torch.nn.functional.cosine_similarity(step, -gradient, dim=0).item() == pytest.approx(1, abs=1e-3)
    assert step.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.35)  # Newton-Schulz: 0.7 to 1.2


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (peft.LoHaConfig(r=4, target_modules=TARGETS), "adapter weight hada_w1_a"),
        (peft.LoKrConfig(r=4, target_modules=TARGETS), "adapter weight lokr_w1"),
        (peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]), "adapter weight oft_R"),
        (peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), "a single row or column"),
        (peft.VeraConfig(r=4, target_modules=["q_proj"]), "it has vectors only"),
        (peft.LNTuningConfig(target_modules=["input_layernorm"]), "it has vectors only"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "embedding"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "embedding"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_methods_without_matrices_are_refused_with_the_reason(tmp_path, method, reason):
    model = peft.get_peft_model(tiny_model("qwen2"), method)
    with pytest.raises(ValueError, match=f"nothing to orthogonalise.*{reason}.*optim='adamw_torch'"):
        trained(tmp_path, model)


# ---- adapters frozen and added in the course of training ----


def test_an_adapter_frozen_between_steps_stays_as_it_is(tmp_path):
    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if "q_proj.lora" in name:
                    parameter.requires_grad_(False)

    trainer, recorder = trained(tmp_path, adapted(), callbacks=[Freeze()], weight_decay=0.1)
    for name in trainable(trainer.model) | {n: None for n in recorder.after[0] if "q_proj.lora" in n}:
        first, second = (torch.equal(recorder.before[i][name], recorder.after[i][name]) for i in (0, 1))
        assert not first
        assert second == ("q_proj.lora" in name), name


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_second_adapter_trains_with_a_new_trainer_and_leaves_the_first_alone(tmp_path, optim):
    model = adapted()
    trained(tmp_path / "first", model, optim)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    trainer, _ = trained(tmp_path / "second", model, optim)
    names = {name for group in optimizer_of(trainer).param_groups for name in group["param_names"]}
    assert names
    assert all(".second." in name for name in names)
    for name, parameter in model.named_parameters():
        if name in first:
            assert torch.equal(parameter, first[name]), name


def test_an_adapter_added_after_the_optimizer_was_made_is_an_error_at_the_next_training(tmp_path):
    model = adapted()
    trainer, _ = trained(tmp_path, model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"4 trainable parameters, such as .*lora_A\.second.*a new Trainer"):
        trainer.train()


def test_an_adapter_added_in_the_course_of_training_is_an_error_at_the_next_log(tmp_path):
    class Add(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
                model.set_adapter("second")

    with pytest.raises(RuntimeError, match="are not in the optimizer and would not be trained"):
        trained(tmp_path, adapted(), callbacks=[Add()], max_steps=6)
    # Where AdamW was asked for, nothing of ours looks.
    trained(tmp_path, adapted(), optim="adamw_torch", callbacks=[Add()], max_steps=6)


# ---- quantised weights ----


def packed(model, *, trainable: bool) -> torch.nn.Parameter:
    """Give the first q_proj a weight as bitsandbytes packs four bits into bfloat16."""
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    weight = torch.nn.Parameter(torch.zeros(256, 1, dtype=torch.bfloat16), requires_grad=trainable)
    weight.quant_state = object()
    layer.weight = weight
    return weight


def test_quantised_weights_are_refused_as_matrices_with_the_reason():
    model = tiny_model("qwen2")
    packed(model, trainable=False)
    name = r"model\.layers\.0\.self_attn\.q_proj\.weight"
    with pytest.raises(ValueError, match=f"matches quantised weights, such as {name}, which cannot be trained"):
        param_groups_for(model, options=PartitionOptions(include=name))
    packed(model, trainable=True)
    with pytest.raises(TypeError, match=f"{name} is trainable but quantised: .*train adapters"):
        param_groups_for(model)


def test_frozen_weights_named_in_include_are_said_to_be_frozen():
    with pytest.raises(ValueError, match=r"it matches 2 that are frozen, such as .*gate_proj\.weight"):
        param_groups_for(adapted(), options=PartitionOptions(include="gate_proj"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_adapters_of_a_4_bit_model_train(tmp_path, storage):
    from transformers import BitsAndBytesConfig

    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage
        ),
    )
    weight = quantised.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match="quantised weights"):
        param_groups_for(quantised, options=PartitionOptions(include="q_proj"))
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(quantised, use_gradient_checkpointing=False),
        peft.LoraConfig(r=4, target_modules=TARGETS),
    )
    before, packed_before = trainable(model), weight.detach().clone()
    trained(tmp_path / "run", model, "adamuon")
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert torch.equal(weight, packed_before)


# ---- evaluation ----


@pytest.mark.parametrize("is_merged", [False, True], ids=["adapter", "merged"])
def test_what_was_trained_is_loaded_for_evaluation(tmp_path, is_merged):
    base = tmp_path / "base"
    tiny_model("qwen2").save_pretrained(base)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    )
    trainer, _ = trained(tmp_path / "run", model.train(), "adamuon")
    expected = logits(model)
    if is_merged:
        model.merge_and_unload().save_pretrained(tmp_path / "run" / "merged")
    else:
        trainer.save_model()
    [checkpoint] = checkpoints.find_checkpoints([str(tmp_path / "run" / "merged" if is_merged else tmp_path / "run")])
    assert (checkpoint.base is None) == is_merged
    loaded = checkpoints.load_model(checkpoint, tokens=VOCABULARY, dtype="float32", device="cpu")
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


# ---- TRL ----


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_sft_trainer_of_trl(tmp_path, optim):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in token_rows()])
    config = SFTConfig(
        **{**json.loads(json.dumps(FIXED_SFT)), "output_dir": str(tmp_path), "optim": optim},
        optim_args="lora=b_only,matrix_lr=2e-3",
    )
    trainer = SFTTrainer(
        tiny_model("qwen2"),
        config,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules=TARGETS),
    )
    before = trainable(trainer.model)
    trainer.train()
    matrices = {name for group in groups_of(trainer, "matrix") for name in group["param_names"]}
    assert matrices == {name for name in before if "lora_B" in name}
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path))
    assert torch.equal(logits(loaded), logits(trainer.model))


FIXED_SFT = {
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


def tokenizer():
    """A tokenizer of ``VOCABULARY`` words, which SFTTrainer asks for its special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w0")
