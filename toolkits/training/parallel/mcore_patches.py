"""What megatron-core 0.16.1 needs on every machine, one reason each."""

import queue
from typing import Any

import torch


def install() -> None:
    """Apply the patches of this file to the process; a second call does nothing more."""
    _write_results_through_a_plain_queue()
    _do_without_transformer_engine()
    _rotate_every_token_by_its_own_angles()
    _take_the_norm_of_all_gradients_at_once()
    _let_transformer_engine_add_weight_gradients()


def _write_results_through_a_plain_queue() -> None:
    # The checkpoint writer starts a manager process for a queue that a synchronous save uses within one
    # process only. The manager re-imports the main module (3 s a rank), and a SIGTERM to the process group
    # kills it, so that the save during the grace period fails.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = queue.Queue


def _do_without_transformer_engine() -> None:
    # Experts and latent attention ask for names that are there only where it is installed.
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    from .fused import has_transformer_engine

    if not has_transformer_engine():
        moe_utils.te_general_gemm = None
        multi_latent_attention.HAVE_TE = False


def _rotate_every_token_by_its_own_angles() -> None:
    # Of a packed row megatron-core asks the GPU for its conversations' lengths and cuts the angles for each, in
    # every layer, for queries and for keys. PaddedVocabularyGPT gathers one angle a token, once a micro batch.
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    from .fused import fused

    rotate, choose = fused(rope_utils._apply_rotary_pos_emb_bshd), rope_utils.apply_rotary_pos_emb

    def apply(
        t: torch.Tensor, freqs: torch.Tensor, config: Any, cu_seqlens: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        """[t, heads, d] by [t, 1, 1, d] in the packed format; the others go where they went."""
        if cu_seqlens is None or config.apply_rope_fusion:
            return choose(t, freqs, config, cu_seqlens, **rest)  # type: ignore[no-any-return]
        assert len(freqs) == len(t), "one angle a token"
        turned = rotate(t.unsqueeze(1), freqs, config.rotary_interleaved, False, rest.get("mscale", 1.0))
        return turned.squeeze(1)  # type: ignore[no-any-return]

    attention.apply_rotary_pos_emb = apply


def _take_the_norm_of_all_gradients_at_once() -> None:
    # Without Transformer Engine and Apex the norm of each gradient is fetched from the GPU by itself.
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    def norm(_chunk: int, _overflow: torch.Tensor, tensors: list[list[torch.Tensor]], *_: Any) -> tuple[Any, None]:
        """Return the norm [1] of all tensors of `tensors[0]`, and nothing of each."""
        return torch.stack(torch._foreach_norm(tensors[0])).norm().view(1), None

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm


def _let_transformer_engine_add_weight_gradients() -> None:
    # Transformer Engine's linears add to the accumulated gradient themselves; megatron-core's output layer then
    # asks for Apex's kernel too, which ours (head.py) does not call.
    from megatron.core.tensor_parallel import layers

    from .fused import has_transformer_engine

    if has_transformer_engine():
        layers._grad_accum_fusion_available = True
