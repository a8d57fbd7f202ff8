"""Training on pairs against the truth: TRL's own trainer, and itself at every layout, resumed, with adapters."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from training_world import LAYOUTS, flags, mostly_full, run_cases, selected, write_model, write_pairs
from trl_world import steps_of_trl

from data_preprocessing.dataset import open_dataset
from toolkits.foundation.errors import DataError, UsageError
from toolkits.training.batches import Batches, micro_batch
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of
from toolkits.training.reference import Cache
from toolkits.training.signals import WINDOW, Signals
from toolkits.training.sources import find_data, find_model

STEPS, LAYOUT_STEPS, GLOBAL = 20, 6, 8
RATE = 1e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of which embedding and head are tied, and pairs to train and to validate on."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model")
    return {
        "model": model,
        "data": write_pairs(folder / "data", model, rows=60),
        "valid": write_pairs(folder / "valid", model, rows=21, seed=6),
    }


def settings(inputs, output, **changes):
    return {
        "checkpoint": inputs["model"],
        "data": inputs["data"],
        "valid_data": inputs["valid"],
        "rows": "pairs",
        "seq_len": 65,  # odd: sequence parallelism has to round up
        "micro_batch_size": 2,
        "global_batch_size": GLOBAL,
        "train_iters": LAYOUT_STEPS,
        "precision": "fp32",
        "lr": RATE,
        "min_lr": RATE / 10,
        "warmup_iters": 2,
        "output": output,
    } | changes


def run_all(inputs, folder, ranks, cases):
    """Run cases of changed settings; return the histories."""
    lines = {name: flags(**settings(inputs, folder / name, **changes)) for name, changes in cases.items()}
    return run_cases(folder / "world", ranks, lines, objective="dpo")


LORA = {"lora_rank": 4, "lora_alpha": 8.0}
AS_TRL = {"packing": False, "min_lr": RATE, "warmup_iters": 0, "train_iters": STEPS, "weight_decay": 0.0}
ONE_RANK = {
    "trl": AS_TRL,
    "trl-ipo": AS_TRL | {"preference_loss": "ipo", "beta": 0.5},
    "short": {"save_interval": 3},
    "lora": LORA,
    "adapters-off": LORA | {"reference": "adapters-off"},
    "orpo": {"preference_loss": "orpo"},
}


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """Runs on one rank: (folder, histories)."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_all(inputs, folder, 1, ONE_RANK)


TWO_RANKS = {
    **LAYOUTS,
    "tp2-adapters-off": {"tensor_parallel": 2, **LORA, "reference": "adapters-off"},
    "pp2-adapters-off": {"pipeline_parallel": 2, **LORA, "reference": "adapters-off"},
    "cp2-adapters-off": {"context_parallel": 2, **LORA, "reference": "adapters-off"},
}
QUICK = ["tp2-sp", "cp2", "pp2-adapters-off"]


@pytest.fixture(scope="module")
def together(request, inputs, alone, tmp_path_factory):
    """Runs on two ranks; the reference is there already, but for the run that has to compute its own."""
    folder = tmp_path_factory.mktemp("together")
    cases = {name: TWO_RANKS[name] for name in sorted(selected(request, "layout"))}
    for cache in inputs["data"].parent.glob("*.reference-*"):
        cache.unlink()
    return run_all(inputs, folder, 2, cases)


@pytest.mark.parametrize("layout", mostly_full(TWO_RANKS, QUICK))
def test_another_layout_trains_the_same(alone, together, layout):
    steps = alone[1]["adapters-off" if "off" in layout else "short"]
    assert len(steps) == LAYOUT_STEPS
    for one, other in zip(steps, together[layout], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert (other["tokens"], other["trained_tokens"]) == (one["tokens"], one["trained_tokens"])
        # Of the first step both answers are as probable as under the reference, but for the last digit.
        unsure = ("accuracy", "falling") if one["step"] == 1 else ()
        expected, found = ({k: v for k, v in step["more"].items() if k not in unsure} for step in (one, other))
        assert found == pytest.approx(expected, abs=1e-3)


def test_the_first_step_knows_nothing_and_the_last_prefers(alone):
    first, *_, last = alone[1]["short"]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["more"]["margin"] == first["more"]["kl"] == first["more"]["accuracy"] == 0.0
    assert last["more"]["margin"] > 0.5 and last["more"]["accuracy"] > 0.9
    rewards = last["more"]["rewards/chosen"] - last["more"]["rewards/rejected"]
    assert last["more"]["margin"] == pytest.approx(rewards, abs=1e-6)


def test_the_base_without_adapters_is_the_reference_that_was_cached(alone):
    cached, asked = alone[1]["lora"], alone[1]["adapters-off"]
    assert [step["loss"] for step in cached] == pytest.approx([step["loss"] for step in asked], abs=1e-6)
    assert cached[-1]["more"] == pytest.approx(asked[-1]["more"], abs=1e-5)


def test_without_a_reference_none_is_computed(alone):
    assert "kl" not in alone[1]["orpo"][0]["more"]
    assert alone[1]["orpo"][-1]["loss"] < alone[1]["orpo"][0]["loss"]


def pairs_in_order(inputs, config, steps):
    """The token ids of each step's pairs, as the run takes them: lists of (prompt, chosen, rejected)."""
    source = find_model(config.model)
    data = find_data(config.data, source).training
    batches = Batches(data, config.batch, layout_of(config, source.settings, 1), replica=0, seed=config.data.seed)
    dataset = open_dataset(inputs["data"])
    for step in range(steps):
        found = []
        for number in batches.row_numbers(step * GLOBAL):
            chosen, rejected = (segment.document for segment in data.segments(number)[1])
            sides = []
            for document in (chosen, rejected):
                trained = np.flatnonzero(dataset.mask(document))
                tokens = dataset.tokens(document).tolist()
                # What comes behind the answer's end is not trained and seen by nothing.
                sides.append((tokens[: trained[0]], tokens[trained[0] : trained[-1] + 1]))
            assert sides[0][0] == sides[1][0]
            found.append((sides[0][0], sides[0][1], sides[1][1]))
        yield found


@pytest.mark.parametrize("name", ["trl", "trl-ipo"])
def test_twenty_steps_equal_the_trainer_of_trl(inputs, alone, tmp_path, name):
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out", **ONE_RANK[name]))
    rows = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True))
        for pairs in pairs_in_order(inputs, config, STEPS)
        for pair in pairs
    ]

    given = {"model": inputs["model"], "folder": tmp_path / "trl", "steps": STEPS}
    theirs = steps_of_trl("DPO", rows, config, **given, loss_type=[config.preference.preference_loss])
    names = {"rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected", "margin": "rewards/margins"}
    for mine, step in zip(alone[1][name], theirs, strict=True):
        assert mine["loss"] == pytest.approx(step["loss"], abs=1e-4)
        for one, other in names.items():
            assert mine["more"][one] == pytest.approx(step[other], abs=1e-4)
        assert mine["more"]["accuracy"] == pytest.approx(step["rewards/accuracies"], abs=1e-6)


def test_an_interrupted_run_goes_on_bit_for_bit(inputs, alone, tmp_path):
    folder, histories = alone
    run = next((folder / "short" / "checkpoint").iterdir())
    half = tmp_path / "half"
    shutil.copytree(folder / "short", half)
    shutil.rmtree(half / "checkpoint" / run.name / f"iter_{LAYOUT_STEPS:07d}")
    for cache in inputs["data"].parent.glob("*.reference-*"):  # then the base has to be asked again
        cache.unlink()
    words = flags(**settings(inputs, half, save_interval=3))
    found = run_cases(tmp_path / "world", 1, {"half": words}, objective="dpo")["half"]
    assert [step["loss"] for step in found] == [step["loss"] for step in histories["short"][3:]]
    step = f"checkpoint/{run.name}/iter_{LAYOUT_STEPS:07d}"
    for shard in (folder / "short" / step).glob("*.distcp"):
        if shard.name.startswith("__0"):
            assert shard.stat().st_size == (half / step / shard.name).stat().st_size


def test_the_figures_are_written_down_and_drawn(alone):
    folder, histories = alone
    run = next((folder / "short" / "checkpoint").iterdir())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validation] == [3, 6]
    assert {"accuracy", "margin", "rewards/chosen", "kl", "falling"} <= validation[0].keys()
    assert validation[1]["accuracy"] >= validation[0]["accuracy"] > 0.5
    assert (run / "loss.png").stat().st_size > 10_000
    assert [line["margin"] for line in lines if "loss" in line] == [
        step["more"]["margin"] for step in histories["short"]
    ]


def test_a_pair_is_laid_out_as_two_documents_that_do_not_see_each_other(inputs, tmp_path):
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out"))
    source = find_model(config.model)
    rows = find_data(config.data, source).training
    assert rows.physical_length(layout_of(config, source.settings, 1)) == 130 and len(rows) < 60
    batch = micro_batch(rows, [0, 1, None], length=130)
    answers = batch.answers
    assert len(answers.numbers) % 2 == 0
    assert (answers.numbers[::2] % 2 == 0).all() and (answers.numbers[1::2] == answers.numbers[::2] + 1).all()
    bounds, dataset = batch.packed.cu_seqlens_q.tolist(), open_dataset(inputs["data"])
    for place, number in zip(answers.places.tolist(), answers.numbers.tolist(), strict=True):
        tokens = dataset.tokens(number)
        begin = bounds[place]
        assert batch.tokens[0, begin : begin + len(tokens)].tolist() == tokens.tolist()
        assert batch.loss_mask[0, begin : bounds[place + 1]].sum() == dataset.mask(number)[1:].sum()
        assert batch.positions[0, begin] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 0.0}, "--beta 0 must be above 0"),
        ({"beta": -1.0}, "--beta -1 must be above 0"),
        ({"beta": float("nan")}, "--beta nan must be above 0"),
        ({"preference_loss": "robust"}, "robust corrects for --label-smoothing"),
        ({"preference_loss": "ipo", "label_smoothing": 0.1}, "not for --preference-loss ipo"),
        ({"preference_loss": "simpo", "length_normalized": True}, "simpo always is"),
        ({"preference_loss": "orpo", "sft_weight": 1.0}, "orpo has that term already"),
        ({"reference": "adapters-off"}, "adapters-off needs adapters"),
        (LORA | {"reference": "adapters-off", "lora_save_modules": "lm_head"}, "use cached"),
        ({"label_smoothing": 0.5}, "--label-smoothing is 0.5, must be a number of at least 0 and below 0.5"),
    ],
)
def test_settings_that_cannot_be(inputs, tmp_path, changes, said):
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out", **changes))
    with pytest.raises(UsageError, match=said):
        config.check()


def test_other_data_is_refused_by_name(inputs, tmp_path):
    from training_world import write_dataset

    talks = write_dataset(tmp_path / "talks", inputs["model"], rows=5)
    for rows, data, said in (
        ("pairs", talks, "holds conversations, and this objective reads preferences: .*`temper train sft`"),
        ("conversations", inputs["data"], "holds preferences, .*`temper train dpo`"),
    ):
        config = TrainConfig.from_values(settings(inputs, tmp_path / "out", rows=rows, data=data))
        with pytest.raises(DataError, match=said):
            find_data(config.data, find_model(config.model))


def test_pairs_that_do_not_fit_are_left_out_whole_or_stop(inputs, tmp_path):
    lengths = open_dataset(inputs["data"]).lengths.reshape(-1, 2)
    limit = int(np.sort(lengths.max(axis=1))[-3])
    too_long = int((lengths.max(axis=1) > limit).sum())
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out", seq_len=limit))
    found = find_data(config.data, find_model(config.model))
    assert len(found.training.parts[0].documents) == 2 * (60 - too_long)
    assert f"{too_long} pairs were left out: an answer and its prompt are over {limit} tokens" in found.remarks[0]
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out", seq_len=limit, too_long="stop"))
    with pytest.raises(DataError, match=rf"{too_long} of 60 pairs have an answer over SEQ_LEN {limit}"):
        find_data(config.data, find_model(config.model))


def test_the_reference_is_kept_beside_the_dataset_under_the_name_of_its_model(inputs, alone):
    dataset = open_dataset(inputs["data"])
    caches = sorted(inputs["data"].parent.glob(f"{dataset.path.name}.reference-*.safetensors"))
    assert len(caches) == 1, "every run on one rank starts from the same model"
    values = load_file(caches[0])["log_probs"]
    assert len(values) == len(dataset) and not np.isnan(values).any() and (values < 0).all()


def test_a_reference_of_another_model_is_not_taken(inputs, tmp_path):
    for suffix in (".bin", ".idx", ".mask", ".json"):
        shutil.copy(f"{inputs['data']}_text_document{suffix}", tmp_path)
    dataset = open_dataset(tmp_path / "data")
    cache, other = (Cache(dataset, model, elsewhere=tmp_path) for model in ("this", "another"))
    assert cache.path != other.path and np.isnan(cache.read(120)).all()
    values = -np.arange(120, dtype=np.float32)
    cache.write(values)
    assert cache.read(120).tolist() == values.tolist() and np.isnan(other.read(120)).all()
    shutil.copy(cache.path, other.path)
    with pytest.raises(DataError, match="the reference of another model or of other data; delete it"):
        other.read(120)
    with pytest.raises(DataError, match="the reference of another model or of other data; delete it"):
        cache.read(119)
    cache.path.write_bytes(cache.path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"is damaged \(.*delete it, and it is computed again"):
        cache.read(120)


def test_what_another_run_found_meanwhile_is_kept(inputs, tmp_path):
    for suffix in (".bin", ".idx", ".mask", ".json"):
        shutil.copy(f"{inputs['data']}_text_document{suffix}", tmp_path)
    cache = Cache(open_dataset(tmp_path / "data"), "this", elsewhere=tmp_path)
    front, back = (np.full(120, np.nan, np.float32) for _ in range(2))
    front[:70], back[60:] = -1.0, -2.0
    cache.write(front)
    cache.write(back)
    assert cache.read(120).tolist() == [-1.0] * 60 + [-2.0] * 60


@pytest.mark.full
def test_a_run_that_ended_by_itself_does_not_train_on(inputs, tmp_path):
    line = settings(inputs, tmp_path / "out", train_iters=4, stop_separated=1, lr=5e-3, warmup_iters=0)
    first = run_cases(tmp_path / "one", 1, {"run": flags(**line)}, objective="dpo")["run"]
    again = run_cases(tmp_path / "two", 1, {"run": flags(**line)}, objective="dpo")["run"]
    assert 0 < len(first) < 4 and again == []


def test_signals_say_what_goes_wrong_once():
    signals = Signals(stop_separated=0)
    figures = {"accuracy": 0.8, "margin": 1.0, "falling": 0.9}
    said = [sentence for step in range(1, 3 * WINDOW) for sentence in signals.look(step, figures)]
    assert len(said) == 1 and said[0].startswith(f"step {WINDOW}: in 90% of the pairs") and "--sft-weight" in said[0]
    assert Signals().look(1, {}) == []


def test_signals_end_what_is_told_apart_too_easily():
    signals = Signals(stop_separated=4)
    told = [signals.look(step, {"accuracy": 1.0, "margin": float(step), "falling": 0.0}) for step in range(1, 5)]
    assert signals.is_enough and "temper data check" in told[3][0] and not any(told[:3])
    signals.look(5, {"accuracy": 0.9, "margin": 5.0, "falling": 0.0})
    assert not signals.is_enough
    shrinking = Signals(stop_separated=4)
    for step in range(1, 9):
        shrinking.look(step, {"accuracy": 1.0, "margin": 4.0**-step, "falling": 0.0})
    assert not shrinking.is_enough
