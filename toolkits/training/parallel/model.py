"""A HuggingFace config becomes megatron-core's GPTModel of this rank."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from ..config import ComputeSettings
from ..layout import Layout
from .offload import saved_on_cpu
from .spec import decoder_spec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ACTIVATIONS = {"silu": torch.nn.functional.silu}
# Settings of the family that belong to GPTModel; all others are fields of TransformerConfig.
GPT_SETTINGS = ("vocab_size", "max_position_embeddings", "rotary_base", "share_embeddings_and_output_weights")


class PaddedVocabularyGPT(GPTModel):
    """GPTModel whose embedding has rows that no token uses, so that TP divides it.

    Their logits take no part in the softmax, as if the rows were not there.
    """

    real_vocab_size: int
    offloads: bool  # saved activations wait for the backward pass in CPU memory

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run this stage; see GPTModel.forward."""
        with saved_on_cpu(self) if self.offloads else contextlib.nullcontext():
            return super().forward(*args, **kwargs)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy [b, s] of labels [b, s] under this rank's logits [s, b, vocab / TP]."""
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        real = max(0, self.real_vocab_size - first)
        if real < logits.shape[-1]:
            # Outside autograd: the softmax of -inf is 0, and so is the gradient that comes back.
            with torch.no_grad():
                logits[..., real:] = float("-inf")
        return super().compute_language_model_loss(labels, logits)


Chunks = tuple[PaddedVocabularyGPT, ...]  # this rank's parts of the model: one, or its virtual pipeline stages


def build_model(
    settings: Mapping[str, Any], layout: Layout, compute: ComputeSettings, *, initialize: bool = True
) -> Chunks:
    """Build this rank's chunks of the model, bare (no wrapper), on the rank's device.

    `settings` come from `conversion.plan.mcore_settings`; process groups must be up. `initialize` False
    leaves the weights as they are allocated, for a checkpoint to fill.
    """
    config = transformer_config(settings, layout, compute, initialize=initialize)
    stages = range(layout.chunks) if layout.chunks > 1 else (None,)
    return tuple(_chunk(settings, layout, compute, config, vp_stage=stage) for stage in stages)


def _chunk(
    settings: Mapping[str, Any],
    layout: Layout,
    compute: ComputeSettings,
    config: TransformerConfig,
    *,
    vp_stage: int | None,
) -> PaddedVocabularyGPT:
    vocab_size = settings["vocab_size"]
    model = PaddedVocabularyGPT(
        config,
        decoder_spec(config, flash_attention=compute.flash_attention, vp_stage=vp_stage),
        vocab_size=-(-vocab_size // layout.tensor) * layout.tensor,
        max_sequence_length=settings["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=settings["share_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_base=settings["rotary_base"],
    )
    model.real_vocab_size = vocab_size
    model.offloads = compute.recompute == "offload"
    return model.cuda()


def transformer_config(
    settings: Mapping[str, Any], layout: Layout, compute: ComputeSettings, *, initialize: bool = True
) -> TransformerConfig:
    """Return megatron-core's config for a family's settings under a layout."""
    fields = {name: value for name, value in settings.items() if name not in (*GPT_SETTINGS, "activation")}
    fields |= _recompute_fields(compute)
    dtype = DTYPES[compute.precision]
    return TransformerConfig(
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
        sequence_parallel=layout.sequence,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers or None,
        bf16=compute.precision == "bf16",
        fp16=compute.precision == "fp16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **({} if initialize else {"init_method": _leave, "output_layer_init_method": _leave}),
        use_cpu_initialization=not torch.cuda.is_available(),
        # The global batch's loss is its summed loss over its number of trained tokens, whichever rank has them.
        calculate_per_token_loss=True,
        # Fused kernels of extensions that a machine without Transformer Engine and Apex does not have.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


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


def wrap(chunks: Chunks, *, distributed_optimizer: bool) -> list[DistributedDataParallel]:
    """Put each chunk behind megatron-core's data parallelism, gradients in fp32."""
    config = chunks[0].config
    gradients = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    half = config.bf16 or config.fp16
    return [
        DistributedDataParallel(config, gradients, Float16Module(config, chunk) if half else chunk) for chunk in chunks
    ]


def sharded_state(chunks: Chunks) -> dict[str, dict[str, Any]]:
    """Return the sharded state of every chunk; what is saved is named by the tensors' own keys, not by the chunk."""
    return {f"chunk{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


def unwrapped(model: torch.nn.Module) -> PaddedVocabularyGPT:
    """Return the bare model inside data parallelism and Float16Module; checkpoint names start there."""
    while not isinstance(model, PaddedVocabularyGPT):
        model = model.get_submodule("module")
    return model
