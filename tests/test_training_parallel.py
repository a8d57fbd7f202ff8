"""The pieces under megatron-core's layers, and the answers that let it run on a CPU."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from training_world import ROOT

from toolkits.training.batches import packed_params


def in_own_process(script):
    """Run `script`, whose patches must not reach the other tests, and return what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cuda_calls_are_answered_by_the_cpu():
    answers = in_own_process("""
        import json, torch
        from toolkits.training.parallel import cpu_backend
        cpu_backend.install(); cpu_backend.install()
        x = torch.zeros(3, device="cuda")
        y = torch.zeros(3, device=torch.cuda.current_device())
        z = torch.zeros(3, device=0)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        before = torch.cuda.get_rng_state()
        first = torch.rand(2)
        torch.cuda.set_rng_state(before)
        again = torch.rand(2)
        moved = torch.nn.Linear(1, 1).cuda().weight
        print(json.dumps({
            "devices": [str(t.device) for t in (x, y, z, x.cuda(), x.to("cuda:1"), moved)],
            "types": [x.type(), x.bfloat16().type()],
            "seeded": torch.equal(first, again),
            "event": stream.record_event().query(),
            "pinned": x.pin_memory() is x,
            "kept": x.to(torch.float64).dtype == torch.float64,
        }))
    """)
    assert answers == {
        "devices": ["cpu"] * 6,
        "types": ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"],
        "seeded": True,
        "event": True,
        "pinned": True,
        "kept": True,
    }


def test_checkpoint_results_travel_through_a_plain_queue():
    kind = in_own_process("""
        import json
        from toolkits.training.parallel import mcore_patches
        mcore_patches.install()
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        print(json.dumps(type(filesystem_async._get_write_results_queue()).__module__))
    """)
    assert kind == "queue", "a manager process would be started for it, and die of the launcher's SIGTERM"


def attention(name):
    from toolkits.training.parallel import attention as module

    return getattr(module, name)(None, 1, None, "self")


def heads(tokens, count, seed):
    return torch.randn(tokens, count, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["PackedAttention", "ReferenceAttention"])
def test_a_packed_row_attends_within_its_conversations(name):
    q, k, v = heads(12, 6, 1), heads(12, 2, 2), heads(12, 2, 3)
    core = attention(name)
    row = core(q, k, v, None, packed_seq_params=packed_params([5, 6, 12], longest=6))
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        alone = core(*(x[part].unsqueeze(1) for x in (q, k, v)))
        assert torch.equal(row[part], alone.squeeze(1))
    changed = core(
        q, k, v.index_fill(0, torch.tensor([11]), 9.0), None, packed_seq_params=packed_params([5, 6, 12], longest=6)
    )
    assert torch.equal(row[:11], changed[:11]), "a token sees the future"


def test_both_attentions_are_the_textbook():
    q, k, v = heads(7, 6, 1), heads(7, 2, 2), heads(7, 2, 3)
    expected = torch.empty(7, 6, 10)
    for head in range(6):
        for position in range(7):
            scores = torch.stack([q[position, head] @ k[past, head // 3] for past in range(position + 1)]) / 10**0.5
            expected[position, head] = scores.softmax(0) @ v[: position + 1, head // 3]
    for name in ("PackedAttention", "ReferenceAttention"):
        ours = attention(name)(*(x.unsqueeze(1) for x in (q, k, v))).squeeze(1)
        torch.testing.assert_close(ours, expected.flatten(1), atol=1e-6, rtol=1e-5)


def test_the_norm_equals_torchs_and_is_summed_over_tensor_parallel_ranks():
    from types import SimpleNamespace

    from toolkits.training.parallel.norm import RMSNorm

    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True), 48, eps=1e-6)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    x = torch.randn(5, 48)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (48,), norm.weight, 1e-6))
    assert norm.weight.sequence_parallel
