"""The layer spec: megatron-core's own linears with the norm and the attention of this folder.

Its parameters are saved under the names that Transformer Engine's fused layers use, so a checkpoint does
not tell which of the two wrote it.
"""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from .attention import PackedAttention, ReferenceAttention
from .norm import RMSNorm


def decoder_spec(
    config: TransformerConfig, *, flash_attention: bool = True, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the spec of the layers of this pipeline stage, or virtual stage, and of the final norm."""
    layer = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention if flash_attention else ReferenceAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
