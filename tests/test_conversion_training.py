"""Twenty steps of every family on two tensor-parallel ranks, against a plain transformers loop.

Run as a script this file is one rank, which trains models with experts too.
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
from test_training_truth import STEPS, case, exported, largest_relative, losses, reference_losses
from training_world import VOCABULARY, rank_main, run_cases, write_dataset, write_tokenizer

import conversion.families
from tests.conversion_models import EXPERTS, TRAINED, write_model

DENSE = ("qwen3", "llama3.1", "mistral", "phi4-mini", "glm")  # qwen2 is the model of the training tests
WITH_EXPERTS = ("qwen2-moe", "deepseek-v3")  # a shared expert with a gate; latent attention and a router with a bias
MODELS = TRAINED | EXPERTS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of each family with the same tokenizer and data."""
    folder, found = tmp_path_factory.mktemp("inputs"), {}
    for name in DENSE + WITH_EXPERTS:
        positions = max(512, MODELS[name]["max_position_embeddings"])
        changes = {"vocab_size": VOCABULARY, "max_position_embeddings": positions}
        found[name] = write_model(folder / name, MODELS[name] | changes)
        write_tokenizer(found[name])
    data = write_dataset(folder / "data", found["qwen3"], rows=60)
    valid = write_dataset(folder / "valid", found["qwen3"], rows=55, seed=6)
    return {**found, "data": data, "valid": valid}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    cases = {
        name: case(inputs, folder / name, model=name, tensor_parallel=2, train_iters=STEPS)
        for name in DENSE + WITH_EXPERTS
    }
    return folder, run_cases(folder / "world", 2, cases, script=__file__)


@pytest.mark.parametrize("name", DENSE + WITH_EXPERTS)
def test_twenty_steps_equal_a_plain_transformers_loop(inputs, trained, name):
    folder, histories = trained
    expected, weights = reference_losses(inputs, name)
    assert losses(histories[name]) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5, "nothing was learned: the comparison would prove little"
    ours = exported(folder, name)
    # Within transformers the experts of a layer are one tensor each of gate and up, and of down.
    apart = {key for key in ours if ".experts." in key}
    assert ours.keys() - apart <= weights.keys() and bool(apart) == (name in WITH_EXPERTS)
    assert largest_relative({key: ours[key] for key in ours.keys() - apart}, weights) < 1e-3


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    allowed = [dataclasses.replace(family, never_exact=()) for family in conversion.families.FAMILIES]
    conversion.families.FAMILIES = tuple(allowed)
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a real rank leaves
