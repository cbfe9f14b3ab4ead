"""Operations of a token against those that torch counts, and the peaks of GPUs."""

import pytest
import torch
from convnet import ConvNetConfig
from model_flops import peak_flops
from tasks import CausalLanguageModeling, ImageClassification, MaskedLanguageModeling
from torch.utils.flop_counter import FlopCounterMode
from transformers import EsmConfig, Qwen2Config, Starcoder2Config

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
MODELS = {
    "tied": (
        CausalLanguageModeling(),
        Starcoder2Config(vocab_size=96, num_key_value_heads=4, use_bias=False, **SIZES),
    ),
    "untied": (
        CausalLanguageModeling(),
        Qwen2Config(vocab_size=96, num_key_value_heads=2, tie_word_embeddings=False, **SIZES),
    ),
    "esm": (
        MaskedLanguageModeling(),
        EsmConfig(vocab_size=33, mask_token_id=32, pad_token_id=1, position_embedding_type="rotary", **SIZES),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_what_torch_counts(name: str) -> None:
    """Eager attention multiplies whole (T, T) matrices, as the formula has it."""
    task, config = MODELS[name]
    block = 48
    model = task.new_model(config, "eager")
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.full((2, block), 5))
    counted = 3 * counter.get_total_flops() / (2 * block)
    assert task.flops_per_token(config, block) == pytest.approx(counted, rel=2e-3)  # torch has the rotary angles too


def test_an_image_costs_what_its_convolutions_do() -> None:
    config = ConvNetConfig(image_size=8, channels=1, widths=[16, 32])
    # 49 places of 8 filters of 4; 7x7 places, then after a pool 3x3, of 3x3 filters; then 1x1 of 3x3
    multiplications = 49 * 8 * 4 + 49 * 16 * 8 * 9 + 9 * 16 * 16 * 9 + 9 * 32 * 16 * 9 + 1 * 32 * 32 * 9 + 32 * 10
    assert ImageClassification().flops_per_token(config, 1) == 3 * 2 * multiplications


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_the_name_of_a_gpu(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
