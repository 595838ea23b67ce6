import math

import pytest
import torch

from blockdiffusion.diffusion.schedules import SCHEDULES, make_schedule
from blockdiffusion.errors import UserError
from blockdiffusion.sampling.policies import Ancestral, FirstHitting
from tests.sampling.laws import streams


def masked(rows, pattern=(True, True, False, True)):
    return torch.tensor([pattern]).expand(rows, -1)


@pytest.mark.parametrize("policy", [FirstHitting(), Ancestral(3), Ancestral(1)], ids=str)
def test_passes_are_dense_and_only_for_masked_positions(policy):
    plan = policy.plan(masked(200), streams(200))
    assert (plan[:, 2] == -1).all()
    for row in plan:
        used = sorted(set(row[row >= 0].tolist()))
        assert used == list(range(len(used)))


def test_first_hitting_takes_every_order_equally_often():
    """Chi-square over the 6 orders of 3 tokens, 6,000 draws; false alarm 1e-4 (25.7 at 5 df)."""
    plan = FirstHitting().plan(masked(6000), streams(6000))[:, [0, 1, 3]]
    counts = torch.bincount(plan @ torch.tensor([9, 3, 1]), minlength=27)
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 25.7


def test_ancestral_shares_a_pass_as_often_as_it_should():
    """Two masked tokens fall into the same of T equal steps with probability 1/T; 4.9 sigma."""
    steps, rows = 4, 20_000
    plan = Ancestral(steps).plan(masked(rows, (True, True)), streams(rows, 2))
    together = (plan[:, 0] == plan[:, 1]).double().mean()
    assert abs(together - 1 / steps) < 4.9 * math.sqrt(1 / steps * (1 - 1 / steps) / rows)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ancestral_spreads_tokens_as_its_schedule_says(name):
    """Two masked tokens fall into step i of T with probability (p(t_i) - p(t_{i-1}))^2; 4.9 sigma
    (false alarm 1e-6) for their sum over the steps."""
    steps, rows = 4, 20_000
    policy = Ancestral(steps, make_schedule(name))
    plan = policy.plan(masked(rows, (True, True)), streams(rows, 2))
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    chance = make_schedule(name).mask_prob(grid).diff().square().sum()
    together = (plan[:, 0] == plan[:, 1]).double().mean()
    assert abs(together - chance) < 4.9 * math.sqrt(chance * (1 - chance) / rows)


def test_one_step_reveals_everything_at_once():
    plan = Ancestral(1).plan(masked(5), streams(5))
    assert plan.amax() == 0


def test_mistakes_are_told():
    with pytest.raises(UserError, match="at least 1 step"):
        Ancestral(0)
