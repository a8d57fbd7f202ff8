"""Communication that overlaps with computation changes no bit: of a loss, a validation, a checkpoint.

Run as a script this file is one rank whose gradient buckets are so small that there are many of them.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from training_world import flags, rank_main, run_cases, write_dataset, write_model

BUCKET = 8_000  # weights: fewer than the output layer has, so that it is a bucket of its own


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tied = write_model(folder / "tied")
    untied = write_model(folder / "untied", tied=False)
    return {"tied": tied, "untied": untied, "data": write_dataset(folder / "data", tied, rows=60)}


def line(inputs, output, *, model="untied", overlap=True, **shape):
    """The flags of a run that validates and saves every second of its four steps."""
    settings = {
        "checkpoint": inputs[model],
        "data": inputs["data"],
        "seq_len": 128,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "train_iters": 4,
        "save_interval": 2,
        "precision": "bf16",
        "lr": 1e-3,
        "min_lr": 1e-4,
    }
    return flags(**settings, **shape, overlap_communication=overlap, output=output)


def pairs(inputs, folder, shapes):
    """Each shape with overlap and without."""
    return {
        f"{name}-{how}": line(inputs, folder / f"{name}-{how}", overlap=how == "overlap", **shape)
        for name, shape in shapes.items()
        for how in ("overlap", "plain")
    }


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shapes = {
        "untied": {},
        "tied-recompute": {"model": "tied", "recompute": "full"},
        "whole-optimizer": {"distributed_optimizer": False},
    }
    return folder, run_cases(folder / "world", 2, pairs(inputs, folder, shapes), script=__file__)


@pytest.fixture(scope="module")
def four_ranks(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    shapes = {"pp2-virtual": {"pipeline_parallel": 2, "virtual_stage_layers": 1}}
    return folder, run_cases(folder / "world", 4, pairs(inputs, folder, shapes), script=__file__)


@pytest.mark.parametrize(
    ("world", "name"),
    [
        ("two_ranks", "untied"),
        ("two_ranks", "tied-recompute"),
        ("two_ranks", "whole-optimizer"),
        ("four_ranks", "pp2-virtual"),
    ],
)
def test_overlap_changes_no_bit(world, name, request):
    folder, histories = request.getfixturevalue(world)
    overlap, plain = (histories[f"{name}-{how}"] for how in ("overlap", "plain"))
    assert losses(overlap) == losses(plain) and losses(overlap)[-1] < losses(overlap)[0] - 0.3
    assert [step["grad_norm"] for step in overlap] == [step["grad_norm"] for step in plain]
    validations = [validation_losses(folder / f"{name}-{how}") for how in ("overlap", "plain")]
    assert validations[0] == validations[1] and len(validations[0]) == 2
    for step in ("iter_0000002", "iter_0000004"):
        saved = [weights(folder / f"{name}-{how}/checkpoint/sft" / step) for how in ("overlap", "plain")]
        assert len(saved[0]) >= 9 and all(saved[0][key].equal(saved[1][key]) for key in saved[1])


def losses(history):
    return [step["loss"] for step in history]


def weights(step):
    """Return the model's tensors of a saved step, whole."""
    import torch
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(step)
    stored = reader.read_metadata().state_dict_metadata
    wanted = {name: about for name, about in stored.items() if name.startswith(("decoder", "embedding", "output"))}
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in wanted.items()
        if isinstance(about, checkpoint.TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def validation_losses(output):
    lines = (output / "checkpoint" / "sft" / "metrics.jsonl").read_text().splitlines()
    return [figures["validation_loss"] for figures in map(json.loads, lines) if "validation_loss" in figures]


def test_overlap_was_passed_on_and_there_were_several_buckets(two_ranks, four_ranks):
    """Else the comparison above would compare a thing with itself."""
    seen = {path.name: json.loads(path.read_text()) for folder, _ in (two_ranks, four_ranks) for path in wraps(folder)}
    for name, (chunk, *_) in seen.items():
        overlap = name.endswith("-overlap.wrapped")
        assert chunk["reduce"] == overlap and chunk["gather"] == (overlap and not name.startswith("whole-optimizer"))
        assert chunk["buckets"] > 1
    assert len(seen) == 8
    virtual = seen["pp2-virtual-overlap.wrapped"]
    assert [chunk["buckets"] for chunk in virtual][1:] == [1], "later chunks are one bucket"


@pytest.fixture(scope="module")
def resumed(inputs, two_ranks, tmp_path_factory):
    """The run with overlap, gone on with after half of its steps: without overlap, and on one rank."""
    folder, target = two_ranks[0], tmp_path_factory.mktemp("resumed")

    def interrupted(name):
        shutil.copytree(folder / "untied-overlap", target / name)
        shutil.rmtree(target / name / "checkpoint" / "sft" / "iter_0000004")
        return target / name

    without = line(inputs, interrupted("without"), overlap=False)
    histories = run_cases(target / "two", 2, {"without": without}, script=__file__)
    alone = line(inputs, interrupted("alone"))
    return histories | run_cases(target / "one", 1, {"alone": alone}, script=__file__)


def test_a_run_goes_on_without_overlap_and_on_another_number_of_ranks(two_ranks, resumed):
    """The optimizer is saved bucket by bucket: their borders must not depend on either."""
    whole = losses(two_ranks[1]["untied-overlap"])
    assert losses(resumed["without"]) == whole[2:]
    assert losses(resumed["alone"]) == pytest.approx(whole[2:], abs=5e-3)


def wraps(folder):
    return folder.glob("*.wrapped")


def noting(wrap, outputs):
    """Return `wrap` that leaves a note of what it made beside the run's output folder."""

    def wrapped(*args, **kwargs):
        chunks = wrap(*args, **kwargs)
        if os.environ["RANK"] == "0":
            note = [
                {
                    "reduce": chunk.ddp_config.overlap_grad_reduce,
                    "gather": chunk.ddp_config.overlap_param_gather,
                    "buckets": len(chunk.bucket_groups),
                }
                for chunk in chunks
            ]
            Path(f"{next(outputs)}.wrapped").write_text(json.dumps(note))
        return chunks

    return wrapped


if __name__ == "__main__":
    import torch

    from toolkits.training import run
    from toolkits.training.parallel import model

    torch.set_num_threads(1)
    given = Path(sys.argv[1])
    lines = [case["flags"] for case in json.loads(given.read_text())]
    outputs = iter([line[line.index("--output") + 1] for line in lines])
    model.GRADIENT_BUCKET = BUCKET
    run.wrap = noting(run.wrap, outputs)
    rank_main(given)
    sys.stdout.flush()
    os._exit(0)
