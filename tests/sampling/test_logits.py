import pytest
import torch

from blockdiffusion.errors import UserError
from blockdiffusion.sampling.logits import Filters, draw_tokens

PROBS = torch.tensor([0.05, 0.6, 0.0, 0.35])  # id 2 is the mask token


def law(filters, draws=4000, probs=PROBS, mask_id=2):
    """Relative frequencies of the drawn ids."""
    logits = probs.log().clamp(min=-50).repeat(draws, 1)
    logits[:, mask_id] = 3.0  # whatever the network says there
    ids, confidence = draw_tokens(logits, mask_id, filters, torch.Generator().manual_seed(0))
    assert torch.allclose(confidence, probs[ids], atol=1e-6)
    return torch.bincount(ids, minlength=len(probs)) / draws


@pytest.mark.parametrize(("filters", "expected"), [
    (Filters(), [0.05, 0.6, 0, 0.35]),
    (Filters(top_k=2), [0, 0.6 / 0.95, 0, 0.35 / 0.95]),
    (Filters(top_k=1), [0, 1, 0, 0]),
    (Filters(top_p=0.9), [0, 0.6 / 0.95, 0, 0.35 / 0.95]),
    (Filters(top_p=0.9, top_p_rule="authors"), [0, 1, 0, 0]),
    (Filters(top_p=0.01), [0, 1, 0, 0]),
    (Filters(top_p=0.01, top_p_rule="authors"), [0, 1, 0, 0]),
    (Filters(top_p=0.96, top_p_rule="authors"), [0, 0.6 / 0.95, 0, 0.35 / 0.95]),
    (Filters(top_k=3, top_p=1.0), [0.05, 0.6, 0, 0.35]),
])  # fmt: skip
def test_filters_give_the_law_they_should(filters, expected):
    """4,000 draws; every frequency within 4.9 standard errors (below 0.039; false alarm 1e-5)."""
    assert (law(filters) - torch.tensor(expected)).abs().max() < 0.039


def test_temperature_sharpens():
    p = PROBS**2 / (PROBS**2).sum()
    assert (law(Filters(temperature=0.5)) - p).abs().max() < 0.039


def test_top_p_equals_transformers(monkeypatch):
    """The kept set equals the library's on random logits, also beyond the first candidates."""
    from transformers import TopPLogitsWarper

    import blockdiffusion.sampling.logits as module

    monkeypatch.setattr(module, "CANDIDATES", 4)
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    logits[:, 49] = float("-inf")
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept, ids = module._filtered(logits.softmax(-1), Filters(top_p=top_p))
        ours = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, kept > 0)
        theirs = TopPLogitsWarper(top_p)(None, logits.clone()) > float("-inf")
        assert torch.equal(ours, theirs)


def test_the_same_generator_gives_the_same_draw():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    first = draw_tokens(logits.clone(), 29, Filters(), torch.Generator().manual_seed(4))[0]
    again = draw_tokens(logits.clone(), 29, Filters(), torch.Generator().manual_seed(4))[0]
    assert torch.equal(first, again)


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1), dict(top_p_rule="hf"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Filters(**options)
