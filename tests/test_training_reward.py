"""Reward models: the loss in closed form and TRL's, twenty steps of both, every layout, and transformers' scores."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_world import LAYOUTS, mostly_full, run_cases, selected, write_model

from conversion import hf_to_mcore
from conversion.merge import merge
from conversion.plan import REWARD_HEAD
from conversion.verify import verify
from toolkits.cards.lesson import LEARNT, STEPS, _adamw, lesson
from toolkits.cards.sample import write_pairs
from toolkits.foundation.errors import UsageError
from toolkits.generation.loading import Source
from toolkits.generation.scoring import Scorer, read_judged
from toolkits.training.batches import Batches, micro_batch
from toolkits.training.layout import Layout
from toolkits.training.optimizer import learning_rate
from toolkits.training.settings import ModelSettings
from toolkits.training.sources import find_data, find_model

PAD = 257  # <|endoftext|> of the tiny tokenizer
CENTER = 0.05
TOLERANCE = 1e-4
SHORT = {"train_iters": 3, "warmup_iters": 1, "packing": True, "micro_batch_size": 2, "global_batch_size": 8}
STANDS_STILL = SHORT | {"train_iters": 1, "warmup_iters": 0, "lr": 0.0, "min_lr": 0.0}
CASES = LAYOUTS | {f"lora-{name}": {**layout, "lora_rank": 4} for name, layout in LAYOUTS.items()}
CASES |= {"recompute": {"recompute": "full", "pipeline_parallel": 2}}
QUICK = ["tp2-sp", "cp2", "lora-pp2-virtual"]
GOES_ON = ("tp2-sp", "pp2", "cp2", "dp2", "lora-pp2")


def case(inputs, out, **changes):
    said = {"checkpoint": str(inputs["reward"]), "rows": "pairs", "packing": False, "name": "r", "valid_data": None}
    said |= {"center_rewards": CENTER, "valid_data": str(inputs["held out"]), "seq_len": 80}
    checkpoint = changes.pop("checkpoint", said.pop("checkpoint"))
    return lesson(checkpoint, inputs["data"], out, **(said | changes))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model that writes, the same with a reward head, an adapter for that, and pairs."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    words = write_model(folder / "words")
    shutil.copytree(words, reward := folder / "reward")
    torch.manual_seed(2)
    network = AutoModelForSequenceClassification.from_pretrained(words, num_labels=1, pad_token_id=PAD)
    torch.nn.init.normal_(network.score.weight, std=0.2)
    network.save_pretrained(reward)
    data = write_pairs(folder / "data", words, rows=40)
    held_out = write_pairs(folder / "held_out", words, rows=12, seed=6)
    return {"words": words, "reward": reward, "data": data, "held out": held_out, "folder": folder}


@pytest.fixture(scope="module")
def adapter(inputs):
    """An adapter of PEFT's for sequence classification, whose head is not its base's; None without PEFT."""
    try:
        import peft
    except ImportError:
        return None
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=5, lora_alpha=20, target_modules="all-linear")
    adapted = peft.get_peft_model(loaded(inputs["reward"]), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "score" in name:
                weight.add_(0.02 * torch.randn_like(weight))
    adapted.save_pretrained(inputs["folder"] / "adapter")
    return inputs["folder"] / "adapter"


@pytest.fixture(scope="module")
def alone(inputs, adapter, tmp_path_factory):
    """Runs on one rank: (folder, histories)."""
    folder = tmp_path_factory.mktemp("alone")
    hf_to_mcore.convert(inputs["words"], folder / "words")
    new = {"checkpoint": str(inputs["words"])}
    cases = {
        "full": case(inputs, folder / "full", export_hf=True),
        "packed": case(inputs, folder / "packed", **new, **SHORT),
        "lora-packed": case(inputs, folder / "lora-packed", lora_rank=4, export_hf=True, **new, **SHORT),
        "from mcore": case(inputs, folder / "from mcore", checkpoint=str(folder / "words"), **STANDS_STILL),
        "of steps": case(inputs, folder / "of steps", checkpoint=str(folder / "full/checkpoint/r"), **STANDS_STILL),
    }
    if adapter is not None:
        cases["lora"] = case(inputs, folder / "lora", adapter=adapter)
    return folder, run_cases(
        folder / "world", 1, {name: each.flags() for name, each in cases.items()}, objective="reward"
    )


def laid_out(inputs, folder, name):
    changes = {"checkpoint": str(inputs["words"]), "save_interval": 2, **SHORT, **CASES[name]}
    return case(inputs, folder / name, **changes).flags()


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("two")
    names = sorted((selected(request, "name") | selected(request, "interrupted")) & set(CASES))
    cases = {name: laid_out(inputs, folder, name) for name in names}
    return folder, run_cases(folder / "world", 2, cases, objective="reward")


def loaded(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def pairs_of_steps(config):
    """The token ids of the pairs of each step, the better answer first."""
    rows = find_data(config.data, find_model(config.model, scores=True)).training
    size, (part,) = config.batch.global_batch_size, rows.parts
    batches = Batches(rows, config.batch, Layout(1, 1, 1, False, size), replica=0, seed=config.data.seed)
    numbers = [batches.row_numbers(step * size) for step in range(STEPS)]
    assert all(len(part.segments(number)) == 2 for taken in numbers for number in taken), "one pair a row"
    return [
        [[part.dataset.tokens(each.document).tolist() for each in part.segments(number)] for number in taken]
        for taken in numbers
    ]


def network_of(kind, inputs, adapter):
    if kind == "full":
        return loaded(inputs["reward"])
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(loaded(inputs["reward"]), adapter, is_trainable=True)


def config_of(kind, inputs, adapter, out):
    return case(inputs, out, **({} if kind == "full" else {"adapter": adapter}))


def plain_figures(config, network):
    """Train with transformers and torch alone, each answer by itself; return loss, better and worse scores a step."""
    optimizer, told, found = _adamw(network, config), config.optimizer, []
    for step, pairs in enumerate(pairs_of_steps(config)):
        scores = torch.stack([network(torch.tensor([ids])).logits[0, 0] for pair in pairs for ids in pair]).view(-1, 2)
        chosen, rejected = scores.unbind(1)
        loss = (torch.log1p(torch.exp(rejected - chosen)) + CENTER * (chosen + rejected) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([each for each in network.parameters() if each.requires_grad], told.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = rate(told, step)
        optimizer.step()
        found.append((loss.item(), chosen.mean().item(), rejected.mean().item()))
    return found


def rate(told, step):
    return learning_rate(step + 1, steps=STEPS, warmup=told.warmup_iters, peak=told.lr, floor=told.min_lr)


def figures(history):
    return [(step["loss"], step["more"]["rewards/chosen"], step["more"]["rewards/rejected"]) for step in history]


def validated(folder):
    """The rewards of the last validation by their figures' names."""
    *_, last = (json.loads(line) for line in (folder / "checkpoint/r/metrics.jsonl").read_text().splitlines())
    return {name: last[name] for name in ("rewards/chosen", "rewards/rejected")}


def require_equal(found, expected):
    assert np.array(found) == pytest.approx(np.array(expected), abs=TOLERANCE)
    assert expected[-1][0] < expected[0][0] - LEARNT, "nothing was learned: the comparison would prove little"


def test_twenty_steps_equal_those_of_transformers_and_torch(inputs, alone, tmp_path):
    network = loaded(inputs["reward"])
    require_equal(figures(alone[1]["full"]), plain_figures(case(inputs, tmp_path), network))
    exported = load_file(alone[0] / "full/huggingface/r/model.safetensors")
    for name, tensor in network.state_dict().items():
        if name in exported:
            assert (exported[name] - tensor).norm() / tensor.norm() < 1e-3, name
    assert "score.weight" in exported and "lm_head.weight" not in exported


def test_twenty_steps_with_an_adapter_equal_those_of_peft(inputs, adapter, alone, tmp_path):
    network = network_of("lora", inputs, adapter)
    require_equal(figures(alone[1]["lora"]), plain_figures(config_of("lora", inputs, adapter, tmp_path), network))
    network.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    ours = load_file(alone[0] / "lora/checkpoint/r" / f"iter_{STEPS:07d}" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours) < 1e-3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_twenty_steps_equal_those_of_trl(inputs, adapter, alone, tmp_path, kind):
    trl = pytest.importorskip("trl", reason="TRL is compared with: it is no dependency")
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer

    config = config_of(kind, inputs, adapter, tmp_path)
    pairs = [pair for step in pairs_of_steps(config) for pair in step]
    network, found = network_of(kind, inputs, adapter), []
    optimizer = _adamw(network, config)

    class Trainer(trl.RewardTrainer):
        def compute_loss(self, *arguments, **more):
            loss = super().compute_loss(*arguments, **more)
            mean, margin = (self._metrics["train"][name][-1] for name in ("mean_reward", "margin"))
            found.append((loss.item(), mean + margin / 2, mean - margin / 2))
            return loss

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset)

    off = {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report_to": []}
    off |= {"save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        max_grad_norm=config.optimizer.clip_grad,
        center_rewards_coefficient=CENTER,
        **off,
    )
    trainer = Trainer(
        network,
        arguments,
        train_dataset=Dataset.from_list([{"chosen_ids": one, "rejected_ids": other} for one, other in pairs]),
        processing_class=AutoTokenizer.from_pretrained(inputs["reward"]),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: rate(config.optimizer, min(step, STEPS - 1)))),
    )
    trainer.train()
    require_equal(figures(alone[1][kind]), found)


def test_the_scores_of_an_export_are_ours_in_transformers(inputs, alone):
    """Padded on the right, several rows at once, and one by one; ours are those of the last validation."""
    folder = alone[0] / "full"
    last = validated(folder)
    said = json.loads((folder / "huggingface/r/config.json").read_text())
    assert (said["architectures"], said["pad_token_id"]) == (["Qwen2ForSequenceClassification"], PAD)
    assert loaded(folder / "huggingface/r").config.num_labels == 1
    rows = read_judged(inputs["held out"].with_suffix(".jsonl"))
    scorer = Scorer(Source(folder / "huggingface/r", device="cpu"))
    for batch_size in (5, 1):
        scored = scorer.score_all(rows, batch_size=batch_size)
        for figure, name in (("rewards/chosen", "score_chosen"), ("rewards/rejected", "score_rejected")):
            assert np.mean([row[name] for row in scored]) == pytest.approx(last[figure], abs=1e-5)
    assert {**scored[0], **rows[0].value} == scored[0], "the row is still there"


def test_an_adapter_loads_in_peft_and_scores_as_its_merged_export(inputs, alone):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    step = alone[0] / "lora-packed/checkpoint/r" / f"iter_{SHORT['train_iters']:07d}"
    base = AutoModelForSequenceClassification.from_pretrained(inputs["words"], num_labels=1, pad_token_id=PAD)
    theirs = peft.PeftModel.from_pretrained(base, step).eval()
    rows = read_judged(inputs["held out"].with_suffix(".jsonl"))[:4]
    merged = Scorer(Source(alone[0] / "lora-packed/huggingface/r", device="cpu"))
    on_the_fly = Scorer(Source(inputs["words"], adapter=step, device="cpu"))
    tokens = [merged.texts.whole(talk) for row in rows for talk in row.talks.values()]
    with torch.no_grad():
        expected = [theirs(torch.tensor([each])).logits[0, 0].item() for each in tokens]
    assert merged.scores(tokens, batch_size=3) == pytest.approx(expected, abs=1e-5)
    assert on_the_fly.scores(tokens, batch_size=3) == pytest.approx(expected, abs=1e-5)


def test_a_new_head_is_drawn_from_the_seed_and_nothing_else_changes(inputs, alone, tmp_path):
    from conversion.mcore_checkpoint import McoreCheckpoint

    saved = McoreCheckpoint(alone[0] / "from mcore/checkpoint/r")
    head, hidden = saved.whole(REWARD_HEAD), 48
    torch.manual_seed(lesson(inputs["words"], inputs["data"], tmp_path).data.seed)
    assert torch.equal(head, torch.randn(1, hidden) / (hidden + 1) ** 0.5)
    assert "output_layer.weight" not in saved.tensors
    hf_to_mcore.convert(inputs["words"], tmp_path / "words")
    before = McoreCheckpoint(tmp_path / "words")
    same = [key for key in before.tensors if key in saved.tensors and key.startswith(("decoder.", "embedding."))]
    assert len(same) == len([key for key in before.tensors if not key.startswith("output_layer")])
    assert all(torch.equal(before.whole(key), saved.whole(key)) for key in same)


def test_training_starts_from_megatron_cores_directories_too(alone):
    folder, histories = alone
    assert figures(histories["from mcore"]) == figures(histories["packed"])[:1]
    assert validated(folder / "of steps") == pytest.approx(validated(folder / "full"), abs=1e-6), (
        "with its trained head"
    )


@pytest.mark.parametrize("name", mostly_full(CASES, QUICK))
def test_every_layout_takes_the_same_steps(alone, two_ranks, name):
    expected = alone[1]["lora-packed" if name.startswith("lora") else "packed"]
    found = two_ranks[1][name]
    assert np.array(figures(found)) == pytest.approx(np.array(figures(expected)), abs=1e-5)
    norms = [[step["grad_norm"] for step in history] for history in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.fixture(scope="module")
def resumed(inputs, two_ranks, tmp_path_factory, request):
    """The runs of two ranks, interrupted before their last step and gone on with in new processes."""
    target, cases = tmp_path_factory.mktemp("resumed"), {}
    for name in sorted(selected(request, "interrupted")):
        shutil.copytree(two_ranks[0] / name, target / name)
        shutil.rmtree(target / name / "checkpoint/r" / f"iter_{SHORT['train_iters']:07d}")
        cases[name] = laid_out(inputs, target, name)
    return target, run_cases(target / "world", 2, cases, objective="reward")


@pytest.mark.full
@pytest.mark.parametrize("interrupted", GOES_ON)
def test_an_interrupted_run_goes_on_bit_for_bit(two_ranks, resumed, interrupted):
    whole, rest = two_ranks[1][interrupted], resumed[1][interrupted]
    assert [(step["loss"], step["grad_norm"], step["more"]) for step in rest] == [
        (step["loss"], step["grad_norm"], step["more"]) for step in whole[2:]
    ]
    if not interrupted.startswith("lora"):
        verify(*(folder / interrupted / "checkpoint/r" for folder in (two_ranks[0], resumed[0])))


def test_a_run_with_other_reward_settings_is_another_run(inputs, alone, tmp_path):
    from toolkits.training.run_folder import claimed

    shutil.copytree(alone[0] / "packed", tmp_path / "packed")
    changes = {"checkpoint": str(inputs["words"]), **SHORT}
    config = case(inputs, tmp_path / "packed", **(changes | {"center_rewards": 0.2}))
    folder = config.output.folder
    source = find_model(config.model, scores=True)
    with (
        pytest.raises(UsageError, match=r"belongs to another run:\n  reward: .*0.05.* -> .*0.2"),
        claimed(folder, config, source),
    ):
        pass


@pytest.mark.parametrize("of", ["huggingface", "checkpoint"])
def test_a_reward_model_is_not_fine_tuned(alone, of):
    folder = alone[0] / "full" / of / "r"
    with pytest.raises(UsageError, match=r"Classification: a reward model.*`temper train reward`") as error:
        find_model(ModelSettings(checkpoint=str(folder)))
    assert error.value.exit_code == 2


def test_micro_batches_say_where_answers_end(inputs, tmp_path):
    config = case(inputs, tmp_path)
    for scores, pad in ((True, PAD), (False, None)):
        words = inputs["reward"] if scores else inputs["words"]
        source = find_model(ModelSettings(checkpoint=str(words)), scores=scores)
        rows = find_data(config.data, source).training
        (part,) = rows.parts
        assert part.pad_token == pad
        batch = micro_batch(rows, [0, None, 3], length=160, multiple=4)
        lengths = [each.length for row in (0, 3) for each in part.segments(row)]
        assert batch.answers.ends.tolist() == [length - 1 for length in lengths]
        starts = batch.packed.cu_seqlens_q[batch.answers.places].long()
        last = batch.tokens[0, starts + batch.answers.ends].tolist()
        documents = [each.document for row in (0, 3) for each in part.segments(row)]
        assert last == [int(part.dataset.tokens(document)[-1]) for document in documents]


def test_a_merge_gives_a_base_its_head(inputs, alone, tmp_path):
    """In fp32 that is the adapter's own; half its weight is half its scores."""
    step = alone[0] / "lora-packed/checkpoint/r" / f"iter_{SHORT['train_iters']:07d}"
    merge(inputs["words"], [(step, 0.5)], tmp_path / "half")
    half, whole = (
        load_file(folder / "model.safetensors")["score.weight"]
        for folder in (tmp_path / "half", alone[0] / "lora-packed/huggingface/r")
    )
    own = load_file(step / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(whole, own) and torch.equal(half, own / 2)


def test_adapters_of_other_tasks_are_told_apart(inputs, adapter, tmp_path):
    from toolkits.training.lora import Lora

    config = case(inputs, tmp_path, checkpoint=str(inputs["words"]), adapter=adapter)
    with pytest.raises(UsageError, match=r"classifier is neither of|score is neither of"):
        Lora.of(config, find_model(config.model))
    lora = Lora.of(config, find_model(config.model, scores=True))
    assert set(lora.whole) == {"score"}
