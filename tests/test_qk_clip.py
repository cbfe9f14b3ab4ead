"""QK-Clip: what it sees against eager attention's own logits, what it leaves alone bitwise, what it refuses."""

import contextlib
import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from block_attention import FULL_BLOCK, PADDED_BLOCK, register_block_attention
from no_questions import NoQuestions
from tiny_models import random_tokens, tiny_lora_model, tiny_model
from tiny_training import OPTIMIZER_NAMES, arguments, optimizer_of, state_tensors, token_rows
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_utils import AttentionInterface

from hf_matrix_optim import MatrixTrainer, attention_logits, create_optimizer, registration
from hf_matrix_optim.attention_logits import raise_to_largest_logits
from hf_matrix_optim.attention_projections import UnknownAttentionError, attention_modules, projections_of
from hf_matrix_optim.options import AdaMuonOptions, MuonOptions
from hf_matrix_optim.qk_clip import QKClip
from hf_matrix_optim.qk_clip_callback import QKClipCallback

#: Every layout: Conv1D, grouped queries, a window, biases, a query scaled in the forward, fused parts, interleaving.
FAMILIES = {
    "gpt2": {},
    "qwen2": {},
    "starcoder2": {"sliding_window": 4},
    "bert": {},
    "esm": {"position_embedding_type": "rotary"},
    "opt": {"word_embed_proj_dim": 32},
    "gpt_neox": {},
    "phi3": {},
    "modernbert": {"local_attention": 4},
    "distilbert": {},
}
MASKED = torch.finfo(torch.float32).min / 2


def large_model(name: str, attention: str = "eager", **configuration: Any) -> nn.Module:
    """A model in float64 without dropout, whose logits are about 1."""
    model = tiny_model(name, **configuration).double()
    model.set_attn_implementation(attention)
    model.set_experts_implementation("eager")  # the others are not for float64
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout"):  # rates of attention that calls the function
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 8
            elif not parameter.any():  # biases, which are scaled too
                parameter += torch.linspace(-0.3, 0.3, parameter.numel())
    return model


def inputs(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Two rows, the second of which is padded."""
    tokens = random_tokens(2, 11, seed=seed)
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, 7:] = 0
    return {"input_ids": tokens, "attention_mask": attention_mask}


@contextlib.contextmanager
def eager_logits() -> Iterator[list[Tensor]]:
    """The logits of eager attention: all that it puts into a softmax, (batch, heads, queries, keys) each."""
    found: list[Tensor] = []
    softmax = nn.functional.softmax

    def recorded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == 4:
            found.append(x.detach().clone())
        return softmax(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", recorded)
        yield found


def largest_of(logits: Tensor) -> Tensor:
    """Largest unmasked logit of each head, (heads,)."""
    return torch.where(logits > MASKED, logits, -torch.inf).amax(dim=(0, 2, 3))


def still(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that changes nothing, so that the logits of the next forward are those of the last, clipped."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Who attaches detaches: no test leaves transformers' attention changed."""
    before = AttentionInterface.get_interface
    yield
    assert AttentionInterface.get_interface is before


@contextlib.contextmanager
def attached(model: nn.Module, threshold: float, optimizer: torch.optim.Optimizer) -> Iterator[QKClip]:
    clip = QKClip(model, threshold).attach(optimizer)
    try:
        yield clip
    finally:
        clip.detach()


def seen(clip: QKClip) -> list[Tensor]:
    return [site.watch.max_logits.clone() for site in clip._sites]


# ---- what is seen ----


@pytest.mark.parametrize("name", FAMILIES)
def test_the_largest_logits_are_those_of_eager_attention(name):
    model = large_model(name, **FAMILIES[name])
    with attached(model, 1e9, still(model)) as clip:
        with eager_logits() as expected:
            model(**inputs(model))
        by_eager = seen(clip)
        assert len(by_eager) == len(expected) == 2
        for found, logits in zip(by_eager, expected, strict=True):
            torch.testing.assert_close(found, largest_of(logits), rtol=1e-6, atol=1e-6)
    model.set_attn_implementation("sdpa")
    for batch in (inputs(model), {"input_ids": inputs(model)["input_ids"]}):  # with a mask, and with the causal flag
        model.set_attn_implementation("eager")
        with eager_logits() as expected:
            model(**batch)
        model.set_attn_implementation("sdpa")
        with attached(model, 1e9, still(model)) as clip:
            model(**batch)
            for found, logits in zip(seen(clip), expected, strict=True):
                torch.testing.assert_close(found, largest_of(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma", "mixtral", "roberta", "bart", "whisper", "wav2vec2", "vit", "clip_classifier"]
)
def test_other_families(name, attention):
    """Encoder-decoders with cross-attention, speech and vision, in float32."""
    model = large_model(name).float()
    model.config.layerdrop = 0.0  # which leaves out layers at random
    model.config.apply_spec_augment = False
    if name in ("vit", "clip_classifier"):
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif name == "wav2vec2":
        batch = {"input_values": torch.randn(2, 400)}
    elif name == "whisper":
        length = 2 * model.config.max_source_positions
        batch = {
            "input_features": torch.randn(2, model.config.num_mel_bins, length),
            "decoder_input_ids": random_tokens(2, 9),
        }
    else:
        batch = inputs(model)
    with eager_logits() as expected:
        model(**batch)
    model.set_attn_implementation(attention)
    with attached(model, 1e9, still(model)) as clip:
        model(**batch)
        assert len(clip._sites) == len(expected)
        for found, logits in zip(seen(clip), expected, strict=True):
            torch.testing.assert_close(found, largest_of(logits), rtol=1e-3, atol=1e-4)


def test_it_keeps_the_largest_of_micro_batches_and_does_not_look_at_evaluation():
    model = large_model("qwen2", "sdpa")
    batches = [inputs(model, seed) for seed in (1, 2, 3)]
    with attached(model, 1e9, still(model)) as clip:
        each = []
        for batch in batches:
            for site in clip._sites:
                site.watch.max_logits.fill_(-torch.inf)
            model(**batch)
            each.append(torch.stack(seen(clip)))
        for site in clip._sites:
            site.watch.max_logits.fill_(-torch.inf)
        for batch in batches[:2]:
            model(**batch)
        model.eval()
        model(**batches[2])
        assert torch.equal(torch.stack(seen(clip)), torch.maximum(each[0], each[1]))
        assert not torch.equal(torch.maximum(each[0], each[1]), torch.stack(each).amax(0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    found = []
    for checkpointed in (False, True):
        model = large_model("qwen2", "sdpa")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with attached(model, 1.0, torch.optim.SGD(model.parameters(), lr=0.01)) as clip:
            batch = inputs(model)
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
            clip._optimizer.step()
            assert clip.drain()["qk_clip/clipped_heads"] > 0
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [FULL_BLOCK, PADDED_BLOCK])
def test_the_block_attention_of_the_recipes(name):
    register_block_attention()
    model = large_model("esm" if name == PADDED_BLOCK else "qwen2", "sdpa")
    batch = inputs(model) if name == PADDED_BLOCK else {"input_ids": inputs(model)["input_ids"]}
    found = []
    for attention in ("sdpa", name):
        model.set_attn_implementation(attention)
        with attached(model, 1e9, still(model)) as clip:
            model(**batch)
            found.append(torch.stack(seen(clip)))
    assert torch.equal(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_models_are_seen_without_a_graph_break(checkpointing):
    torch._dynamo.reset()
    model = large_model("qwen2", "sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {**inputs(model), "labels": inputs(model)["input_ids"], "use_cache": False}
    with attached(model, 1e9, still(model)) as clip:
        model(**batch)
        expected = torch.stack(seen(clip))
        for site in clip._sites:
            site.watch.max_logits.fill_(-torch.inf)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(**batch).loss.backward()
        torch.testing.assert_close(torch.stack(seen(clip)), expected, rtol=1e-12, atol=0)
        clip.threshold = float(expected.min())
        clip._optimizer.step()
        compiled(**batch)
        torch.testing.assert_close(float(seen(clip)[0].max()), clip.threshold, rtol=1e-6, atol=0)


# ---- the look itself ----

MASKS: dict[str, Any] = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 9, 13) > 0.3,
    "bool by head": lambda: torch.rand(2, 6, 9, 13) > 0.3,
    "bool for all queries": lambda: torch.rand(1, 1, 1, 13) > 0.3,
    "additive": lambda: torch.where(torch.rand(2, 1, 9, 13) > 0.3, 0.0, torch.finfo(torch.float32).min),
    "infinite": lambda: torch.where(torch.rand(2, 1, 9, 13) > 0.3, 0.0, -torch.inf),
    "additive bias": lambda: torch.where(torch.rand(2, 6, 9, 13) > 0.3, torch.randn(2, 6, 9, 13), -torch.inf),
}


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cap", [attention_logits.MAX_LOGITS_BYTES, 3000, 1])
@pytest.mark.parametrize("keys", [13, 5])
def test_chunks_and_masks_against_the_whole_product(monkeypatch, kv_heads, mask, cap, keys):
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 9, 4), torch.randn(2, kv_heads, keys, 4)
    logits = query @ key.repeat_interleave(6 // kv_heads, dim=1).mT * 0.5
    tensor = MASKS[mask]()
    causal = tensor is None
    if causal:
        allowed = torch.ones(9, keys, dtype=torch.bool).tril()
    else:
        tensor = tensor[..., :keys]
        allowed = tensor if tensor.dtype == torch.bool else tensor > MASKED
    expected = torch.where(allowed, logits, -torch.inf).amax(dim=(0, 2, 3))
    found = torch.full((6,), -torch.inf)
    monkeypatch.setattr(attention_logits, "MAX_LOGITS_BYTES", cap)
    raise_to_largest_logits(found, query, key, tensor, 0.5, causal)
    torch.testing.assert_close(found, expected)
    raise_to_largest_logits(found, query * 0.1, key, tensor, 0.5, causal)
    torch.testing.assert_close(found, expected)


def test_chunks_stay_below_the_cap(monkeypatch):
    largest = 0
    amax = Tensor.amax

    def recorded(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, self.numel() * self.element_size())
        return amax(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "amax", recorded)
    monkeypatch.setattr(attention_logits, "MAX_LOGITS_BYTES", 20_000)
    raise_to_largest_logits(torch.zeros(4), torch.randn(2, 4, 50, 8), torch.randn(2, 2, 60, 8), None, 1.0, False)
    assert 10_000 < largest <= 20_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_keeps_its_value(value):
    query = torch.ones(1, 3, 2, 4)
    query[0, 1, 0, 0] = value
    found = torch.tensor([1.0, 2.0, 3.0])
    raise_to_largest_logits(found, query, torch.ones(1, 3, 2, 4), None, 1.0, False)
    assert found.tolist() == [4.0, 2.0, 4.0]


def test_half_precision_does_not_overflow():
    found = torch.zeros(1)
    raise_to_largest_logits(
        found, torch.full((1, 1, 1, 4), 3e4).half(), torch.full((1, 1, 1, 4), 4.0).half(), None, 1.0, False
    )
    assert found.item() == 4 * 3e4 * 4
    with torch.autocast("cpu", torch.bfloat16):
        raise_to_largest_logits(found, torch.full((1, 1, 1, 1), 1e6 + 1), torch.ones(1, 1, 1, 1), None, 1.0, False)
    assert found.item() == 1e6 + 1


def test_the_operator_is_one_of_torchs():
    arguments_of = (torch.zeros(4), torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.ones(1, 1, 5, 5) > 0, 1.0)
    torch.library.opcheck(raise_to_largest_logits, (*arguments_of, False))
    torch.library.opcheck(raise_to_largest_logits, (*arguments_of[:3], None, 1.0, True))


def test_nothing_waits_for_a_device():
    model = large_model("qwen2", "sdpa")
    batch = {"input_ids": inputs(model)["input_ids"]}
    with attached(model, 0.5, still(model)) as clip:
        model(**batch)
        clip._optimizer.step()  # the check of the first step may wait
        query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
        with NoQuestions():
            raise_to_largest_logits(clip._sites[0].watch.max_logits, query, key, None, 1.0, True)
            clip.clip()
        assert clip.drain()["qk_clip/clipped_heads"] > 4


# ---- what is clipped ----


def one_layer(name: str) -> dict[str, Any]:
    """So that every logit is of weights that no other clip changes the input of."""
    layers = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(name, "num_hidden_layers")
    return {**FAMILIES[name], layers: 1}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_clipped_heads_are_at_the_threshold_and_the_others_bitwise_unchanged(name, count):
    """The logits of one batch, by eager attention, before and after a step that changes nothing but by the clip."""
    model = large_model(name, **one_layer(name))
    with eager_logits() as logits:
        model(**inputs(model))
        before = largest_of(logits[0])
        order = before.argsort(descending=True)
        below = float(before[order[count]]) if count < 4 else 0.5 * float(before[order[3]])
        threshold = (float(before[order[count - 1]]) + below) / 2
        weights = copy.deepcopy(model.state_dict())
        with attached(model, threshold, still(model)) as clip:
            model(**inputs(model))
            clip._optimizer.step()
            report = clip.drain()
            model(**inputs(model))
    after = logits[-1]
    for head in range(4):
        if head in order[:count]:
            torch.testing.assert_close(float(largest_of(after)[head]), threshold, rtol=1e-6, atol=0)
        else:
            assert torch.equal(after[:, head], logits[1][:, head])
    torch.testing.assert_close(report["qk_clip/max_logit"], float(before.max()), rtol=1e-6, atol=0)
    assert report["qk_clip/clipped_heads"] == count
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])}
    found = projections_of(*attention_modules(model)[0])
    parts = (found.query,) if found.kv_heads < found.heads else (found.query, found.key)
    assert changed <= {f"{part.name}.{leaf}" for part in parts for leaf in ("weight", "bias")}
    assert {f"{part.name}.weight" for part in parts} <= changed


def test_equal_numbers_of_heads_share_the_factor_and_values_are_not_touched():
    model = large_model("gpt2", n_layer=1)
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    with attached(model, 1e-3, still(model)) as clip:
        model(**inputs(model))
        factors = (1e-3 / seen(clip)[0]).sqrt().repeat_interleave(8)
        clip._optimizer.step()
    torch.testing.assert_close(weight[:, :32], before[:, :32] * factors, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight[:, 32:64], before[:, 32:64] * factors, rtol=1e-6, atol=0)
    assert torch.equal(weight[:, 64:], before[:, 64:])


def test_attention_with_sinks():
    """GPT-OSS puts a sink beside the keys and shifts its logits, so they are compared with what is seen itself."""
    model = large_model("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    with attached(model, 1e9, still(model)) as clip:
        for _ in range(2):
            model(**inputs(model))
            before, clip.threshold = clip.threshold, float(seen(clip)[0].min()) * 0.9
            assert before == 1e9 or seen(clip)[0].tolist() == pytest.approx([before] * 4, rel=1e-6)
            clip._optimizer.step()
        assert clip.drain()["qk_clip/clipped_heads"] == 8


def test_weights_in_bfloat16_are_rounded_once():
    model = large_model("qwen2", "sdpa").bfloat16()
    projection = model.model.layers[0].self_attn.q_proj
    before = projection.weight.detach().clone()
    with attached(model, 0.1, still(model)) as clip:
        model(**inputs(model))
        factors = (0.1 / seen(clip)[0]).clamp(max=1).repeat_interleave(8)
        clip._optimizer.step()
    assert torch.equal(projection.weight, (before.float() * factors[:, None]).bfloat16())
    assert not torch.equal(projection.weight, before)


def test_a_head_that_is_not_finite_is_left_alone():
    model = large_model("bert", num_hidden_layers=1)
    query = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        query.weight[3] = float("inf")  # of head 0
    before = query.weight.detach().clone()
    with attached(model, 0.01, still(model)) as clip:
        model(**inputs(model))
        clip._optimizer.step()
        assert clip.drain()["qk_clip/clipped_heads"] == 3
    assert torch.equal(query.weight[:8], before[:8])
    assert not (query.weight[8:] == before[8:]).any()


def test_a_skipped_step_clips_nothing_and_keeps_what_was_seen():
    model = large_model("gpt2", "sdpa").float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    batch = inputs(model)
    before = copy.deepcopy(model.state_dict())
    with attached(model, 0.01, optimizer) as clip:
        for is_bad in (True, False):
            loss = model(**batch, labels=batch["input_ids"]).loss
            scaler.scale(loss * float("inf") if is_bad else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if is_bad:
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
                assert all(found.isfinite().all() for found in seen(clip))
        assert clip.drain()["qk_clip/clipped_heads"] > 0
    assert all(value.isfinite().all() for value in model.state_dict().values())


# ---- in training ----


def trained(
    folder, trainer_class: Any = Trainer, attention: str = "sdpa", model: str = "qwen2", **values: Any
) -> Trainer:
    extra = {"optimizer_options": values.pop("optimizer_options")} if "optimizer_options" in values else {}
    network = tiny_model(model)
    network.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "q_proj.weight" in name or "c_attn.weight" in name:
                parameter *= 30
    trainer = trainer_class(network, arguments(folder, **values), train_dataset=token_rows(), **extra)
    trainer.train()
    return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in OPTIMIZER_NAMES), ("muon", "eager")])
def test_training_is_bit_identical_where_no_head_reaches_the_threshold(tmp_path, name, attention):
    off = trained(tmp_path, optim=name, attention=attention)
    on = trained(tmp_path, optim=name, attention=attention, optim_args="qk_clip=1e9")
    one, other = (state_tensors(run.model, optimizer_of(run)) for run in (off, on))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    assert [entry["loss"] for entry in off.state.log_history[:-1]] == [
        entry["loss"] for entry in on.state.log_history[:-1]
    ]
    assert not logged(off, "qk_clip/max_logit")
    assert len(logged(on, "qk_clip/max_logit")) == 6
    assert logged(on, "qk_clip/clipped_heads") == [0] * 6


@pytest.mark.parametrize("model", ["qwen2", "gpt2"])
def test_logits_that_grow_are_held(tmp_path, model):
    values = {"optim": "muon", "model": model, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 30}
    free = logged(trained(tmp_path, optim_args="qk_clip=1e9", **values), "qk_clip/max_logit")
    held = trained(tmp_path, optim_args="qk_clip=5", **values)
    assert max(free[-10:]) > 25
    assert max(logged(held, "qk_clip/max_logit")[-10:]) < 15  # at this learning rate a single step adds that much
    assert sum(logged(held, "qk_clip/clipped_heads")) > 30
    assert isinstance(logged(held, "qk_clip/clipped_heads")[0], int)


def test_logs_cover_all_steps_since_the_last(tmp_path):
    values = {"optim": "muon", "optim_args": "qk_clip=0.5", "learning_rate": 0.05}
    each = trained(tmp_path, **values, logging_steps=1)
    rarely = trained(tmp_path, **values, logging_steps=3)
    for key, together in (("qk_clip/max_logit", max), ("qk_clip/clipped_heads", sum)):
        by_step = logged(each, key)
        assert logged(rarely, key) == [together(by_step[:3]), together(by_step[3:])]


def test_micro_batches_clip_as_one_batch(tmp_path):
    runs = [
        trained(tmp_path, optim="muon", optim_args="qk_clip=1,map_dtype=float32", max_steps=3, **values)
        for values in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    ]
    assert logged(runs[0], "qk_clip/clipped_heads") == logged(runs[1], "qk_clip/clipped_heads")
    for one, other in zip(*(logged(run, "qk_clip/max_logit") for run in runs), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_autocast_to_bfloat16(tmp_path):
    single = trained(tmp_path, optim="muon", optim_args="qk_clip=0.5")
    mixed = trained(tmp_path, optim="muon", optim_args="qk_clip=0.5", bf16=True)
    assert logged(mixed, "qk_clip/max_logit")[0] == pytest.approx(logged(single, "qk_clip/max_logit")[0], rel=0.02)
    assert logged(mixed, "qk_clip/clipped_heads")[0] > 0


def test_options_as_a_dataclass_where_the_import_hook_is_off(tmp_path, monkeypatch):
    monkeypatch.setattr(registration, "accepted_names", {})
    monkeypatch.setattr("hf_matrix_optim.trainer.accepted_names", {})
    default = [callback for callback in transformers.trainer.DEFAULT_CALLBACKS if callback is not QKClipCallback]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", default)
    trainer = trained(tmp_path, MatrixTrainer, optimizer_options=AdaMuonOptions(qk_clip=0.5))
    assert sum(logged(trainer, "qk_clip/clipped_heads")) > 0
    assert len([c for c in trainer.callback_handler.callbacks if isinstance(c, QKClipCallback)]) == 1


def test_with_the_hook_there_is_one_callback_and_nothing_is_left_after_training(tmp_path):
    trainer = trained(tmp_path, MatrixTrainer, optim="muon", optim_args="qk_clip=0.5")
    assert len([c for c in trainer.callback_handler.callbacks if isinstance(c, QKClipCallback)]) == 1
    assert not hasattr(optimizer_of(trainer), "qk_clip")
    assert not any(attention_logits._WATCH in vars(module) for module in trainer.model.modules())
    trainer.train()  # once more, with another optimizer
    assert not any(attention_logits._WATCH in vars(module) for module in trainer.model.modules())


def test_a_training_that_fails_leaves_nothing_to_the_next(tmp_path):
    class Failing(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = Trainer(
        tiny_model("qwen2"),
        arguments(tmp_path, optim="muon", optim_args="qk_clip=0.5"),
        train_dataset=token_rows(),
        callbacks=[Failing()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Failing)
    trainer.train()


def test_without_trainer_the_optimizer_has_it():
    model = large_model("qwen2", "sdpa")
    optimizer = create_optimizer("muon", model, lr=1e-3, options=MuonOptions(qk_clip=0.5))
    try:
        batch = inputs(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        assert optimizer.qk_clip.drain()["qk_clip/clipped_heads"] > 0
        assert "qk_clip" not in optimizer.state_dict()["param_groups"][0]
        with pytest.raises(RuntimeError, match="attached already"):
            optimizer.qk_clip.attach(optimizer)
        given = Trainer(
            model.float(),
            arguments("unused", max_steps=2, use_cpu=True),
            train_dataset=token_rows(),
            optimizers=(optimizer, None),
        )
        given.train()  # logs what its own does, and leaves it attached
        assert len(logged(given, "qk_clip/max_logit")) == 2
        assert optimizer.qk_clip is not None
    finally:
        optimizer.qk_clip.detach()
    assert not hasattr(optimizer, "qk_clip")


def test_nothing_is_left_when_model_and_optimizer_are_gone():
    before = AttentionInterface.get_interface
    create_optimizer("muon", tiny_model("qwen2"), lr=1e-3, options=MuonOptions(qk_clip=0.5))
    model = tiny_model("qwen2")
    optimizer = create_optimizer("muon", model, lr=1e-3, options=MuonOptions(qk_clip=0.5))
    gc.collect()
    assert AttentionInterface.get_interface is not before  # the second is still there
    del optimizer
    gc.collect()
    assert AttentionInterface.get_interface is before
    optimizer = create_optimizer("muon", model, lr=1e-3, options=MuonOptions(qk_clip=0.5))
    optimizer.qk_clip.detach()
    del optimizer
    gc.collect()
    with attached(model, 1.0, still(model)):  # nothing was counted twice
        assert AttentionInterface.get_interface is not before


def test_copies_of_a_watched_model_are_not_watched():
    model = large_model("qwen2", "sdpa")
    with attached(model, 1e9, still(model)) as clip:
        copied = copy.deepcopy(model)
        assert b"hf_matrix_optim" not in pickle.dumps(model)
        copied(**inputs(model))
        assert not torch.stack(seen(clip)).isfinite().any()
        model(**inputs(model))
        assert torch.stack(seen(clip)).isfinite().all()
    assert not hasattr(copy.deepcopy(still(model)), "qk_clip")


def test_an_optimizer_in_a_wrapper_of_accelerates():
    model = large_model("qwen2", "sdpa")
    wrapped = Accelerator(cpu=True).prepare_optimizer(still(model))
    with attached(model, 0.5, wrapped) as clip:
        model(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
        wrapped.step()
        assert clip.drain()["qk_clip/clipped_heads"] > 0


def test_steps_after_the_last_log_are_in_the_summary(tmp_path):
    trainer = trained(tmp_path, optim="muon", optim_args="qk_clip=0.5", logging_steps=4, max_steps=6)
    entries = [entry for entry in trainer.state.log_history if "qk_clip/max_logit" in entry]
    assert [entry["step"] for entry in entries] == [4, 6]
    assert "train_runtime" in entries[1]


# ---- what is refused ----


def test_what_it_is_not_attached_to():
    model = tiny_model("qwen2")
    with pytest.raises(TypeError, match="is attached to a torch.optim.Optimizer, not to NoneType"):
        QKClip(model, 1.0).attach(None)
    optimizer = still(model)
    with (
        attached(model, 1.0, optimizer),
        pytest.raises(RuntimeError, match=r"has a QKClip already: optimizer.qk_clip.detach\(\) it first"),
    ):
        QKClip(model, 2.0).attach(optimizer)


def test_a_threshold_out_of_range():
    for value in (0.0, -1.0, float("inf"), float("nan"), True, "100"):
        with pytest.raises(ValueError, match=f"qk_clip={value!r} is not allowed: the threshold must be above 0"):
            create_optimizer("muon", tiny_model("qwen2"), lr=1e-3, options=MuonOptions(qk_clip=value))
        with pytest.raises(ValueError, match="must be above 0 and finite"):
            QKClip(tiny_model("qwen2"), value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3", r"model.layers.0.self_attn \(Qwen3Attention\) queries or keys are normalised .* \(q_norm\)"),
        ("deepseek_v3", r"\(DeepseekV3Attention\) is multi-head latent attention"),
        ("llama4", "is of a class whose forward is not known: Llama4TextAttention"),
        ("bloom", "is of a class whose forward is not known: BloomAttention"),
        ("t5", "is of a class whose forward is not known: T5Attention"),
        ("deberta", "is of a class whose forward is not known: DisentangledSelfAttention"),
        ("siglip", "is of a class whose forward is not known: MultiheadAttention"),
        ("gpt2_cross_attention", "has no query, key and value in c_attn of 64 rows"),
        ("mamba", "has no attention to clip in MambaForCausalLM: there is none in it"),
    ],
)
def test_models_that_cannot_be_clipped(name, message):
    with pytest.raises(ValueError, match=message) as error:
        QKClip(tiny_model(name), 100.0)
    assert "leave qk_clip out" in str(error.value)


def test_bounded_logits_and_clamped_projections():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = transformers.Gemma2Config(**sizes, **heads, head_dim=8, attn_logit_softcapping=50.0)
    with pytest.raises(ValueError, match=r"Gemma2Attention\) the logits are capped .*attn_logit_softcapping=50"):
        QKClip(transformers.Gemma2ForCausalLM(gemma), 100.0)
    gemma.attn_logit_softcapping = None
    QKClip(transformers.Gemma2ForCausalLM(gemma), 100.0)
    olmo = transformers.OlmoConfig(**sizes, **heads, clip_qkv=8.0)
    with pytest.raises(ValueError, match=r"OlmoAttention\) queries and keys are clamped \(clip_qkv=8"):
        QKClip(transformers.OlmoForCausalLM(olmo), 100.0)


def test_frozen_projections():
    model = tiny_model("qwen2")
    attention = [layer.self_attn for layer in model.model.layers]
    attention[0].k_proj.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn .*some of the weights and biases .* are frozen and some"
    ):
        QKClip(model, 100.0)
    attention[0].q_proj.requires_grad_(False)
    assert [site.projections.module for site in QKClip(model, 100.0)._sites] == [attention[1]]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no attention to clip .* the projections of all 2 are frozen"):
        QKClip(model, 100.0)


def test_adapters_quantised_and_other_projections():
    with pytest.raises(ValueError, match=r"q_proj has an adapter \(Linear\): its weight is a sum"):
        QKClip(tiny_lora_model(), 100.0)

    class Linear4bit(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = tiny_model("qwen2")
    attention = model.model.layers[0].self_attn
    whole = attention.k_proj
    attention.k_proj = Linear4bit(32, 16)
    with pytest.raises(ValueError, match="k_proj is a Linear4bit, quantised or unknown"):
        QKClip(model, 100.0)
    attention.k_proj = nn.Linear(32, 16)
    attention.k_proj.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"k_proj is quantised \(torch.int8\)"):
        QKClip(model, 100.0)
    attention.k_proj = nn.utils.parametrizations.weight_norm(nn.Linear(32, 16))
    with pytest.raises(ValueError, match="k_proj .*not a plain nn.Linear|k_proj has no weight of its own"):
        QKClip(model, 100.0)
    attention.k_proj = nn.Linear(32, 12)
    with pytest.raises(ValueError, match="32 query and 12 key rows, which are not heads of 8"):
        QKClip(model, 100.0)
    attention.k_proj = whole
    model.model.layers[1].self_attn.k_proj.weight = whole.weight
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.k_proj and model.layers.0.self_attn.k_proj are one weight"
    ):
        QKClip(model, 100.0)


def test_a_subclass_with_a_forward_of_its_own_is_not_known():
    model = tiny_model("qwen2")
    attention = model.model.layers[0].self_attn

    class Same(type(attention)):
        pass

    class Other(type(attention)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    attention.__class__ = Same
    QKClip(model, 100.0)
    attention.__class__ = Other
    with pytest.raises(ValueError, match="model.layers.0.self_attn is of a class whose forward is not known: Other"):
        QKClip(model, 100.0)
    with pytest.raises(UnknownAttentionError, match="Other"):
        projections_of("model.layers.0.self_attn", attention)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "of_ones_own"])
def test_attention_whose_mask_is_not_known(implementation):
    model = tiny_model("qwen2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "of_ones_own", lambda *args, **kwargs: None)
        model.config._attn_implementation = implementation
        with pytest.raises(ValueError, match=f"'{implementation}': use --attn_implementation sdpa"):
            QKClip(model, 100.0)
        model.set_attn_implementation("sdpa")
        with attached(model, 100.0, still(model)):
            model.config._attn_implementation = implementation  # later
            with pytest.raises(ValueError, match="use --attn_implementation sdpa"):
                model.model.layers[0].self_attn(
                    torch.zeros(1, 3, 32), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)), None
                )


def test_ways_to_spread_a_model(tmp_path):
    model = tiny_model("qwen2")
    with pytest.raises(NotImplementedError, match="DataParallel"):
        QKClip(nn.DataParallel(model), 100.0)
    args = arguments(tmp_path, optim="muon", optim_args="qk_clip=100")
    trainer = Trainer(model, args, train_dataset=token_rows())
    args._n_gpu = 2
    with pytest.raises(NotImplementedError, match="DataParallel, which Trainer uses for 2 GPUs of one process"):
        QKClipCallback().on_train_begin(args, None, None, model=model, optimizer=trainer.create_optimizer())
    args._n_gpu = 1
    args.parallelism_config = type("Parallelism", (), {"tp_size": 1, "cp_size": 2})()
    with pytest.raises(NotImplementedError, match="cp_size=2"):
        QKClipCallback().on_train_begin(args, None, None, model=model, optimizer=trainer.create_optimizer())
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        QKClip(model, 100.0)
    model._tp_size = None
    with attached(model, 100.0, still(model)) as clip:
        look = clip._sites[0].watch
        with pytest.raises(RuntimeError, match="expects 4 query and 2 key heads .* and sees 2 and 1"):
            attention_logits._look(look, torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8), None, is_sdpa=True)
        with pytest.raises(ValueError, match=r"does not know the attention mask .* Tensor\(2, 3\)"):
            attention_logits._look(
                look, torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), torch.ones(2, 3), is_sdpa=False
            )


def test_a_model_whose_attention_is_never_seen():
    model = tiny_model("qwen2")
    with attached(model, 100.0, still(model)) as clip:
        model.eval()
        model(**inputs(model))
        with pytest.raises(
            RuntimeError, match=r"seen no finite attention logit in training, of 2 modules .*model.train"
        ):
            clip._optimizer.step()


def test_a_module_that_did_not_attend_before_the_first_step_is_named(caplog):
    model = tiny_model("qwen2")
    with attached(model, 100.0, still(model)) as clip:
        model(**inputs(model))
        clip._sites[1].watch.max_logits.fill_(-torch.inf)
        clip._optimizer.step()
    assert "1 of 2 modules before the first step, the first of them model.layers.1.self_attn" in caplog.text


# ---- where queries and keys are ----


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "distilbert"])
def test_scaling_makes_logits_of_the_projections(name):
    """Of models without rotary embeddings: W_q x . W_k x * scaling, from the rows, is what eager attention has."""
    model = large_model(name, **FAMILIES[name])
    found = projections_of(*attention_modules(model)[0])
    outputs: dict[int, Tensor] = {}
    for part in (found.query, found.key):
        part.owner.register_forward_hook(lambda owner, args, output: outputs.update({id(owner): output}))
    with eager_logits() as logits:
        model(**inputs(model))
    query, key = (
        outputs[id(part.owner)].reshape(2, 11, -1)[..., part.rows].transpose(1, 2) for part in (found.query, found.key)
    )
    expected = query @ key.mT * found.scaling
    kept = logits[0] > MASKED
    torch.testing.assert_close(logits[0][kept], expected[kept])


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_nothing_waits_and_the_logits_are_those_of_the_cpu(dtype):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 300, 32), torch.randn(2, 2, 300, 32)
    query, key = query.to(dtype), key.to(dtype)
    expected, found = torch.full((4,), -torch.inf), torch.full((4,), -torch.inf, device="cuda")
    raise_to_largest_logits(expected, query.float(), key.float(), None, 0.2, True)
    model = large_model("qwen2", "sdpa").to("cuda", torch.float32)
    batch = {"input_ids": inputs(model)["input_ids"].cuda()}
    with attached(model, 0.5, still(model)) as clip:
        model(**batch)
        clip._optimizer.step()  # the check of the first step may wait
        query, key = query.cuda(), key.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            raise_to_largest_logits(found, query, key, None, 0.2, True)
            clip.clip()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert clip.drain()["qk_clip/clipped_heads"] > 0
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)
