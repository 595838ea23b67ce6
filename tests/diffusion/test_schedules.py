import math

import pytest
import torch

from blockdiffusion.diffusion.schedules import SCHEDULES, Clipped, Linear, make_schedule, prob_range
from blockdiffusion.errors import UserError


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_is_a_schedule(name):
    schedule = make_schedule(name)
    t = torch.linspace(1e-3, 1, 1001, dtype=torch.float64)
    p = schedule.mask_prob(t)
    assert (p.diff() > 0).all() and p[-1] == 1
    assert torch.allclose(schedule.inverse(p), t, atol=1e-12)
    h = 1e-6
    slope = (schedule.mask_prob(t[1:-1] + h) - schedule.mask_prob(t[1:-1] - h)) / (2 * h)
    assert torch.allclose(schedule.loss_weight(t[1:-1]), slope / p[1:-1], rtol=1e-6)
    assert schedule.is_bound and schedule.t_range == (0.0, 1.0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_both_ends_are_exact(name):
    schedule = make_schedule(name)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(schedule.mask_prob(ends), ends)
    assert torch.equal(schedule.inverse(ends), ends)
    assert schedule.loss_weight(ends)[0] == math.inf and schedule.loss_weight(ends)[1] > 0
    tiny = torch.tensor([1e-12], dtype=torch.float64)  # no cancellation near the end
    assert schedule.inverse(schedule.mask_prob(tiny)).item() == pytest.approx(1e-12, rel=1e-9)
    assert prob_range(schedule) == (0.0, 1.0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_weights_integrate_to_the_exact_ones(name, size):
    """Integral of w p^k (1-p)^(S-k) dt = 1 / (k C(S, k)): one NELBO for all schedules.

    Gauss-Legendre quadrature in u = sqrt(t), where every integrand is smooth.
    """
    from numpy.polynomial.legendre import leggauss

    schedule = make_schedule(name)
    x, weight = (torch.from_numpy(a) for a in leggauss(64))
    u = (x + 1) / 2
    p, w = schedule.mask_prob(u**2), schedule.loss_weight(u**2)
    for k in range(1, size + 1):
        integral = (weight * u * w * p**k * (1 - p) ** (size - k)).sum()
        assert abs(integral * k * math.comb(size, k) - 1) < 1e-6


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_clip_is_in_mask_probabilities_for_every_schedule(name):
    clipped = make_schedule(name, (0.3, 0.8))
    assert prob_range(clipped) == pytest.approx((0.3, 0.8), abs=1e-12)
    base = make_schedule(name)
    t = torch.tensor([clipped.t_range[0]], dtype=torch.float64)
    assert torch.equal(clipped.loss_weight(t), base.loss_weight(t))
    everything = make_schedule(name, (1.0, 1.0))
    assert everything.t_range == (1.0, 1.0) and prob_range(everything) == (1.0, 1.0)


def test_clipped_draws_from_the_clip_and_is_no_bound():
    clipped = Clipped(Linear(), 0.3, 0.8)
    assert clipped.t_range == (0.3, 0.8) and not clipped.is_bound
    t = torch.tensor([0.5])
    assert clipped.loss_weight(t) == 2 and clipped.mask_prob(t) == 0.5
    assert clipped.name == "linear[0.3,0.8]"


@pytest.mark.parametrize("clip", [(0.8, 0.3), (-0.1, 0.5), (0.2, 1.1), (0.0, 0.0)])
def test_an_empty_or_outside_clip_is_refused(clip):
    with pytest.raises(UserError, match="clip"):
        Clipped(Linear(), *clip)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="linear"):
        make_schedule("lineal")
