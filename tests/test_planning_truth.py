"""The planner's bytes are those that megatron-core allocates and autograd saves, on every rank, to the byte."""

import dataclasses
import json
import shutil
import sys

import planning_world
import pytest
from planning_world import ACTIVATIONS, FIRST_SEQUENCE, FUSED, HF, MEASURE, RANKS, ROWS, SEQ_LEN, STATES, Case, quick
from training_world import free_ports, mostly_full, run_ranks, selected

from conversion.plan import plan_for
from toolkits.planning import activations, states
from toolkits.planning.layer import micro_batch
from toolkits.planning.memory import run_memory
from toolkits.planning.sizes import sizes_of
from toolkits.planning.states import ELEMENT
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of


@pytest.fixture(scope="module")
def measured(tmp_path_factory, request):
    """What every rank of every case allocated: {kind and case: [figures of rank 0, rank 1, ...]}."""
    return run_kinds(tmp_path_factory.mktemp("planning"), ["states", "activations"], request, ranks=RANKS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, request):
    """The same of compiled operations."""
    if shutil.which("g++") is None or " " in sys.prefix:
        pytest.skip("torch.compile needs a C++ compiler, and a path of torch without spaces to link with it")
    return run_kinds(tmp_path_factory.mktemp("compiled"), ["fused"], request, ranks=1)


def run_kinds(folder, kinds, request, *, ranks):
    wanted = {kind: selected(request, f"{kind}_of") for kind in kinds}
    cases = [
        {"kind": kind, **dataclasses.asdict(case)}
        for kind in kinds
        for case in MEASURE[kind][1]
        if case in wanted[kind]
    ]
    (folder / "cases.json").write_text(json.dumps(list(zip(cases, free_ports(len(cases)), strict=True))))
    run_ranks([planning_world.__file__, folder / "cases.json"], ranks, logs=folder)
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [each[name] for each in said if name in each] for name in said[0]}


@pytest.mark.parametrize("states_of", mostly_full(STATES, quick(STATES)), ids=str)
def test_states_are_what_megatron_allocates(measured, states_of, monkeypatch):
    case = states_of
    if case.bucket:
        monkeypatch.setattr(states, "GRADIENT_BUCKET", case.bucket)
    planned = run_memory(case.plan, case.config, case.layout, case.tuning, every_rank=True)
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


@pytest.mark.parametrize("activations_of", mostly_full(ACTIVATIONS, quick(ACTIVATIONS)), ids=str)
def test_activations_are_what_autograd_saves(measured, activations_of):
    """Of ranks that share experts the mean is: which of them sees how many tokens is the router's business."""
    case = activations_of
    kept = kept_after_forward(case, fused=False)
    over = [
        real - kept - of_a_cpu(case, rank // case.tensor) for rank, real in enumerate(measured[f"activations {case}"])
    ]
    assert over == [0] * case.world if case.expert == 1 else sum(over) == 0


@pytest.mark.parametrize("fused_of", mostly_full(FUSED, quick(FUSED)), ids=str)
def test_activations_are_what_compiled_operations_save(compiled, fused_of):
    case = fused_of
    assert compiled[f"fused {case}"] == [kept_after_forward(case, fused=True) + of_a_cpu(case, 0)]


def kept_after_forward(case, *, fused):
    sizes = dataclasses.replace(sizes_of(case.plan), **({} if case.model else {"qk_norm": case.qk_norm}))
    batch = micro_batch(case.config, case.layout, fused=fused)
    kept = activations.stage_bytes(sizes, batch, case.tuning, stage=0)
    if batch.recompute == "full":  # that is there in the backward pass only
        kept -= activations.largest_layer_bytes(sizes, batch, case.tuning, stage=0)
    return kept + activations.loss_bytes(sizes, batch, case.tuning)


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
