"""The training line against the truth: a plain transformers + AdamW loop, and itself at every layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_world import talk, write_rows
from safetensors.torch import load_file
from training_world import flags, mostly_full, run_cases, selected, write_dataset, write_model

from data_preprocessing.build import build
from data_preprocessing.dataset import open_dataset
from toolkits.cards.lesson import plain_losses
from toolkits.training.config import TrainConfig
from toolkits.training.rows import make_rows, select
from toolkits.training.settings import DataSettings

STEPS = 20
LAYOUT_STEPS = 6
SEQ_LEN, MICRO, GLOBAL = 129, 2, 8  # odd: sequence parallelism has to round up
SCHEDULE = {"lr": 1e-3, "min_lr": 1e-4, "warmup_iters": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tied and an untied model with training and validation data; some answers of the first have weights."""
    folder = tmp_path_factory.mktemp("inputs")
    tied = write_model(folder / "tied")
    untied = write_model(folder / "untied", tied=False, head_dim=10)
    data = weighted(write_dataset(folder / "data", tied, rows=60), tied)
    valid = write_dataset(folder / "valid", tied, rows=55, seed=6)
    return {"tied": tied, "untied": untied, "data": data, "valid": valid}


def weighted(prefix, tokenizer):
    """Build a sample again with a weight for two of three answers."""
    rows = map(json.loads, prefix.with_suffix(".jsonl").read_text().splitlines())
    talks = [talk(row["instruction"], row["output"]) for row in rows]
    for number, row in enumerate(talks):
        row["messages"][1]["loss"] = (True, 0.5, 1.75)[number % 3]
    build(write_rows(prefix.with_suffix(".rows"), talks), prefix, tokenizer=tokenizer, overwrite=True)
    return prefix


def settings(inputs, output, *, model="tied", **changes):
    """The settings of one run; `output` gets its checkpoint and HuggingFace export."""
    return {
        "checkpoint": inputs[model],
        "data": inputs["data"],
        "valid_data": inputs["valid"],
        "seq_len": SEQ_LEN,
        "micro_batch_size": MICRO,
        "global_batch_size": GLOBAL,
        "train_iters": LAYOUT_STEPS,
        "precision": "fp32",
        "export_hf": True,
        "output": output,
        **SCHEDULE,
    } | changes


def case(inputs, output, **changes):
    return flags(**settings(inputs, output, **changes))


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """Runs on one rank: (folder, histories)."""
    folder = tmp_path_factory.mktemp("alone")
    everything = packed_rows(inputs)
    cases = {
        "tied": case(inputs, folder / "tied", train_iters=STEPS),
        "untied": case(inputs, folder / "untied", model="untied", train_iters=STEPS),
        "short": case(inputs, folder / "short"),
        "reference-attention": case(inputs, folder / "reference-attention", flash_attention=False),
        "bf16": case(inputs, folder / "bf16", precision="bf16"),
        "fp16": case(inputs, folder / "fp16", precision="fp16"),
        "recompute-full": case(inputs, folder / "recompute-full", recompute="full", recompute_layers=2),
        "recompute-selective": case(inputs, folder / "recompute-selective", recompute="selective"),
        "offload": case(inputs, folder / "offload", recompute="offload"),
        "all-packed": case(inputs, folder / "all-packed", global_batch_size=everything, micro_batch_size=1),
        "all-apart": case(inputs, folder / "all-apart", global_batch_size=60, packing=False),
    }
    return folder, run_cases(folder / "world", 1, cases)


TWO_RANKS = {
    "tp2-sp": {"tensor_parallel": 2},
    "tp2": {"tensor_parallel": 2, "sequence_parallel": False, "distributed_optimizer": False},
    "pp2": {"pipeline_parallel": 2},
    "pp2-uneven": {"pipeline_parallel": 2, "first_stage_layers": 1},
    "pp2-virtual": {"pipeline_parallel": 2, "virtual_stage_layers": 1},
    "cp2": {"context_parallel": 2},
    "cp2-exact": {"context_parallel": 2, "flash_attention": False},
    "tp2-recompute": {"tensor_parallel": 2, "recompute": "full"},
    "dp2": {},
    "dp2-plain": {"distributed_optimizer": False},
}
HALF = {
    "tp2-bf16": {"tensor_parallel": 2, "precision": "bf16"},
    "pp2-bf16": {"pipeline_parallel": 2, "precision": "bf16"},
    "dp2-bf16": {"precision": "bf16"},
    "cp2-bf16": {"context_parallel": 2, "precision": "bf16"},
}
FOUR_RANKS = {
    "tp2-pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2-dp2": {"tensor_parallel": 2},
    "tp2-cp2": {"tensor_parallel": 2, "context_parallel": 2},
    "pp2-cp2-virtual": {"pipeline_parallel": 2, "context_parallel": 2, "virtual_stage_layers": 1},
    "cp2-dp2": {"context_parallel": 2},
    "pp2-dp2-plain": {"pipeline_parallel": 2, "distributed_optimizer": False},
}
QUICK = ["tp2-sp", "tp2", "pp2-uneven", "pp2-virtual", "cp2", "dp2", "tp2-pp2", "tp2-dp2", "pp2-cp2-virtual"]


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("two")
    wanted = selected(request, "layout") | selected(request, "half") | {"tp2-bf16"}
    more = {name: changes for name, changes in (TWO_RANKS | HALF).items() if name in wanted} | {
        "cp2-apart": {"context_parallel": 2, "global_batch_size": 60, "packing": False},
        "tp2-fp16": {"tensor_parallel": 2, "precision": "fp16"},
        "untied-tp2-20": {"model": "untied", "tensor_parallel": 2, "train_iters": STEPS},
    }
    cases = {name: case(inputs, folder / name, **changes) for name, changes in more.items()}
    return folder, run_cases(folder / "world", 2, cases)


@pytest.fixture(scope="module")
def four_ranks(inputs, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("four")
    wanted = selected(request, "layout") | {"tp2-pp2", "tp2-dp2"}
    more = {name: changes for name, changes in FOUR_RANKS.items() if name in wanted}
    cases = {name: case(inputs, folder / name, **changes) for name, changes in more.items()}
    return folder, run_cases(folder / "world", 4, cases)


def packed_rows(inputs):
    """Return how many packed rows all of the training data makes."""
    settings = DataSettings(data=inputs["data"], seq_len=SEQ_LEN)
    return len(make_rows(select(open_dataset(inputs["data"]), settings)[0], settings))


def reference_losses(inputs, model, *, shift=0):
    """Train with transformers and torch alone, each conversation by itself; return losses and final weights.

    `shift` moves the loss mask: 1 is the classic off-by-one.
    """
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(inputs[model], dtype=torch.float32)
    config = TrainConfig.from_values(settings(inputs, Path("nowhere"), model=model, train_iters=STEPS))
    return plain_losses(config, network, shift=shift), network.state_dict()


def exported(folder, name):
    return load_file(folder / name / "huggingface" / "sft" / "model.safetensors")


def largest_relative(ours, theirs):
    """Return the largest difference of a tensor, relative to its norm."""
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def losses(history):
    return [step["loss"] for step in history]


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_twenty_steps_equal_a_plain_transformers_loop(inputs, alone, model):
    folder, histories = alone
    expected, weights = reference_losses(inputs, model)
    assert losses(histories[model]) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5, "nothing was learned: the comparison would prove little"
    final = exported(folder, model)
    assert set(final) == set(weights) - ({"lm_head.weight"} if model == "tied" else set())
    assert largest_relative(final, weights) < 1e-3


def test_the_comparison_fails_when_the_mask_is_shifted_by_one(inputs, alone):
    shifted, weights = reference_losses(inputs, "tied", shift=1)
    folder, histories = alone
    difference = np.abs(np.array(losses(histories["tied"])) - shifted)
    assert difference.max() > 1e-2 and largest_relative(exported(folder, "tied"), weights) > 1e-2


def test_a_packed_row_equals_its_conversations_trained_apart(alone):
    folder, histories = alone
    packed, apart = histories["all-packed"], histories["all-apart"]
    assert packed[0]["trained_tokens"] == apart[0]["trained_tokens"]
    assert losses(packed) == pytest.approx(losses(apart), abs=1e-5)
    norms = [[step["grad_norm"] for step in history] for history in (packed, apart)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert largest_relative(exported(folder, "all-packed"), exported(folder, "all-apart")) < 1e-4


def test_context_parallelism_without_packing_trains_the_same_model(alone, two_ranks):
    (single_folder, single), (folder, histories) = alone, two_ranks
    assert losses(histories["cp2-apart"]) == pytest.approx(losses(single["all-apart"]), abs=1e-4)
    assert largest_relative(exported(folder, "cp2-apart"), exported(single_folder, "all-apart")) < 1e-3


def test_the_exact_attention_agrees_with_the_fused_one(alone):
    folder, histories = alone
    assert losses(histories["reference-attention"]) == pytest.approx(losses(histories["short"]), abs=1e-5)
    assert largest_relative(exported(folder, "reference-attention"), exported(folder, "short")) < 1e-3


@pytest.mark.parametrize("layout", mostly_full([*TWO_RANKS, *FOUR_RANKS], QUICK))
def test_every_layout_trains_the_same_model(alone, layout, request):
    (single_folder, single), name = alone, layout
    folder, histories = request.getfixturevalue("two_ranks" if layout in TWO_RANKS else "four_ranks")
    assert losses(histories[name]) == pytest.approx(losses(single["short"]), abs=1e-4)
    norms = [[step["grad_norm"] for step in history] for history in (histories[name], single["short"])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    counts = [[step["trained_tokens"] for step in history] for history in (histories[name], single["short"])]
    assert counts[0] == counts[1]
    assert largest_relative(exported(folder, name), exported(single_folder, "short")) < 1e-3


def test_the_untied_model_trains_the_same_at_tp2(alone, two_ranks):
    (single_folder, single), (folder, histories) = alone, two_ranks
    assert losses(histories["untied-tp2-20"]) == pytest.approx(losses(single["untied"]), abs=1e-4)
    assert largest_relative(exported(folder, "untied-tp2-20"), exported(single_folder, "untied")) < 1e-3


def test_the_validation_loss_is_that_of_transformers(inputs, alone, four_ranks):
    """Summed over all validation tokens, though the last of its batches is not full."""
    from transformers import Qwen2ForCausalLM

    folder = alone[0]
    network = Qwen2ForCausalLM.from_pretrained(folder / "short" / "huggingface" / "sft", dtype=torch.float32)
    dataset, total, trained = open_dataset(inputs["valid"]), 0.0, 0
    for row in range(len(dataset)):
        tokens, mask = torch.from_numpy(dataset.tokens(row).astype(np.int64)), dataset.mask(row)[1:].astype(np.float32)
        with torch.no_grad():
            logits = network(tokens[None, :-1]).logits[0]
        total += float(
            (torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none") * torch.from_numpy(mask)).sum()
        )
        trained += int(mask.sum())
    for run in (folder / "short", four_ranks[0] / "tp2-pp2", four_ranks[0] / "tp2-dp2"):
        figures = [json.loads(line) for line in (run / "checkpoint" / "sft" / "metrics.jsonl").read_text().splitlines()]
        (validated,) = [each for each in figures if "validation_loss" in each]
        assert validated["validation_loss"] == pytest.approx(total / trained, abs=1e-4)
        assert validated["trained_tokens"] == trained


def test_rows_that_only_pad_the_vocabulary_are_zero():
    from types import SimpleNamespace

    from toolkits.training.weights import _fill

    whole = torch.arange(15.0).reshape(5, 3)
    source = SimpleNamespace(
        tensors={"embedding": SimpleNamespace(shape=(5, 3))},
        read=lambda key, start, shape: whole[start[0] : start[0] + shape[0]],
    )
    for offset, expected in ((0, whole[:4]), (4, torch.cat([whole[4:], torch.zeros(3, 3)])), (8, torch.zeros(4, 3))):
        data = torch.full((4, 3), float("nan"))
        shard = SimpleNamespace(
            key="embedding", data=data, local_shape=(4, 3), global_offset=(offset, 0), prepend_axis_num=0
        )
        _fill(shard, source)
        assert torch.equal(data, expected)


@pytest.mark.parametrize("name", ["recompute-full", "recompute-selective", "offload"])
def test_saving_memory_changes_nothing(alone, name):
    folder, histories = alone
    assert losses(histories[name]) == losses(histories["short"])
    assert largest_relative(exported(folder, name), exported(folder, "short")) == 0


def test_fp16_skips_what_overflows_and_then_follows_fp32(alone, two_ranks):
    for histories, name in ((alone[1], "fp16"), (two_ranks[1], "tp2-fp16")):
        skipped = [step["grad_norm"] is None for step in histories[name]]
        first = skipped.index(False)
        assert not any(skipped[first:]), "the loss scale had settled"
        assert losses(histories[name])[0] == pytest.approx(losses(alone[1]["short"])[0], abs=0.01)
        assert losses(histories[name])[-1] < losses(histories[name])[first] - 0.5
    assert losses(two_ranks[1]["tp2-fp16"]) == pytest.approx(losses(alone[1]["fp16"]), abs=0.05)
    assert {tensor.dtype for tensor in exported(alone[0], "fp16").values()} == {torch.float16}


@pytest.mark.parametrize("half", mostly_full(HALF, ["tp2-bf16"]))
def test_bf16_follows_fp32(alone, two_ranks, half):
    single, double = alone[1], two_ranks[1]
    assert losses(single["bf16"]) == pytest.approx(losses(single["short"]), abs=0.05)
    assert losses(double[half]) == pytest.approx(losses(single["bf16"]), abs=0.005)
    assert losses(single["bf16"]) != losses(single["short"])


def test_bf16_weights_come_out_as_bf16(two_ranks):
    folder, _ = two_ranks
    assert {tensor.dtype for tensor in exported(folder, "tp2-bf16").values()} == {torch.bfloat16}


def test_a_run_leaves_what_the_launchers_contract_says(alone):
    folder, _ = alone
    out = folder / "short"
    run = out / "checkpoint" / "sft"
    assert {path.name for path in run.iterdir()} == {
        "exported.txt",
        "fingerprint.json",
        "hf",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
        "lineage.json",
        "loss.png",
        "metrics.jsonl",
        "run.json",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "6"
    (log,) = (out / "log").glob("sft_*.log")
    text = log.read_text()
    assert text.count("| loss ") == LAYOUT_STEPS + 1, "a line for every step and one for the validation"
    assert "step 6/6 | loss " in text and "| lr 1.000e-04 |" in text and "validation after step 6 | loss " in text
    (board,) = (out / "tensorboard").glob("sft_*")
    assert any(path.stat().st_size > 500 for path in Path(board).iterdir())


def test_the_last_step_has_exactly_the_smallest_learning_rate(alone):
    _, histories = alone
    assert histories["tied"][-1]["learning_rate"] == 1e-4
