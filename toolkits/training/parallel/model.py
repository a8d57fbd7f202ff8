"""A HuggingFace config becomes megatron-core's GPTModel of this rank."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..layout import GRADIENT_BUCKET, Layout
from ..settings import ComputeSettings
from .fused import has_fused_weight_gradient, has_transformer_engine
from .head import LossHead
from .offload import saved_on_cpu
from .reward_head import RewardHead
from .spec import decoder_spec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
ACTIVATIONS = {"silu": torch.nn.functional.silu}
# Settings of the family that belong to GPTModel; all others are fields of TransformerConfig.
ROTARY_SETTINGS = ("rotary_base", "rotary_percent", "rope_scaling", "rope_scaling_factor")
GPT_SETTINGS = ("vocab_size", "max_position_embeddings", "share_embeddings_and_output_weights", *ROTARY_SETTINGS)
OWN_SETTINGS = ("activation", "reward_head")  # and those that neither of them knows


class PaddedVocabularyGPT(GPTModel):
    """GPTModel whose embedding has rows that no token uses, so that TP divides it.

    Their logits take no part in the softmax, as if the rows were not there.
    """

    real_vocab_size: int
    is_reward_model: bool  # its output is a score for every token
    offloads: bool  # saved activations wait for the backward pass in CPU memory
    saved: "Callable[[PaddedVocabularyGPT], dict[str, Any]] | None" = None  # what is saved instead of all weights

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run this stage; see GPTModel.forward."""
        with saved_on_cpu(self) if self.offloads else contextlib.nullcontext():
            return super().forward(*args, **kwargs)

    def _preprocess(self, **inputs: Any) -> tuple[Any, ...]:
        """Give each token of a packed row its own rotary angles [t, 1, 1, d]; see mcore_patches.py."""
        decoder_input, angles, *rest = super()._preprocess(**inputs)
        if inputs["packed_seq_params"] is not None and angles is not None and not self.config.apply_rope_fusion:
            angles = angles[inputs["position_ids"].flatten()]
        return decoder_input, angles, *rest

    def _postprocess(self, *, hidden_states: torch.Tensor, labels: torch.Tensor | None, **rest: Any) -> torch.Tensor:
        """Go from the last stage's hidden states straight to the loss fp32 [b, s] of labels [b, s].

        A reward model's labels are not looked at: it gives scores fp32 [b, s].
        """
        if self.is_reward_model and self.post_process:
            return self.output_layer(hidden_states)  # type: ignore[no-any-return]
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        losses, _ = self.output_layer(hidden_states, weight, labels=labels, vocab_size=self.real_vocab_size)
        return losses


Chunks = tuple[PaddedVocabularyGPT, ...]  # this rank's parts of the model: one, or its virtual pipeline stages


def build_model(
    settings: Mapping[str, Any],
    layout: Layout,
    compute: ComputeSettings,
    *,
    initialize: bool = True,
    adapters: bool = False,
    quantized: bool = False,
) -> Chunks:
    """Build this rank's chunks of the model, bare (no wrapper), on the rank's device.

    With `adapters` its layers are our own also where Transformer Engine is installed, whose fused norms keep to
    themselves what an adapter takes in. `quantized` ones have no matrices yet; see `QuantizedLayer`.

    `settings` come from `conversion.settings.mcore_settings`; process groups must be up. `initialize` False
    leaves the weights as they are allocated, for a checkpoint to fill.
    """
    engine = takes_engine(compute, adapters=adapters)
    config = transformer_config(settings, layout, compute, initialize=initialize, engine=engine)
    spec = partial(decoder_spec, config, flash_attention=compute.flash_attention, engine=engine, quantized=quantized)
    stages = range(layout.chunks) if layout.chunks > 1 else (None,)
    chunks = tuple(_chunk(settings, layout, config, spec(vp_stage=stage), vp_stage=stage) for stage in stages)
    for chunk in chunks:
        chunk.offloads = compute.recompute == "offload"
    return chunks


def takes_engine(compute: ComputeSettings, *, adapters: bool = False) -> bool:
    """Whether the layers are Transformer Engine's on this machine."""
    return compute.flash_attention and has_transformer_engine() and not adapters


def _chunk(
    settings: Mapping[str, Any],
    layout: Layout,
    config: TransformerConfig,
    spec: TransformerBlockSubmodules,
    *,
    vp_stage: int | None,
) -> PaddedVocabularyGPT:
    vocab_size = settings["vocab_size"]
    model = PaddedVocabularyGPT(
        config,
        spec,
        vocab_size=-(-vocab_size // layout.tensor) * layout.tensor,
        max_sequence_length=settings["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=settings["share_embeddings_and_output_weights"],
        position_embedding_type="rope",
        **{name: settings[name] for name in ROTARY_SETTINGS if name in settings},
    )
    model.real_vocab_size, model.is_reward_model = vocab_size, settings["reward_head"]
    if model.post_process:  # GPTModel leaves no other choice of its output layer
        if model.is_reward_model:
            model.output_layer = RewardHead(config, group=model.output_layer.tp_group)
        else:
            model.output_layer.__class__ = LossHead
    return model.cuda()


def transformer_config(
    settings: Mapping[str, Any],
    layout: Layout,
    compute: ComputeSettings,
    *,
    initialize: bool = True,
    engine: bool = False,
) -> TransformerConfig:
    """Return megatron-core's config for a family's settings under a layout; `engine`: its layers are that one's."""
    kind = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    ours = {*GPT_SETTINGS, *OWN_SETTINGS} - {field.name for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in settings.items() if name not in ours}
    fields |= _recompute_fields(compute) | _fusion_fields(settings, engine)
    dtype = DTYPES[compute.precision]
    return kind(
        **fields,
        activation_func=ACTIVATIONS[settings["activation"]],
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        # Sends that overlap are paired by direction; in one batch, two stages could not tell an activation from a
        # gradient.
        overlap_p2p_comm=layout.chunks > 1,
        batch_p2p_comm=layout.chunks == 1,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor or None,
        sequence_parallel=layout.sequence,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers or None,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        fp8="hybrid" if compute.precision == "fp8" else None,  # E4M3 forward, E5M2 for gradients
        params_dtype=dtype,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **({} if initialize else {"init_method": _leave, "output_layer_init_method": _leave}),
        use_cpu_initialization=not torch.cuda.is_available(),
        # The global batch's loss is its summed loss over its number of trained tokens, whichever rank has them.
        calculate_per_token_loss=True,
    )


def _fusion_fields(settings: Mapping[str, Any], engine: bool) -> dict[str, Any]:
    """Choose megatron-core's fused operations: what this machine has a kernel or a compiler for."""
    gpu = torch.cuda.is_available()
    return {
        # Compiled. The fused GELU is the tanh approximation, so only SwiGLU is exact.
        "bias_activation_fusion": gpu and settings["activation"] == "silu",
        "bias_dropout_fusion": gpu,
        "masked_softmax_fusion": False,  # of an attention that we do not use
        # Its kernel for packed rows does not know the interleaved form.
        "apply_rope_fusion": engine and not settings.get("rotary_interleaved", False),
        "gradient_accumulation_fusion": engine or has_fused_weight_gradient(),
    }


def _recompute_fields(compute: ComputeSettings) -> dict[str, Any]:
    if compute.recompute == "full":
        layers = compute.recompute_layers
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": layers}
    if compute.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """Initialise nothing: a checkpoint fills the weight.

    megatron-core's own switch for that, perform_initialization=False, also leaves out the marks that tell a
    tensor-parallel weight from a replicated one, and the gradient norm comes out wrong.
    """
    return weight


def draw_reward_head(chunks: Chunks, seed: int) -> None:
    """Give a reward model's head its first values, on the rank that has it."""
    for chunk in chunks:
        if chunk.post_process:
            chunk.output_layer.initialize(seed)


def wrap(chunks: Chunks, *, distributed_optimizer: bool, overlap: bool = True) -> list[DistributedDataParallel]:
    """Put each chunk behind megatron-core's data parallelism, gradients in fp32.

    With `overlap` and more than one replica, gradients are reduced in buckets while the backward pass still
    runs, and the distributed optimizer's weights are gathered while the next forward pass runs: between a step
    and that pass, `gather_weights` makes them whole.
    """
    config = chunks[0].config
    half, replicas = config.bf16 or config.fp16, parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    overlap = overlap and replicas > 1
    communication = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=True,
        overlap_param_gather=overlap and distributed_optimizer,
        bucket_size=GRADIENT_BUCKET,
    )
    wrapped = [
        # Buckets keep communication off the critical path; of later chunks it is not on it.
        DistributedDataParallel(
            config, communication, Float16Module(config, chunk) if half else chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]
    # Not before: the optimizer is saved bucket by bucket, and a run goes on with or without overlap, at any DP.
    communication.overlap_grad_reduce = overlap
    if overlap:  # the schedule takes one function, or a list with one for each virtual stage
        not_yet, now = [chunk.no_sync for chunk in wrapped], [chunk.start_grad_sync for chunk in wrapped]
        config.no_sync_func, config.grad_sync_func = (not_yet, now) if len(wrapped) > 1 else (not_yet[0], now[0])
    return wrapped


def gather_weights(wrapped: list[DistributedDataParallel]) -> None:
    """Make the weights whole on every rank after a step whose gathering overlaps with the next forward pass."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def sharded_state(chunks: Chunks) -> dict[str, dict[str, Any]]:
    """Return the sharded state of every chunk; what is saved is named by the tensors' own keys, not by the chunk."""
    return {
        f"chunk{number}": chunk.saved(chunk) if chunk.saved else chunk.sharded_state_dict()
        for number, chunk in enumerate(chunks)
    }


def unwrapped(model: torch.nn.Module) -> PaddedVocabularyGPT:
    """Return the bare model inside data parallelism and Float16Module; checkpoint names start there."""
    while not isinstance(model, PaddedVocabularyGPT):
        model = model.get_submodule("module")
    return model
