"""The bounds of SEDD and D3PM against matrices, quadrature and enumeration."""

import itertools
import math

import pytest
import torch

import blockdiffusion
from blockdiffusion.diffusion.estimators import Bernoulli, Complement, Count, Timesteps
from blockdiffusion.diffusion.exact import exact_blocks
from blockdiffusion.diffusion.losses import Pieces, score_entropy, subs_nll
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from tests import noise_oracles as oracles

ROWS = [[0, 2, 1, 1], [2, 2, 0, 1]]
T_MIN = 1e-3


@pytest.fixture
def make_tiny(make_model):
    """A network of 3 tokens and a mask (id 1 of 0..3), two blocks of 2 tokens, in float64."""

    def make(objective, **overrides):
        sizes = dict(
            vocab_size=4, mask_id=3, seq_len=4, block_size=2, objective=objective,
            time_conditioning=True,
        )  # fmt: skip
        return make_model(**{**sizes, **overrides})

    return make


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def estimate(model, estimator, samples, rows=ROWS, **options):
    return blockdiffusion.likelihood(
        model, torch.tensor(rows), estimator, samples, bos=False, generator=seeded(), **options
    )


# --- SEDD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 4])
def test_the_bound_of_sedd_is_the_integral_of_the_score_entropy(make_tiny, block_size):
    """All mask sets, quadrature in time; within 4 standard errors (false alarm 6e-5) of 1.5 %."""
    model = make_tiny("score_entropy", block_size=block_size)
    whole = sum(oracles.sedd_bound(model, row) for row in ROWS) / 8
    result = estimate(model, "auto", 400)
    assert result.estimator == "complement" and result.is_bound and result.t_min is None
    assert result.stderr_noise / whole < 0.015
    assert abs(result.nats_per_token - whole) < 4 * result.stderr_noise
    cut = sum(oracles.sedd_bound(model, row, low=T_MIN) for row in ROWS) / 8
    assert 0 < whole - cut < 2e-3 * whole
    result = estimate(model, "bernoulli", 400, t_min=T_MIN)
    assert result.t_min == T_MIN and result.stderr_noise / whole < 0.07
    assert abs(result.nats_per_token - cut) < 4 * result.stderr_noise


def test_noise_that_ends_early_has_a_prior(make_tiny):
    """p(t) = (1 - eps) t: the integral goes to 1 - eps, and a kept token costs eps log(V - 1)."""
    plain = make_tiny("score_entropy")
    model = make_tiny("score_entropy", noise_eps=0.3)
    assert diffusion_of(model.config).prior_nats == pytest.approx(0.3 * math.log(3))
    cut = sum(oracles.sedd_bound(plain, row, low=T_MIN) for row in ROWS)
    beyond = sum(oracles.sedd_bound(plain, row, low=0.7) for row in ROWS)
    expected = (cut - beyond) / 8 + 0.3 * math.log(3)
    result = estimate(model, "auto", 400)
    assert result.estimator == "bernoulli" and result.stderr_noise / expected < 0.09
    assert abs(result.nats_per_token - expected) < 4 * result.stderr_noise
    with pytest.raises(UserError, match=r"noise_eps is 0\.3; take bernoulli"):
        estimate(model, "count", 1)
    with pytest.raises(UserError, match="is clipped: it does not bound"):
        estimate(model, "bernoulli[0.3,0.8]", 1)


def test_normalised_scores_are_cross_entropy():
    """The rest, C - 1 - log C, is never negative, and 0 where the scores add up as they should."""
    logits = 2 * torch.randn(6, 5, generator=seeded(), dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    total = logits[:, :4].logsumexp(-1) - math.log(4)
    rest = score_entropy(logits.clone(), target, 4) - subs_nll(logits.clone(), target, 4)
    assert torch.allclose(rest, total.exp() - 1 - total) and (rest > 0).all()
    scaled = logits - total[:, None]
    rest = score_entropy(scaled.clone(), target, 4) - subs_nll(scaled.clone(), target, 4)
    assert rest.abs().max() < 1e-12


# --- times for networks that read them ----------------------------------------------------------


@pytest.mark.parametrize("law", [Count(timed=True), Complement(timed=True)], ids=lambda l: l.name)
def test_the_time_of_a_count_has_its_law(law):
    """Given that k of n are masked, p is Beta(k, n - k + 1): its first two moments, at 4.9 standard
    errors each (false alarm 1e-6, 12 times)."""
    clean = torch.zeros(4000, 6, dtype=torch.long)
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, 4:] = False  # blocks of 3: one whole, one with a single free token
    drawn = law(clean, free, 3, 9, seeded())
    count = (drawn.noisy_BNL == 9).unflatten(2, (2, 3)).sum(-1)
    for block, n in ((0, 3), (1, 1)):
        for k in range(1, n + 1):
            p = drawn.prob_BNK[..., block][count[..., block] == k]
            assert len(p) > 1000
            for power in (1, 2):
                mean = math.prod((k + i) / (n + 1 + i) for i in range(power))
                square = math.prod((k + i) / (n + 1 + i) for i in range(2 * power))
                error = math.sqrt((square - mean**2) / len(p))
                assert abs(float(p.pow(power).mean()) - mean) < 4.9 * error
    nothing = law(clean, torch.zeros_like(free), 3, 9, seeded())
    assert ((nothing.prob_BNK > 0) & (nothing.prob_BNK <= 1)).all()


def test_the_draws_of_masks_do_not_depend_on_whether_times_are_drawn():
    clean = torch.zeros(8, 12, dtype=torch.long)
    free = torch.ones_like(clean, dtype=torch.bool)
    for kind in (Count, Complement):
        plain, timed = (kind(timed=t)(clean, free, 4, 9, seeded()) for t in (False, True))
        assert torch.equal(plain.noisy_BNL, timed.noisy_BNL) and plain.prob_BNK is None


def test_masked_diffusion_that_reads_the_time(make_tiny):
    """`complement` and `bernoulli` estimate the same bound; 4 standard errors of the difference."""
    model = make_tiny("block_diffusion")
    pairs = estimate(model, "auto", 400)
    assert pairs.estimator == "complement"
    drawn = estimate(model, "bernoulli:cosine", 400)
    error = math.hypot(pairs.stderr_noise, drawn.stderr_noise)
    assert error / pairs.nats_per_token < 0.05
    assert abs(pairs.nats_per_token - drawn.nats_per_token) < 4 * error
    for name in ("exact", "orders"):
        with pytest.raises(UserError, match="reads no time; use auto"):
            estimate(model, name, 1)
    with pytest.raises(UserError, match="with a clip take bernoulli"):
        diffusion_of(model.config).fitted(Count(schedule=blockdiffusion_clip()))


def blockdiffusion_clip():
    from blockdiffusion.diffusion.schedules import make_schedule

    return make_schedule("linear", (0.3, 0.8))


# --- D3PM ---------------------------------------------------------------------------------------


def probabilities(steps, schedule=lambda t: t):
    return [schedule((i + 1) / steps) for i in range(steps)]


@pytest.mark.parametrize("transition", ["absorbing", "uniform"])
@pytest.mark.parametrize(
    ("timesteps", "name", "schedule"),
    [(1, "linear", lambda t: t), (3, "linear", lambda t: t), (4, "square", lambda t: t * t)],
)
def test_the_bound_of_d3pm_is_that_of_the_matrices(
    make_tiny, transition, timesteps, name, schedule
):
    """Equations 1 and 4 with matrices Q_t, every x_t enumerated; the estimate lies within 4
    standard errors (false alarm 6e-5) and 6 %. At T = 1 it has little noise or none."""
    model = make_tiny("d3pm", transition=transition, timesteps=timesteps, noise_schedule=name)
    probs = probabilities(timesteps, schedule)
    expected = sum(oracles.d3pm_bound(model, row, transition, probs) for row in ROWS) / 8
    result = estimate(model, "auto", 400)
    assert result.estimator == "timesteps" and result.is_bound and result.t_min is None
    assert result.stderr_noise / expected < 0.06
    assert abs(result.nats_per_token - expected) < 4 * result.stderr_noise + 1e-9


@pytest.mark.parametrize("transition", ["absorbing", "uniform"])
def test_every_term_of_d3pm_is_that_of_the_matrices(make_tiny, transition):
    """Without noise: all times and all x_t of a block as noisy copies, weighted by their chance."""
    steps, row = 3, [1, 2]
    model = make_tiny("d3pm", transition=transition, timesteps=steps, seq_len=2)
    probs = probabilities(steps)
    law = diffusion_of(model.config).fitted(Bernoulli())
    states = oracles.block_states(model, data_only=transition == "uniform")
    from_zero = torch.eye(4, dtype=torch.float64)
    total = 0.0
    for step, matrix in enumerate(oracles.step_matrices(model, transition, probs)):
        from_zero = from_zero @ matrix
        for state in states:
            chance = math.prod(float(from_zero[x, y]) for x, y in zip(row, state, strict=True))
            if chance:
                total += chance * float(_term(model, law, row, state, step + 1))
    assert total == pytest.approx(oracles.d3pm_bound(model, row, transition, probs), rel=1e-12)


def _term(model, law, row, state, step):
    """weight * term / T, summed over a row, of the corruption x_t = state at time t."""
    clean, free = torch.tensor([row]), torch.ones(1, 2, dtype=torch.bool)
    generator = seeded()
    while True:  # until the law itself draws it, so that the weights are its own
        drawn = law(clean, free, 2, model.config.mask_id, generator)
        time = round(float(drawn.prob_BNK) * law.timesteps)
        if time == step and torch.equal(drawn.noisy_BNL[0, 0], state):
            break
    with torch.no_grad():
        terms = diffusion_of(model.config).terms(model, drawn, clean)
    return (terms * drawn.weight_BNL).sum() / law.timesteps


@torch.no_grad()
def test_absorbing_d3pm_tends_to_masked_diffusion(make_tiny):
    """The bound of a network that reads no time, at T steps, is that of continuous time up to a
    difference that halves when T doubles (the sum is a Riemann sum of the integral over p)."""
    model = make_tiny("block_diffusion", time_conditioning=False)
    clean = torch.tensor(ROWS[:1])
    limit = float(exact_blocks(model, clean, clean >= 0).nelbo_BK.sum())
    away = []
    for steps in (4, 8, 16):
        bound = oracles.d3pm_bound(model, ROWS[0], "absorbing", probabilities(steps))
        away.append(bound - limit)
    assert all(difference > 0 for difference in away)  # fewer steps, a looser bound
    ratios = [a / b for a, b in itertools.pairwise(away)]
    assert all(abs(ratio - 2) < 0.05 for ratio in ratios)
    many = make_tiny("d3pm", time_conditioning=False, timesteps=2000)
    result = estimate(many, "auto", 800, rows=ROWS[:1])
    expected = (limit + away[-1] * 16 / 2000) / 4
    assert result.stderr_noise / expected < 0.06
    assert abs(result.nats_per_token - expected) < 4 * result.stderr_noise


def test_the_steps_are_stratified_and_uniform():
    """As many draws as a multiple of T: every step equally often in a batch."""
    law = Timesteps(timesteps=4, transition="uniform", vocab_size=10, num_noisy=2)
    clean = torch.full((8, 12), 3)
    free = torch.ones_like(clean, dtype=torch.bool)
    drawn = law(clean, free, 4, 9, seeded())
    steps, counts = (drawn.prob_BNK * 4).unique(return_counts=True)
    assert steps.tolist() == [1, 2, 3, 4] and counts.tolist() == [12] * 4
    assert torch.equal(drawn.before_BNK, drawn.prob_BNK - 0.25)
    assert (drawn.noisy_BNL != 9).all() and (drawn.weight_BNL == 4).all()
    last = drawn.prob_BNK.repeat_interleave(4, -1) == 1
    changed = (drawn.noisy_BNL[last] != 3).double().mean()
    assert 0.7 < changed < 1  # 8 of 9 tokens are others


def test_given_tokens_and_padding_stay_as_they_are():
    clean = torch.arange(12).expand(20, 12) % 9
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, 0], free[:, 9:] = False, False
    for transition in ("absorbing", "uniform"):
        law = Timesteps(timesteps=2, transition=transition, vocab_size=10)
        drawn = law(clean, free, 4, 9, seeded())
        assert torch.equal(drawn.noisy_BNL[:, 0][~free], clean[~free])
        assert (drawn.weight_BNL[:, 0][~free] == 0).all()
        assert (drawn.noisy_BNL[:, 0] != clean)[free].any()


def test_padding_and_given_tokens_are_not_counted(make_tiny):
    model = make_tiny("d3pm", transition="uniform", timesteps=2)
    rows = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 0]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    result = blockdiffusion.likelihood(
        model, rows, mc_samples=30, bos=True, valid=valid, generator=seeded()
    )
    assert result.num_tokens == 4
    other = rows.clone()
    other[1, 2:] = 1
    again = blockdiffusion.likelihood(
        model, other, mc_samples=30, bos=True, valid=valid, generator=seeded()
    )
    assert torch.equal(result.nats_per_row, again.nats_per_row)


def test_progress_and_a_target_work_as_for_masks(make_tiny):
    model, calls = make_tiny("d3pm", timesteps=5), []
    result = estimate(model, "auto", 8, target_stderr=0.2, progress=lambda *a: calls.append(a))
    assert result.stderr_noise <= 0.2 and 0 < calls[-1][0] <= calls[-1][1]


@pytest.mark.parametrize(
    ("objective", "estimator", "message"),
    [
        (
            "d3pm",
            "bernoulli",
            "discrete time; use timesteps or auto; a likelihood can also be auto",
        ),
        ("d3pm", "exact", "estimator exact needs a masked diffusion network"),
        ("score_entropy", "orders", "estimator orders needs a masked diffusion network"),
        ("score_entropy", "timesteps", "unknown estimator"),
        ("score_entropy", "bernoulli[0.3,0.8]", "is clipped: it does not bound"),
        ("score_entropy", "count[0.3,0.8]", "with a clip take bernoulli"),
    ],
)
def test_estimators_that_a_network_does_not_have(make_tiny, objective, estimator, message):
    with pytest.raises(UserError, match=message):
        estimate(make_tiny(objective, timesteps=3), estimator, 1)


def test_networks_without_noise_have_no_diffusion(make_ar):
    with pytest.raises(UserError, match="autoregressive draws no noise"):
        diffusion_of(make_ar().config)


KINDS = {
    "masks": ("block_diffusion", dict(time_conditioning=False)),
    "masks, timed": ("block_diffusion", {}),
    "sedd": ("score_entropy", {}),
    "d3pm": ("d3pm", dict(transition="absorbing", timesteps=5)),
    "d3pm, uniform": ("d3pm", dict(transition="uniform", timesteps=5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_in_pieces_are_the_weighted_terms(make_tiny, monkeypatch, kind):
    """No more logits at a time than a piece has, with and without a gradient; terms, too."""
    objective, options = KINDS[kind]
    model = make_tiny(objective, **options).train()
    diffusion = diffusion_of(model.config)
    law, _ = diffusion.estimator(diffusion.usual_estimator)
    clean = torch.tensor(ROWS * 3)
    drawn = law(clean, torch.ones_like(clean, dtype=torch.bool), 2, 3, seeded())
    parameters = [p for p in model.parameters() if p.requires_grad]

    def with_gradients(value):
        return [value.detach(), *torch.autograd.grad(value, parameters, allow_unused=True)]

    terms = diffusion.terms(model, drawn, clean)
    expected = with_gradients((drawn.weight_BNL * terms).sum())
    assert int((terms != 0).sum()) > 5

    sizes = []
    monkeypatch.setattr("blockdiffusion.diffusion.losses.CPU_PIECES", Pieces(8, 1))
    head = type(model).head
    monkeypatch.setattr(
        type(model), "head", lambda self, hidden: sizes.append(len(hidden)) or head(self, hidden)
    )
    for found in (
        with_gradients(diffusion.loss(model, drawn, clean)),
        with_gradients((drawn.weight_BNL * diffusion.terms(model, drawn, clean)).sum()),
    ):
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(diffusion.terms(model, drawn, clean), terms.detach())
    assert sizes and max(sizes) <= 2
