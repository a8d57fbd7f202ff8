"""The planner's bytes are those that megatron-core allocates and autograd saves, on every rank, to the byte.

Run as a script this file is one rank: `RANK=.. python test_planning_truth.py CASES.json`.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conversion_models import EXPERTS
from training_world import ROOT, TINY, free_ports

from conversion.plan import plan_for
from toolkits.planning import activations, states
from toolkits.planning.layer import micro_batch
from toolkits.planning.memory import run_memory
from toolkits.planning.sizes import sizes_of
from toolkits.planning.states import ELEMENT
from toolkits.planning.weights import Tuning
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of

RANKS = 4
SEQ_LEN, ROWS = 31, 2  # odd: TP=2 and CP=2 round a row up
FIRST_SEQUENCE = 12  # tokens: CP=2 cuts it into four pieces
# Odd: TP=2 pads it. Large: with the tied embedding in a bucket of its own, DP ranks share the padding differently.
VOCABULARY = 1021
HF = TINY | {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Case:
    """A model with experts or the dense one, a layout and settings; `bucket` replaces what ends a bucket, elements."""

    model: str = ""
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 0
    precision: str = "bf16"
    distributed: bool = True
    tied: bool = False
    first: int = 0
    virtual: int = 0
    bucket: int = 0
    sequence: bool = True
    qk_norm: bool = False  # of the dense model
    recompute: str = "none"

    def __str__(self):
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        differs = [f"{name} {value}" for name, value in said.items() if value != getattr(Case, name)]
        return ", ".join(differs) or "plain"

    @property
    def world(self):
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def config(self):
        return TrainConfig.from_values(
            {
                "checkpoint": "none",
                "data": Path("data"),
                "output": Path("out"),
                "seq_len": SEQ_LEN,
                "micro_batch_size": ROWS,
                "global_batch_size": 8,
                "precision": self.precision,
                "tensor_parallel": self.tensor,
                "pipeline_parallel": self.pipeline,
                "context_parallel": self.context,
                "expert_parallel": self.expert,
                "expert_tensor_parallel": self.expert_tensor,
                "first_stage_layers": self.first,
                "virtual_stage_layers": self.virtual,
                "sequence_parallel": self.sequence,
                "distributed_optimizer": self.distributed,
                "recompute": self.recompute,
            }
        )

    @property
    def plan(self):
        return plan_for((EXPERTS[self.model] if self.model else HF) | {"tie_word_embeddings": self.tied})

    @property
    def settings(self):
        return {**self.plan.settings, **({} if self.model else {"qk_layernorm": self.qk_norm})}

    @property
    def layout(self):
        return layout_of(self.config, self.plan.settings, self.world)


STATES = [
    Case(),
    Case(precision="fp32", distributed=False, tied=True),
    Case(tensor=2, tied=True),
    Case(tensor=2, precision="fp32", distributed=False),
    Case(pipeline=2, tied=True),
    Case(pipeline=2, distributed=False, first=1),
    Case(data=2),
    Case(data=2, distributed=False, tied=True),
    Case(data=2, precision="fp32", tied=True),
    Case(tensor=2, pipeline=2),
    Case(pipeline=2, data=2, tied=True),
    Case(tensor=2, data=2, precision="fp32", tied=True),
    Case(context=2, tied=True),
    Case(context=2, data=2),
    Case(pipeline=2, virtual=1, tied=True),
    Case(pipeline=2, virtual=1, data=2, bucket=5000, tied=True),
    Case(data=2, bucket=5000),
    Case(context=2, bucket=5000, distributed=False),
    *(Case(name, tensor=2) for name in EXPERTS),
    *(Case(name, pipeline=2, data=2, expert=2) for name in EXPERTS),
    Case("qwen2-moe-every-other", pipeline=2, first=1, tied=True),
    Case("qwen2-moe", expert=2, data=4),
    Case("qwen2-moe", expert=2, data=4, distributed=False),
    Case("qwen2-moe", tensor=2, expert=2, data=2, precision="fp32"),
    Case("qwen2-moe", tensor=2, expert=2, expert_tensor=1, data=2, bucket=5000),
    Case("deepseek-v3", precision="fp32"),
]
ACTIVATIONS = [
    Case(qk_norm=True),
    Case(precision="fp32"),
    Case(recompute="full"),
    Case(recompute="selective"),
    Case(tensor=2),
    Case(tensor=2, sequence=False),
    Case(context=2),
    Case(context=2, tensor=2),
    Case(context=2, recompute="selective"),
    Case(context=2, recompute="full"),
    *(Case(name) for name in EXPERTS),
    *(Case(name, tensor=2) for name in ("qwen2-moe", "qwen3-moe-mixed", "deepseek-v3")),
    *(Case(name, expert=2, data=2) for name in ("qwen2-moe", "deepseek-v3")),
    Case("qwen2-moe", tensor=2, expert=2, expert_tensor=1),
    Case("qwen2-moe", context=2),
    Case("qwen2-moe", recompute="full"),
    Case("deepseek-v3", recompute="selective"),
    Case("deepseek-v2-lite", tensor=2, precision="fp32"),
]
# As on a GPU, pointwise operations compiled; on one rank.
FUSED = [
    Case(qk_norm=True),
    Case(precision="fp32"),
    Case(recompute="full"),
    Case(recompute="selective"),
    *(Case(name) for name in ("qwen2-moe", "qwen3-moe-mixed", "deepseek-v3")),
    Case("deepseek-v2-lite", precision="fp32"),
    Case("deepseek-v3", recompute="selective"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What every rank of every case allocated: {kind and case: [figures of rank 0, rank 1, ...]}."""
    return run_kinds(tmp_path_factory.mktemp("planning"), ["states", "activations"], ranks=RANKS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The same of compiled operations."""
    if shutil.which("g++") is None or " " in sys.prefix:
        pytest.skip("torch.compile needs a C++ compiler, and a path of torch without spaces to link with it")
    return run_kinds(tmp_path_factory.mktemp("compiled"), ["fused"], ranks=1)


def run_kinds(folder, kinds, *, ranks):
    cases = [{"kind": kind, **dataclasses.asdict(case)} for kind in kinds for case in MEASURE[kind][1]]
    (folder / "cases.json").write_text(json.dumps(list(zip(cases, free_ports(len(cases)), strict=True))))
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    command = [sys.executable, "-W", "ignore", __file__, str(folder / "cases.json")]
    processes = []
    for rank in range(ranks):
        with open(folder / f"{rank}.log", "wb") as log:
            environment = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks, "\n".join((folder / f"{rank}.log").read_text() for rank in range(ranks))
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [each[name] for each in said if name in each] for name in said[0]}


def wait(ranks):
    """Return the exit codes; when one rank fails, the others would wait for it."""
    ends = time.monotonic() + 300
    while time.monotonic() < ends and any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            break
        time.sleep(0.1)
    return [rank.poll() for rank in ranks]


@pytest.mark.parametrize("case", STATES, ids=str)
def test_states_are_what_megatron_allocates(measured, case, monkeypatch):
    if case.bucket:
        monkeypatch.setattr(states, "GRADIENT_BUCKET", case.bucket)
    planned = run_memory(case.plan, case.config, case.layout, Tuning(), every_rank=True)
    ranks = measured[f"states {case}"]
    assert len(ranks) == len(planned) == case.world
    for rank, real in enumerate(ranks):
        held = planned[rank].states
        expected = {
            "parameters": held.parameters,
            "gradients": held.gradients,
            "masters": held.masters,
            "exp_avg": held.moments // 2,
            "exp_avg_sq": held.moments // 2,
        }
        assert real == expected, f"rank {rank}"


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_activations_are_what_autograd_saves(measured, case):
    """Of ranks that share experts the mean is: which of them sees how many tokens is the router's business."""
    kept = kept_after_forward(case, fused=False)
    over = [
        real - kept - of_a_cpu(case, rank // case.tensor) for rank, real in enumerate(measured[f"activations {case}"])
    ]
    assert over == [0] * case.world if case.expert == 1 else sum(over) == 0


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_activations_are_what_compiled_operations_save(compiled, case):
    assert compiled[f"fused {case}"] == [kept_after_forward(case, fused=True) + of_a_cpu(case, 0)]


def kept_after_forward(case, *, fused):
    sizes = dataclasses.replace(sizes_of(case.plan), **({} if case.model else {"qk_norm": case.qk_norm}))
    batch = micro_batch(case.config, case.layout, fused=fused)
    kept = activations.stage_bytes(sizes, batch, Tuning(), stage=0)
    if batch.recompute == "full":  # that is there in the backward pass only
        kept -= activations.largest_layer_bytes(sizes, batch, Tuning(), stage=0)
    return kept + activations.loss_bytes(sizes, batch)


def of_a_cpu(case, rank):
    """Bytes that a CPU's attention keeps in all layers instead of a GPU's, when nothing is computed again."""
    row, layers = case.layout.padded(SEQ_LEN), case.settings["num_layers"]
    conversations = (FIRST_SEQUENCE, row - FIRST_SEQUENCE, row)
    if case.recompute != "none":
        return 0
    if latent := sizes_of(case.plan).latent:  # values narrower than keys: all is computed in fp32, scores are kept
        heads, element = case.settings["num_attention_heads"] // case.tensor, ELEMENT[case.precision]
        wider = (4 - element) * (2 * (latent.nope + latent.rope) + latent.value)
        not_there = element * latent.value + 4
        scores = 4 * sum(length**2 for length in conversations)
        return layers * heads * (ROWS * row * (wider - not_there) + scores)
    if case.context == 1:
        return 0
    found, own = 0, (rank, 2 * case.context - 1 - rank)
    for length in conversations:  # a mask for each piece that has more keys than queries
        piece = length // (2 * case.context)
        found += sum(piece * (number + 1) * piece for number in own if number)
    return layers * found * ELEMENT[case.precision]


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 0), (4, 0), (2, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("rows", [8, 32])
def test_micro_batches_in_flight_are_those_of_the_schedule(pipeline, virtual, rows):
    from types import SimpleNamespace as Stub

    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    plan = plan_for(HF | {"num_hidden_layers": 8, "tie_word_embeddings": False})
    values = {"pipeline_parallel": pipeline, "virtual_stage_layers": virtual, "global_batch_size": rows}
    layout = layout_of(TrainConfig.from_values(Case().config.values() | values), plan.settings, pipeline)
    for stage in range(pipeline):
        group = Stub(size=lambda: pipeline, rank=lambda stage=stage: stage)
        of = Stub(pp_group=group, virtual_pipeline_model_parallel_size=layout.chunks if virtual else None)
        total, _, before, _ = get_pp_rank_microbatches(
            layout.micro_batches, layout.chunks, pipeline, p2p_communicator=of
        )
        assert sum(activations.in_flight(layout, stage=stage)) == min(before + 1, total)


def rank_main(cases):
    import torch

    from toolkits.training.parallel.world import process_groups

    rank, figures = int(os.environ["RANK"]), {}
    for fields, port in json.loads(cases.read_text()):
        measure, _ = MEASURE[kind := fields.pop("kind")]
        if kind == "fused" and not figures:
            compile_operations()
        case = Case(**fields)
        if rank < case.world:
            os.environ |= {"WORLD_SIZE": str(case.world), "MASTER_PORT": str(port)}
            with process_groups(case.layout, seed=1):
                if kind == "fused":
                    torch.compiler.set_stance("default")  # CPU ranks compile nothing by themselves
                figures[f"{kind} {case}"] = measure(case)
    (cases.parent / f"{rank}.json").write_text(json.dumps(figures))


def compile_operations():
    """Compile what is compiled on a GPU, with a backend that needs no compiler and saves what its default saves."""
    import torch
    from megatron.core import jit

    from toolkits.training.parallel import fused

    torch._dynamo.config.recompile_limit = 100  # of one function, for all cases together
    fused.fused = lambda function: torch.compile(function, backend="aot_eager_decomp_partition", dynamic=False)
    jit.disable_jit_fuser()  # SwiGLU says itself what it saves
    from toolkits.training.parallel import model  # takes the functions above as it is imported

    choose = model._fusion_fields
    model._fusion_fields = lambda *of: choose(*of) | {"bias_activation_fusion": True, "bias_dropout_fusion": True}


def wrapped_model(case):
    from toolkits.training.parallel import model

    chunks = model.build_model(case.settings, case.layout, case.config.compute)
    usual = model.GRADIENT_BUCKET
    model.GRADIENT_BUCKET = case.bucket or usual
    try:
        return model.wrap(chunks, distributed_optimizer=case.distributed)
    finally:
        model.GRADIENT_BUCKET = usual


def allocated(case):
    """Bytes of everything that stays allocated after an optimizer step."""
    from toolkits.training.optimizer import build_optimizer

    wrapped = wrapped_model(case)
    optimizer = build_optimizer(case.config, wrapped)
    optimizer.step()
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    stepped = [weight for one in inner for group in one.param_groups for weight in group["params"]]
    weights = [weight for chunk in wrapped for weight in chunk.parameters()]
    of_model = storages([*weights, *(buffer for chunk in wrapped for buffer in chunk.module.buffers())])
    moments = [state for one in inner for state in one.state.values()]
    return {
        "parameters": sum(of_model.values()),
        "gradients": sum(storages(weight.main_grad for weight in weights).values()),
        "masters": sum(size for key, size in storages(stepped).items() if key not in of_model),
        "exp_avg": sum(storages(state["exp_avg"] for state in moments).values()),
        "exp_avg_sq": sum(storages(state["exp_avg_sq"] for state in moments).values()),
    }


def saved(case):
    """Bytes that autograd keeps after the forward pass of one micro batch of packed rows."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from toolkits.training.batches import MicroBatch
    from toolkits.training.parallel.context import share_of
    from toolkits.training.parallel.world import context_rank

    (wrapped,) = wrapped_model(case)
    tokens = ROWS * case.layout.padded(SEQ_LEN)
    ends = torch.tensor([0, FIRST_SEQUENCE, tokens // 2, tokens], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=tokens // 2, max_seqlen_kv=tokens // 2)
    ids = torch.arange(tokens)[None]
    positions = ids - ends[torch.searchsorted(ends, ids, right=True) - 1]
    batch = MicroBatch(ids, ids.clone(), torch.ones(ids.shape), positions, packed)
    batch = share_of(batch, rank=context_rank(), size=case.context)
    weights, kept = storages(wrapped.parameters()), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = wrapped(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    assert output.shape == (1, tokens // case.context)
    return sum(size for key, size in storages(kept).items() if key not in weights)


def storages(tensors):
    """{address: bytes} of the memory behind `tensors`, each piece once; empty ones have none."""
    return {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
        if storage.nbytes()
    }


MEASURE = {"states": (allocated, STATES), "activations": (saved, ACTIVATIONS), "fused": (saved, FUSED)}

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a real rank leaves
