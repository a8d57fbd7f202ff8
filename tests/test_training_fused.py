"""Fused operations against their references, in value and gradient, and what is chosen on which machine."""

import math
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed
from training_world import ROOT

from toolkits.training.parallel import head
from toolkits.training.parallel.head import LinearCrossEntropy, parts
from toolkits.training.parallel.norm import rms_norm

TOKENS, HIDDEN, VOCABULARY, PADDED = 23, 20, 37, 40


class Group:
    """Stands for a tensor-parallel group of one rank."""

    def size(self):
        return 1


def randoms(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def values_and_gradients(function, *inputs):
    """Call `function`, weigh its output, go back; return the output and every input's gradient."""
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    gradients = torch.autograd.grad((output.float() * weights).sum(), inputs)
    return [output.detach(), *gradients]


@pytest.fixture
def labels():
    return torch.arange(TOKENS) * 7 % VOCABULARY


def cross_entropy(labels, *, share=(0, VOCABULARY)):
    return lambda hidden, weight: LinearCrossEntropy.apply(hidden, weight, labels, *share, Group())


def reference(labels):
    def losses(hidden, weight):
        logits = (hidden @ weight[:VOCABULARY].t()).float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    return losses


@pytest.mark.parametrize("at_once", [4096, 23, 22, 8, 1])
def test_the_loss_in_parts_is_the_cross_entropy_of_all_logits(labels, monkeypatch, at_once):
    monkeypatch.setattr(head, "LOSS_TOKENS", at_once)
    inputs = randoms((TOKENS, HIDDEN), (PADDED, HIDDEN))
    ours = values_and_gradients(cross_entropy(labels), *inputs)
    theirs = values_and_gradients(reference(labels), *inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert ours[0].dtype == torch.float32
    assert torch.equal(ours[2][VOCABULARY:], torch.zeros(PADDED - VOCABULARY, HIDDEN)), "padding learns nothing"


def test_the_loss_in_bf16_is_as_near_to_fp32_as_bf16_logits_are(labels, monkeypatch):
    exact = values_and_gradients(reference(labels), *randoms((TOKENS, HIDDEN), (PADDED, HIDDEN)))
    half = randoms((TOKENS, HIDDEN), (PADDED, HIDDEN), dtype=torch.bfloat16)
    plain = values_and_gradients(reference(labels), *half)
    monkeypatch.setattr(head, "LOSS_TOKENS", 4)
    ours = values_and_gradients(cross_entropy(labels), *half)
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for one, other, truth in zip(ours, plain, exact, strict=True):
        errors = [float((tensor.float() - truth).norm() / truth.norm()) for tensor in (one, other)]
        assert errors[0] <= 1.1 * errors[1] < 0.02


def test_a_shifted_label_is_another_loss(labels):
    inputs = randoms((TOKENS, HIDDEN), (PADDED, HIDDEN))
    ours, shifted = cross_entropy(labels)(*inputs), reference(labels.roll(1))(*inputs)
    assert (ours - shifted).abs().max() > 0.1


@pytest.mark.parametrize("at_once", [4096, 8])
def test_a_frozen_layer_passes_the_same_gradient_on(labels, monkeypatch, at_once):
    monkeypatch.setattr(head, "LOSS_TOKENS", at_once)
    hidden, weight = randoms((TOKENS, HIDDEN), (PADDED, HIDDEN))
    losses, of_hidden, _ = values_and_gradients(reference(labels), hidden, weight)
    ours = values_and_gradients(lambda h: cross_entropy(labels)(h, weight.detach()), hidden)
    torch.testing.assert_close(ours, [losses, of_hidden], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_a_frozen_layer_of_half_precision_passes_small_gradients_on(labels, dtype, tolerance):
    """Probabilities near 1e-7, of which fp16 holds little, count when the loss is scaled as it is with fp16."""
    hidden, weight = randoms((TOKENS, VOCABULARY), (VOCABULARY, VOCABULARY), dtype=dtype)
    with torch.no_grad():
        weight.copy_(torch.eye(VOCABULARY))
        hidden[torch.arange(TOKENS), labels] = 16.0
    scaled = 2.0**12
    _, truth, _ = values_and_gradients(lambda h, w: cross_entropy(labels)(h, w) * scaled, hidden, weight)
    _, ours = values_and_gradients(lambda h: cross_entropy(labels)(h, weight.detach()) * scaled, hidden)
    small = torch.ones_like(truth).scatter(1, labels.unsqueeze(1), 0)
    assert 0 < (truth * small).abs().max() / scaled < 1e-5
    for of in (1, small):
        assert float((of * (ours - truth)).float().norm() / (of * truth).float().norm()) < tolerance


def test_a_frozen_layer_computes_its_logits_once(labels, monkeypatch):
    monkeypatch.setattr(head, "LOSS_TOKENS", 4)
    taken, gradient = [], head.logits_gradient
    monkeypatch.setattr(head, "logits_gradient", lambda logits, *rest: taken.append(logits) or gradient(logits, *rest))
    hidden, weight = randoms((TOKENS, HIDDEN), (PADDED, HIDDEN))
    with torch.no_grad():
        cross_entropy(labels)(hidden.detach(), weight)
    assert not taken, "validation needs no gradient"
    losses = cross_entropy(labels)(hidden, weight.detach())
    assert len(taken) == 6
    losses.sum().backward()
    assert len(taken) == 6 and hidden.grad is not None


def test_large_logits_do_not_overflow(labels):
    hidden, weight = randoms((TOKENS, HIDDEN), (PADDED, HIDDEN))
    assert cross_entropy(labels)(hidden * 1e3, weight * 1e3).isfinite().all()


def test_parts_are_equal_and_cover_all_tokens(monkeypatch):
    monkeypatch.setattr(head, "LOSS_TOKENS", 10)
    assert [(part.start, part.stop) for part in parts(24)] == [(0, 8), (8, 16), (16, 24)]
    assert [(part.start, part.stop) for part in parts(11)] == [(0, 6), (6, 11)]
    assert [(part.start, part.stop) for part in parts(3)] == [(0, 3)]


def test_all_logits_are_never_there_at_once(labels, monkeypatch):
    monkeypatch.setattr(head, "LOSS_TOKENS", 4)
    seen = []
    statistics, gradient = head.statistics, head.logits_gradient

    def watched(function):
        def call(logits, *rest):
            seen.append(logits.shape)
            return function(logits, *rest)

        return call

    monkeypatch.setattr(head, "statistics", watched(statistics))
    monkeypatch.setattr(head, "logits_gradient", watched(gradient))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    inputs = randoms((TOKENS, HIDDEN), (PADDED, HIDDEN))
    with hooks:
        losses = cross_entropy(labels)(*inputs)
    losses.sum().backward()
    assert len(seen) == 12 and max(tokens for tokens, _ in seen) == 4
    assert {shape for _, shape in seen} == {VOCABULARY}
    assert sum(tensor.numel() for tensor in kept) == TOKENS * HIDDEN + PADDED * HIDDEN + 2 * TOKENS


@pytest.mark.parametrize("frozen", [False, True])
def test_a_divided_vocabulary_gives_the_same_loss_and_gradients(labels, monkeypatch, frozen):
    """Four ranks of ten rows each, of which the last has seven real ones, and a fifth that has none."""
    hidden, weight = randoms((TOKENS, HIDDEN), (PADDED + 10, HIDDEN))
    whole = values_and_gradients(lambda h, w: cross_entropy(labels)(h, w[:PADDED]), hidden, weight)
    monkeypatch.setattr(head, "LOSS_TOKENS", 8)
    ranks = in_turn(hidden, weight, labels, ranks=5, frozen=frozen)
    for losses, *_ in ranks:
        torch.testing.assert_close(losses, whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(of_hidden for _, of_hidden, *_ in ranks), whole[1], rtol=1e-5, atol=1e-5)
    if not frozen:
        torch.testing.assert_close(torch.cat([of_weight for *_, of_weight in ranks]), whole[2], rtol=1e-5, atol=1e-5)


def in_turn(hidden, weight, labels, *, ranks, frozen):
    """Run the ranks of a vocabulary-parallel loss as threads; return each one's loss and gradients."""
    import threading

    barrier, meeting = threading.Barrier(ranks), {}

    class Together:
        def __init__(self, rank):
            self.rank = rank

        def size(self):
            return ranks

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        meeting[group.rank] = tensor.clone()
        barrier.wait()
        stacked = torch.stack([meeting[rank] for rank in range(ranks)])
        tensor.copy_(stacked.amax(0) if op == torch.distributed.ReduceOp.MAX else stacked.sum(0))
        barrier.wait()

    results, rows = [None] * ranks, len(weight) // ranks

    def one(rank):
        mine = weight[rank * rows : (rank + 1) * rows].detach().requires_grad_(not frozen)
        own = hidden.detach().requires_grad_()
        real = max(0, min(rows, VOCABULARY - rank * rows))
        results[rank] = values_and_gradients(
            lambda h, *_: LinearCrossEntropy.apply(h, mine, labels, rank * rows, real, Together(rank)),
            *((own,) if frozen else (own, mine)),
        )

    real_all_reduce, torch.distributed.all_reduce = torch.distributed.all_reduce, all_reduce
    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        torch.distributed.all_reduce = real_all_reduce
    assert all(result is not None for result in results)
    return results


def test_the_norm_of_all_gradients_is_that_of_each(monkeypatch):
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    from toolkits.training.parallel import mcore_patches

    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    mcore_patches._take_the_norm_of_all_gradients_at_once()
    tensors = [tensor.detach() for tensor in randoms((7, 5), (3,), (1,), (64, 9))]
    ours, nothing = clip_grads.l2_norm_impl(65536, None, [tensors], False)
    assert ours.shape == (1,) and nothing is None
    truth = math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in tensors))
    assert float(ours) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_of_each_token_turn_a_packed_row_as_megatron_turns_its_conversations(interleaved):
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    from toolkits.training.parallel import mcore_patches

    mcore_patches._rotate_every_token_by_its_own_angles()
    lengths, heads, width = [5, 1, 9, 4], 3, 16
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    (query,) = randoms((sum(lengths), heads, width))
    angles = torch.outer(torch.arange(9.0), torch.logspace(0, -2, width // 2))
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    angles = angles[:, None, None, :]
    config = types.SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=interleaved, multi_latent_attention=False
    )
    theirs = rope_utils._apply_rotary_pos_emb_thd(
        query, bounds, angles, rotary_interleaved=interleaved, cp_group=types.SimpleNamespace(size=lambda: 1, rank=int)
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    ours = attention.apply_rotary_pos_emb(query, angles[positions], config=config, cu_seqlens=bounds, mscale=1.0)
    assert torch.equal(ours, theirs)
    with pytest.raises(AssertionError, match="one angle a token"):
        attention.apply_rotary_pos_emb(query, angles, config=config, cu_seqlens=bounds)


COMPILED = """
import sys, torch
from toolkits.training.parallel import head, norm
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate

def check(plain, inputs, extra, dtype, compiled=None):
    compiled = compiled or torch.compile(plain, dynamic=False)
    sides = []
    for function in (plain, compiled):
        own = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = function(*own, *extra)
        outs = out if isinstance(out, tuple) else (out,)
        weigh = sum((o.float() * torch.linspace(-1, 1, o.numel()).reshape(o.shape)).sum() for o in outs)
        sides.append([*outs, *torch.autograd.grad(weigh, own)])
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    for one, other in zip(*sides, strict=True):
        scale = one.float().abs().max()
        assert (one.float() - other.float()).abs().max() <= tolerance * max(1, scale), (plain, dtype)

torch.manual_seed(0)
x, w, up = torch.randn(12, 32), torch.rand(32) + 0.5, torch.randn(12, 1, 48)
places = torch.tensor([0, 5, -3, 31, 40, 2, 7, 8, 9, 10, 11, 30])
def swiglu(y):
    gate, linear = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * linear
check(norm.rms_norm, [x, w], [1e-6], torch.bfloat16)
for dtype in (torch.float32, torch.bfloat16) if "all" in sys.argv else ():
    check(norm.rms_norm, [x, w], [1e-6], dtype)
    check(rotate, [torch.randn(12, 1, 2, 16)], [torch.rand(12, 1, 1, 16) * 6], dtype)
    check(swiglu, [up], [], dtype, compiled=lambda y: bias_swiglu_impl(y, None))
    check(head.statistics, [x], [places], dtype)
    check(head.logits_gradient, [x], [places, torch.rand(12) + 4, torch.rand(12)], dtype)
    check(head.scaled, [x], [torch.rand(12)], dtype)
print("compiled")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.skipif(" " in sys.prefix, reason="torch.compile cannot link where the path of torch has a space")
@pytest.mark.parametrize("which", ["norm", pytest.param("all", marks=pytest.mark.full)])
def test_what_a_gpu_compiles_equals_what_a_cpu_runs(tmp_path, which):
    """In a process of its own: the compiler's workers and caches stay out of the other tests."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILED, which]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "compiled\n", done.stderr[-3000:]


def test_on_a_cpu_nothing_is_compiled():
    assert not torch.cuda.is_available()
    assert type(rms_norm) is types.FunctionType and rms_norm.__module__ == "toolkits.training.parallel.norm"
