"""The planner's bytes are those that megatron-core allocates and autograd saves, on every rank, to the byte.

Run as a script this file is one rank: `RANK=.. python test_planning_truth.py CASES.json`.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_world import ROOT, TINY, free_ports

from conversion.plan import plan_for
from toolkits.planning import activations
from toolkits.planning.memory import run_memory
from toolkits.planning.weights import Tuning, sizes_of
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of

RANKS = 4
SEQ_LEN, ROWS = 31, 2  # odd: TP=2 rounds a row up
# Odd: TP=2 pads it. Large: with the tied embedding in a bucket of its own, DP ranks share the padding differently.
VOCABULARY = 1021
HF = TINY | {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY}

# (TP, PP, DP, precision, distributed optimizer, tied).
STATES = [
    (1, 1, 1, "bf16", True, False),
    (1, 1, 1, "fp32", False, True),
    (2, 1, 1, "bf16", True, True),
    (2, 1, 1, "fp32", False, False),
    (1, 2, 1, "bf16", True, True),
    (1, 2, 1, "bf16", False, False),
    (1, 1, 2, "bf16", True, False),
    (1, 1, 2, "bf16", False, True),
    (1, 1, 2, "fp32", True, True),
    (2, 2, 1, "bf16", True, False),
    (1, 2, 2, "bf16", True, True),
    (2, 1, 2, "fp32", True, True),
]
# (TP, sequence parallel, precision, norms on queries and keys, recompute)
ACTIVATIONS = [
    (1, False, "bf16", True, "none"),
    (1, False, "fp32", False, "none"),
    (1, False, "bf16", False, "full"),
    (1, False, "bf16", False, "selective"),
    (2, True, "bf16", False, "none"),
    (2, False, "bf16", False, "none"),
]


def config_of(case):
    tensor, pipeline, _, precision, distributed, _ = case["states"]
    return TrainConfig.from_values(
        {
            "checkpoint": "none",
            "data": Path("data"),
            "output": Path("out"),
            "seq_len": SEQ_LEN,
            "micro_batch_size": ROWS,
            "global_batch_size": 8,
            "precision": precision,
            "tensor_parallel": tensor,
            "pipeline_parallel": pipeline,
            "sequence_parallel": case.get("sequence", True),
            "distributed_optimizer": distributed,
            "recompute": case.get("recompute", "none"),
        }
    )


def activation_case(shape):
    tensor, sequence, precision, _, recompute = shape
    return {"states": (tensor, 1, 1, precision, True, False), "sequence": sequence, "recompute": recompute}


def plan_and_layout(case):
    tensor, pipeline, data, *_, tied = case["states"]
    plan = plan_for(HF | {"tie_word_embeddings": tied})
    return plan, layout_of(config_of(case), plan.settings, tensor * pipeline * data)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What every rank of every case allocated: {case name: [figures of rank 0, rank 1, ...]}."""
    folder = tmp_path_factory.mktemp("planning")
    cases = [{"name": str(case), "states": case} for case in STATES]
    for case in ACTIVATIONS:
        cases.append({"name": str(case), **activation_case(case), "qk_norm": case[3]})
    for case, port in zip(cases, free_ports(len(cases)), strict=True):
        case["port"] = port
    (folder / "cases.json").write_text(json.dumps(cases))
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    command = [sys.executable, "-W", "ignore", __file__, str(folder / "cases.json")]
    ranks = []
    for rank in range(RANKS):
        with open(folder / f"{rank}.log", "wb") as log:
            environment = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0] * RANKS, "\n".join((folder / f"{rank}.log").read_text() for rank in range(RANKS))
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {case["name"]: [each[case["name"]] for each in said if case["name"] in each] for case in cases}


def wait(ranks):
    """Return the exit codes; when one rank fails, the others would wait for it."""
    ends = time.monotonic() + 200
    while time.monotonic() < ends and any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            break
        time.sleep(0.1)
    return [rank.poll() for rank in ranks]


@pytest.mark.parametrize("shape", STATES, ids=str)
def test_states_are_what_megatron_allocates(measured, shape):
    tensor, pipeline, data, *_ = shape
    case = {"states": shape}
    plan, layout = plan_and_layout(case)
    planned = run_memory(plan, config_of(case), layout, Tuning(), every_replica=True)
    of = {(rank.stage, rank.replica): rank.states for rank in planned}
    ranks = measured[str(shape)]
    assert len(ranks) == tensor * pipeline * data
    for rank, real in enumerate(ranks):
        states = of[rank // (tensor * data), rank // tensor % data]
        expected = {
            "parameters": states.parameters,
            "gradients": states.gradients,
            "masters": states.masters,
            "exp_avg": states.moments // 2,
            "exp_avg_sq": states.moments // 2,
        }
        assert real == expected, f"rank {rank}"


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=str)
def test_activations_are_what_autograd_saves(measured, shape):
    case = activation_case(shape)
    plan, layout = plan_and_layout(case)
    sizes = dataclasses.replace(sizes_of(plan), qk_norm=shape[3])
    batch = activations.micro_batch(config_of(case), layout)
    kept = activations.stage_bytes(sizes, batch, layout, Tuning(), stage=0)
    if batch.recompute == "full":  # that is there in the backward pass only
        kept -= activations.layer_bytes(sizes, batch)
    for real in measured[str(shape)]:
        assert real == kept + activations.loss_bytes(sizes, batch)


def rank_main(cases):
    from toolkits.training.parallel.world import process_groups

    rank, figures = int(os.environ["RANK"]), {}
    for case in json.loads(cases.read_text()):
        tensor, pipeline, data, *_ = case["states"]
        if rank >= tensor * pipeline * data:
            continue
        os.environ |= {"WORLD_SIZE": str(tensor * pipeline * data), "MASTER_PORT": str(case["port"])}
        plan, layout = plan_and_layout(case)
        with process_groups(layout, seed=1):
            settings = {**plan.settings, **({"qk_layernorm": case["qk_norm"]} if "qk_norm" in case else {})}
            measure = allocated if "qk_norm" not in case else saved
            figures[case["name"]] = measure(settings, layout, config_of(case))
    (cases.parent / f"{rank}.json").write_text(json.dumps(figures))


def allocated(settings, layout, config):
    """Bytes of everything that stays allocated after an optimizer step."""
    from toolkits.training.optimizer import build_optimizer
    from toolkits.training.parallel.model import build_model, wrap

    model = build_model(settings, layout, config.compute)
    wrapped = wrap(model, distributed_optimizer=config.layout.distributed_optimizer)
    optimizer = build_optimizer(config, wrapped)
    optimizer.step()
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    stepped = [weight for one in inner for group in one.param_groups for weight in group["params"]]
    of_model = storages(wrapped.parameters())
    moments = [state for one in inner for state in one.state.values()]
    return {
        "parameters": sum(of_model.values()),
        "gradients": sum(storages(weight.main_grad for weight in wrapped.parameters()).values()),
        "masters": sum(size for key, size in storages(stepped).items() if key not in of_model),
        "exp_avg": sum(storages(state["exp_avg"] for state in moments).values()),
        "exp_avg_sq": sum(storages(state["exp_avg_sq"] for state in moments).values()),
    }


def saved(settings, layout, config):
    """Bytes that autograd keeps after the forward pass of one micro batch of packed rows."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from toolkits.training.batches import row_length
    from toolkits.training.parallel.model import build_model, wrap

    model = build_model(settings, layout, config.compute)
    wrapped = wrap(model, distributed_optimizer=True)
    tokens = ROWS * row_length(SEQ_LEN, layout)
    ids = torch.arange(tokens)[None]
    ends = torch.tensor([0, 10, tokens // 2, tokens], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=tokens // 2, max_seqlen_kv=tokens // 2)
    weights, kept = storages(wrapped.parameters()), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = wrapped(ids, ids, None, labels=ids, packed_seq_params=packed)
    assert output.shape == (1, tokens)
    return sum(size for key, size in storages(kept).items() if key not in weights)


def storages(tensors):
    """{address: bytes} of the memory behind `tensors`, each piece once; empty ones have none."""
    return {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
        if storage.nbytes()
    }


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a real rank leaves
