"""Which modules store several matrices in one parameter, and in what order: tables read off the models' forwards.

A fused projection is split only where its parts are contiguous along fan_out and the class is in a table here.
"""

from collections.abc import Callable

from torch import nn

from hf_matrix_optim.matrix_layout import MatrixLayout

Sizes = tuple[int, ...]
# (class of the module that holds a projection, its attribute) -> sizes of the parts, from that module and fan_out
FusedTable = dict[tuple[str, str], Callable[[nn.Module, int], Sizes]]


def _equal(parts: int) -> Callable[[nn.Module, int], Sizes]:
    return lambda holder, fan_out: (fan_out // parts,) * parts


def _split_size(holder: nn.Module, fan_out: int) -> Sizes:
    """GPT-2 and its kin: q, k, v of ``split_size`` columns each; k and v only in cross-attention."""
    size = _integer(holder, "split_size")
    return (size,) * (fan_out // size)


def _grouped_query(holder: nn.Module, fan_out: int) -> Sizes:
    """q takes what the key and value heads leave."""
    kv = _integer(holder, "num_key_value_heads") * _integer(holder, "head_dim")
    return (fan_out - 2 * kv, kv, kv)


def _multi_query(holder: nn.Module, fan_out: int) -> Sizes:
    """GPT-BigCode: contiguous with one key-value head; with one for each query head the parts are interleaved."""
    if not holder.multi_query:
        return (fan_out,)
    return (_integer(holder, "embed_dim"), _integer(holder, "kv_dim"), _integer(holder, "kv_dim"))


def _delta_net(holder: nn.Module, fan_out: int) -> Sizes:
    return (_integer(holder, "key_dim"), _integer(holder, "key_dim"), _integer(holder, "value_dim"))


def _integer(holder: nn.Module, attribute: str) -> int:
    return int(getattr(holder, attribute))


def _rows(classes: str, attribute: str, sizes: Callable[[nn.Module, int], Sizes]) -> FusedTable:
    return {(class_name, attribute): sizes for class_name in classes.split()}


FUSED_QKV: FusedTable = {
    **_rows("GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention Attention", "c_attn", _split_size),
    **_rows("GPTBigCodeAttention", "c_attn", _multi_query),
    **_rows("Phi3Attention Phi4MultimodalAttention", "qkv_proj", _grouped_query),
    **_rows("DbrxAttention", "Wqkv", _grouped_query),
    **_rows("MptAttention ModernBertAttention", "Wqkv", _equal(3)),
    **_rows("BarkSelfAttention BarkSelfFlashAttention2", "att_proj", _equal(3)),
    **_rows("LayoutLMv2SelfAttention", "qkv_linear", _equal(3)),
    **_rows("JetMoeAttention", "kv_proj", _equal(2)),
    **_rows(
        "GraniteSpeechConformerAttention GraniteSpeechPlusConformerAttention EvollaSequenceCompressorAttention",
        "to_kv",
        _equal(2),
    ),
    **_rows("Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet", "in_proj_qkv", _delta_net),
    **_rows("Exaone4_5_VisionAttention", "qkv", _grouped_query),
    **_rows(  # vision towers: (tokens, 3, heads, head_dim)
        "BlipAttention Blip2Attention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention "
        "VitDetAttention TimesformerSelfAttention HieraMaskUnitAttention SegGptAttention SamVisionAttention "
        "SamHQVisionAttention Sam2MultiScaleAttention GotOcr2VisionAttention DeepseekOcr2SamVisionAttention "
        "UnlimitedOcrSamVisionAttention SLANeXtVisionAttention PPFormulaNetVisionAttention "
        "PPOCRV5MobileRecAttention PPOCRV5ServerRecAttention PPOCRV6SmallRecAttention "
        "Florence2VisionWindowAttention Florence2VisionChannelAttention VisionAttention "
        "Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Qwen3VLMoeVisionAttention Qwen3OmniMoeVisionAttention "
        "Qwen3_5VisionAttention Qwen3_5MoeVisionAttention Qwen4ExpVisionAttention Glm4vVisionAttention "
        "Glm4vMoeVisionAttention Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention "
        "Ernie4_5_VLMoeVisionAttention Dots3NoteVisionAttention CohereCompassVisionAttention",
        "qkv",
        _equal(3),
    ),
}
# Head by head q, k, v: no slice of fan_out is one of them, so these stay whole.
INTERLEAVED_QKV = {
    ("GPTNeoXAttention", "query_key_value"),
    ("GPTNeoXJapaneseAttention", "query_key_value"),
    ("FalconAttention", "query_key_value"),
    ("BloomAttention", "query_key_value"),
    ("PersimmonAttention", "query_key_value"),
    ("DisentangledSelfAttention", "in_proj"),
    ("CodeGenAttention", "qkv_proj"),
    ("MiniMaxLightningAttention", "qkv_proj"),
    ("Qwen3NextGatedDeltaNet", "in_proj_qkvz"),
}
FUSED_GATE_UP: FusedTable = {
    **_rows(
        "Phi3MLP Phi4MultimodalMLP Phi4MultimodalAudioMLP GlmMLP Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmOcrTextMLP "
        "DiaMLP Zamba2MLP MiniMaxM3VLDenseMLP EsmFold2SwiGLU Dots3NoteAudioMLP",
        "gate_up_proj",
        _equal(2),
    ),
    **_rows("GraniteMoeSharedMLP GraniteMoeHybridMLP GraniteMoeSWAMLP", "input_linear", _equal(2)),
    **_rows("ModernBertMLP ModernBertDecoderMLP", "Wi", _equal(2)),
    **_rows("MoonshineDecoderMLP MoonshineStreamingDecoderMLP", "fc1", _equal(2)),
    **_rows("MoshiGatingMLP KyutaiSpeechToTextGatingMLP", "fc1", _equal(2)),
    # stacks of experts, (experts, out, in)
    **_rows("JetMoeMoE GraniteMoeMoE GraniteMoeSharedMoE GraniteMoeHybridMoE", "input_linear", _equal(2)),
}
# Stacks of experts without the marks of ``use_experts_implementation``: class -> are they (experts, in, out)?
UNMARKED_EXPERTS = {
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "GraniteMoeParallelExperts": False,
    "GraniteMoeSharedParallelExperts": False,
    "GraniteMoeHybridParallelExperts": False,
}
# Stacks with two axes, (experts * intermediate, hidden): class -> its number of experts. The down projection w2 is
# stacked along its fan_in; reading it transposed changes neither direction nor RMS-matched scale.
FLAT_EXPERTS = {"DbrxExpertGLU": "moe_num_experts"}


def transformers_class_names(module: nn.Module) -> list[str]:
    """Names of the classes of ``module`` that transformers defines, the most derived one first."""
    return [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("transformers.")]


def _sizes(table: FusedTable, holder: nn.Module, attribute: str, fan_out: int) -> Sizes | None:
    for class_name in transformers_class_names(holder):
        if rule := table.get((class_name, attribute)):
            sizes = rule(holder, fan_out)
            # Sizes that do not add up mean another release's layout: one matrix is then the safe reading.
            return sizes if len(sizes) > 1 and sum(sizes) == fan_out and min(sizes) > 0 else None
    return None


def qkv_sizes(holder: nn.Module, attribute: str, fan_out: int) -> Sizes | None:
    """Sizes of the contiguous q, k, v parts of ``holder.attribute``; None if it is one matrix or not known."""
    return _sizes(FUSED_QKV, holder, attribute, fan_out)


def gate_up_sizes(holder: nn.Module, attribute: str, fan_out: int) -> Sizes | None:
    """Sizes of the contiguous gate and up parts of ``holder.attribute``; None if it is one matrix or not known."""
    return _sizes(FUSED_GATE_UP, holder, attribute, fan_out)


def is_interleaved_qkv(holder: nn.Module, attribute: str) -> bool:
    """Whether ``holder.attribute`` stores q, k and v head by head."""
    return any((class_name, attribute) in INTERLEAVED_QKV for class_name in transformers_class_names(holder))


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` itself holds stacks of experts, one parameter for all of them."""
    name = type(module).__name__
    return hasattr(module, "is_transposed") or "Experts" in name or name in FLAT_EXPERTS


def experts_layout(experts: nn.Module, leaf: str, shape: tuple[int, ...]) -> MatrixLayout | None:
    """How a stack of experts is read; None if its layout is not known.

    Args:
        experts: the module that owns the stack.
        leaf: name of the parameter there; "gate_up_proj" is two matrices for each expert.
        shape: (experts, fan_out, fan_in) or (experts, fan_in, fan_out).

    Source: the attributes that ``transformers.integrations.moe.use_experts_implementation`` leaves on a module.
    """
    names = transformers_class_names(experts)
    for class_name in names:
        if class_name in FLAT_EXPERTS and len(shape) == 2:
            count = _integer(experts, FLAT_EXPERTS[class_name])
            return MatrixLayout(split_sizes=(shape[0] // count,) * count)
    transposed = getattr(experts, "is_transposed", None)
    if transposed is None:
        transposed = next((UNMARKED_EXPERTS[name] for name in names if name in UNMARKED_EXPERTS), None)
    if transposed is None or len(shape) != 3:
        return None
    if leaf != "gate_up_proj":
        return MatrixLayout(output_axis=int(transposed))
    half = shape[-1 if transposed else -2] // 2
    # Early releases of transformers 5 do not mark the interleaved gate and up of GPT-OSS.
    concatenated = getattr(experts, "is_concatenated", "GptOssExperts" not in names)
    return MatrixLayout(output_axis=int(transposed), split_sizes=(half, half), interleaved=not concatenated)
