"""Attention for blocks of known form: the same numbers, no mask in a compiled model, nothing in config.json."""

from typing import Any

import pytest
import torch
from block_attention import FULL_BLOCK, PADDED_BLOCK, refuse_padding, register_block_attention
from no_questions import NoQuestions
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as CausalLM
from transformers import EsmConfig, EsmForMaskedLM, GPT2Config, PretrainedConfig, Qwen2Config, Starcoder2Config

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CAUSAL = {
    "qwen2": Qwen2Config(vocab_size=50, num_key_value_heads=2, **SIZES),
    "starcoder2": Starcoder2Config(vocab_size=50, num_key_value_heads=4, use_bias=False, **SIZES),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
}
ESM = EsmConfig(
    vocab_size=33,
    mask_token_id=32,
    pad_token_id=1,
    position_embedding_type="rotary",
    max_position_embeddings=40,
    **SIZES,
)
register_block_attention()


def built(config: PretrainedConfig, attention: str) -> nn.Module:
    torch.manual_seed(0)
    kind: Any = EsmForMaskedLM if isinstance(config, EsmConfig) else CausalLM
    config.use_cache = False  # as Trainer sets it: with a cache transformers asks less
    make = kind._from_config if isinstance(config, EsmConfig) else kind.from_config
    model: nn.Module = make(config, attn_implementation=attention).eval()
    return model


def attention_calls(model: nn.Module, **inputs: Tensor) -> list[dict[str, Any]]:
    """Trace a model as torch.compile does and return how each of its attentions is called."""
    calls = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is nn.functional.scaled_dot_product_attention:
                calls.append(node.kwargs)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**inputs)
    return calls


@pytest.mark.parametrize("name", CAUSAL)
def test_full_blocks_are_as_sdpa(name: str) -> None:
    tokens = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))
    ours, stock = (built(CAUSAL[name], attention)(tokens).logits for attention in (FULL_BLOCK, "sdpa"))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
    changed = tokens.clone()
    changed[:, 9:] = 0
    later = built(CAUSAL[name], FULL_BLOCK)(changed).logits
    torch.testing.assert_close(later[:, :9], ours[:, :9], rtol=1e-5, atol=1e-6)  # causal without a mask


@pytest.mark.parametrize("name", CAUSAL)
def test_a_compiled_full_block_needs_no_mask(name: str) -> None:
    tokens = torch.randint(50, (2, 16))
    calls = attention_calls(built(CAUSAL[name], FULL_BLOCK).train(), input_ids=tokens)
    assert len(calls) == 2
    assert all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)


@pytest.mark.parametrize("name", CAUSAL)
def test_stock_sdpa_builds_a_mask_when_compiled(name: str) -> None:
    """When this fails, transformers keeps the flash kernel by itself: remove ``full_block``."""
    calls = attention_calls(built(CAUSAL[name], "sdpa").train(), input_ids=torch.randint(50, (2, 16)))
    assert len(calls) == 2
    assert any(call["attn_mask"] is not None for call in calls)


def test_full_blocks_refuse_padding() -> None:
    model, tokens = built(CAUSAL["qwen2"], FULL_BLOCK), torch.ones(1, 4, dtype=torch.long)
    refuse_padding(model)
    assert model(tokens).logits.shape == (1, 4, 50)
    with pytest.raises(ValueError, match="full_block' is for blocks without padding"):
        model(tokens, attention_mask=torch.tensor([[1, 1, 1, 0]]))


def test_padded_blocks_are_as_sdpa_whether_or_not_a_row_is_padded() -> None:
    tokens = torch.randint(4, 24, (3, 12), generator=torch.Generator().manual_seed(0))
    for lengths in ([12, 7, 3], [12, 12, 12]):
        mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
        ours, stock = (
            built(ESM, attention)(tokens, attention_mask=mask).logits for attention in (PADDED_BLOCK, "sdpa")
        )
        torch.testing.assert_close(ours[mask.bool()], stock[mask.bool()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "attention"),
    [*((config, FULL_BLOCK) for config in CAUSAL.values()), (ESM, PADDED_BLOCK)],
    ids=[*CAUSAL, "esm"],
)
def test_a_forward_does_not_ask_for_values(config: PretrainedConfig, attention: str) -> None:
    model, tokens = built(config, attention), torch.full((2, 8), 5)
    inputs = {"attention_mask": torch.ones(2, 8, dtype=torch.long)} if config is ESM else {}
    with NoQuestions():
        model(tokens, **inputs)


@pytest.mark.parametrize("config", [CAUSAL["qwen2"], ESM], ids=["causal", "esm"])
def test_stock_sdpa_asks_for_values(config: PretrainedConfig) -> None:
    """When this fails, transformers no longer waits for the GPU in a forward: remove the names."""
    model, tokens = built(config, "sdpa"), torch.full((2, 8), 5)
    inputs = {"attention_mask": torch.ones(2, 8, dtype=torch.long)} if config is ESM else {}
    with pytest.raises(AssertionError, match="asked for a value"), NoQuestions():
        model(tokens, **inputs)


def test_the_names_are_not_saved(tmp_path: Any) -> None:
    model = built(CAUSAL["qwen2"], FULL_BLOCK)
    model.save_pretrained(tmp_path)
    assert FULL_BLOCK not in (tmp_path / "config.json").read_text()
    assert CausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
