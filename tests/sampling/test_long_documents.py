"""Documents of any length: after the window is full nothing grows any more."""

import pytest
import torch

import blockdiffusion
from blockdiffusion.models import block_diffusion
from blockdiffusion.models.attention import attend_cached
from blockdiffusion.sampling import Finished, TokensRevealed
from tests.models.test_cache import pattern
from tests.oracles import network, subs_log_prob
from tests.sampling.laws import seeded

KINDS = {
    "block diffusion": (dict(), 16 + 4),  # the window and the block that is being committed
    "autoregressive": (dict(objective="autoregressive", adaln=False, block_size=1), 16),
    "one block": (dict(block_size=16), 16),
}


@pytest.mark.parametrize("prompts", [None, [[1] * 5, []]])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pass_reads_and_what_an_event_holds_stays_the_same(
    make_model, monkeypatch, kind, prompts
):
    sizes, capacity = KINDS[kind]
    model = make_model(num_hidden_layers=1, bos=False, **sizes)
    passes, told = [], []

    def remember(q, k, v, mask, sizes):
        passes.append((k.shape[2], 0 if mask is None else mask.numel()))
        return attend_cached(q, k, v, mask, sizes)

    monkeypatch.setattr(block_diffusion, "attend_cached", remember)
    events = blockdiffusion.stream(
        model, prompts, max_new_tokens=160, window=16, eos=False, generator=seeded()
    )
    for event in events:
        if isinstance(event, Finished):
            continue
        told.append(max(x.numel() for x in vars(event).values() if hasattr(x, "numel")))
    assert max(slots for slots, _ in passes) == capacity
    half = len(passes) // 2
    assert max(passes[half:]) <= max(passes[:half])
    assert max(told[len(told) // 2 :]) <= max(told[: len(told) // 2])


@pytest.mark.parametrize("kind", ["block diffusion", "autoregressive"])
@torch.no_grad()
def test_a_late_token_is_what_the_dense_oracle_says(make_model, kind):
    """The ring of keys has gone round many times."""
    model, total, mask_id = make_model(bos=False, **KINDS[kind][0]), 160, 12
    size = model.config.block_size
    events = list(
        blockdiffusion.stream(
            model, max_new_tokens=total, window=16, eos=False, generator=seeded(4)
        )
    )
    last, done = events[-3], events[-1]
    assert isinstance(last, TokensRevealed) and isinstance(done, Finished)
    text, position = torch.tensor(done.ids), int(last.positions)
    if kind == "autoregressive":
        read = torch.cat([torch.tensor([mask_id]), text[:-1]])
    else:  # the token that is revealed last sees all others of its block
        read = text.clone()
        read[position] = mask_id
    logits = network(model, read, torch.arange(total), pattern(size, total, 16))[position]
    expected = subs_log_prob(logits, mask_id)[int(last.ids)].exp()
    assert abs(last.confidences - expected) < 1e-9
