"""The layer spec: Transformer Engine's where it is installed, else megatron-core's linears with our norm and attention.

Ours saves its parameters under the names that Transformer Engine's fused layers use, so a checkpoint does not
tell which of the two wrote it.
"""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from .attention import PackedAttention, ReferenceAttention
from .latent import LatentAttention
from .norm import RMSNorm
from .quantized import QuantizedLayer


def decoder_spec(
    config: TransformerConfig,
    *,
    flash_attention: bool = True,
    engine: bool = False,
    quantized: bool = False,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of the layers of this pipeline stage, or virtual stage, and of the final norm.

    With `engine` Transformer Engine's; without `flash_attention` the exact attention of this folder. `quantized`
    layers wait for matrices in another format.
    """
    if engine:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    core_attention = PackedAttention if flash_attention else ReferenceAttention
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    layers = [_layer(config, core_attention, experts=_has_experts(config, number)) for number in numbers]
    if quantized:
        for layer in layers:
            layer.module = QuantizedLayer
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _has_experts(config: TransformerConfig, number: int) -> bool:
    """Whether layer `number`, from 0, has experts; `moe_layer_freq` says it of every layer, or is 1."""
    if config.num_moe_experts is None:
        return False
    return isinstance(config.moe_layer_freq, int) or bool(config.moe_layer_freq[number])


def _layer(config: TransformerConfig, core_attention: type, *, experts: bool) -> ModuleSpec:
    assert not config.layernorm_zero_centered_gamma, "the weight of our norm is the factor, not what it has above 1"
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = core_attention
    # The norms that Transformer Engine fuses into the linear layer behind them: they are saved as parts of it.
    fused = {} if experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        parts.self_attention.module = LatentAttention
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
        fused["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        fused["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        fused["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    parts.sharded_state_dict_keys_map = fused
    return layer
