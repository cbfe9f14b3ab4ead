"""Bounds of attention logits: above every logit of a forward, as tight as said, and absent where nothing is known."""

import pytest
import torch
from tiny_models import random_tokens, tiny_lora_model, tiny_model
from torch import nn
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

from hf_matrix_optim.attention_logit_bounds import LogitBound, find_logit_bounds, largest_logits
from hf_matrix_optim.attention_projections import projections_of

KNOWN = ["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", "gpt2", "bert", "roberta", "esm"]
logits: dict[int, torch.Tensor] = {}


def recording_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Eager attention without a mask that keeps the largest absolute logit of each head."""
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    logits[id(module)] = scores.abs().amax(dim=(0, 2, 3))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("recording", recording_attention)


def large_and_uneven(model: nn.Module) -> nn.Module:
    """Weights, gains and biases of all sizes, so that nothing of the bound is hidden by ones and zeros."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.7)
    model.set_attn_implementation("recording")
    return model.eval()


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("with_gains", [True, False])
def test_no_logit_is_above_the_bound(name, with_gains):
    model = tiny_model(name)
    if with_gains:
        model = large_and_uneven(model)
    model.set_attn_implementation("recording")
    model.eval()
    found, left_out = find_logit_bounds(model)
    assert len(found) == 2
    assert not left_out
    logits.clear()
    with torch.no_grad():
        model(random_tokens(8, 30))
    for each in found:
        seen, bound = logits[id(each.projections.module)], each.of_heads()
        assert bound.shape == seen.shape
        assert (seen <= bound * (1 + 1e-5)).all()
        assert (seen > bound / 200).all()  # neither infinite nor of other weights


@pytest.mark.parametrize("name", ["llama", "gpt2", "esm"])
def test_bound_is_its_formula(name):
    """In float64 with singular values, projections written down by hand."""
    model = large_and_uneven(tiny_model(name))
    found = find_logit_bounds(model)[0][1]
    if name == "llama":
        layer = model.model.layers[1]
        weights = [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight]
        biases, norm, heads, scaling = None, layer.input_layernorm, (4, 2), 8**-0.5
    elif name == "gpt2":
        layer = model.transformer.h[1]
        weights = layer.attn.c_attn.weight.T.split(32)[:2]
        biases, norm, heads, scaling = layer.attn.c_attn.bias.split(32)[:2], layer.ln_1, (4, 4), 8**-0.5
    else:
        layer = model.esm.encoder.layer[1].attention
        weights = [layer.self.query.weight, layer.self.key.weight]
        biases = [layer.self.query.bias, layer.self.key.bias]
        norm, heads, scaling = layer.LayerNorm, (4, 4), 8**-0.5
    largest = []
    for i, weight in enumerate(weights):
        weight = weight.detach().double()
        seen = weight * norm.weight.detach().double()
        offset = torch.zeros(weight.size(0), dtype=torch.float64)
        if biases is not None:
            offset = weight @ norm.bias.detach().double() + biases[i].detach().double()
            seen = seen @ (torch.eye(32, dtype=torch.float64) - 1 / 32)
        spectral = torch.linalg.matrix_norm(seen.view(heads[i], 8, 32), 2)
        largest.append(32**0.5 * spectral + offset.view(heads[i], 8).norm(dim=1))
    exact = scaling * largest[0] * largest[1].repeat_interleave(heads[0] // heads[1])
    bound = found.of_heads().double()
    assert (bound >= exact * (1 - 1e-5)).all()
    assert (bound <= exact * 8 ** (2 / 512) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2", "esm"])
@pytest.mark.parametrize("max_bytes", [1, 2**13, 2**28])
def test_largest_of_many_modules(name, max_bytes):
    """Modules that are computed together, some at a time, or one by one; one of them of another form."""
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    model = large_and_uneven(tiny_model(name, **{layers: 5}))
    found = find_logit_bounds(model)[0]
    found[1].input_norm.bias = None  # of RMS norms none
    expected = torch.stack([each.of_heads().max() for each in found])
    assert len(set(expected.tolist())) == len(found) == 5
    torch.testing.assert_close(largest_logits(found, max_bytes=max_bytes), expected)


def test_rows_that_do_not_lie_together():
    """GPT-NeoX has each head's query, key and value side by side; its norm is given here, not looked up."""
    model = large_and_uneven(tiny_model("gpt_neox"))
    layer = model.gpt_neox.layers[0]
    found = projections_of("attention", layer.attention)
    weight, bias = (p.detach() for p in layer.attention.query_key_value.parameters())
    heads = found.heads
    weights = weight.view(heads, 3, -1, 32)
    biases = bias.view(heads, 3, -1)
    separate = LogitBound(found, found.scaling, layer.input_layernorm).of_heads()
    exact = []
    for i in range(2):
        offset = weights[:, i] @ layer.input_layernorm.bias.detach() + biases[:, i]
        seen = weights[:, i] * layer.input_layernorm.weight.detach()
        seen = seen - seen.mean(-1, keepdim=True)
        exact.append(32**0.5 * torch.linalg.matrix_norm(seen, 2) + offset.norm(dim=-1))
    torch.testing.assert_close(separate, found.scaling * exact[0] * exact[1], rtol=0.01, atol=0)


def test_qk_norm_bounds_by_its_gains():
    model = tiny_model("qwen3")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_norm.weight.fill_(0.5)
        attention.k_norm.weight[3] = -7.0
        attention.q_proj.weight.mul_(1000)  # normed away
    bound = find_logit_bounds(model)[0][0].of_heads()
    torch.testing.assert_close(bound, torch.full((4,), 8**-0.5 * 8 * 0.5 * 7.0))


def test_mistral_and_scaled_rotary_embeddings():
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    plain = MistralForCausalLM(MistralConfig(**values))
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    model = MistralForCausalLM(MistralConfig(**values, rope_parameters=yarn, max_position_embeddings=512))
    model.load_state_dict(plain.state_dict())
    bounds = [large_and_uneven(m) and find_logit_bounds(m)[0][0] for m in (plain, model)]
    factor = model.model.rotary_emb.attention_scaling
    assert factor > 1
    torch.testing.assert_close(bounds[1].of_heads(), bounds[0].of_heads() * factor**2)
    logits.clear()
    with torch.no_grad():
        model(random_tokens(8, 30))
    assert (logits[id(bounds[1].projections.module)] <= bounds[1].of_heads()).all()


def test_what_is_left_out_says_why():
    for name, class_name, reason in (
        ("gpt_neox", "GPTNeoXAttention", "not in the table"),
        ("deepseek_v3", "DeepseekV3Attention", "latent attention"),
        ("gpt2_cross_attention", "GPT2Attention", "cross-attention"),
    ):
        _, left_out = find_logit_bounds(tiny_model(name, device="meta"))
        assert reason in left_out[class_name]
    found, left_out = find_logit_bounds(tiny_lora_model("qwen2"))
    assert not found
    assert "q_proj" in left_out["Qwen2Attention"]
    assert find_logit_bounds(tiny_model("resnet", device="meta")) == ([], {})
