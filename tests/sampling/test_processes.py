"""Samplers of SEDD, D3PM and networks that read the time, against exactly enumerated laws."""

from functools import partial

import pytest
import torch

import blockdiffusion
from blockdiffusion.diffusion.losses import uniform_reverse
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import BlockDone, Finished, TokensRevealed, reverse
from blockdiffusion.sampling.choosing import make_sampler
from blockdiffusion.sampling.reverse import Analytic, UniformReverse
from blockdiffusion.sampling.samplers import FirstHitting, Planned
from tests import noise_oracles as oracles
from tests.sampling.laws import FALSE_ALARM, SHAPES, of_shape, p_value, seeded

DRAWS = 6_000
KINDS = {
    "sedd": dict(objective="score_entropy"),
    "absorbing": dict(objective="d3pm", timesteps=3),
    "uniform": dict(objective="d3pm", transition="uniform", timesteps=3),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def make(make_model):
    """A network that reads the time: 3 tokens and a mask, two blocks of 2 tokens, float64."""

    def make(kind="masked", **overrides):
        sizes = dict(vocab_size=4, mask_id=3, seq_len=4, block_size=2, time_conditioning=True)
        return make_model(**{**sizes, **KINDS.get(kind, {}), **overrides})

    return make


def exact_law(model, kind, steps):
    """The law of the chain on a linear grid of `steps` times, from transition matrices."""
    probs = [(i + 1) / steps for i in range(steps)]
    config = model.config
    if kind == "sedd":
        earlier = [0.0, *probs[:-1]]
        taken = [
            oracles.sedd_step(p, q, config.mask_id) for p, q in zip(probs, earlier, strict=True)
        ]
    else:
        transition = "uniform" if kind == "uniform" else "absorbing"
        taken = [oracles.d3pm_step(model, transition, probs, i) for i in range(steps)]
    chain = list(zip(probs, taken, strict=True))[::-1]
    blocks = config.seq_len // config.block_size
    law = oracles.chain_law(model, chain, kind == "uniform", blocks)
    assert abs(sum(law.values()) - 1) < 1e-9
    assert len(law) == (config.vocab_size - 1) ** config.seq_len
    return law


def draw(model, seed=1, prompts=None, draws=DRAWS, new=4, **options):
    return blockdiffusion.generate(
        model,
        prompts,
        num_samples=draws,
        max_new_tokens=new,
        bos=False,
        generator=seeded(seed),
        **options,
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_sampler_has_the_law_of_its_chain(make, kind, use_cache):
    model = make(kind)
    result = draw(model, steps=3, use_cache=use_cache)
    assert p_value(result, exact_law(model, kind, 3)) > FALSE_ALARM
    assert p_value(result, exact_law(model, kind, 1)) < 1e-10  # it tells laws apart
    assert result.nfe.max() <= 6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sampler_has_the_law_of_its_chain_at_every_block_size(make, kind, shape):
    model = of_shape(partial(make, kind), shape)
    draws = {"S=1": 2_000, "S=4": 20_000}.get(shape, DRAWS)
    result = draw(model, seed=3, draws=draws, steps=3, new=model.config.seq_len)
    assert p_value(result, exact_law(model, kind, 3)) > FALSE_ALARM
    assert p_value(result, exact_law(model, kind, 1)) < 1e-6


def test_every_step_of_uniform_noise_draws_from_equation_4(make, monkeypatch):
    """Exactly, where a chi-square test has little power: the law that each token is drawn from."""
    model, steps = make("uniform", noise_schedule="square"), 4
    probs = [((i + 1) / steps) ** 2 for i in range(steps)]
    taken = []

    def remember(clean, noisy, *rest):
        drawn_from = uniform_reverse(clean, noisy, *rest)
        taken.append((clean, noisy, drawn_from / drawn_from.sum(-1, keepdim=True)))
        return drawn_from

    monkeypatch.setattr(reverse, "uniform_reverse", remember)
    draw(model, draws=5, new=2, steps=steps)
    matrices = oracles.step_matrices(model, "uniform", probs)
    assert len(taken) == steps
    for index, (clean, noisy, drawn_from) in zip(reversed(range(steps)), taken, strict=True):
        from_zero = oracles.product(matrices[:index])
        for guess, x_t, law in zip(clean, noisy.tolist(), drawn_from, strict=True):
            expected = oracles.posterior(from_zero, matrices[index], guess, x_t)
            assert (law - expected).abs().max() < 1e-12


def test_the_steps_of_a_model_are_the_usual_ones(make):
    """D3PM: its own T; SEDD: as many as a block has tokens."""
    for kind, steps in (("absorbing", 3), ("uniform", 3), ("sedd", 2)):
        model = make(kind)
        same = [draw(model, draws=50, **o).sequences for o in ({}, {"steps": steps})]
        assert torch.equal(*same), kind


@pytest.mark.parametrize("kind", ["uniform", "sedd"])
def test_a_prompt_inside_a_block_is_given(make, kind):
    """With the first token given the second follows the chain that never changes the first."""
    model, steps, size = make(kind), 3, 4
    probs = [(i + 1) / steps for i in range(steps)]
    law = {(2, y): float(y == 3) if kind == "sedd" else float(y != 3) / 3 for y in range(size)}
    for i in reversed(range(steps)):
        if kind == "sedd":
            step = oracles.sedd_step(probs[i], probs[i - 1] if i else 0.0)
        else:
            step = oracles.d3pm_step(model, "uniform", probs, i)
        states = torch.tensor(list(law))
        logits = oracles.logits_of(model, [], states, probs[i])
        after = dict.fromkeys(law, 0.0)
        for (x, y), at in zip(law, logits, strict=True):
            if law[x, y] > 0:
                for new, chance in enumerate(step(at[1], y).tolist()):
                    after[x, new] += law[x, y] * chance
        law = after
    del law[2, 3]
    result = draw(model, prompts=[[2]], new=1, steps=steps)
    assert p_value(result, law) > FALSE_ALARM


def test_masked_diffusion_reads_the_time_of_its_pass(make):
    """Ancestral steps are those of absorbing D3PM; first hitting is their limit."""
    model = make()
    result = draw(model, sampler="ancestral", steps=3)
    assert p_value(result, exact_law(model, "absorbing", 3)) > FALSE_ALARM
    first = draw(model)
    assert first.nfe.max() == 4
    assert p_value(first, exact_law(model, "absorbing", 3)) < 1e-10
    limit = oracles.first_hitting_law(model)
    assert abs(sum(limit.values()) - 1) < 1e-5
    assert p_value(first, limit) > FALSE_ALARM


def test_many_steps_cost_at_most_one_pass_per_token_with_absorbing_noise(make):
    """When a token is revealed does not depend on the network, even if the network reads when."""
    result = draw(make("absorbing", timesteps=5000), draws=4)
    assert (result.nfe <= 4).all() and (result.sequences < 3).all()
    assert (draw(make("uniform", timesteps=50), draws=4).nfe == 100).all()
    assert (draw(make("sedd"), draws=4, steps=50).nfe < 100).all()  # it leaves when all is decided


@pytest.mark.parametrize("window", [None, 8])
def test_cached_equals_recomputed_for_ragged_prompts(make_model, kind, window):
    """Same generator, same tokens: prompts of any length, rows ending at different times."""
    model = make_model(**KINDS[kind], time_conditioning=True)
    prompts = [[1, 2, 3], [], list(range(7)), [5] * 8]
    results = [
        draw(model, 5, prompts, 2, 21, window=window, use_cache=use_cache, steps=3)
        for use_cache in (True, False)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert results[0].lengths.tolist() == [24, 24, 21, 21, 28, 28, 29, 29]
    for row, prompt in enumerate(p for p in prompts for _ in range(2)):
        kept = results[0].sequences[row, : results[0].lengths[row]]
        assert kept[: len(prompt)].tolist() == prompt
        assert (kept != 12).all()  # no mask is left


def test_events_tell_the_last_word_on_every_token(make_model, kind):
    model = make_model(**KINDS[kind], time_conditioning=True)
    events = list(
        blockdiffusion.stream(model, [[1], [1, 2]], max_new_tokens=9, generator=seeded(8))
    )
    result = sorted((e for e in events if isinstance(e, Finished)), key=lambda e: e.row)
    told = torch.full((2, 12), -1)
    changes = 0
    for event in events:
        if isinstance(event, TokensRevealed):
            changes += int((told[event.rows, event.positions] != -1).sum())
            assert (told[event.rows, event.positions] != event.ids).all()
            assert ((event.confidences >= 0) & (event.confidences <= 1)).all()
            told[event.rows, event.positions] = event.ids
        elif isinstance(event, BlockDone):
            for row, start, ids in zip(event.rows, event.starts, event.ids, strict=True):
                decided = told[row, start : start + 4]
                assert ((decided == ids) | (decided == -1)).all()
    for row, prompt in enumerate([1, 2]):
        kept = torch.tensor(result[row].ids)
        assert torch.equal(told[row, prompt : len(kept)], kept[prompt:])
    assert (changes > 0) == (kind == "uniform")


def test_rows_end_at_a_sampled_eos(make_model, kind):
    model = make_model(**KINDS[kind], time_conditioning=True, eos_id=0, bos_id=0, bos=True)
    result = blockdiffusion.generate(model, num_samples=48, max_new_tokens=40, generator=seeded())
    assert (result.sequences[:, 0] == 0).all() and (result.prompt_lengths == 1).all()
    for row, length in zip(result.sequences, result.lengths, strict=True):
        eos = (row[1:length] == 0).nonzero().flatten()
        assert eos.tolist() == [length - 2] or (length == 41 and not len(eos))
    assert result.lengths.min() < 41 and len(result.lengths.unique()) > 5


def test_filters_act_on_the_denoiser(make, kind):
    """With one token allowed the result is that token, where nothing but the network decides it."""
    model = make(kind)
    result = draw(model, draws=200, new=2, steps=1, top_k=1)
    state = torch.tensor([[3, 3]])
    if kind == "uniform":
        assert len(result.sequences.unique(dim=0)) < 9  # at most one text for each start
    else:
        best = oracles.denoised(model, oracles.logits_of(model, [], state, 1.0))[0].argmax(-1)
        assert (result.sequences == best).all()
    hot = draw(model, draws=200, new=2, steps=1, temperature=50.0)
    assert len(hot.sequences.unique(dim=0)) == 9


def test_which_process_a_network_has(make):
    usual = make_sampler(make("sedd").config)
    assert isinstance(usual, Analytic) and usual.steps == 2
    assert isinstance(make_sampler(make("uniform").config), UniformReverse)
    assert make_sampler(make("absorbing").config).name == "ancestral"
    assert make_sampler(make().config) == FirstHitting()
    assert Planned(FirstHitting()).name == "first-hitting"
    model = make("sedd")
    own = draw(model, draws=20, sampler=Analytic(2))
    assert torch.equal(own.sequences, draw(model, draws=20).sequences)


class Untimed:
    name = "untimed"
    plan = FirstHitting().plan


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("sedd", dict(sampler="first-hitting"), "sampler is first-hitting, but .* use analytic"),
    ("sedd", dict(steps=0), "steps is 0; it must be at least 1"),
    ("sedd", dict(schedule="cosin"), "unknown schedule"),
    ("uniform", dict(sampler="analytic"), "by its own steps; use ancestral"),
    ("uniform", dict(steps=0), "steps is 0; it must be at least 1"),
    ("absorbing", dict(schedule="cosine"), r"has its own \(linear\); leave it out"),
    ("masked", dict(sampler=Untimed()), "which the sampler untimed does not know"),
    ("masked", dict(sampler="analytic"), "unknown sampler 'analytic'"),
    ("sedd", dict(sampler=Analytic(2), steps=3), "this object has its own"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(make, kind, options, message):
    with pytest.raises(UserError, match=message):
        draw(make(kind), draws=1, **options)
