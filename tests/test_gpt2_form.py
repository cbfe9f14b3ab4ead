"""GPT-2 in the papers' form against a reference in float64, typed from its definition; and how its weights start."""

import math

import gpt2
import pytest
import torch
from recipe_arguments import RecipeArguments
from task import initial_model
from tasks import CausalLanguageModeling
from tiny_recipe import TOKENIZER
from torch import Tensor

HEADS, WIDTH, LAYERS, WORDS, BLOCK = 4, 128, 4, 2048, 40


def tiny_model(seed: int = 0) -> torch.nn.Module:
    task, preset = CausalLanguageModeling(), gpt2.PRESETS["tiny"]
    arguments = RecipeArguments(preset="tiny", tokenizer=str(TOKENIZER))
    config = task.build_config(preset, task.load_tokenizer(arguments), arguments)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (LAYERS, WIDTH, HEADS)
    return initial_model(task, preset, config, seed, task.attention)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: pair (i, i + h/2) of a head of width h at position t is turned by t 10000^(-2i/h)."""
    *_, length, width = x.shape
    angles = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference_loss(parameters: dict[str, Tensor], input_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of (batch, T) targets; ``parameters`` are float64."""
    embedding = parameters["model.embed_tokens.weight"]
    x = embedding[input_ids]
    batch, length, _ = x.shape
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    for layer in range(LAYERS):
        p = {name.removeprefix(f"model.layers.{layer}."): value for name, value in parameters.items()}
        h = layer_norm(x, p["input_layernorm.weight"], p["input_layernorm.bias"])
        q, k, v = (
            (h @ p[f"self_attn.{name}_proj.weight"].T).view(batch, length, HEADS, -1).transpose(1, 2) for name in "qkv"
        )
        scores = rotate(q) @ rotate(k).mT / math.sqrt(WIDTH / HEADS)
        attended = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v
        x = x + attended.transpose(1, 2).reshape(batch, length, WIDTH) @ p["self_attn.o_proj.weight"].T
        h = layer_norm(x, p["post_attention_layernorm.weight"], p["post_attention_layernorm.bias"])
        h = h @ p["mlp.c_fc.weight"].T
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        x = x + h @ p["mlp.c_proj.weight"].T
    x = layer_norm(x, parameters["model.norm.weight"], parameters["model.norm.bias"])
    log_probabilities = (x @ embedding.T).log_softmax(-1)
    return -log_probabilities.gather(-1, targets[..., None]).mean()


def test_the_form_is_the_reference() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms unlike 1 and 0, weights large enough for attention to choose
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    input_ids, targets = torch.randint(0, WORDS, (2, 3, BLOCK), generator=generator)
    parameters = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    expected = reference_loss(parameters, input_ids, targets)
    expected.backward()
    loss = model.double()(input_ids=input_ids, labels=targets, shift_labels=targets).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)  # transformers keeps norms and softmax in float32
    for name, parameter in model.named_parameters():
        wanted = parameters[name].grad
        assert wanted is not None
        assert torch.linalg.norm(parameter.grad - wanted) < 1e-5 * torch.linalg.norm(wanted), name


def test_matrices_into_the_residual_stream_start_smaller() -> None:
    model = tiny_model()
    scaled = 0.02 / math.sqrt(2 * LAYERS)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            deviation = scaled if "o_proj" in name or "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(deviation, rel=0.03), name


def test_initial_weights_are_a_function_of_the_seed() -> None:
    one, same, other = ([*model.parameters()] for model in (tiny_model(1), tiny_model(1), tiny_model(2)))
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])
