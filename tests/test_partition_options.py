"""What options, adapters and plain torch modules change in the partition, and what is refused."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from partition_tables import routes_by_name
from tiny_models import tiny_lora_model, tiny_model
from torch import nn

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.partition import (
    PartitionOptions,
    UnroutableParameterError,
    param_groups_for,
    route_parameters,
)


def roles_that_change(model: nn.Module, **options: Any) -> dict[str, str]:
    """Names whose role differs from the default, and their role."""
    default = routes_by_name(model)
    return {n: r.role for n, r in routes_by_name(model, **options).items() if r.role != default[n].role}


# --- options ---------------------------------------------------------------------------------------------------------


def test_qkv_whole_changes_attention_only():
    model = tiny_model("phi3", device="meta")
    whole = routes_by_name(model, qkv="whole")
    assert whole["model.layers.0.self_attn.qkv_proj.weight"].layout == MatrixLayout()
    assert whole["model.layers.0.mlp.gate_up_proj.weight"].layout == MatrixLayout(split_sizes=(48, 48))


def test_head_option_frees_task_heads_but_not_vocabulary_projections():
    assert roles_that_change(tiny_model("bert", device="meta"), head="matrix") == {
        "cls.predictions.transform.dense.weight": "matrix"
    }
    assert roles_that_change(tiny_model("bert_classifier", device="meta"), head="matrix") == {
        "classifier.weight": "matrix"
    }
    assert roles_that_change(tiny_model("qwen2_untied", device="meta"), head="matrix") == {}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx"])
def test_router_option(name):
    """Both kinds of router: one that owns its weight, and one that holds a Linear."""
    model = tiny_model(name, device="meta")
    changed = roles_that_change(model, router="matrix")
    assert len(changed) == 2
    assert all(re.search(r"(mlp\.gate|router|router\.layer)\.weight$", n) for n in changed)
    routes = routes_by_name(model, router="matrix")
    assert {routes[n].layout for n in changed} == {MatrixLayout()}


def test_conv_option():
    model = tiny_model("convnext", device="meta")
    assert set(roles_that_change(model, conv="adamw")) == {
        "convnext.encoder.stages.1.downsampling_layer.1.weight",
    }


def test_include_adds_and_exclude_wins():
    model = tiny_model("qwen2_untied", device="meta")
    assert roles_that_change(model, include="lm_head") == {"lm_head.weight": "matrix"}
    assert roles_that_change(model, include=["lm_head"]) == {"lm_head.weight": "matrix"}
    assert roles_that_change(model, include="all-linear") == {"lm_head.weight": "matrix"}
    assert roles_that_change(model, include=["all_linear"]) == {"lm_head.weight": "matrix"}
    assert roles_that_change(model, exclude=r"layers\.1\.mlp") == {
        f"model.layers.1.mlp.{part}_proj.weight": "adamw" for part in ("gate", "up", "down")
    }
    both = roles_that_change(model, include=".*mlp.*", exclude=r"layers\.0\.mlp")
    assert set(both) == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_include_and_exclude_anchor_on_module_names():
    model = tiny_model("qwen2", device="meta")
    assert set(roles_that_change(model, exclude=r"^model\.layers\.0\.mlp\.up_proj$")) == {
        "model.layers.0.mlp.up_proj.weight"
    }


def test_include_reads_an_embedding_as_a_lookup_and_keeps_vectors():
    included = routes_by_name(tiny_model("gpt2", device="meta"), include="wpe|ln_f")
    assert included["transformer.wpe.weight"].layout == MatrixLayout(output_axis=1)
    assert included["transformer.ln_f.weight"].role == "adamw"


def test_include_keeps_the_layout_of_a_known_layer():
    model = tiny_model("gpt2", device="meta")
    default, included = routes_by_name(model), routes_by_name(model, include=["c_attn"])
    name = "transformer.h.0.attn.c_attn.weight"
    assert included[name].layout == default[name].layout
    assert included[name].reason == "include"


def test_a_name_of_a_tied_weight_is_enough():
    model = tiny_model("qwen2", device="meta")
    assert roles_that_change(model, include=["lm_head"]) == {"model.embed_tokens.weight": "matrix"}
    assert roles_that_change(model, include="all-linear") == {}


# --- PEFT ------------------------------------------------------------------------------------------------------------


def test_lora_factors_are_matrices():
    routes = routes_by_name(tiny_lora_model(device="meta"))
    trainable = {n: r for n, r in routes.items() if r.role != "frozen"}
    assert len(trainable) == 2 * 2 * 2
    assert all(
        r.layout == MatrixLayout() and r.reason == f"LoRA {n.split('.lora_')[1][0]}" for n, r in trainable.items()
    )


def test_lora_options():
    model = tiny_lora_model(device="meta")
    b_only = [r.name for r in route_parameters(model, PartitionOptions(lora="b_only")) if r.role == "matrix"]
    assert len(b_only) == 4
    assert all("lora_B" in name for name in b_only)
    with pytest.raises(ValueError, match=r"nothing to orthogonalise.*lora_A, lora='adamw'"):
        param_groups_for(model, options=PartitionOptions(lora="adamw"))


def test_dora_magnitudes_and_saved_modules():
    model = tiny_lora_model(
        "qwen2_untied", device="meta", use_dora=True, modules_to_save=["embed_tokens", "lm_head", "down_proj"]
    )
    reasons = Counter()
    for route in route_parameters(model):
        if route.role != "frozen":
            kind = "magnitude" if "magnitude" in route.name else "saved" if "modules_to_save" in route.name else "lora"
            reasons[kind, route.role, route.reason] += 1
    assert reasons == {
        ("lora", "matrix", "LoRA A"): 4,
        ("lora", "matrix", "LoRA B"): 4,
        ("magnitude", "adamw", "fewer than two axes"): 4,
        ("saved", "adamw", "embedding"): 1,
        ("saved", "adamw", "output embeddings"): 1,
        ("saved", "matrix", "linear"): 2,
    }


def test_fused_projections_are_seen_through_saved_modules_but_not_cut_in_lora():
    saved = tiny_lora_model(
        "phi3", device="meta", target_modules=["o_proj"], modules_to_save=["qkv_proj", "gate_up_proj"]
    )
    layouts = {r.name.split(".")[-4]: r.layout for r in route_parameters(saved) if "modules_to_save" in r.name}
    assert layouts == {
        "qkv_proj": MatrixLayout(split_sizes=(32, 16, 16)),
        "gate_up_proj": MatrixLayout(split_sizes=(48, 48)),
    }
    fused = tiny_lora_model("gpt2", device="meta", target_modules=["c_attn"], fan_in_fan_out=True)
    assert {r.layout for r in route_parameters(fused) if r.role == "matrix"} == {MatrixLayout()}


def test_lora_of_embeddings_heads_and_expert_stacks_goes_to_adamw():
    model = tiny_lora_model("qwen2_untied", device="meta", target_modules=["embed_tokens", "lm_head", "q_proj"])
    adamw = {r.name.split(".")[-3 if r.name.endswith("weight") else -2]: r.reason
             for r in route_parameters(model) if r.role == "adamw"}  # fmt: skip
    assert adamw == {
        "lora_embedding_A": "embedding",
        "lora_embedding_B": "embedding",
        "lora_A": "output embeddings",
        "lora_B": "output embeddings",
    }
    experts = tiny_lora_model(
        "qwen3_moe", device="meta", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    stacks = [r for r in route_parameters(experts) if "experts" in r.name and r.role != "frozen"]
    assert len(stacks) == 4
    assert all(r.role == "adamw" and "stack of experts" in r.reason for r in stacks)


def test_saved_classifier_stays_a_head():
    import peft

    model = peft.get_peft_model(
        tiny_model("bert_classifier"), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    )
    saved = [r for r in route_parameters(model) if "modules_to_save" in r.name and len(r.shape) > 1]
    assert [(r.role, r.reason) for r in saved] == [("adamw", "head")]


# --- plain torch modules ---------------------------------------------------------------------------------------------


class PlainNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.grouped = nn.Conv1d(8, 12, 3, groups=4)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4)
        self.one_channel = nn.Conv2d(1, 6, 3)
        self.transposed = nn.ConvTranspose1d(8, 8, 2)
        self.recurrent = nn.GRU(8, 8)
        self.scale = nn.ParameterDict({"a": nn.Parameter(torch.zeros(3, 4))})
        self.norm = nn.LayerNorm((4, 4))
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.tokens.weight
        self.head = nn.Linear(8, 3)


def test_plain_torch_layers():
    routes = routes_by_name(PlainNetwork())
    matrices = {n: r.layout for n, r in routes.items() if r.role == "matrix"}
    assert matrices == {
        "attention.in_proj_weight": MatrixLayout(split_sizes=(8, 8, 8)),
        "attention.out_proj.weight": MatrixLayout(),
        "cross.q_proj_weight": MatrixLayout(),
        "cross.k_proj_weight": MatrixLayout(),
        "cross.v_proj_weight": MatrixLayout(),
        "cross.out_proj.weight": MatrixLayout(),
        "grouped.weight": MatrixLayout(flatten=True, split_sizes=(3, 3, 3, 3)),
        "one_channel.weight": MatrixLayout(flatten=True),
    }
    assert {n: r.reason for n, r in routes.items() if r.role == "adamw" and len(r.shape) > 1} == {
        "tokens.weight": "embedding",
        "positions": "free parameter of PlainNetwork",
        "depthwise.weight": "depthwise convolution",
        "transposed.weight": "transposed convolution",
        "recurrent.weight_ih_l0": "free parameter of GRU",
        "recurrent.weight_hh_l0": "free parameter of GRU",
        "scale.a": "free parameter of ParameterDict",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "head.weight": "head",
    }
    whole = routes_by_name(PlainNetwork(), qkv="whole")
    assert whole["attention.in_proj_weight"].layout == MatrixLayout()


def test_frozen_and_integer_parameters_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.requires_grad_(False)
    model[0].register_parameter("quantised", nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False))
    assert [(r.name, r.role) for r in route_parameters(model)] == [
        ("0.weight", "frozen"),
        ("0.quantised", "frozen"),
        ("1.weight", "matrix"),
    ]
    groups = param_groups_for(model)
    assert [group["param_names"] for group in groups] == [["1.weight"]]


# --- errors ----------------------------------------------------------------------------------------------------------


class UnknownLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))


def test_an_unknown_layer_is_refused_by_name_and_can_be_named():
    model = nn.ModuleDict({"known": nn.Linear(4, 4), "odd": UnknownLayer()})
    with pytest.raises(UnroutableParameterError, match=r"odd\.weight.*UnknownLayer.*optim_target_modules") as error:
        param_groups_for(model)
    assert routes_by_name(model, include=["odd"])["odd.weight"].layout == MatrixLayout()
    for key in ("include", "exclude"):  # the remedies in the message work as they are written
        pattern = re.search(rf"{key}=(\S+) to optim_args", str(error.value)).group(1)
        assert routes_by_name(model, **{key: pattern})["odd.weight"].reason == key


def test_unknown_expert_stacks_are_refused():
    class OddExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(torch.zeros(2, 4, 6))

    with pytest.raises(UnroutableParameterError, match=r"experts\.down of shape \(2, 4, 6\).*OddExperts"):
        route_parameters(nn.ModuleDict({"experts": OddExperts()}))


def test_tied_weights_with_two_readings_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.MultiheadAttention(2, 1)})
    model["a"].weight = model["b"].in_proj_weight
    with pytest.raises(UnroutableParameterError, match=r"in different ways.*exclude="):
        route_parameters(model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_trainable_parameter_of_another_type_is_named(dtype):
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "odd": nn.Linear(4, 4, bias=False)})
    model["odd"].weight = nn.Parameter(torch.zeros(4, 4).to(dtype))
    with pytest.raises(TypeError, match=rf"odd\.weight.*{dtype}.*requires_grad_\(False\)"):
        param_groups_for(model)
    model["odd"].weight.requires_grad_(False)
    assert routes_by_name(model)["odd.weight"].role == "frozen"


def test_parameters_in_place_of_the_model_are_refused():
    for parameters in (nn.Linear(4, 4).parameters(), [nn.Parameter(torch.zeros(4, 4))]):
        with pytest.raises(TypeError, match=r"a (generator|list) is no nn\.Module: give the model itself"):
            param_groups_for(parameters)


def test_a_lazy_module_is_refused():
    with pytest.raises(UnroutableParameterError, match=r"0\.weight has no shape yet"):
        route_parameters(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.LayerNorm(4), "it has vectors only"),
        (nn.Sequential(nn.Embedding(3, 4)), "its trainable arrays are: embedding"),
        (nn.Linear(3, 3).requires_grad_(False), "no trainable parameters"),
        (nn.Module(), "no trainable parameters"),
    ],
)
def test_nothing_to_orthogonalise(model, reason):
    with pytest.raises(ValueError, match=f"nothing to orthogonalise in {type(model).__name__}.*{reason}"):
        param_groups_for(model)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}='q_prj' matches no trainable parameter"):
        param_groups_for(tiny_model("qwen2", device="meta"), options=PartitionOptions(**{key: "q_prj"}))


def test_include_reads_convolutions_as_the_rules_do():
    included = routes_by_name(PlainNetwork(), conv="adamw", include="grouped|depthwise|one_channel")
    assert included["grouped.weight"].layout == MatrixLayout(flatten=True, split_sizes=(3, 3, 3, 3))
    assert included["depthwise.weight"].layout == MatrixLayout(flatten=True)
    assert included["one_channel.weight"].layout == MatrixLayout(flatten=True)
    with pytest.raises(UnroutableParameterError, match=r"transposed\.weight \(ConvTranspose1d"):
        routes_by_name(PlainNetwork(), include="transposed")


def test_include_of_what_is_no_matrix_is_refused():
    volume = nn.ParameterDict({"table": nn.Parameter(torch.zeros(2, 2, 2, 2))})
    with pytest.raises(
        UnroutableParameterError, match=r"table \(ParameterDict, shape \(2, 2, 2, 2\)\) is named in inc"
    ):
        route_parameters(volume, PartitionOptions(include="table"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qkv": "splt"}, "qkv='splt' must be one of 'split', 'whole'"),
        ({"lora": "a_only"}, "lora='a_only' must be one of 'both', 'b_only', 'adamw'"),
        ({"head": True}, "head=True must be one of 'adamw', 'matrix'"),
        ({"exclude": "(mlp"}, r"exclude='\(mlp' is not a regular expression"),
        ({"include": "*"}, r"include='\*' is not a regular expression"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PartitionOptions(**options)
