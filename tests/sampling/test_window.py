"""The sliding window against the exactly enumerated law of texts that are longer than it."""

import itertools
import math

import pytest
import torch

import blockdiffusion
from blockdiffusion import Engine
from blockdiffusion.sampling import Finished
from tests.oracles import exact_block, network, subs_log_prob
from tests.sampling.laws import DRAWS, FALSE_ALARM, p_value, seeded

SIZE, WINDOW, LENGTH = 2, 4, 6


@pytest.fixture
def model(make_model):
    """Two tokens and a mask, blocks of 2, predictions that hang on what is read."""
    model = make_model(vocab_size=3, mask_id=2, seq_len=LENGTH, block_size=SIZE)
    with torch.no_grad():  # what is added to every prediction alike
        for constant in (model.output.bias, *model.backbone.final_modulation.parameters()):
            constant.zero_()
        model.output.weight.mul_(4)
    return model


@torch.no_grad()
def windowed_law(model, window):
    """Text -> probability, by the dense oracle: every order of a block's two tokens is equally
    likely, a block sees the last `window` tokens, and keys stay as they were when their block was
    committed, with what that block saw."""
    texts = {(): (1.0, None)}
    for start in range(0, LENGTH, SIZE):
        position = torch.arange(start, start + SIZE)
        visible = (torch.arange(start + SIZE) >= start + SIZE - window).expand(SIZE, -1)
        following = {}
        for text, (chance, past) in texts.items():

            def read(block, remember=None, past=past, position=position, visible=visible):
                ids = torch.tensor(block)
                return network(model, ids, position, visible, remember=remember, past=past)

            for block in itertools.product(range(2), repeat=SIZE):

                def log_prob_of(masked, block=block, read=read):
                    state = [2 if i in masked else token for i, token in enumerate(block)]
                    found = subs_log_prob(read(state), 2)
                    return {i: found[i, block[i]].item() for i in masked}

                own = []
                read(block, own)
                if past is not None:
                    own = [
                        tuple(torch.cat(pair, dim=1) for pair in zip(before, now, strict=True))
                        for before, now in zip(past, own, strict=True)
                    ]
                prob = math.exp(-exact_block(log_prob_of, range(SIZE))[1])
                following[(*text, *block)] = (chance * prob, own)
        texts = following
    return {text: chance for text, (chance, _) in texts.items()}


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_window_keeps_its_law(model, use_cache):
    """Chi-square with a false-alarm probability of 1e-4; the law without a window is told apart."""
    law = windowed_law(model, WINDOW)
    assert len(law) == 2**LENGTH
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=LENGTH, bos=False, window=WINDOW,
        use_cache=use_cache, generator=seeded(),
    )  # fmt: skip
    assert p_value(result, law) > FALSE_ALARM
    assert p_value(result, windowed_law(model, LENGTH)) < 1e-10


def test_the_engines_window_keeps_its_law(model):
    """The same through the engine, whose cache is a ring of 6 slots a row, requests of other
    lengths among them."""
    engine = Engine(model, max_rows=64, window=WINDOW)
    draws = 3000
    for seed in range(draws):
        engine.submit(max_new_tokens=LENGTH, bos=False, seed=seed)
        if seed % 5 == 0:
            engine.submit(max_new_tokens=3, bos=False, seed=seed)
    finished = [event.ids for event in engine.run() if isinstance(event, Finished)]
    texts = [tuple(ids) for ids in finished if len(ids) == LENGTH]
    assert len(texts) == draws
    assert p_value(texts, windowed_law(model, WINDOW)) > FALSE_ALARM
    assert p_value(texts, windowed_law(model, LENGTH)) < 1e-6
