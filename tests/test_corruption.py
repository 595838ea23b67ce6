import math

import pytest
import torch

from blockdiffusion.corruption import bernoulli, stratified_uniform
from blockdiffusion.schedules import Clipped, Linear
from blockdiffusion.seeding import generator

MASK = 9


def draw(rows=3, length=8, size=2, seed=0, free=None, **options):
    clean = torch.arange(rows * length).view(rows, length) % 9
    free = torch.ones_like(clean, dtype=torch.bool) if free is None else free
    schedule = options.pop("schedule", Linear())
    out = bernoulli(clean, free, size, MASK, schedule, generator(seed, "c"), **options)
    return clean, free, out


def test_only_free_tokens_are_masked_and_only_masked_tokens_have_weight():
    free = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.6
    clean, free, out = draw(free=free, num_noisy=5)
    masked = out.noisy_BNL == MASK
    assert masked.any() and (masked <= free[:, None]).all()
    assert torch.equal(out.noisy_BNL[~masked], clean[:, None].expand_as(masked)[~masked])
    assert torch.equal(out.weight_BNL > 0, masked)


def test_weight_is_one_over_t_and_equal_within_a_block():
    _, _, out = draw(rows=64, size=4, length=8)
    weight = out.weight_BNL.unflatten(-1, (-1, 4))
    top = weight.amax(-1, keepdim=True)
    assert ((weight == 0) | (weight == top)).all()
    assert top[top > 0].min() >= 1 and top.max() <= 1000


@pytest.mark.parametrize("stratified", [False, True])
def test_every_row_and_block_has_the_uniform_marginal(stratified):
    """Kolmogorov-Smirnov for each of 6 (row, block) entries; false alarm 6 * 1e-4 in all."""
    draws, entries = 2000, 6
    source = torch.Generator().manual_seed(3)
    sample = torch.stack([stratified_uniform((2, 1, 3), source, stratified) for _ in range(draws)])
    sorted_draws = sample.view(draws, entries).sort(0).values
    grid = torch.arange(1, draws + 1, dtype=torch.float64)[:, None] / draws
    distance = torch.maximum(grid - sorted_draws, sorted_draws - grid + 1 / draws).amax(0)
    critical = math.sqrt(-0.5 * math.log(1e-4 / 2) / draws)
    assert (distance < critical).all()


def test_stratification_puts_one_time_into_each_stratum():
    uniform = stratified_uniform((4, 1, 8), torch.Generator().manual_seed(0)).flatten()
    assert torch.equal((uniform * 32).ceil().sort().values, torch.arange(1.0, 33).double())
    assert not torch.equal(uniform, uniform.sort().values)


def test_the_mask_rate_is_the_mask_probability():
    """Mean mask rate of 40,000 tokens under U[0.3, 0.8]: 0.55 within 5 standard errors (1e-6)."""
    _, _, out = draw(rows=500, length=80, size=1, schedule=Clipped(Linear(), 0.3, 0.8))
    rate = (out.noisy_BNL == MASK).double().mean()
    assert abs(rate - 0.55) < 5 * math.sqrt(0.25 / 40_000)
    used = out.weight_BNL[out.weight_BNL > 0]
    assert used.min() >= 1 / 0.8 - 1e-6 and used.max() <= 1 / 0.3 + 1e-5


def test_everything_is_masked_when_the_clip_is_one():
    _, _, out = draw(schedule=Clipped(Linear(), 1.0, 1.0))
    assert (out.noisy_BNL == MASK).all() and (out.weight_BNL == 1).all()


def test_t_min_bounds_the_weight():
    _, _, out = draw(rows=400, size=1, t_min=0.5)
    assert out.weight_BNL.max() <= 2


def test_masks_are_a_function_of_the_seed_and_slices_are_consistent():
    _, _, first = draw(rows=6, seed=5)
    _, _, again = draw(rows=6, seed=5)
    _, _, other = draw(rows=6, seed=6)
    assert torch.equal(first.noisy_BNL, again.noisy_BNL)
    assert not torch.equal(first.noisy_BNL, other.noisy_BNL)
    part = first.rows(2, 4)
    assert torch.equal(part.noisy_BNL, first.noisy_BNL[2:4])
    assert torch.equal(part.weight_BNL, first.weight_BNL[2:4])


def test_the_weighted_sum_is_unbiased_for_a_known_function():
    """E sum w 1[masked] = sum over tokens of E_t[p(t)/t] = 1 per token, whatever t_min.

    Its standard deviation per token is sqrt(E[1/t] - 1) = sqrt(ln(1000)/0.999 - 1) < 2.5; 5
    standard errors: false alarm 1e-6.
    """
    _, _, out = draw(rows=2000, length=16, size=4)
    tokens = out.weight_BNL.numel()
    block = out.weight_BNL.double().unflatten(-1, (-1, 4)).mean(-1).flatten()
    assert abs(block.mean() - 1) < 5 * 2.5 / math.sqrt(tokens)
