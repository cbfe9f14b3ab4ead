"""Functional oracles: the parts that fused parameters are cut into are what the models use them for."""

from typing import Any

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch import Tensor, nn

from hf_matrix_optim.matrix_layout import split_parts
from hf_matrix_optim.partition import ParameterRoute, route_parameters


def seen_by(module: nn.Module, model: nn.Module, *, output: bool = False) -> Tensor:
    """First input (or output) of ``module`` in a forward pass of ``model``."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], result: Any) -> None:
        found = result if output else inputs
        seen.append((found[0] if isinstance(found, tuple) else found).detach().clone())

    handle = module.register_forward_hook(keep)
    extra = {}
    if model.config.model_type == "gpt2" and model.config.add_cross_attention:
        extra["encoder_hidden_states"] = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.eval()(input_ids=random_tokens(), **extra)
    handle.remove()
    return seen[0]


def parts_of(model: nn.Module, route: ParameterRoute) -> list[list[Tensor]]:
    """For each part of a fused weight: views of its rows in the weight and, if there is one, in the bias."""
    weight = model.get_parameter(route.name)
    parts = [[part] for part in split_parts(weight.data, route.layout)]
    owner = model.get_submodule(route.name.rpartition(".")[0])
    if isinstance(bias := getattr(owner, "bias", None), Tensor):
        for part, rows in zip(parts, bias.data.split(route.layout.split_sizes), strict=True):
            part.append(rows)
    return parts


OUTPUT_PROJECTIONS = {"c_attn": "c_proj", "qkv_proj": "o_proj", "Wqkv": "out_proj", "gate_up_proj": "down_proj"}


def output_projection(model: nn.Module, route: ParameterRoute) -> nn.Module:
    holder, _, attribute = route.name.removesuffix(".weight").rpartition(".")
    name = "Wo" if model.config.model_type == "modernbert" else OUTPUT_PROJECTIONS[attribute]
    return model.get_submodule(f"{holder}.{name}")


def first_fused(model: nn.Module, kind: str) -> ParameterRoute:
    return next(route for route in route_parameters(model) if route.reason.endswith(kind))


@pytest.mark.parametrize("name", ["gpt2", "openai_gpt", "gpt_bigcode", "phi3", "mpt", "dbrx", "modernbert"])
def test_fused_qkv_parts_are_query_key_value(name):
    model = tiny_model(name)
    route = first_fused(model, "fused qkv")
    query, key, value = parts_of(model, route)
    projection = output_projection(model, route)
    assert seen_by(projection, model).abs().max() > 0
    for rows in query:
        rows.zero_()
    blind = seen_by(projection, model)
    for rows in key:  # no query: attention does not depend on the keys
        rows.normal_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(seen_by(projection, model), blind)
    assert blind.abs().max() > 0
    for rows in value:  # no value: attention has no output
        rows.zero_()
    assert seen_by(projection, model).abs().max() == 0


def test_fused_key_value_of_cross_attention():
    model = tiny_model("gpt2_cross_attention")
    route = next(r for r in route_parameters(model) if "crossattention.c_attn.weight" in r.name)
    _, value = parts_of(model, route)
    for rows in value:
        rows.zero_()
    assert seen_by(output_projection(model, route), model).abs().max() == 0


@pytest.mark.parametrize(
    ("name", "attention", "groups", "heads_in_group"),
    [
        ("gpt_neox", "gpt_neox.layers.0.attention", 4, 3),
        ("bloom", "transformer.h.0.self_attention", 4, 3),
        ("falcon", "transformer.h.0.self_attention", 2, 4),  # two query heads, a key head, a value head
        ("deberta", "deberta.encoder.layer.0.attention.self", 4, 3),
    ],
)
def test_interleaved_qkv_has_no_contiguous_value_part(name, attention, groups, heads_in_group):
    """Why these stay whole: the values are the last head of every group of rows, not the last rows."""
    for last_rows in (True, False):
        model = tiny_model(name)
        route = first_fused(model, "qkv interleaved by head")
        assert route.layout.split_sizes is None
        weight = model.get_parameter(route.name).data
        grouped = weight.view(groups, heads_in_group, -1, weight.shape[1])
        (weight[-grouped[:, -1].flatten(0, 1).shape[0] :] if last_rows else grouped[:, -1]).zero_()
        if name == "deberta":
            context = seen_by(model.get_submodule(attention), model, output=True)
        else:
            context = seen_by(model.get_submodule(f"{attention}.dense"), model)
        assert (context.abs().max() > 0) == last_rows


@pytest.mark.parametrize("name", ["phi3", "glm4", "modernbert"])
def test_fused_gate_and_up_halves(name):
    for zeroed in (0, 1):
        model = tiny_model(name)
        route = first_fused(model, "linear, fused gate and up")
        for rows in parts_of(model, route)[zeroed]:
            rows.zero_()
        assert seen_by(output_projection(model, route), model).abs().max() == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "jetmoe", "llama4", "gpt_oss"])
def test_fused_gate_and_up_of_experts(name):
    for zeroed in (0, 1):
        model = tiny_model(name)
        route = first_fused(model, "experts, fused gate and up")
        holder = route.name.removesuffix(".weight").rpartition(".")[0]
        experts = model.get_submodule(holder)
        with torch.no_grad():
            for n, bias in experts.named_parameters():
                if "bias" in n:
                    bias.zero_()
        assert seen_by(experts, model, output=True).abs().max() > 0
        split_parts(model.get_parameter(route.name).data, route.layout)[zeroed].zero_()
        silent = seen_by(experts, model, output=True).abs().max() == 0
        # GPT-OSS computes gate * (up + 1), so only its gate silences it.
        assert silent == (name != "gpt_oss" or zeroed == 0)
