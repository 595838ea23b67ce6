"""Variances against exact enumeration of all masks, against a list of gradients, and identities."""

import itertools
import math

import pytest
import torch

from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.diffusion.estimators import (
    Bernoulli,
    Complement,
    Corrupted,
    Count,
    make_estimator,
)
from blockdiffusion.diffusion.variance import average, batch_moments
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.seeding import seeded


def gradient_of(model, loss):
    """All gradients in one vector; a parameter that is not used has zeros."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs]
    )


def moments_of(model, clean, estimator, replicates, seed=0, free=None, **options):
    free = torch.ones_like(clean, dtype=torch.bool) if free is None else free
    generator = torch.Generator().manual_seed(seed)
    return batch_moments(model, clean, free, None, estimator, replicates, generator, **options)


def outcomes(free, size):
    """(probability, mask, weight) of every outcome of independent counts: k uniform on 1..n, then
    one of the C(n, k) subsets, weight n / k."""
    blocks = []
    for block in range(len(free) // size):
        members = [l for l in range(block * size, (block + 1) * size) if free[l]]
        n = len(members)
        blocks.append([
            (1 / (n * math.comb(n, k)), subset, n / k)
            for k in range(1, n + 1)
            for subset in itertools.combinations(members, k)
        ])  # fmt: skip
    for parts in itertools.product(*blocks):
        mask = torch.zeros(len(free), dtype=torch.bool)
        weight = torch.zeros(len(free), dtype=torch.float64)
        for _, subset, value in parts:
            mask[list(subset)] = True
            weight[list(subset)] = value
        yield math.prod(p for p, _, _ in parts), mask, weight


@pytest.mark.parametrize(("size", "given"), [pytest.param(2, [], marks=pytest.mark.slow), (3, [0])])
def test_moments_have_the_enumerated_values_as_expectation(make_model, random_ids, size, given):
    """One row of two blocks: all pairs of mask sets are enumerated, with the loss and gradient of
    each. 48 estimates of 12 replicates are unbiased: each mean lies within 4.5 of its standard
    errors, estimated with 47 degrees of freedom (false alarm 5e-5 each, 8 comparisons)."""
    model = make_model(block_size=size, seq_len=2 * size, num_hidden_layers=1)
    clean = random_ids(1, 2 * size)
    free = torch.ones_like(clean, dtype=torch.bool)
    free[0, given] = False
    probabilities, losses, gradients = [], [], []
    for probability, mask, weight in outcomes(free[0], size):
        noisy = clean.masked_fill(mask, model.config.mask_id)
        nll = masked_nll(model, noisy[:, None], clean, mask[None, None])[0, 0]
        loss = (nll * weight).sum() / free.sum()
        probabilities.append(probability)
        losses.append(loss.detach())
        gradients.append(gradient_of(model, loss))
    p, loss, gradient = torch.tensor(probabilities), torch.stack(losses), torch.stack(gradients)
    p = p.double()
    assert abs(p.sum() - 1) < 1e-6
    mean_gradient = p @ gradient
    exact = {
        "loss": p @ loss,
        "loss_variance": p @ (loss - p @ loss) ** 2,
        "trace": p @ (gradient - mean_gradient).square().sum(1),
        "square": mean_gradient.square().sum(),
    }
    found = {name: [] for name in exact}
    for seed in range(48):
        moments = moments_of(
            model, clean, Count(stratify="none"), 12, seed, free=free, gradients=True
        )
        found["loss"].append(moments.loss)
        found["loss_variance"].append(moments.loss_variance)
        found["trace"].append(sum(moments.gradient_variance.values()))
        found["square"].append(sum(moments.gradient_square.values()))
    for name, values in found.items():
        estimate = torch.tensor(values, dtype=torch.float64)
        error = estimate.std() / len(values) ** 0.5
        assert error < 0.3 * exact["trace" if name == "square" else name], name  # it says something
        assert abs(estimate.mean() - exact[name]) < 4.5 * error, name


@pytest.mark.parametrize("spec", ["bernoulli", "count", "complement", "bernoulli[0.3,0.8]x2"])
def test_moments_are_those_of_a_list_of_gradients(make_model, random_ids, spec, monkeypatch):
    """The same draws, kept whole, and `torch.cov` of them. In one pass and in several."""
    model, clean = make_model(hidden_size=8, num_hidden_layers=1, cond_dim=4), random_ids(5, 16)
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, 0] = False
    estimator = make_estimator(spec)
    source = torch.Generator().manual_seed(3)
    losses, gradients, blocks = [], [], []
    for _ in range(6):
        own = seeded(int(torch.randint(2**63 - 1, (), generator=source)))
        drawn = estimator(clean, free, 4, model.config.mask_id, own)
        terms = masked_nll(model, drawn.noisy_BNL, clean, drawn.scored_BNL) * drawn.weight_BNL
        loss = terms.sum() / free.sum() / drawn.noisy_BNL.shape[1]
        losses.append(loss.detach())
        gradients.append(gradient_of(model, loss))
        sums = terms.detach().mean(1).view(5, 4, 4).sum(-1)
        blocks.append((sums / free.view(5, 4, 4).sum(-1)).var())
    trace = torch.cov(torch.stack(gradients).T).trace()
    square = torch.stack(gradients).mean(0).square().sum() - trace / 6
    for tokens in (8192, 96):
        monkeypatch.setattr("blockdiffusion.diffusion.variance.PASS_TOKENS", tokens)
        moments = moments_of(model, clean, estimator, 6, seed=3, free=free, gradients=True)
        assert moments.losses == pytest.approx([float(loss) for loss in losses], rel=1e-9)
        assert moments.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-9)
        assert moments.loss_variance == pytest.approx(float(torch.stack(losses).var()), rel=1e-9)
        assert moments.block_variance == pytest.approx(float(torch.stack(blocks).mean()), rel=1e-9)
        assert sum(moments.gradient_variance.values()) == pytest.approx(float(trace), rel=1e-9)
        assert sum(moments.gradient_square.values()) == pytest.approx(float(square), rel=1e-9)
        assert moments.signal_to_noise == pytest.approx(float(square / trace), rel=1e-9)
        assert moments.gradient_variance.keys() == dict(model.backbone.named_parameters()).keys()


def test_what_has_no_noise_has_no_variance(make_model, random_ids):
    """Everything masked in single-token blocks, by three estimators: exactly 0."""
    model, clean = make_model(block_size=1), random_ids(3, 16)
    laws = (make_estimator("bernoulli[1,1]"), Count(), Count(num_noisy=3))
    results = [moments_of(model, clean, law, 4, gradients=True) for law in laws]
    for moments in results:
        assert moments.loss_variance == 0
        assert set(moments.gradient_variance.values()) == {0.0}
        assert moments.signal_to_noise is None
        assert moments.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert moments.block_variance > 0  # the data's


def test_a_law_without_chance_has_no_variance(make_model, random_ids):
    class LastOfEveryBlock:
        name, num_noisy, is_bound = "last", 1, False

        def __call__(self, clean_BL, free_BL, block_size, mask_id, generator):
            masked = (torch.arange(clean_BL.shape[1]) % block_size == block_size - 1) & free_BL
            noisy = clean_BL.masked_fill(masked, mask_id)
            return Corrupted(noisy[:, None], masked[:, None].float(), masked[:, None])

    moments = moments_of(make_model().float(), random_ids(3, 16), LastOfEveryBlock(), 5,
                         gradients=True)  # fmt: skip
    assert moments.loss_variance == 0 and set(moments.gradient_variance.values()) == {0.0}
    assert sum(moments.gradient_square.values()) > 0


def test_independent_copies_divide_the_variance(make_model, random_ids):
    """Four independent copies: a quarter, within a factor 1.7 (ratio of two chi-squares with 249
    degrees of freedom: false alarm 5e-5; the losses are sums over 32 blocks, nearly normal).
    Complement pairs do better than two independent copies."""
    model, clean = make_model(num_hidden_layers=1), random_ids(8, 16)
    one, four, two, pair = (
        moments_of(model, clean, law, 250).loss_variance
        for law in (
            Count(stratify="none"),
            Count(num_noisy=4, stratify="none"),
            Count(num_noisy=2, stratify="none"),
            Complement(stratify="none"),
        )
    )
    assert 1 / 1.7 < one / four / 4 < 1.7
    assert pair < two / 1.5


def test_equal_seeds_are_common_random_numbers(make_model, random_ids):
    """A clip as wide as everything is no clip: the same draws, replicate by replicate, whatever
    a replicate of the other estimator drew from its stream."""
    model, clean = make_model(), random_ids(3, 16)
    whole = moments_of(model, clean, Bernoulli(t_min=0.0), 5)
    clipped = moments_of(model, clean, make_estimator("bernoulli[0,1]", t_min=0.0), 5)
    assert clipped.losses == pytest.approx(whole.losses, rel=1e-12)
    assert moments_of(model, clean, Bernoulli(), 5, seed=1).losses != whole.losses


def test_the_model_is_left_as_it_was(make_model, random_ids):
    model, clean = make_model(dropout=0.5).train(), random_ids(2, 16)
    marks = {name: torch.full_like(p, 7.0) for name, p in model.backbone.named_parameters()}
    for name, parameter in model.backbone.named_parameters():
        parameter.grad = marks[name].clone()
    first = moments_of(model, clean, Count(), 3, gradients=True)
    assert model.training
    assert all((p.grad == 7).all() for p in model.parameters())
    again = moments_of(model.eval(), clean, Count(), 3, gradients=True)  # without dropout
    assert again.losses == first.losses

    class Broken:
        def __call__(self, *_):
            raise UserError("no draw")

    with pytest.raises(UserError, match="no draw"):
        moments_of(model.train(), clean, Broken(), 3)
    assert model.training


def test_nothing_masked_is_a_loss_of_zero(make_model, random_ids):
    """Times near 0: some batches of a single block have no masked token and no gradient."""
    model, clean = make_model(block_size=8, seq_len=8), random_ids(1, 8)
    law = make_estimator("bernoulli[0.05,0.1]", stratify="none")
    moments = moments_of(model, clean, law, 8, gradients=True)
    assert 0 in moments.losses and max(moments.losses) > 0
    assert moments.loss_variance > 0 and moments.block_variance is None


def test_the_average_over_batches(make_model, random_ids):
    model = make_model()
    parts = [moments_of(model, random_ids(2, 16, seed=s), Count(), 3, gradients=True)
             for s in range(2)]  # fmt: skip
    both = average(parts)
    for name in ("loss", "loss_variance", "block_variance"):
        first, second = (getattr(m, name) for m in parts)
        assert getattr(both, name) == pytest.approx((first + second) / 2)
    assert both.losses == parts[0].losses + parts[1].losses
    squares, traces = (
        sum(sum(getattr(m, name).values()) for m in parts)
        for name in ("gradient_square", "gradient_variance")
    )
    assert both.signal_to_noise == pytest.approx(squares / traces)


def test_mistakes(make_model, random_ids):
    model, clean = make_model(), random_ids(2, 16)
    with pytest.raises(UserError, match="at least 2"):
        moments_of(model, clean, Count(), 1)
    with pytest.raises(UserError, match="nothing to score"):
        moments_of(model, clean, Count(), 2, free=torch.zeros_like(clean, dtype=torch.bool))
