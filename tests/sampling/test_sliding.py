"""MDLM (one block, S = L): ancestral steps that are skipped, and texts beyond L."""

import itertools
import math

import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import BlockDone, Finished, TokensRevealed
from blockdiffusion.sampling.streams import row_streams
from tests.oracles import exact_block, network, subs_log_prob
from tests.sampling.laws import DRAWS, FALSE_ALARM, p_value, seeded


@pytest.fixture
def make_mdlm(make_model):
    """A network of one block of L tokens whose predictions hang on what it reads."""

    def make(length=4, vocab_size=3, **overrides):
        model = make_model(
            seq_len=length,
            block_size=length,
            vocab_size=vocab_size,
            num_hidden_layers=1,
            **overrides,
        )
        with torch.no_grad():  # what is added to every prediction alike
            for constant in (model.output.bias, *model.backbone.final_modulation.parameters()):
                constant.zero_()
            model.output.weight.mul_(2)
        return model

    return make


def log_prob(model, ids):
    """log p(. | frame) (L, V) of a frame with masks, all tokens seeing each other."""
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool)
    logits = network(model, torch.tensor(ids), torch.arange(len(ids)), visible)
    return subs_log_prob(logits, model.config.mask_id)


@torch.no_grad()
def frame_prob(model, frame, given):
    """Probability of the tokens of a frame behind the first `given` ones: all orders averaged."""
    found = {}

    def of_subset(subset):
        masked = [model.config.mask_id if i in subset else x for i, x in enumerate(frame)]
        if subset not in found:
            log_probs = log_prob(model, masked)
            found[subset] = {i: log_probs[i, frame[i]].item() for i in subset}
        return found[subset]

    return math.exp(-exact_block(of_subset, range(given, len(frame)))[1])


def enumerated(model, slides, stride):
    """Text -> probability of a whole row and `slides` further strides."""
    size, tokens = model.config.block_size, range(model.config.vocab_size - 1)
    law = {text: frame_prob(model, text, 0) for text in itertools.product(tokens, repeat=size)}
    for _ in range(slides):
        kept = size - stride
        ends = itertools.product(tokens, repeat=size)
        step = {frame: frame_prob(model, frame, kept) for frame in ends}
        law = {
            (*text, *frame[kept:]): prob * step[frame]
            for text, prob in law.items()
            for frame in step
            if text[len(text) - kept :] == frame[:kept]
        }
    return law


def cut(law, length, eos_id=None):
    """The law of texts that end after `length` tokens and at the first EOS."""
    shorter = {}
    for text, prob in law.items():
        ends = [i + 1 for i, token in enumerate(text[:length]) if token == eos_id]
        kept = text[: min([length, *ends])]
        shorter[kept] = shorter.get(kept, 0.0) + prob
    return shorter


# --- within L -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stride": 2}])
def test_a_row_keeps_the_law(make_mdlm, options):
    """By the block loop, and as the first frame of the sliding sampler."""
    model = make_mdlm()
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=4, generator=seeded(), **options
    )
    assert p_value(result, enumerated(model, 0, 2)) > FALSE_ALARM
    assert result.nfe.unique().tolist() == [4]


@torch.no_grad()
def test_skipping_passes_that_reveal_nothing_equals_recomputing_them(make_mdlm):
    """Ancestral sampling with many steps: the network run anew in each of them gives the same
    tokens from the same random numbers, in fewer passes."""
    model, steps = make_mdlm(length=6, vocab_size=13), 40
    for seed in range(5):
        numbers = row_streams(seeded(seed), [[]], most=6)
        uniform = numbers.each(6)[0]
        ids = [12] * 6
        for step in range(steps, 0, -1):
            prob = log_prob(model, ids).exp()  # in every step
            low, high = (step - 1) / steps, step / steps  # the linear schedule's mask probabilities
            now = [i for i in range(6) if low <= uniform[i] < high]
            if now:
                draws = numbers.each(len(now))[0]
                for i, u in zip(now, draws, strict=True):
                    ids[i] = int((prob[i].cumsum(0) <= u * prob[i].sum()).sum())
        result = blockdiffusion.generate(
            model, max_new_tokens=6, sampler="ancestral", steps=steps, generator=seeded(seed)
        )
        assert result.sequences[0].tolist() == ids and result.nfe.item() <= 6


def test_ancestral_steps_are_those_of_the_reverse_process(make_mdlm):
    """Three steps, each with the posterior of absorbing diffusion, and a network run in each."""
    model, steps = make_mdlm(length=3, vocab_size=4), 3
    state = {(3, 3, 3): 1.0}
    for step in range(steps, 0, -1):
        reveal = 1 / step  # (p(t_i) - p(t_{i-1})) / p(t_i)
        following = {}
        for ids, prob in state.items():
            with torch.no_grad():
                token_prob = log_prob(model, ids).exp()
            options = [
                [(x, 1.0)] if x != 3 else
                [(3, 1 - reveal), *((y, reveal * token_prob[i, y].item()) for y in range(3))]
                for i, x in enumerate(ids)
            ]  # fmt: skip
            for choice in itertools.product(*options):
                text = tuple(token for token, _ in choice)
                weight = prob * math.prod(p for _, p in choice)
                following[text] = following.get(text, 0.0) + weight
        state = {ids: prob for ids, prob in following.items() if prob > 0}
    assert len(state) == 27
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=3, sampler="ancestral", steps=steps,
        generator=seeded(4),
    )  # fmt: skip
    assert p_value(result, state) > FALSE_ALARM
    assert result.nfe.unique().tolist() == [1, 2, 3]


# --- beyond L -----------------------------------------------------------------------------------


def test_beyond_the_row_it_keeps_the_law(make_mdlm):
    """L = 4, a stride of 2, which is the default, 6 tokens."""
    model = make_mdlm()
    law = enumerated(model, 1, 2)
    assert len(law) == 2**6
    result = blockdiffusion.generate(model, num_samples=DRAWS, max_new_tokens=6, generator=seeded())
    assert p_value(result, law) > FALSE_ALARM
    assert result.nfe.unique().tolist() == [6] and (result.tokens_per_forward == 1).all()
    other = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=6, stride=1, generator=seeded()
    )
    assert p_value(other, law) < 1e-10  # another stride has another law, and is told apart


@pytest.mark.parametrize("options", [{"stride": 2}, {"use_cache": False}, {"window": 4}])
def test_options_that_change_nothing(make_mdlm, options):
    model = make_mdlm()
    results = [
        blockdiffusion.generate(
            model, None, num_samples=50, max_new_tokens=11, generator=seeded(), **chosen
        )
        for chosen in ({}, options)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)


@pytest.mark.parametrize(("stride", "tokens"), [(1, 6), (3, 7), (4, 8)])
def test_every_stride_keeps_its_law(make_mdlm, stride, tokens):
    model = make_mdlm()
    law = enumerated(model, (tokens - 4) // stride, stride)
    assert len(law) == 2**tokens
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=tokens, stride=stride, generator=seeded(7)
    )
    assert p_value(result, law) > FALSE_ALARM


@pytest.mark.parametrize(("length", "eos_id"), [(5, None), (6, 1), (5, 1)])
def test_a_cut_inside_a_stride_keeps_the_law(make_mdlm, length, eos_id):
    """At a limit and at EOS: the kept part follows the marginal."""
    model = make_mdlm(eos_id=eos_id)
    law = cut(enumerated(model, 1, 2), length, eos_id)
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=length, generator=seeded(5)
    )
    assert p_value(result, law) > FALSE_ALARM
    assert result.nfe.max() <= 6


@pytest.mark.parametrize("stride", [None, 2, 5, 8])
@torch.no_grad()
def test_every_confidence_equals_the_oracle_on_the_frame(make_mdlm, stride):
    """Ragged prompts, one of them longer than L, rows that end at different times."""
    model, length = make_mdlm(length=8, vocab_size=13, eos_id=0), 8
    kept = length - (stride or 4)
    prompts = [[3, 1], [], [5] * 8, list(range(1, 12)), [7] * 6]
    texts = [dict(enumerate(prompt)) for prompt in prompts]
    starts = [0 if len(p) < length else len(p) - kept for p in prompts]
    lengths, finished, ended = [0] * 5, 0, []
    for event in blockdiffusion.stream(
        model, prompts, max_new_tokens=21, stride=stride, generator=seeded(6)
    ):
        if isinstance(event, TokensRevealed):
            told = (event.rows, event.positions, event.ids, event.confidences)
            before = [dict(text) for text in texts]
            for row, position, token, confidence in zip(*(x.tolist() for x in told), strict=True):
                start = starts[row]
                frame = [before[row].get(p, 12) for p in range(start, start + length)]
                assert frame[position - start] == 12
                expected = log_prob(model, frame)[position - start, token].exp().item()
                assert confidence == pytest.approx(expected, abs=1e-9)
                texts[row][position] = token
        elif isinstance(event, BlockDone):
            finished += 1
            assert event.starts.tolist() == [starts[row] for row in event.rows]
            for row, ids, end in zip(event.rows.tolist(), event.ids, event.ends, strict=True):
                frame = [texts[row].get(p, 12) for p in range(starts[row], starts[row] + length)]
                assert frame == ids.tolist()
                starts[row], lengths[row] = starts[row] + length - kept, int(end)
        elif isinstance(event, Finished):
            ended.append(event.row)
            assert event.prompt_tokens == len(prompts[event.row])
            assert event.ids == [texts[event.row][p] for p in range(lengths[event.row])]
    assert finished > 2 and sorted(ended) == [0, 1, 2, 3, 4]


def test_few_passes_with_ancestral_steps(make_mdlm):
    model = make_mdlm(length=8, vocab_size=13)
    result = blockdiffusion.generate(
        model, num_samples=3, max_new_tokens=16, sampler="ancestral", steps=1, generator=seeded()
    )
    assert result.nfe.tolist() == [3, 3, 3]  # the row, and two slides of four tokens
    assert result.tokens_per_forward.tolist() == pytest.approx([16 / 3] * 3)


def test_memory_is_one_frame(make_mdlm, monkeypatch):
    from blockdiffusion.models.cache import BlockCache

    sizes = []
    original = BlockCache.__init__

    def remember(self, num_layers, batch, num_heads, head_width, capacity, **kwargs):
        sizes.append(capacity)
        original(self, num_layers, batch, num_heads, head_width, capacity, **kwargs)

    monkeypatch.setattr(BlockCache, "__init__", remember)
    model = make_mdlm(length=8, vocab_size=13)
    blockdiffusion.generate(model, [[1] * 30], max_new_tokens=60, generator=seeded())
    assert sizes == [8]


@pytest.mark.parametrize(("options", "message"), [
    (dict(stride=0), "stride is 0; it must be at least 1"),
    (dict(stride=9), "stride is 9"),
    (dict(window=12), "leave window out"),
    (dict(window=4), "the window is 4"),
    (dict(prompts=[[12]]), "without the mask token"),
    (dict(prompts=[]), "no prompt"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(make_mdlm, options, message):
    with pytest.raises(UserError, match=message):
        blockdiffusion.generate(
            make_mdlm(length=8, vocab_size=13), **{"max_new_tokens": 20, **options}
        )


def test_a_stride_is_for_models_of_one_block(make_model):
    with pytest.raises(UserError, match="this one has blocks of 4 tokens in rows of 16"):
        blockdiffusion.generate(make_model(), max_new_tokens=4, stride=2)
