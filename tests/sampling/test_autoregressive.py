"""The sampler of the baseline against its enumerated law, the dense oracle and the likelihood."""

import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import BlockEvent, DoneEvent, StepEvent
from blockdiffusion.sampling.policies import FirstHitting
from tests.oracles import network, subs_log_prob
from tests.sampling.laws import DRAWS, FALSE_ALARM, p_value, seeded


def next_log_prob(model, past, window=None):
    """log p(. | past) of the next token from one dense causal pass over what the network reads."""
    ids = torch.tensor(past)
    distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    visible = (distance >= 0) & (distance < (window or len(ids)))
    logits = network(model, ids, torch.arange(len(ids)), visible)[-1]
    return subs_log_prob(logits, model.config.mask_id)


@torch.no_grad()
def enumerated(model, length, *, window=None, eos_id=None, prompt=(), changed=lambda x: x):
    """Text -> probability, after the start symbol; `changed` filters a distribution (V,)."""
    law, open_texts = {}, {tuple(prompt): 1.0}
    while open_texts:
        text, prob = open_texts.popitem()
        past = [model.config.mask_id, *text]
        for token, p in enumerate(changed(next_log_prob(model, past, window).exp()).tolist()):
            if p == 0:
                continue
            longer = (*text, token)
            done = token == eos_id or len(longer) == len(prompt) + length
            (law if done else open_texts)[longer] = prob * p
    return law


@pytest.mark.parametrize(
    ("use_cache", "window"), [(True, None), (False, None), (True, 2), (False, 2)]
)
def test_it_keeps_the_law(make_ar, use_cache, window):
    model = make_ar(vocab_size=5, bos=False)
    law = enumerated(model, 4, window=window)
    assert len(law) == 256
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=4, use_cache=use_cache, window=window,
        generator=seeded(),
    )  # fmt: skip
    assert p_value(result, law) > FALSE_ALARM


def test_ending_at_eos_keeps_the_law(make_ar):
    model = make_ar(vocab_size=5, eos_id=1, bos=False)
    law = enumerated(model, 3, eos_id=1, prompt=(2, 0))
    assert len(law) == 1 + 3 + 9 * 4
    result = blockdiffusion.generate(model, [2, 0], DRAWS, max_new_tokens=3, generator=seeded(2))
    assert p_value(result, law) > FALSE_ALARM
    assert torch.equal(result.nfe, result.lengths - 2 + 1)  # one pass reads the prompt
    assert result.lengths.unique().tolist() == [3, 4, 5]


def test_filters_act_on_every_token(make_ar):
    model = make_ar(vocab_size=5, bos=False)

    def changed(prob):
        """Temperature 0.7, then the three most likely."""
        cooled = prob ** (1 / 0.7)
        kept = torch.where(cooled >= cooled.sort().values[-3], cooled, 0.0)
        return kept / kept.sum()

    law = enumerated(model, 3, changed=changed)
    assert len(law) == 27
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=3, temperature=0.7, top_k=3, generator=seeded(3)
    )
    assert p_value(result, law) > FALSE_ALARM


@pytest.mark.parametrize("window", [None, 12, 9])
def test_cached_equals_recomputed_for_ragged_prompts(make_ar, window):
    """Same generator, same tokens: prompts of any length, rows ending at different times."""
    model = make_ar(eos_id=0, bos=False)
    prompts = [[1, 2, 3], [], list(range(1, 10)), [5] * 8]
    results = [
        blockdiffusion.generate(
            model, prompts, 4, max_new_tokens=21, window=window, use_cache=use_cache,
            generator=seeded(1),
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(results[0].lengths, results[1].lengths)
    assert results[0].lengths.min() < 15 and results[0].lengths.max() == 30
    for row, prompt in enumerate(p for p in prompts for _ in range(4)):
        assert results[0].sequences[row, : len(prompt)].tolist() == prompt


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_every_confidence_equals_the_dense_oracle(make_ar, window, use_cache, monkeypatch):
    """Ragged prompts, read in several passes: each row as the oracle has it alone."""
    monkeypatch.setattr("blockdiffusion.sampling.context.PREFILL_TOKENS", 2)
    model = make_ar(bos=True, bos_id=3)
    prompts = [[3, 1], [], [3, 4, 5, 6, 7, 8], [2]]  # the second and the last have no BOS
    texts = [list(prompt) for prompt in prompts]
    decided = 0
    for event in blockdiffusion.stream(
        model, prompts, max_new_tokens=15, window=window, use_cache=use_cache, bos=False,
        generator=seeded(2),
    ):  # fmt: skip
        if isinstance(event, StepEvent):
            for row, position, token, confidence in zip(
                *(x.tolist() for x in (event.rows, event.positions, event.ids, event.confidences)),
                strict=True,
            ):
                assert position == len(texts[row])
                past = texts[row] if row in (0, 2) else [12, *texts[row]]
                expected = next_log_prob(model, past, window)[token].exp().item()
                assert confidence == pytest.approx(expected, abs=1e-9)
                texts[row].append(token)
                decided += 1
    assert decided == 4 * 15


@pytest.mark.parametrize(("bos", "first"), [(False, []), (True, [3]), (None, []), (None, [3])])
@torch.no_grad()
def test_its_law_is_the_one_that_the_likelihood_scores(make_ar, bos, first):
    """With start symbol and with a given BOS: the probabilities of a sample's tokens multiply to
    the likelihood of the sample."""
    model = make_ar(bos=bos, bos_id=3)
    prompts = None if bos is not None else [first]
    events = list(blockdiffusion.stream(model, prompts, max_new_tokens=12, generator=seeded(9)))
    done = events[-1]
    assert isinstance(done, DoneEvent) and done.prompt_lengths.tolist() == [len(first)]
    told = [event.confidences.log().sum() for event in events if isinstance(event, StepEvent)]
    scored = blockdiffusion.likelihood(model, done.ids, bos=bool(first))
    assert -sum(told) == pytest.approx(scored.nats_per_row.item(), abs=1e-9)


def test_a_model_with_a_start_symbol_always_gets_it(make_ar):
    """Though the prompt begins with the BOS."""
    with torch.no_grad():
        model = make_ar(bos=False, bos_id=3)
        result = blockdiffusion.generate(model, [3], 1, 1, bos=True, top_k=1, generator=seeded())
        assert result.sequences.tolist() == [[3, next_log_prob(model, [12, 3]).argmax().item()]]


def test_greedy_rows_of_a_batch_are_those_alone(make_ar):
    model = make_ar(bos=False, seq_len=64)
    prompts = [[1, 2, 3], [], list(range(9)), [5]]
    batch = blockdiffusion.generate(model, prompts, max_new_tokens=12, top_k=1, window=10)
    for row, prompt in enumerate(prompts):
        alone = blockdiffusion.generate(model, [prompt], max_new_tokens=12, top_k=1, window=10)
        length = len(prompt) + 12
        assert batch.sequences[row, :length].tolist() == alone.sequences[0].tolist()


def test_events_are_those_of_the_block_loop_with_blocks_of_one_token(make_ar):
    model = make_ar(bos=False, eos_id=0)
    events = list(
        blockdiffusion.stream(model, [[1], [1, 2]], max_new_tokens=9, generator=seeded(8))
    )
    done = events.pop()
    assert isinstance(done, DoneEvent)
    told = torch.full_like(done.ids, -1)
    for step, block in zip(events[::2], events[1::2], strict=True):
        assert isinstance(step, StepEvent) and isinstance(block, BlockEvent) and step.step == 0
        assert torch.equal(step.rows, block.rows) and torch.equal(step.positions, block.starts)
        assert torch.equal(step.ids[:, None], block.ids)
        assert torch.equal(block.ends, block.starts + 1)
        told[step.rows, step.positions] = step.ids
    for row, prompt in enumerate([1, 2]):
        length = done.lengths[row]
        assert torch.equal(told[row, prompt:length], done.ids[row, prompt:length])


def test_nfe_counts_one_pass_a_token_and_those_that_read_the_prompt(make_ar, monkeypatch):
    model = make_ar(bos=False)
    result = blockdiffusion.generate(model, max_new_tokens=16, generator=seeded())
    assert result.nfe.tolist() == [16] and result.tokens_per_forward.tolist() == [1.0]
    monkeypatch.setattr("blockdiffusion.sampling.context.PREFILL_TOKENS", 4)
    result = blockdiffusion.generate(
        model, [list(range(9)), [1], []], max_new_tokens=4, generator=seeded()
    )
    # The last token of a prompt is read by the pass that gives the next one.
    assert result.nfe.tolist() == [3 + 4, 1 + 4, 4]


def test_rows_end_at_a_sampled_eos_and_not_at_the_given_bos(make_ar):
    model = make_ar(eos_id=0, bos_id=0, bos=True)
    result = blockdiffusion.generate(model, num_samples=64, max_new_tokens=64, generator=seeded())
    assert (result.sequences[:, 0] == 0).all() and (result.prompt_lengths == 1).all()
    for row, length in zip(result.sequences, result.lengths, strict=True):
        eos = (row[1:length] == 0).nonzero().flatten()
        assert eos.tolist() == [length - 2] or (length == 65 and not len(eos))
        assert (row[length:] == 0).all()  # padded
    assert result.lengths.min() < 65
    free = blockdiffusion.generate(model, max_new_tokens=64, eos=False, generator=seeded())
    assert free.lengths.tolist() == [65]


def test_the_cache_is_a_ring_of_the_window(make_ar, monkeypatch):
    from blockdiffusion.models.cache import BlockCache

    sizes = []
    original = BlockCache.__init__

    def remember(self, num_layers, batch, num_heads, head_width, capacity, **kwargs):
        sizes.append(capacity)
        original(self, num_layers, batch, num_heads, head_width, capacity, **kwargs)

    monkeypatch.setattr(BlockCache, "__init__", remember)
    model = make_ar(bos=False)
    blockdiffusion.generate(model, max_new_tokens=100, window=16, generator=seeded())
    blockdiffusion.generate(model, max_new_tokens=100, generator=seeded())
    assert sizes == [16, 101]


@pytest.mark.parametrize(("options", "message"), [
    (dict(policy="first-hitting"), "policy is given, but this model is autoregressive"),
    (dict(policy=FirstHitting()), "no masks to reveal"),
    (dict(steps=4), "steps is given"),
    (dict(schedule="linear"), "schedule is given"),
    (dict(stride=2), "stride is given"),
    (dict(prompts=[[1] * 17], window=16), "more than the window"),
    (dict(window=0), "window is 0; it must be at least 1"),
    (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(prompts=[[12]]), "without the mask token 12"),
    (dict(prompts=[]), "no prompt"),
    (dict(bos=True), "needs a BOS"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(make_ar, options, message):
    with pytest.raises(UserError, match=message):
        blockdiffusion.generate(make_ar(), **{"max_new_tokens": 4, **options})
