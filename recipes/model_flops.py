"""Floating point operations of a training step, and the share of a GPU's peak that they are."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

# Dense bfloat16 products with float32 sums, in operations a second, from the makers' data sheets. A GPU's name must
# hold all words of a key; the first that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A40": 149.7e12,
    "MI300X": 1307.4e12,
    "MI250X": 383e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's peak in operations a second, None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if set(name.split()) <= set(words)), None)


def transformer_flops_per_token(model: nn.Module, config: PretrainedConfig, block_size: int) -> float:
    """Count the operations a token costs forward and backward: 6 N + 12 L d T.

    N is the number of weights in matrices that a token is multiplied with: not those that are looked up, so the output
    embedding counts also where it is tied. L d T is layers x width of attention x block size. A causal kernel does
    half of the second term; it is counted whole, as is usual for MFU.

    Args:
        model: any transformer of transformers with ``get_input_embeddings``; may be on the meta device.
        config: its configuration.
        block_size: sequence length in tokens.

    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.ndim > 1 and id(parameter) not in looked_up
    )
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in looked_up:
        multiplied += head.weight.numel()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_width = head_size * config.num_attention_heads
    return 6.0 * multiplied + 12.0 * config.num_hidden_layers * attention_width * block_size


def counted_flops(model: nn.Module, example: torch.Tensor) -> float:
    """Count the operations of one forward and backward by running ``example`` forward, best on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return 3.0 * counter.get_total_flops()  # a backward costs two forwards
