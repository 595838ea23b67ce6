from dataclasses import replace

import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import BlockDone, Finished, TokensRevealed
from tests import noise_oracles
from tests.models.test_cache import pattern
from tests.oracles import network, subs_log_prob
from tests.sampling import laws
from tests.sampling.laws import FALSE_ALARM, SHAPES, seeded

DRAWS = 20_000


def p_value(model, expected, **options):
    """Of samples of the known law."""
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=4, bos=False, generator=seeded(), **options
    )
    return laws.p_value(result, laws.law_of(expected))


@pytest.mark.parametrize("use_cache", [True, False])
def test_first_hitting_keeps_the_law(tiny_law, tiny_law_expected, use_cache):
    assert p_value(tiny_law, tiny_law_expected, use_cache=use_cache) > FALSE_ALARM


def test_ancestral_tends_to_the_law(tiny_law, tiny_law_expected):
    few = p_value(tiny_law, tiny_law_expected, sampler="ancestral", steps=4)
    many = p_value(tiny_law, tiny_law_expected, sampler="ancestral", steps=256)
    assert few < 1e-10 and many > FALSE_ALARM


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=pytest.mark.slow) if s == "S=2" else s for s in SHAPES]
)
def test_both_samplers_have_their_laws_at_every_block_size(make_model, shape):
    """First hitting that of a random order, ancestral steps that of their chain; at S = 1 both are
    the law of the next token."""
    model = laws.of_shape(make_model, shape)
    config = model.config
    order = noise_oracles.random_order_law(model)
    assert abs(sum(order.values()) - 1) < 1e-9
    assert len(order) == (config.vocab_size - 1) ** config.seq_len
    halves = [
        (p, noise_oracles.d3pm_step(model, "absorbing", [1 / 2, 1.0], i))
        for i, p in ((1, 1.0), (0, 1 / 2))
    ]
    blocks = config.seq_len // config.block_size
    chain = noise_oracles.chain_law(model, halves, uniform=False, num_blocks=blocks)
    for options, law, other in (
        (dict(sampler="first-hitting"), order, chain),
        (dict(sampler="ancestral", steps=2), chain, order),
    ):
        result = blockdiffusion.generate(
            model, num_samples=DRAWS, max_new_tokens=config.seq_len, bos=False,
            generator=seeded(3), **options,
        )  # fmt: skip
        assert laws.p_value(result, law) > FALSE_ALARM
        if config.block_size > 1:
            assert laws.p_value(result, other) < 1e-6  # it tells laws apart
        else:
            assert max(abs(law[text] - other[text]) for text in law) < 1e-9


@pytest.mark.parametrize("schedule", ["cosine", "sqrt"])
def test_ancestral_tends_to_the_law_with_every_schedule(tiny_law, tiny_law_expected, schedule):
    many = p_value(tiny_law, tiny_law_expected, sampler="ancestral", steps=1024, schedule=schedule)
    assert many > FALSE_ALARM


def test_a_prompt_inside_a_block_conditions_the_law(tiny_law, tiny_law_expected):
    """Given the first token, the rest follows the conditional law (the tail of a prompt is never
    padded to a block border)."""
    tiny_law.double()
    ids = tiny_law_expected["sequences"]
    draws = 8000
    result = blockdiffusion.generate(
        tiny_law, [[2]], draws, max_new_tokens=3, bos=False, generator=seeded(3)
    )
    # Given x_1 the sampler reveals x_2 in one step, so the law is p(x_2 | x_1) * p(block 2 | ..).
    with torch.no_grad():
        logits = tiny_law.denoise_logits(torch.tensor([[2, 4]]))[0, 1]
    second = subs_log_prob(logits, 4).exp().double()
    block = ids[:, 0] == 2
    tail = tiny_law_expected["probabilities"][block]
    given = ids[block]
    pair = torch.zeros(4, dtype=torch.float64).index_add_(0, given[:, 1], tail)
    wanted = second[given[:, 1]] * tail / pair[given[:, 1]]
    law = laws.law_of({"sequences": given, "probabilities": wanted})
    assert laws.p_value(result, law) > FALSE_ALARM


@pytest.mark.parametrize("window", [None, 16, 12, 10])
@pytest.mark.parametrize("clean_attention", ["block", "causal"])
def test_cached_equals_recomputed_for_ragged_prompts(make_model, window, clean_attention):
    """Same generator, same tokens: prompts of any length, rows ending at different times."""
    model = make_model(clean_attention=clean_attention)
    prompts = [[1, 2, 3], [], list(range(9)), [5] * 8]
    results = [
        blockdiffusion.generate(
            model, prompts, 2, max_new_tokens=21, window=window, use_cache=use_cache,
            generator=seeded(5),
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert results[0].lengths.tolist() == [24, 24, 21, 21, 30, 30, 29, 29]
    for row, prompt in enumerate(p for p in prompts for _ in range(2)):
        assert results[0].sequences[row, : len(prompt)].tolist() == prompt


@pytest.mark.parametrize("window", [None, 8])
@torch.no_grad()
def test_confidences_equal_the_dense_oracle(make_model, window):
    """Every decision of a long cached run, against one dense pass over the sequence so far."""
    model, size, mask_id = make_model(), 4, 12
    state, ids = {}, None
    for event in blockdiffusion.stream(
        model, [[3, 1]], max_new_tokens=30, window=window, generator=seeded(2)
    ):
        if isinstance(event, TokensRevealed):
            position, token = int(event.positions), int(event.ids)
            start = position // size * size
            past = [state[p] for p in range(start)] if state else []
            given = {0: 3, 1: 1} if start == 0 else {}
            block = [state.get(p, given.get(p, mask_id)) for p in range(start, start + size)]
            ids = torch.tensor(past + block)
            logits = network(model, ids, torch.arange(len(ids)), pattern(size, len(ids), window))[
                position
            ]
            expected = subs_log_prob(logits, mask_id)[token].exp()
            assert abs(event.confidences - expected) < 1e-9
            state.update({**given, position: token})
    assert sorted(state) == list(range(32))


def test_events_tell_the_whole_story(make_model):
    model = make_model()
    events = list(
        blockdiffusion.stream(model, [[1], [1, 2]], max_new_tokens=9, generator=seeded(8))
    )
    result = sorted((e for e in events if isinstance(e, Finished)), key=lambda e: e.row)
    told = torch.full((2, 12), -1)
    for event in events:
        if isinstance(event, TokensRevealed):
            assert (told[event.rows, event.positions] == -1).all()
            told[event.rows, event.positions] = event.ids
        elif isinstance(event, BlockDone):
            for row, start, ids in zip(event.rows, event.starts, event.ids, strict=True):
                decided = told[row, start : start + 4]
                assert ((decided == ids) | (decided == -1)).all()
    for row, prompt in enumerate([1, 2]):
        kept = torch.tensor(result[row].ids)
        assert torch.equal(told[row, prompt : len(kept)], kept[prompt:])
    assert [len(row.ids) for row in result] == [10, 11]


def test_nfe_counts_passes_a_row_took_part_in(make_model):
    model = make_model(seq_len=64)
    result = blockdiffusion.generate(model, max_new_tokens=16, generator=seeded())
    assert result.nfe.tolist() == [16]  # one per token; commits ride on the next block's first pass
    assert result.tokens_per_forward.tolist() == [1.0]
    result = blockdiffusion.generate(
        model, [list(range(8)), [1]], max_new_tokens=4, generator=seeded()
    )
    assert result.nfe[0] == 5  # one pass reads the prompt
    result = blockdiffusion.generate(
        model, num_samples=3, max_new_tokens=16, sampler="ancestral", steps=1, generator=seeded()
    )
    assert result.nfe.tolist() == [4, 4, 4] and result.tokens_per_forward.tolist() == [4, 4, 4]


def test_rows_end_at_a_sampled_eos_and_not_at_the_given_bos(make_model):
    model = make_model(eos_id=0, bos_id=0, bos=True)
    result = blockdiffusion.generate(model, num_samples=64, max_new_tokens=64, generator=seeded())
    assert (result.sequences[:, 0] == 0).all() and (result.prompt_lengths == 1).all()
    for row, length in zip(result.sequences, result.lengths, strict=True):
        eos = (row[1:length] == 0).nonzero().flatten()
        assert eos.tolist() == [length - 2] or (length == 65 and not len(eos))
        assert (row[length:] == 0).all()  # padded
    assert result.lengths.min() < 65
    free = blockdiffusion.generate(model, max_new_tokens=64, eos=False, generator=seeded())
    assert free.lengths.tolist() == [65]


def test_leaving_a_block_early_keeps_the_law(tiny_law, tiny_law_expected):
    """EOS and a limit inside a block: the kept part follows the marginal of the exact law."""
    tiny_law.config = replace(tiny_law.config, eos_id=1)
    result = blockdiffusion.generate(
        tiny_law, num_samples=DRAWS, max_new_tokens=3, bos=False, generator=seeded(11)
    )
    assert result.nfe.max() <= 4 and result.nfe.min() < 3

    def kept(ids):  # cut after the first EOS and at 3 tokens
        out = []
        for token in ids.tolist()[:3]:
            out.append(token)
            if token == 1:
                break
        return tuple(out)

    law = {}
    for ids, prob in zip(
        tiny_law_expected["sequences"], tiny_law_expected["probabilities"].tolist(), strict=True
    ):
        law[kept(ids)] = law.get(kept(ids), 0.0) + prob
    assert laws.p_value(result, law) > FALSE_ALARM


def test_memory_stays_constant_with_a_window(make_model, monkeypatch):
    from blockdiffusion.models.cache import BlockCache

    sizes = []
    original = BlockCache.__init__

    def remember(self, num_layers, batch, num_heads, head_width, capacity, **kwargs):
        sizes.append(capacity)
        original(self, num_layers, batch, num_heads, head_width, capacity, **kwargs)

    monkeypatch.setattr(BlockCache, "__init__", remember)
    model = make_model()
    blockdiffusion.generate(model, max_new_tokens=100, window=16, generator=seeded())
    assert sizes == [20]


@pytest.mark.parametrize(("options", "message"), [
    (dict(prompts=[[1] * 17], window=16), "more than the window"),
    (dict(window=3), "smaller than a block"),
    (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(num_samples=0), "num_samples"),
    (dict(prompts=[[12]]), "without the mask token 12"),
    (dict(prompts=[[99]]), "allowed are 0..12"),
    (dict(prompts=["text"]), "no tokenizer"),
    (dict(prompts=[]), "no prompt"),
    (dict(bos=True), "needs a BOS"),
    (dict(top_p=0), "top_p"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(make_model, options, message):
    with pytest.raises(UserError, match=message):
        blockdiffusion.generate(make_model(), **{"max_new_tokens": 4, **options})
