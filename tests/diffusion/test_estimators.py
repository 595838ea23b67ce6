"""Estimators: their laws against enumeration and quadrature, their expectation against the NELBO.

Statistical tests use fixed seeds and state the probability of a false alarm.
"""

import itertools
import math
from typing import get_args

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from scipy import stats

from blockdiffusion.diffusion.estimators import (
    Bernoulli,
    Complement,
    Count,
    EstimatorName,
    build_estimator,
    count_weights,
    for_block_size,
    make_estimator,
    relative_cost,
    stratified_uniform,
)
from blockdiffusion.diffusion.schedules import SCHEDULES, Clipped, Linear, make_schedule
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.seeding import generator

MASK = 99
ALL = ["bernoulli", "bernoulli:cosine", "resampled[0.3,0.8]", "count", "count[0.3,0.8]x2"]
ALL += ["complement", "complementx4", "complement[0.3,0.8]", "bernoulli[0.45,0.95]x3"]


def draw(estimator, rows=3, length=8, size=2, seed=0, free=None):
    clean = torch.arange(rows * length).view(rows, length) % 9
    free = torch.ones_like(clean, dtype=torch.bool) if free is None else free
    if isinstance(estimator, str):
        estimator = make_estimator(estimator)
    return clean, free, estimator(clean, free, size, MASK, generator(seed, "c"))


def sets_of(out, size):
    """Mask set of every block as a number, and the block's weight, flat."""
    masked = (out.noisy_BNL == MASK).unflatten(-1, (-1, size))
    number = (masked * 2 ** torch.arange(size)).sum(-1)
    weight = out.weight_BNL.double().unflatten(-1, (-1, size)).amax(-1)
    return number, weight


# --- what every estimator does ---------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL)
def test_only_free_tokens_are_masked_and_only_masked_tokens_have_weight(spec):
    free = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    clean, free, out = draw(spec, free=free, length=16, size=4)
    masked = out.noisy_BNL == MASK
    assert masked.any() and (masked <= free[:, None]).all()
    assert torch.equal(out.noisy_BNL[~masked], clean[:, None].expand_as(masked)[~masked])
    assert torch.equal(out.weight_BNL > 0, masked)
    assert out.noisy_BNL.shape[1] == make_estimator(spec).num_noisy


@pytest.mark.parametrize("spec", ALL)
def test_masks_are_a_function_of_the_seed_and_slices_are_consistent(spec):
    _, _, first = draw(spec, rows=6, seed=5)
    _, _, again = draw(spec, rows=6, seed=5)
    _, _, other = draw(spec, rows=6, seed=6)
    assert torch.equal(first.noisy_BNL, again.noisy_BNL)
    assert not torch.equal(first.noisy_BNL, other.noisy_BNL)
    part = first.rows(2, 4)
    assert torch.equal(part.noisy_BNL, first.noisy_BNL[2:4])
    assert torch.equal(part.weight_BNL, first.weight_BNL[2:4])


# --- the expectation: exact for a known table of losses ---------------------------------------


def loss_table(size, seed=0):
    """A loss for every (mask set, token): as irregular as a network's."""
    return torch.rand(2**size, size, generator=torch.Generator().manual_seed(seed)).double() * 5


def expected_loss(table, schedule, t_min=0.0):
    """The expected weighted loss of one block by quadrature over t and enumeration of masks."""
    size = table.shape[1]
    uncut, high = schedule.t_range
    low = max(uncut, float(schedule.inverse(torch.tensor(t_min, dtype=torch.float64))))
    x, w = (torch.from_numpy(a) for a in leggauss(200))
    if high > low:  # t = low + (high - low) u^2, which tames the ends
        u = (x + 1) / 2
        t, w = low + (high - low) * u**2, w * u * (high - low) / (high - uncut)
    else:
        t, w = torch.full_like(x, high), w / 2
    p, weight = schedule.mask_prob(t), schedule.loss_weight(t)
    total = 0.0
    for number in range(1, 2**size):
        members = [i for i in range(size) if number >> i & 1]
        k = len(members)
        chance = float((w * weight * p**k * (1 - p) ** (size - k)).sum())
        total += chance * float(table[number, members].sum())
    return total


def exact_nelbo(table):
    size = table.shape[1]
    total = 0.0
    for number in range(1, 2**size):
        members = [i for i in range(size) if number >> i & 1]
        k = len(members)
        total += float(table[number, members].sum()) / (k * math.comb(size, k))
    return total


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_oracle_gives_one_nelbo_for_all_schedules(name):
    table = loss_table(3)
    assert expected_loss(table, make_schedule(name)) == pytest.approx(exact_nelbo(table), rel=1e-8)


EXPECTATIONS = [f"bernoulli:{name}" for name in SCHEDULES]
EXPECTATIONS += ["bernoulli[0.3,0.8]", "bernoulli:cosine[0.45,0.95]", "bernoulli[1,1]"]
EXPECTATIONS += ["count", "count:cosine", "countx3", "complement", "complementx4"]
EXPECTATIONS += ["complement[0.3,0.8]", "complement:cosine[0.45,0.95]x4", "complement[1,1]"]
EXPECTATIONS += ["count[0.3,0.8]", "count:sqrt[0.45,0.95]", "count[1,1]", "count:log[0.6,0.6]"]


@pytest.mark.parametrize("spec", EXPECTATIONS)
@pytest.mark.parametrize("stratify", ["none", "batch", "row"])
def test_every_estimator_is_unbiased_for_its_objective(spec, stratify):
    """Mean of 400 independent batches within 4.5 standard errors: false alarm 7e-6 each."""
    size, rows, blocks = 3, 8, 4
    table = loss_table(size)
    estimator = make_estimator(spec, stratify=stratify)
    schedule = getattr(estimator, "schedule", Linear())
    t_min = getattr(estimator, "t_min", 0.0)
    means = []
    for seed in range(400):
        _, _, out = draw(estimator, rows=rows, length=size * blocks, size=size, seed=seed)
        number, _ = sets_of(out, size)
        weight = out.weight_BNL.double().unflatten(-1, (-1, size))
        means.append((weight * table[number]).sum(-1).mean())
    means = torch.stack(means)
    want = expected_loss(table, schedule, t_min)
    error = float(means.std()) / math.sqrt(len(means))
    assert abs(float(means.mean()) - want) < 4.5 * error + 1e-6


def test_count_is_bernoulli_with_t_integrated_out():
    """E[sum over k of c_k ...] of a clip is the clipped Bernoulli objective, by quadrature."""
    table = loss_table(4)
    for schedule in (Clipped(make_schedule(n), 0.2, 0.9) for n in SCHEDULES):
        weights = count_weights(schedule, 4)[4]
        total = 0.0
        for number in range(1, 16):
            members = [i for i in range(4) if number >> i & 1]
            k = len(members)
            mean = float(table[number, members].mean())
            total += float(weights[k - 1]) * mean / math.comb(4, k)
        assert total == pytest.approx(expected_loss(table, schedule), rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", [1, 4, 16, 256])
def test_without_a_clip_every_count_weighs_the_same(name, size):
    weights = count_weights(make_schedule(name), size)
    below = torch.ones(size + 1, size).tril(-1).double()
    assert torch.allclose(weights, below, atol=1e-9)


# --- the laws --------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("num_free", [1, 2, 3, 4])
def test_both_copies_of_a_pair_have_the_law_of_count(copy, num_free):
    """Chi-square over the mask sets, 12,000 independent blocks; false alarm 1e-5 each."""
    free = (torch.arange(4) < num_free).repeat(12_000, 1)
    pair = Complement(stratify="none")
    _, _, out = draw(pair, rows=12_000, length=4, size=4, free=free)
    number, weight = sets_of(out, 4)
    observed = torch.bincount(number[:, copy].flatten(), minlength=16)[1 : 2**num_free].double()
    size = torch.tensor([bin(i).count("1") for i in range(1, 2**num_free)])
    chance = torch.tensor([1 / (num_free * math.comb(num_free, int(k))) for k in size])
    assert observed.sum() == 12_000
    assert torch.equal(weight[:, copy, 0].float(), (num_free / size)[number[:, copy, 0] - 1])
    if num_free > 1:
        assert stats.chisquare(observed, chance.double() * 12_000).pvalue > 1e-5


def test_a_pair_supervises_every_token():
    _, _, out = draw("complementx4", rows=50, length=32, size=8)
    masked = (out.noisy_BNL == MASK).unflatten(1, (2, 2)).unflatten(-1, (-1, 8))
    assert masked.any(2).all()
    both = masked.all(2)  # in both copies only where everything is masked in both
    assert torch.equal(both.any(-1), both.all(-1)) and both.any()


def test_resampling_has_the_law_of_drawing_again():
    """Mask sets against the truncated binomial, by quadrature; chi-square, false alarm 1e-5."""
    clip, size, rows = (0.3, 0.8), 4, 20_000
    estimator = build_estimator("resampled", clip=clip, stratify="none")
    _, _, out = draw(estimator, rows=rows, length=size, size=size)
    number, weight = sets_of(out, size)
    x, w = (torch.from_numpy(a) for a in leggauss(100))
    p = clip[0] + (clip[1] - clip[0]) * (x + 1) / 2
    inside = {k: math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in (2, 3)}
    whole = sum(inside.values())
    chance = {k: float((w / 2 * mass / whole).sum()) for k, mass in inside.items()}
    counts = torch.tensor([bin(i).count("1") for i in range(16)])
    observed = torch.bincount(number.flatten(), minlength=16)
    assert observed[(counts < 2) | (counts > 3)].sum() == 0
    kept = [i for i in range(16) if 2 <= counts[i] <= 3]
    expected = [rows * chance[int(counts[i])] / math.comb(size, int(counts[i])) for i in kept]
    assert stats.chisquare(observed[kept], expected).pvalue > 1e-5
    assert weight.min() >= 1 / 0.8 - 1e-6 and weight.max() <= 1 / 0.3 + 1e-5


def test_resampling_takes_the_nearest_share_where_a_given_token_leaves_none():
    free = torch.tensor([[False, True, False, False]])
    _, _, out = draw("resampled[0.3,0.8]", rows=1, length=4, size=4, free=free)
    assert (out.noisy_BNL == MASK).sum() <= 1


def test_bernoulli_weight_is_one_over_t_and_equal_within_a_block():
    _, _, out = draw("bernoulli", rows=64, size=4, length=8)
    weight = out.weight_BNL.unflatten(-1, (-1, 4))
    top = weight.amax(-1, keepdim=True)
    assert ((weight == 0) | (weight == top)).all()
    assert top[top > 0].min() >= 1 and top.max() <= 1000


def test_the_mask_rate_is_the_mask_probability():
    """Mean mask rate of 40,000 tokens under U[0.3, 0.8]: 0.55 within 5 standard errors (1e-6)."""
    _, _, out = draw("bernoulli[0.3,0.8]", rows=500, length=80, size=1)
    rate = (out.noisy_BNL == MASK).double().mean()
    assert abs(rate - 0.55) < 5 * math.sqrt(0.25 / 40_000)
    used = out.weight_BNL[out.weight_BNL > 0]
    assert used.min() >= 1 / 0.8 - 1e-6 and used.max() <= 1 / 0.3 + 1e-5


@pytest.mark.parametrize("kind", ["bernoulli", "count"])
def test_everything_is_masked_when_the_clip_is_one(kind):
    _, _, out = draw(f"{kind}[1,1]")
    assert (out.noisy_BNL == MASK).all() and (out.weight_BNL == 1).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_cut_biases_every_schedule_by_less_than_itself(name):
    """It is a cut of the mask probability, left out of the integral and of nothing else: a cut of
    t at 1e-3 would lose 3 % with the square root, and a mean over what is left gain as much with
    the square."""
    table = loss_table(3)
    cut = expected_loss(table, make_schedule(name), t_min=1e-3)
    assert 0 < 1 - cut / exact_nelbo(table) < 1e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log"])
@pytest.mark.parametrize("t_min", [0.8, 0.9])
@pytest.mark.parametrize("kind", ["bernoulli", "resampled"])
def test_a_t_min_that_leaves_nothing_of_the_clip_is_refused(kind, schedule, t_min):
    """It would draw no masks at all, and train on nothing."""
    with pytest.raises(UserError, match=f"t_min is {t_min}, but .* end at 0.8, .* a smaller t_min"):
        build_estimator(kind, schedule=schedule, clip=(0.3, 0.8), t_min=t_min)
    build_estimator(kind, schedule=schedule, clip=(0.3, 0.8), t_min=0.79)


def test_t_min_bounds_the_weight():
    _, _, out = draw(Bernoulli(t_min=0.5), rows=400, size=1)
    assert out.weight_BNL.max() <= 2


# --- stratification --------------------------------------------------------------------------


@pytest.mark.parametrize("stratify", ["none", "batch", "row"])
def test_every_row_copy_and_block_has_the_uniform_marginal(stratify):
    """Kolmogorov-Smirnov for each of 12 entries; false alarm 12 * 1e-4 in all."""
    draws, shape = 2000, (2, 2, 3)
    source = torch.Generator().manual_seed(3)
    sample = torch.stack([stratified_uniform(shape, source, stratify) for _ in range(draws)])
    sorted_draws = sample.view(draws, -1).sort(0).values
    grid = torch.arange(1, draws + 1, dtype=torch.float64)[:, None] / draws
    distance = torch.maximum(grid - sorted_draws, sorted_draws - grid + 1 / draws).amax(0)
    critical = math.sqrt(-0.5 * math.log(1e-4 / 2) / draws)
    assert (distance < critical).all()


@pytest.mark.parametrize("stratify", ["batch", "row"])
def test_stratification_puts_one_number_into_each_stratum_of_the_batch(stratify):
    uniform = stratified_uniform((4, 2, 8), torch.Generator().manual_seed(0), stratify).flatten()
    assert torch.equal((uniform * 64).ceil().sort().values, torch.arange(1.0, 65).double())
    assert not torch.equal(uniform, uniform.sort().values)


def test_row_stratification_also_spreads_the_copies_of_a_block_and_the_blocks_of_a_row():
    uniform = stratified_uniform((5, 4, 8), torch.Generator().manual_seed(0))
    copies = (uniform * 4).ceil()
    assert torch.equal(
        copies.sort(1).values, torch.arange(1.0, 5).double()[:, None].expand(5, 4, 8)
    )
    for row in uniform:
        assert torch.equal(
            (row.flatten() * 32).ceil().sort().values, torch.arange(1.0, 33).double()
        )


def test_row_stratification_lowers_the_noise_of_a_row():
    def spread(stratify):
        means = [
            stratified_uniform((4, 1, 16), generator(seed, "s"), stratify).mean(-1)
            for seed in range(50)
        ]
        return torch.stack(means).var(0).mean()

    assert spread("row") < spread("batch") / 10


# --- names and mistakes ----------------------------------------------------------------------


@pytest.mark.parametrize("copies", [None, 2, 4, 12])
@pytest.mark.parametrize("clip", [None, (0.3, 0.8), (0.0, 1.0), (1 / 3, 2 / 3), (1e-7, 0.5)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", get_args(EstimatorName))
def test_a_name_reads_back_as_the_same_estimator(kind, schedule, clip, copies):
    if kind == "resampled" and clip is None:
        return
    estimator = build_estimator(kind, schedule=schedule, clip=clip, num_noisy=copies)
    again = make_estimator(estimator.name)
    assert repr(again) == repr(estimator).replace(repr(estimator.schedule), repr(again.schedule))
    assert again.name == estimator.name and again.is_bound == estimator.is_bound
    assert again.schedule.t_range == estimator.schedule.t_range
    assert type(again.schedule) is type(estimator.schedule)


def test_only_unclipped_estimators_are_bounds():
    bound = [spec for spec in ALL if make_estimator(spec).is_bound]
    assert bound == ["bernoulli", "bernoulli:cosine", "count", "complement", "complementx4"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bernouli", "unknown estimator"),
        ("bernoulli[0.3]", "two numbers"),
        ("bernoulli[0.8,0.3]", "empty or leaves"),
        ("bernoulli:lineal", "unknown schedule"),
        ("countx0", "num_noisy is 0; it must be at least 1"),
        ("complementx3", "must be even"),
        ("resampled", "none is given"),
    ],
)
def test_a_mistake_is_one_sentence(spec, words):
    with pytest.raises(UserError, match=words):
        make_estimator(spec)


def test_pairs_of_one_token_become_one_copy_with_a_note():
    estimator, note = for_block_size(Complement(num_noisy=4), 1)
    assert isinstance(estimator, Count) and estimator.num_noisy == 2 and note is not None
    assert for_block_size(Complement(), 2) == (Complement(), None)


def test_a_clip_that_no_share_fits_is_refused():
    with pytest.raises(UserError, match="widen the clip"):
        for_block_size(make_estimator("resampled[0.3,0.45]"), 4)
    assert for_block_size(make_estimator("resampled[0.3,0.5]"), 4)[1] is None


def test_the_cost_of_a_pass():
    assert [relative_cost(n) for n in (1, 2, 4)] == [1, 1.5, 2.5]
    assert relative_cost(2, has_clean=False) == 2
    assert list(itertools.islice(SCHEDULES, 1)) == ["linear"]


def test_a_schedule_of_ones_own_may_have_a_hyphen_in_its_name(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "cosine-cubed", type(make_schedule("cosine")))
    found = make_estimator("bernoulli:cosine-cubedx2")
    assert found.num_noisy == 2 and type(found.schedule) is type(make_schedule("cosine"))
