"""The partition of models into matrix and AdamW parameters: hand-checked tables, invariants, the printed table."""

import math
import re
from collections import Counter

import pytest
import torch
from partition_tables import EXPECTED, parse_row, routes_by_name
from tiny_models import CONFIGURATIONS, VOCABULARY, random_tokens, tiny_lora_model, tiny_model
from torch import nn
from transformers import EncoderDecoderModel, GPT2Config, GPT2LMHeadModel, Trainer

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.partition import (
    PartitionOptions,
    explain,
    param_groups_for,
    route_parameters,
    summary,
)

MATRIX_KEYS = {"output_axis", "flatten", "split_sizes", "interleaved"}


# --- golden tables ---------------------------------------------------------------------------------------------------


def test_every_tiny_model_has_a_table():
    assert set(EXPECTED) == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_partition_is_the_hand_checked_one(name):
    routes = route_parameters(tiny_model(name, device="meta"))
    rows = [parse_row(row) for row in EXPECTED[name].splitlines() if row.strip()]
    matrices = Counter()
    matched = set()
    for route in routes:
        if len(route.shape) < 2:
            assert route.role == "adamw", route
            continue
        hits = [i for i, (names, *_) in enumerate(rows) if names.fullmatch(route.name)]
        assert len(hits) == 1, (route.name, hits)
        _, role, reason, layout, _ = rows[hits[0]]
        assert (route.role, route.layout) == (role, layout), route
        if role == "adamw":
            assert route.reason == reason
        matched.add(hits[0])
        matrices[hits[0]] += route.matrix_count
    assert matched == set(range(len(rows)))
    assert [matrices[i] for i in range(len(rows))] == [count for *_, count in rows]


def test_gpt2_small_has_48_conv1d_and_72_matrices():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    routes = route_parameters(model)
    matrix = [route for route in routes if route.role == "matrix"]
    assert len(matrix) == 48
    assert all(route.layout.output_axis == 1 for route in matrix)
    assert sum(route.matrix_count for route in matrix) == 72  # c_attn is three matrices
    assert sum(route.numel for route in matrix) == 12 * 12 * 768**2
    assert sum(route.matrix_count for route in route_parameters(model, PartitionOptions(qkv="whole"))) == 48
    large_adamw = {r.name: r.reason for r in routes if r.role == "adamw" and len(r.shape) > 1}
    assert large_adamw == {
        "transformer.wte.weight": "tied input and output embeddings",
        "transformer.wpe.weight": "embedding",
    }
    assert summary(routes) == (
        "matrix optimizer: 48 parameters as 72 matrices, 84.93 M (68.3 %); AdamW: 100 parameters, 39.51 M (31.7 %)"
    )


# --- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_groups_cover_every_trainable_parameter_once(name):
    model = tiny_model(name, device="meta")
    groups = param_groups_for(model, weight_decay=0.25)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grouped = [(n, p) for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)]
    assert len(grouped) == len(parameters) == len({id(p) for _, p in grouped})
    assert all(parameters[n] is p for n, p in grouped)
    assert all(group["params"] for group in groups)
    decay = set(Trainer.get_decay_parameter_names(None, model))
    order = []
    for group in groups:
        assert set(group) == {"params", "param_names", "role", "weight_decay"} | (
            MATRIX_KEYS if group["role"] == "matrix" else set()
        )
        assert {n in decay for n in group["param_names"]} == {group["weight_decay"] == 0.25}
        order.append((group["role"], group["weight_decay"] if group["role"] == "adamw" else 0.0))
        if group["role"] == "matrix":
            layout = MatrixLayout.from_group(group)
            for n, p in zip(group["param_names"], group["params"], strict=True):
                layout.check(tuple(p.shape), n)
    assert order[0][0] == "adamw"
    assert order == sorted(order, key=lambda item: (item[0] == "matrix", -item[1]))


def test_groups_hold_plain_values_that_load_with_weights_only(tmp_path):
    groups = param_groups_for(tiny_model("gpt_oss"))
    saved = [{**group, "params": list(range(len(group["params"])))} for group in groups]
    torch.save(saved, tmp_path / "groups.pt")
    assert torch.load(tmp_path / "groups.pt", weights_only=True) == saved


def test_tied_weights_are_one_parameter():
    tied = route_parameters(tiny_model("qwen2", device="meta"))
    untied = route_parameters(tiny_model("qwen2_untied", device="meta"))
    extra = {r.name for r in untied} - {r.name for r in tied}
    assert extra == {"lm_head.weight"}
    assert sum(r.numel for r in untied) - sum(r.numel for r in tied) == VOCABULARY * 32
    assert [r for r in tied if r.role == "matrix"] == [r for r in untied if r.role == "matrix"]


def test_routes_do_not_depend_on_the_device_or_on_being_wrapped():
    meta, cpu = tiny_model("gpt2", device="meta"), tiny_model("gpt2")
    assert route_parameters(meta) == route_parameters(cpu)
    wrapped = nn.ModuleDict({"module": cpu})
    assert [(r.role, r.layout) for r in route_parameters(wrapped)] == [
        (r.role, r.layout) for r in route_parameters(cpu)
    ]


def test_heads_of_submodels_are_found():
    encoder, decoder = (
        tiny_model("bert_classifier").bert,
        tiny_model("bert", is_decoder=True, add_cross_attention=True),
    )
    routes = routes_by_name(EncoderDecoderModel(encoder=encoder, decoder=decoder))
    assert routes["decoder.cls.predictions.transform.dense.weight"].reason == "head"
    assert routes["decoder.bert.embeddings.word_embeddings.weight"].reason == "tied input and output embeddings"
    assert routes["encoder.embeddings.word_embeddings.weight"].reason == "embedding"
    assert routes["decoder.bert.encoder.layer.1.crossattention.self.key.weight"].role == "matrix"


def test_weight_decay_names_can_be_given():
    groups = param_groups_for(
        tiny_model("gpt2", device="meta"),
        weight_decay=0.5,
        decay_parameter_names=["transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.weight"],
    )
    decayed = {n for group in groups if group["weight_decay"] == 0.5 for n in group["param_names"]}
    assert decayed == {"transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.weight"}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}


# --- the table for people --------------------------------------------------------------------------------------------


def test_explain_is_a_markdown_table_whose_numbers_add_up():
    model = tiny_model("phi3", device="meta")
    table, _, line = explain(model).rpartition("\n\n")
    header, rule, *rows = table.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {len(row) for row in cells} == {header.count("|") - 1} == {rule.count("|") - 1}
    assert sum(int(row[5].replace(",", "")) for row in cells) == sum(p.numel() for p in model.parameters())
    assert math.isclose(sum(float(row[6].rstrip(" %")) for row in cells), 100, abs_tol=0.05)
    (fused,) = [row for row in cells if "qkv_proj" in row[0]]
    assert fused[0] == "`model.layers.*.self_attn.qkv_proj.weight` (2)"
    assert fused[2:5] == ["matrix", "(out, in), 32 + 16 + 16", "2 of 32 x 32 + 4 of 16 x 32"]
    assert line == summary(route_parameters(model))


def test_explain_follows_the_options_and_shows_frozen_parameters():
    table = explain(tiny_lora_model(device="meta"), PartitionOptions(lora="b_only"))
    assert "lora_A, lora='b_only'" in table
    assert re.search(
        r"\| `base_model\.model\.model\.layers\.\*\.mlp\.up_proj\.weight` \(2\) \| 48 x 32 \| frozen \|", table
    )
    assert re.search(r"matrix optimizer: 4 parameters as 4 matrices.*; frozen: 26 parameters", table)


# --- the tiny models themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bert", "esm"])
def test_tiny_models_train_and_are_seeded(name):
    model, same, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tokens = random_tokens()
    model(input_ids=tokens, labels=tokens).loss.backward()
    matrices = [p for group in param_groups_for(model) if group["role"] == "matrix" for p in group["params"]]
    assert matrices
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in matrices)
