"""Hand-checked partitions of the models in ``tiny_models``, as text.

One row for the parameters with at least two axes: name (``*`` is a number, ``(a|b)`` a choice), how it is read, and
for matrices their number. Everything with fewer axes goes to AdamW. "how it is read" is one of

    adamw <reason>            AdamW
    frozen                    not trainable
    out,in  in,out  conv      a matrix: axes of the last two dimensions, or a flattened convolution
    ... / 3x32                cut along fan_out into 3 parts of 32; "/ 32+16" into parts of 32 and 16
    ... % 2x48                cut into 2 interleaved parts
"""

import re
from typing import Any

from torch import nn

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.partition import ParameterRoute, PartitionOptions, route_parameters

_LLAMA_ATTENTION = "model.layers.*.self_attn.(q|k|v|o)_proj.weight | out,in | 8\n"
_LLAMA_MLP = "model.layers.*.mlp.(gate|up|down)_proj.weight | out,in | 6\n"
_TIED = "model.embed_tokens.weight | adamw tied input and output embeddings\n"
_UNTIED = "model.embed_tokens.weight | adamw embedding\nlm_head.weight | adamw output embeddings\n"
_GPT2 = """
    transformer.wpe.weight | adamw embedding
    transformer.h.*.attn.c_attn.weight | in,out / 3x32 | 6
    transformer.h.*.(attn.c_proj|mlp.c_fc|mlp.c_proj).weight | in,out | 6
"""


def _bert(prefix: str) -> str:
    return f"""
    {prefix}.encoder.layer.*.attention.self.(query|key|value).weight | out,in | 6
    {prefix}.encoder.layer.*.(attention.output|intermediate|output).dense.weight | out,in | 6
"""


def _t5(feed_forward: str, count: int) -> str:
    return f"""
    shared.weight | adamw tied input and output embeddings
    (en|de)coder.block.0.layer.0.SelfAttention.relative_attention_bias.weight | adamw embedding
    (en|de)coder.block.*.layer.0.SelfAttention.(q|k|v|o).weight | out,in | 16
    decoder.block.*.layer.1.EncDecAttention.(q|k|v|o).weight | out,in | 8
    (en|de)coder.block.*.layer.*.{feed_forward}.weight | out,in | {count}
"""


_SEQ2SEQ_LAYERS = """
    model.(en|de)coder.layers.*.(self|encoder)_attn.(q|k|v|out)_proj.weight | out,in | 24
    model.(en|de)coder.layers.*.fc(1|2).weight | out,in | 8
"""

EXPECTED: dict[str, str] = {
    "gpt2": "transformer.wte.weight | adamw tied input and output embeddings" + _GPT2,
    "gpt2_untied": "transformer.wte.weight | adamw embedding\nlm_head.weight | adamw output embeddings" + _GPT2,
    "gpt2_classifier": "transformer.wte.weight | adamw embedding\nscore.weight | adamw head" + _GPT2,
    "gpt2_cross_attention": """
        transformer.h.*.crossattention.c_attn.weight | in,out / 2x32 | 4
        transformer.h.*.crossattention.(q_attn|c_proj).weight | in,out | 4
        transformer.wte.weight | adamw tied input and output embeddings"""
    + _GPT2,
    "openai_gpt": """
        transformer.tokens_embed.weight | adamw tied input and output embeddings
        transformer.positions_embed.weight | adamw embedding
        transformer.h.*.attn.c_attn.weight | in,out / 3x32 | 6
        transformer.h.*.(attn.c_proj|mlp.c_fc|mlp.c_proj).weight | in,out | 6
    """,
    "qwen2": _TIED + _LLAMA_ATTENTION + _LLAMA_MLP,
    "qwen2_untied": _UNTIED + _LLAMA_ATTENTION + _LLAMA_MLP,
    "qwen3": _UNTIED + _LLAMA_ATTENTION + _LLAMA_MLP,
    "llama": _UNTIED + _LLAMA_ATTENTION + _LLAMA_MLP,
    "gemma": _TIED + _LLAMA_ATTENTION + _LLAMA_MLP,
    "starcoder2": _TIED + _LLAMA_ATTENTION + "model.layers.*.mlp.c_(fc|proj).weight | out,in | 4",
    "phi3": _UNTIED
    + """
        model.layers.*.self_attn.qkv_proj.weight | out,in / 32+16+16 | 6
        model.layers.*.mlp.gate_up_proj.weight | out,in / 2x48 | 4
        model.layers.*.(self_attn.o|mlp.down)_proj.weight | out,in | 4
    """,
    "glm4": _UNTIED
    + _LLAMA_ATTENTION
    + """
        model.layers.*.mlp.gate_up_proj.weight | out,in / 2x48 | 4
        model.layers.*.mlp.down_proj.weight | out,in | 2
    """,
    "mixtral": _UNTIED
    + _LLAMA_ATTENTION
    + """
        model.layers.*.mlp.gate.weight | adamw router
        model.layers.*.mlp.experts.gate_up_proj | out,in / 2x48 | 16
        model.layers.*.mlp.experts.down_proj | out,in | 8
    """,
    "qwen3_moe": _UNTIED
    + _LLAMA_ATTENTION
    + """
        model.layers.*.mlp.gate.weight | adamw router
        model.layers.*.mlp.experts.gate_up_proj | out,in / 2x24 | 16
        model.layers.*.mlp.experts.down_proj | out,in | 8
    """,
    "qwen2_moe": _UNTIED
    + _LLAMA_ATTENTION
    + """
        model.layers.*.mlp.gate.weight | adamw router
        model.layers.*.mlp.shared_expert_gate.weight | adamw a single row or column
        model.layers.*.mlp.experts.gate_up_proj | out,in / 2x24 | 16
        model.layers.*.mlp.experts.down_proj | out,in | 8
        model.layers.*.mlp.shared_expert.(gate|up|down)_proj.weight | out,in | 6
    """,
    "gpt_oss": _UNTIED
    + _LLAMA_ATTENTION
    + """
        model.layers.*.mlp.router.weight | adamw router
        model.layers.*.mlp.experts.gate_up_proj | in,out % 2x48 | 16
        model.layers.*.mlp.experts.down_proj | in,out | 8
        model.layers.*.mlp.experts.(gate_up|down)_proj_bias | adamw bias
    """,
    "llama4": _UNTIED
    + _LLAMA_ATTENTION
    + """
        model.layers.0.feed_forward.(gate|up|down)_proj.weight | out,in | 3
        model.layers.1.feed_forward.router.weight | adamw router
        model.layers.1.feed_forward.experts.gate_up_proj | in,out / 2x48 | 8
        model.layers.1.feed_forward.experts.down_proj | in,out | 4
        model.layers.1.feed_forward.shared_expert.(gate|up|down)_proj.weight | out,in | 3
    """,
    "deepseek_v3": _UNTIED
    + """
        model.layers.*.self_attn.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj).weight | out,in | 10
        model.layers.0.mlp.(gate|up|down)_proj.weight | out,in | 3
        model.layers.1.mlp.gate.weight | adamw router
        model.layers.1.mlp.experts.gate_up_proj | out,in / 2x24 | 8
        model.layers.1.mlp.experts.down_proj | out,in | 4
        model.layers.1.mlp.shared_experts.(gate|up|down)_proj.weight | out,in | 3
    """,
    "dbrx": """
        transformer.wte.weight | adamw embedding
        lm_head.weight | adamw output embeddings
        transformer.blocks.*.norm_attn_norm.attn.Wqkv.weight | out,in / 32+16+16 | 6
        transformer.blocks.*.norm_attn_norm.attn.out_proj.weight | out,in | 2
        transformer.blocks.*.ffn.router.layer.weight | adamw router
        transformer.blocks.*.ffn.experts.mlp.(w1|v1|w2) | out,in / 4x24 | 24
    """,
    "jetmoe": _TIED
    + """
        model.layers.*.mlp.input_linear.weight | out,in / 2x48 | 16
        model.layers.*.mlp.output_linear.weight | out,in | 8
        model.layers.*.(mlp|self_attention.experts).router.layer.weight | adamw router
        model.layers.*.self_attention.experts.(in|out)put_linear.weight | out,in | 16
        model.layers.*.self_attention.kv_proj.weight | out,in / 2x16 | 4
    """,
    "gpt_bigcode": """
        transformer.wte.weight | adamw tied input and output embeddings
        transformer.wpe.weight | adamw embedding
        transformer.h.*.attn.c_attn.weight | out,in / 32+8+8 | 6
        transformer.h.*.(attn.c_proj|mlp.c_fc|mlp.c_proj).weight | out,in | 6
    """,
    "gpt_neox": """
        gpt_neox.embed_in.weight | adamw embedding
        lm_head.weight | adamw output embeddings
        gpt_neox.layers.*.attention.(query_key_value|dense).weight | out,in | 4
        gpt_neox.layers.*.mlp.dense_(h_to_4h|4h_to_h).weight | out,in | 4
    """,
    "falcon": """
        transformer.word_embeddings.weight | adamw tied input and output embeddings
        transformer.h.*.self_attention.(query_key_value|dense).weight | out,in | 4
        transformer.h.*.mlp.dense_(h_to_4h|4h_to_h).weight | out,in | 4
    """,
    "bloom": """
        transformer.word_embeddings.weight | adamw tied input and output embeddings
        transformer.h.*.self_attention.(query_key_value|dense).weight | out,in | 4
        transformer.h.*.mlp.dense_(h_to_4h|4h_to_h).weight | out,in | 4
    """,
    "mpt": """
        transformer.wte.weight | adamw tied input and output embeddings
        transformer.blocks.*.attn.Wqkv.weight | out,in / 3x32 | 6
        transformer.blocks.*.(attn.out|ffn.up|ffn.down)_proj.weight | out,in | 6
    """,
    "opt": """
        model.decoder.embed_tokens.weight | adamw tied input and output embeddings
        model.decoder.embed_positions.weight | adamw embedding
        model.decoder.project_(in|out).weight | out,in | 2
        model.decoder.layers.*.self_attn.(q|k|v|out)_proj.weight | out,in | 8
        model.decoder.layers.*.fc(1|2).weight | out,in | 4
    """,
    "gptj": """
        transformer.wte.weight | adamw embedding
        lm_head.weight | adamw output embeddings
        transformer.h.*.attn.(q|k|v|out)_proj.weight | out,in | 8
        transformer.h.*.mlp.fc_(in|out).weight | out,in | 4
    """,
    "mamba": """
        backbone.embeddings.weight | adamw tied input and output embeddings
        backbone.layers.*.mixer.A_log | adamw free parameter of MambaMixer
        backbone.layers.*.mixer.conv1d.weight | adamw depthwise convolution
        backbone.layers.*.mixer.(in|x|dt|out)_proj.weight | out,in | 8
    """,
    "bert": """
        bert.embeddings.word_embeddings.weight | adamw tied input and output embeddings
        bert.embeddings.(position|token_type)_embeddings.weight | adamw embedding
        cls.predictions.transform.dense.weight | adamw head"""
    + _bert("bert"),
    "bert_classifier": """
        bert.embeddings.(word|position|token_type)_embeddings.weight | adamw embedding
        bert.pooler.dense.weight | out,in | 1
        classifier.weight | adamw head"""
    + _bert("bert"),
    "roberta": """
        roberta.embeddings.word_embeddings.weight | adamw tied input and output embeddings
        roberta.embeddings.(position|token_type)_embeddings.weight | adamw embedding
        lm_head.dense.weight | adamw head"""
    + _bert("roberta"),
    "roberta_classifier": """
        roberta.embeddings.(word|position|token_type)_embeddings.weight | adamw embedding
        classifier.(dense|out_proj).weight | adamw head"""
    + _bert("roberta"),
    "esm": """
        esm.embeddings.word_embeddings.weight | adamw tied input and output embeddings
        esm.contact_head.regression.weight | adamw a single row or column
        lm_head.dense.weight | adamw head"""
    + _bert("esm"),
    "modernbert": """
        model.embeddings.tok_embeddings.weight | adamw tied input and output embeddings
        model.layers.*.attn.Wqkv.weight | out,in / 3x32 | 6
        model.layers.*.mlp.Wi.weight | out,in / 2x48 | 4
        model.layers.*.(attn|mlp).Wo.weight | out,in | 4
        head.dense.weight | adamw head
    """,
    "distilbert": """
        distilbert.embeddings.word_embeddings.weight | adamw tied input and output embeddings
        distilbert.embeddings.position_embeddings.weight | adamw embedding
        distilbert.transformer.layer.*.attention.(q|k|v|out)_lin.weight | out,in | 8
        distilbert.transformer.layer.*.ffn.lin(1|2).weight | out,in | 4
        vocab_transform.weight | adamw head
    """,
    "deberta": """
        deberta.embeddings.(word|position)_embeddings.weight | adamw embedding
        deberta.encoder.rel_embeddings.weight | adamw embedding
        deberta.encoder.layer.*.attention.self.(in|pos|pos_q)_proj.weight | out,in | 6
        deberta.encoder.layer.*.(attention.output|intermediate|output).dense.weight | out,in | 6
        (pooler.dense|classifier).weight | adamw head
    """,
    "deberta_v2": """
        deberta.embeddings.word_embeddings.weight | adamw tied input and output embeddings
        deberta.embeddings.position_embeddings.weight | adamw embedding
        deberta.encoder.rel_embeddings.weight | adamw embedding
        deberta.encoder.layer.*.attention.self.(query|key|value|pos_key|pos_query)_proj.weight | out,in | 10
        deberta.encoder.layer.*.(attention.output|intermediate|output).dense.weight | out,in | 6
        cls.predictions.transform.dense.weight | adamw head
    """,
    "t5": _t5("DenseReluDense.w(i|o)", 8),
    "t5_gated": _t5("DenseReluDense.w(i_0|i_1|o)", 12),
    "switch_transformers": _t5("mlp.(experts.expert_[0-3].)?w(i|o)", 20)
    + "(en|de)coder.block.*.layer.*.mlp.router.classifier.weight | adamw router",
    "bart": """
        model.shared.weight | adamw tied input and output embeddings
        model.(en|de)coder.embed_positions.weight | adamw embedding"""
    + _SEQ2SEQ_LAYERS,
    "whisper": """
        model.encoder.conv1.weight | adamw embedding
        model.encoder.conv2.weight | conv | 1
        model.encoder.embed_positions.weight | frozen
        model.decoder.embed_tokens.weight | adamw tied input and output embeddings
        model.decoder.embed_positions.weight | adamw embedding"""
    + _SEQ2SEQ_LAYERS,
    "wav2vec2": """
        wav2vec2.feature_extractor.conv_layers.*.conv.weight | conv | 2
        wav2vec2.feature_projection.projection.weight | out,in | 1
        wav2vec2.encoder.pos_conv_embed.conv.(\\w+).weight.original0 | adamw a single row or column
        wav2vec2.encoder.pos_conv_embed.conv.(\\w+).weight.original1 | adamw free parameter of ParametrizationList
        wav2vec2.encoder.layers.*.attention.(q|k|v|out)_proj.weight | out,in | 8
        wav2vec2.encoder.layers.*.feed_forward.(intermediate|output)_dense.weight | out,in | 4
        lm_head.weight | adamw head
    """,
    "vit": """
        vit.embeddings.(cls_token|position_embeddings|patch_embeddings.projection.weight) | adamw embedding
        vit.layers.*.attention.(q|k|v|o)_proj.weight | out,in | 8
        vit.layers.*.mlp.fc(1|2).weight | out,in | 4
        classifier.weight | adamw head
    """,
    "convnext": """
        convnext.embeddings.patch_embeddings.weight | adamw embedding
        convnext.encoder.stages.1.downsampling_layer.1.weight | conv | 1
        convnext.encoder.stages.*.layers.0.dwconv.weight | adamw depthwise convolution
        convnext.encoder.stages.*.layers.0.pwconv(1|2).weight | out,in | 4
        classifier.weight | adamw head
    """,
    "resnet": """
        resnet.embedder.embedder.convolution.weight | conv | 1
        resnet.encoder.stages.*.layers.0.(shortcut|layer.*).convolution.weight | conv | 5
        classifier.1.weight | adamw head
    """,
    "regnet": """
        regnet.embedder.embedder.convolution.weight | conv | 1
        regnet.encoder.stages.*.layers.0.(shortcut|layer.0|layer.3).convolution.weight | conv | 6
        regnet.encoder.stages.0.layers.0.layer.1.convolution.weight | conv / 2x8 | 2
        regnet.encoder.stages.1.layers.0.layer.1.convolution.weight | conv / 4x8 | 4
        regnet.encoder.stages.*.layers.0.layer.2.attention.*.weight | conv | 4
        classifier.1.weight | adamw head
    """,
    "clip_classifier": """
        vision_model.embeddings.(patch|position)_embedding.weight | adamw embedding
        vision_model.encoder.layers.*.self_attn.(q|k|v|out)_proj.weight | out,in | 8
        vision_model.encoder.layers.*.mlp.fc(1|2).weight | out,in | 4
        classifier.weight | adamw head
    """,
    "siglip": """
        text_model.embeddings.(token|position)_embedding.weight | adamw embedding
        vision_model.embeddings.(patch|position)_embedding.weight | adamw embedding
        (text|vision)_model.encoder.layers.*.self_attn.(q|k|v|out)_proj.weight | out,in | 16
        (text|vision)_model.encoder.layers.*.mlp.fc(1|2).weight | out,in | 8
        text_model.head.weight | out,in | 1
        vision_model.head.probe | adamw a single row or column
        vision_model.head.attention.in_proj_weight | out,in / 3x32 | 3
        vision_model.head.(attention.out_proj|mlp.fc(1|2)).weight | out,in | 3
    """,
    "clip": """
        text_model.embeddings.(token|position)_embedding.weight | adamw embedding
        vision_model.embeddings.(patch|position)_embedding.weight | adamw embedding
        (text|vision)_model.encoder.layers.*.self_attn.(q|k|v|out)_proj.weight | out,in | 16
        (text|vision)_model.encoder.layers.*.mlp.fc(1|2).weight | out,in | 8
        (text|visual)_projection.weight | out,in | 2
    """,
}


def parse_row(row: str) -> tuple[re.Pattern[str], str, str, MatrixLayout | None, int]:
    """Read a row of a table: names, role, reason, layout, number of matrices."""
    name, reading, *count = row.strip().split(" | ")
    names = re.compile(name.replace(".", r"\.").replace("*", r"\d+"))
    if not count:
        role, _, reason = reading.partition(" ")
        return names, role, reason, None, 0
    axes, cut, sizes = re.fullmatch(r"(\S+)(?: ([/%]) (\S+))?", reading).groups()
    split = None
    if sizes and "x" in sizes:
        parts, size = map(int, sizes.split("x"))
        split = (size,) * parts
    elif sizes:
        split = tuple(map(int, sizes.split("+")))
    layout = MatrixLayout(int(axes == "in,out"), flatten=axes == "conv", split_sizes=split, interleaved=cut == "%")
    return names, "matrix", "", layout, int(count[0])


def routes_by_name(model: nn.Module, **options: Any) -> dict[str, ParameterRoute]:
    return {route.name: route for route in route_parameters(model, PartitionOptions(**options))}
