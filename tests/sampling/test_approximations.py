"""Policies that reveal several tokens in a pass, by hand and against enumerated laws."""

import itertools

import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import TokensRevealed
from blockdiffusion.sampling.adaptive import MostCertain
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.sampling.samplers import FirstHitting, Planned, RandomOrder, SamplingContext
from tests import noise_oracles as oracles
from tests.sampling.laws import FALSE_ALARM, p_value, seeded, streams

DRAWS = 6000


@pytest.fixture
def small(make_model):
    """3 tokens and a mask, two blocks of 2 tokens, float64."""
    return make_model(vocab_size=4, mask_id=3, seq_len=4, block_size=2)


def draw(model, **options):
    return blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=4, bos=False, generator=seeded(), **options
    )


# --- which tokens a pass reveals


PROBS = torch.tensor([
    [0.90, 0.06, 0.04],
    [0.55, 0.44, 0.01],
    [0.50, 0.25, 0.25],
    [0.34, 0.33, 0.33],
], dtype=torch.float64)  # fmt: skip


@pytest.mark.parametrize(("name", "threshold", "passes"), [
    ("confidence", 0.95, [0, 1, 2, 3]),  # at least one
    ("confidence", 0.52, [0, 0, 1, 2]),
    ("confidence", 0.0, [0, 0, 0, 0]),
    ("margin", 0.2, [0, 1, 0, 2]),
    ("margin", 1.0, [0, 2, 1, 3]),
    ("entropy", 0.0, [0, 1, 2, 3]),
    ("entropy", 0.4, [0, 0, 1, 2]),  # 0.39, then 0.73 (without the next), then 1.04
    ("entropy", 1.2, [0, 0, 0, 1]),
    ("entropy", 3.0, [0, 0, 0, 0]),
])  # fmt: skip
def test_a_threshold_reveals_what_reaches_it(name, threshold, passes):
    assert passes_of(MostCertain(name, threshold=threshold)) == passes


@pytest.mark.parametrize(("name", "per_step", "passes"), [
    ("confidence", 1, [0, 1, 2, 3]),
    ("confidence", 2, [0, 0, 1, 1]),
    ("confidence", 3, [0, 0, 0, 1]),
    ("margin", 2, [0, 1, 0, 1]),
    ("entropy", 2, [0, 0, 1, 1]),
])  # fmt: skip
def test_so_many_tokens_in_a_pass(name, per_step, passes):
    assert passes_of(MostCertain(name, tokens_per_step=per_step)) == passes


@pytest.mark.parametrize(("name", "threshold", "passes"), [
    ("confidence", 0.95, [0, 0, 1, 1]),
    ("confidence", 0.45, [0, 0, 0, 1]),  # more reach it
    ("confidence", 0.0, [0, 0, 0, 0]),
    ("margin", 0.2, [0, 1, 0, 1]),
    ("entropy", 0.0, [0, 0, 1, 1]),
    ("entropy", 1.2, [0, 0, 0, 1]),
])  # fmt: skip
def test_a_threshold_and_at_least_two_tokens_in_a_pass(name, threshold, passes):
    assert passes_of(MostCertain(name, 2, threshold)) == passes


@pytest.mark.parametrize(("how", "passes"), [
    (dict(threshold=0.45, sub_block=2), [0, 0, 1, 2]),
    (dict(threshold=0.0, sub_block=2), [0, 0, 1, 1]),
    (dict(threshold=0.0, sub_block=3), [0, 0, 0, 1]),
    (dict(tokens_per_step=1, sub_block=1), [0, 1, 2, 3]),
    (dict(tokens_per_step=3, sub_block=2), [0, 0, 1, 1]),
])  # fmt: skip
def test_parts_of_a_block_in_order(how, passes):
    assert passes_of(MostCertain("confidence", **how)) == passes


def test_the_most_certain_token_of_a_part_goes_first():
    probs = PROBS.flip(0)  # the least certain one is first
    for sub_block, passes in ((None, [3, 2, 1, 0]), (2, [1, 0, 3, 2]), (3, [2, 1, 0, 3])):
        sampler = MostCertain("confidence", tokens_per_step=1, sub_block=sub_block)
        assert passes_of(sampler, probs) == passes


def test_the_first_token_goes_alone_if_the_clean_past_alone_predicts_it():
    for how, passes in (
        (dict(threshold=0.0), [0, 1, 1, 1]),
        (dict(tokens_per_step=2), [0, 2, 1, 1]),
    ):
        sampler = MostCertain("confidence", **how)
        assert passes_of(sampler, PROBS.flip(0), of_reading="shifted") == passes


def passes_of(sampler, probs=PROBS, of_reading="same"):
    """The pass that reveals each of four slots, two rows in step, with the same predictions in
    every pass; the second row has two given tokens."""

    class Config:
        mask_id, time_conditioning, reading = 3, False, of_reading

    logits = torch.cat([probs.log(), torch.full((4, 1), 9.0, dtype=torch.float64)], dim=1)
    open_RS = torch.tensor([[True] * 4, [False, True, True, False]])
    state = sampler.start(
        open_RS,
        SamplingContext(Config, torch.device("cpu"), SamplingParams(top_p=0.01), streams(2)),
    )
    passes = torch.full((2, 4), -1)
    for step in itertools.count():
        if not state.undecided_RS.any():
            break
        place = state.wanted_RS().nonzero(as_tuple=True)
        update = state.step(place, torch.full_like(place[0], 3), logits[place[1]].clone())
        assert (update.ids == 0).all()  # the filter keeps the most likely
        assert torch.allclose(update.confidences, probs[update.slots, 0])
        assert (passes[update.rows, update.slots] == -1).all()
        passes[update.rows, update.slots] = step
    assert (passes[1] == -1).tolist() == [True, False, False, True]
    return passes[0].tolist()


def test_random_order_shares_first_hittings_passes():
    masked = torch.tensor([[True, True, False, True, True]])
    one = FirstHitting().plan(masked, streams(1))
    assert torch.equal(RandomOrder(1).plan(masked, streams(1)), one)
    pairs = RandomOrder(2).plan(masked, streams(1))
    assert torch.equal(pairs, torch.tensor([[a // 2 if a >= 0 else -1 for a in one[0].tolist()]]))


# --- laws


def independent_law(model):
    """Both tokens of a block from their own marginals, given masks: one pass for each block."""
    law = {}
    for text in itertools.product(range(3), repeat=4):
        chance = 1.0
        for start in (0, 2):
            state = torch.tensor([[3, 3]])
            probs = oracles.denoised(model, oracles.logits_of(model, text[:start], state, 1.0))[0]
            chance *= float(probs[0, text[start]] * probs[1, text[start + 1]])
        law[text] = chance
    return law


@pytest.mark.parametrize("options", [
    dict(sampler="random", tokens_per_step=2),
    dict(sampler="confidence", threshold=0.0),
    dict(sampler="entropy", tokens_per_step=2),
    dict(sampler="remask", steps=1),
])  # fmt: skip
def test_a_block_in_one_pass_is_drawn_from_marginals(small, options):
    result = draw(small, **options)
    assert p_value(result, independent_law(small)) > FALSE_ALARM
    assert result.tokens_per_forward.tolist() == [2.0] * DRAWS


def certain_first_law(model, past):
    """A block after `past`: the more confident of its two tokens first, then the other given it.
    (Without a past both predictions are the same: the tokens are, and only distances are seen.)"""
    masks = torch.tensor([[3, 3]])
    both = oracles.denoised(model, oracles.logits_of(model, past, masks, 1.0))[0]
    confidence = both.amax(-1)
    assert abs(confidence[0] - confidence[1]) > 1e-3
    first = int(confidence.argmax())
    law = {}
    for block in itertools.product(range(3), repeat=2):
        state = masks.clone()
        state[0, first] = block[first]
        then = oracles.denoised(model, oracles.logits_of(model, past, state, 1.0))[0]
        law[(*past, *block)] = float(both[first, block[first]] * then[1 - first, block[1 - first]])
    return law


@pytest.mark.parametrize("past", [(0, 1), (1, 2), (2, 0)])
def test_confidence_has_the_law_of_its_order(small, past):
    law = certain_first_law(small, past)
    assert abs(sum(law.values()) - 1) < 1e-9
    result = blockdiffusion.generate(
        small, [list(past)], num_samples=DRAWS, max_new_tokens=2, bos=False, generator=seeded(),
        sampler="confidence", tokens_per_step=1,
    )  # fmt: skip
    assert p_value(result, law) > FALSE_ALARM


def remask_step(now, then, share, mask_id=3):
    """A token's transition from p = `now` to `then`, from the paper's formulas in alpha = 1 - p."""

    def step(logits, x_t):
        alpha_t, alpha_s = 1 - now, 1 - then
        sigma = 0.0 if alpha_t <= 0 else share * min(1.0, (1 - alpha_s) / alpha_t)
        probs = torch.zeros_like(logits)
        if x_t != mask_id:
            probs[x_t], probs[mask_id] = 1 - sigma, sigma
            return probs
        keep = [i for i in range(len(logits)) if i != mask_id]
        reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        probs[keep] = reveal * logits[keep].softmax(-1)
        probs[mask_id] = 1 - reveal
        return probs

    return step


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["plain", "timed"])
def test_remasking_has_the_law_of_its_chain(make_model, share, kind):
    model = make_model(
        vocab_size=4, mask_id=3, seq_len=4, block_size=2, time_conditioning=kind == "timed"
    )
    probs = [1.0, 0.75, 0.5, 0.25, 0.0]
    steps = [(now, remask_step(now, then, share)) for now, then in itertools.pairwise(probs)]
    law = oracles.chain_law(model, steps, uniform=False)
    assert abs(sum(law.values()) - 1) < 1e-9
    result = draw(model, sampler="remask", steps=4, remask=share)
    assert p_value(result, law) > FALSE_ALARM
    if share == 0:
        assert p_value(draw(model, sampler="ancestral", steps=4), law) > FALSE_ALARM


def test_a_time_reading_network_reads_the_share_of_masks(make_model):
    model = make_model(vocab_size=4, mask_id=3, seq_len=4, block_size=2, time_conditioning=True)
    assert draw(model, sampler="confidence", tokens_per_step=1).nfe.max() == 4
    sampler = MostCertain("confidence", tokens_per_step=1)
    open_RS = torch.tensor([[True, True], [False, True]])
    context = SamplingContext(model.config, model.device, SamplingParams(), streams(2))
    state = sampler.start(open_RS, context)
    state.undecided_RS[0, 0] = False
    found = state.sigma_R()
    assert torch.allclose(found, oracles.sigma_of(torch.tensor([0.5, 1.0])).float())


def test_remasked_tokens_are_told(make_model):
    """The last word on a position counts; a mask is never the last."""
    model = make_model()
    text, masked_again = {}, 0
    events = blockdiffusion.stream(
        model, max_new_tokens=8, bos=False, sampler="remask", steps=12, generator=seeded()
    )
    for event in events:
        if isinstance(event, TokensRevealed):
            for place, token in zip(event.positions.tolist(), event.ids.tolist(), strict=True):
                masked_again += token == model.config.mask_id
                text[place] = token
    assert masked_again > 2
    assert sorted(text) == list(range(8)) and model.config.mask_id not in text.values()


@pytest.mark.parametrize(("options", "message"), [
    (dict(sampler="random"), "needs the number of tokens of a pass"),
    (dict(sampler="random", tokens_per_step=3), "tokens_per_step is 3; .* at most 2, the tokens"),
    (dict(sampler="confidence", tokens_per_step=3), "tokens_per_step is 3; .* at most 2"),
    (dict(sampler="confidence", tokens_per_step=0), "tokens_per_step is 0; it must be at least 1"),
    (dict(sampler="confidence"), "needs tokens_per_step or threshold"),
    (dict(sampler="margin", tokens_per_step=3, threshold=0.5), "tokens_per_step is 3"),
    (dict(sampler="margin", threshold=0.5, sub_block=0), "sub_block is 0; it must be at least 1"),
    (dict(sampler="random", tokens_per_step=1, sub_block=2), "sub_block is 2, which has no"),
    (dict(sampler="margin", threshold=1.5), r"threshold is 1\.5; for margin it lies in \[0, 1\]"),
    (dict(sampler="entropy", threshold=-1), "threshold is -1; entropies are at least 0"),
    (dict(sampler="remask"), "needs a number of steps"),
    (dict(sampler="remask", steps=0), "steps is 0; it must be at least 1"),
    (dict(sampler="remask", steps=4, remask=2), "remask is 2; it must lie in"),
    (dict(sampler="first-hitting", threshold=0.5), "leave it out, or take confidence"),
    (dict(threshold=0.5), "no meaning for the sampler first-hitting"),
    (dict(sampler="ancestral", steps=2, remask=0.5), "sampler ancestral; .* take remask"),
    (dict(sampler="ancestral"), "needs a number of steps"),
    (dict(sampler="first-hitting", steps=5), "steps is 5, which has no meaning"),
    (dict(sampler="first_hitting", schedule="cosine"), "schedule is cosine, which has no meaning"),
    (dict(sampler="ancestral", steps=5, schedule="cosin"), "unknown schedule"),
    (dict(sampler="certain"), "unknown sampler 'certain'; known: ancestral, confidence"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_drawn(small, options, message):
    with pytest.raises(UserError, match=message):
        blockdiffusion.generate(small, max_new_tokens=4, bos=False, **options)


def test_a_policy_without_times_does_not_fit_a_network_that_reads_them(make_model):
    model = make_model(vocab_size=4, mask_id=3, seq_len=4, block_size=2, time_conditioning=True)
    with pytest.raises(UserError, match="reads the time"):
        blockdiffusion.generate(model, max_new_tokens=4, sampler="random", tokens_per_step=1)


def test_a_policy_object_has_its_own_settings(small):
    result = draw(small, sampler=Planned(RandomOrder(2)))
    assert result.nfe.max() == 2
    with pytest.raises(UserError, match="go with a sampler's name"):
        draw(small, sampler=RandomOrder(2), tokens_per_step=2)
