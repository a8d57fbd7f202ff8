"""The loss of a reward model in closed form and TRL's own, and the head's arithmetic, without a run."""

from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from toolkits.commands.train import train
from toolkits.training.objectives import OBJECTIVES
from toolkits.training.objectives.bradley_terry import pair_losses
from toolkits.training.settings import RewardSettings

SCORES = torch.tensor([[0.3, -1.2], [2.5, 2.5], [-4.0, 3.0], [30.0, -60.0], [-60.0, 45.0]])


METRICS = ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin")


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_loss_is_its_closed_form(center):
    found = pair_losses(*SCORES.unbind(1), RewardSettings(center))
    wide = SCORES.double()
    expected = torch.log1p(torch.exp(wide[:, 1] - wide[:, 0])) + center * wide.sum(1) ** 2
    assert torch.allclose(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_those_of_trl(center):
    trl = pytest.importorskip("trl", reason="TRL is compared with: it is no dependency")
    gathering = SimpleNamespace(gather=lambda each: each, gather_for_metrics=lambda each: each)
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        args=SimpleNamespace(center_rewards_coefficient=center or None),
        accelerator=gathering,
        _metrics={"train": {name: [] for name in METRICS}},
        _total_train_tokens=0,
        _tp_size=1,
    )
    ours, theirs = SCORES[:3].clone().requires_grad_(), SCORES[:3].clone().requires_grad_()
    inputs = {"attention_mask": torch.ones(1)}
    expected = trl.RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=theirs.t().reshape(-1, 1)), inputs
    )
    found = pair_losses(*ours.unbind(1), RewardSettings(center)).mean()
    (gradient,), (expected_gradient,) = torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [4096, 8, 1])
def test_token_scores_and_their_gradients_are_those_of_wide_numbers(monkeypatch, dtype, at_once):
    from toolkits.training.parallel import head
    from toolkits.training.parallel.reward_head import TokenScores

    monkeypatch.setattr(head, "LOSS_TOKENS", at_once)
    generator = torch.Generator().manual_seed(6)
    hidden, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((23, 20), (1, 20)))
    factors = torch.randn(23, generator=generator)
    found, expected = [], []
    for results, kind, scores in (
        (found, dtype, TokenScores.apply),
        (expected, torch.float64, lambda hidden, weight: (hidden @ weight.t())[:, 0]),
    ):
        inputs = [each.to(kind).requires_grad_() for each in (hidden, weight)]
        output = scores(*inputs)
        results += [output, *torch.autograd.grad((output * factors.to(output.dtype)).sum(), inputs)]
    assert found[0].dtype == torch.float32 and [each.dtype for each in found[1:]] == [dtype] * 2
    assert torch.allclose(found[0].double(), expected[0], atol=1e-5), (
        "the sum itself is in fp32 whatever the inputs are"
    )
    rounding = torch.finfo(dtype).eps
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-5, rtol=rounding)


def test_the_objective_has_settings_of_its_own():
    said = CliRunner().invoke(train, ["reward", "--help"]).output
    assert "--center-rewards" in said and "--beta" not in said and "--sft-weight" not in said
    assert "--center-rewards" not in CliRunner().invoke(train, ["dpo", "--help"]).output
    assert OBJECTIVES["reward"].rows == "pairs"
