"""The losses of pairs: their values by hand, and TRL's own functions on the same log-probabilities."""

import contextlib
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from toolkits.training.objectives.preference import Side, pair_losses, score
from toolkits.training.settings import PreferenceSettings

PAIRS, BETA = 7, 0.4
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
VARIANTS = {
    "sigmoid": {},
    "sigmoid-normalized": {"length_normalized": True},
    "hinge": {"preference_loss": "hinge"},
    "ipo": {"preference_loss": "ipo"},
    "robust": {"preference_loss": "robust", "label_smoothing": 0.15},
}


@pytest.fixture
def answers():
    """Log-probabilities of single tokens, and which of them are trained, [2 x PAIRS, longest]: better, then worse."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (2 * PAIRS,), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).float()
    now, then = (-torch.rand(2 * PAIRS, 9, generator=generator) * 3 * mask for _ in range(2))
    return now, then, mask


def sides(answers):
    now, then, mask = (each.sum(1) for each in answers)
    return [Side(now[half], then[half], mask[half]) for half in (slice(PAIRS), slice(PAIRS, None))]


def one(chosen, rejected, **settings):
    """The loss of one pair of (log-probability, reference, tokens)."""
    pair = [Side(*(torch.tensor([float(each)]) for each in side)) for side in (chosen, rejected)]
    beta = settings.pop("beta")
    return pair_losses(*pair, PreferenceSettings(**settings), beta).item()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.1}, math.log(1 + math.exp(-0.1 * 5))),
        (
            {"beta": 0.1, "label_smoothing": 0.2},
            0.8 * math.log(1 + math.exp(-0.5)) + 0.2 * math.log(1 + math.exp(0.5)),
        ),
        ({"beta": 0.1, "length_normalized": True}, math.log(1 + math.exp(-0.1 * (2 / 4 + 3 / 2)))),
        ({"beta": 0.1, "preference_loss": "hinge"}, 0.5),
        ({"beta": 0.5, "preference_loss": "hinge"}, 0.0),
        ({"beta": 0.5, "preference_loss": "ipo"}, (2 / 4 + 3 / 2 - 1) ** 2),
        (
            {"beta": 0.1, "preference_loss": "robust", "label_smoothing": 0.2},
            (0.8 * math.log(1 + math.exp(-0.5)) - 0.2 * math.log(1 + math.exp(0.5))) / 0.6,
        ),
        ({"beta": 2.0, "preference_loss": "simpo"}, math.log(1 + math.exp(-(2 * (-8 / 4 + 11 / 2) - 0.5)))),
        (
            {"beta": 0.2, "preference_loss": "orpo"},
            2
            + 0.2
            * math.log(
                1
                + math.exp(
                    -(-2 + 5.5 - math.log(1 - math.exp(-2)) + math.log(1 - math.exp(-5.5)))  # the log odds ratio
                )
            ),
        ),
        ({"beta": 0.1, "sft_weight": 0.5}, math.log(1 + math.exp(-0.5)) + 0.5 * 2),
    ],
)
def test_values_by_hand(settings, expected):
    assert one((-8, -10, 4), (-11, -8, 2), **settings) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [*VARIANTS, "simpo", "orpo"])
def test_every_loss_wants_the_better_answer_and_not_the_worse(answers, name):
    settings = PreferenceSettings(**VARIANTS.get(name, {"preference_loss": name}))
    chosen, rejected = sides(answers)
    chosen.log_prob.requires_grad_(), rejected.log_prob.requires_grad_()
    pair_losses(chosen, rejected, settings, BETA).sum().backward()
    if name == "ipo":  # it wants a difference, and not more
        assert torch.equal(chosen.log_prob.grad * chosen.tokens, -rejected.log_prob.grad * rejected.tokens)
    else:
        assert (chosen.log_prob.grad <= 0).all() and chosen.log_prob.grad.sum() < 0
        assert (rejected.log_prob.grad >= 0).all() and rejected.log_prob.grad.sum() > 0


def test_orpo_has_a_gradient_where_an_answer_is_certain():
    log_probs = torch.tensor([0.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    chosen, rejected = (Side(each, torch.zeros(1), torch.tensor([2.0])) for each in log_probs)
    for pair in ((chosen, rejected), (rejected, chosen)):
        loss = pair_losses(*pair, PreferenceSettings(preference_loss="orpo"), BETA).sum()
        loss.backward()
        assert loss.isfinite() and all(each.grad.isfinite().all() for each in log_probs)


class Says(torch.nn.Module):
    """In the place of a model: it says what it thinks of single tokens."""

    def __init__(self, log_probs):
        super().__init__()
        nothing = torch.zeros_like(log_probs)
        self.said = SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    def forward(self, **_):
        return self.said


def of_trl(answers, loss_type, settings, monkeypatch):
    """TRL's loss [PAIRS], from its own method, pair by pair."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    monkeypatch.setattr(dpo_trainer, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext())
    now, then, mask = answers
    ids = torch.ones(2, 10, dtype=torch.long)  # a prompt of one token stands before each answer
    losses = []
    for pair in range(PAIRS):
        both = torch.tensor([pair, PAIRS + pair])
        model = Says(now[both])
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda each: each, gather=lambda each: each),
            model=model,
            ref_model=Says(then[both]),
            args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=False,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=BETA,
            label_smoothing=settings.label_smoothing,
            use_weighting=False,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        completion = torch.cat([torch.zeros(2, 1), mask[both]], 1).long()
        inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": completion}
        losses.append(dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False))
    return torch.stack(losses)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_losses_with_a_reference_are_those_of_trl(answers, name, monkeypatch):
    settings = PreferenceSettings(**VARIANTS[name])
    theirs = of_trl(answers, name.replace("-normalized", "_norm"), settings, monkeypatch)
    torch.testing.assert_close(pair_losses(*sides(answers), settings, BETA), theirs, **TOLERANCE)


@pytest.mark.parametrize("name", ["simpo", "sigmoid"])
def test_simpo_and_smoothed_labels_are_those_of_trl(answers, name):
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    settings = PreferenceSettings(preference_loss=name, label_smoothing=0.1 if name == "sigmoid" else 0.0)
    chosen, rejected = sides(answers)
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type=name,
        beta=BETA,
        simpo_gamma=settings.simpo_margin,
        label_smoothing=settings.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, score(chosen, settings), score(rejected, settings))
    torch.testing.assert_close(pair_losses(chosen, rejected, settings, BETA), theirs, **TOLERANCE)


def test_orpo_is_that_of_trl(answers):
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    settings = PreferenceSettings(preference_loss="orpo")
    chosen, rejected = sides(answers)
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen.mean, rejected.mean)
    torch.testing.assert_close(pair_losses(chosen, rejected, settings, BETA), -chosen.mean - theirs, **TOLERANCE)


def test_the_sft_term_is_that_of_trl(answers, monkeypatch):
    """TRL means over the tokens of a batch: of one pair that is the pair's mean."""
    theirs = of_trl(answers, "sft", PreferenceSettings(), monkeypatch)
    plain, with_term = (PreferenceSettings(sft_weight=weight) for weight in (0.0, 1.0))
    ours = pair_losses(*sides(answers), with_term, BETA) - pair_losses(*sides(answers), plain, BETA)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
