import pytest
import torch

from blockdiffusion.errors import UserError
from blockdiffusion.sampling.logits import Filters, draw_tokens, in_nucleus

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


# Nearly flat (where the library's sums in float32 go wrong), usual, peaked.
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-3, torch.float64), (1, torch.float64), (1, torch.float32), (10, torch.float32)],
)
def test_top_p_equals_transformers(scale, dtype):
    """The kept set equals the library's, which sorts all."""
    from transformers import TopPLogitsWarper

    logits = scale * torch.randn(64, 500, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[:, 49] = float("-inf")
    for top_p in (0.1, 0.5, 0.9, 0.99):
        ours = torch.stack([in_nucleus(p, top_p, "transformers") for p in logits.softmax(-1)])
        theirs = TopPLogitsWarper(top_p)(None, logits.clone()) > float("-inf")
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("top_p", [0.2, 0.35, 0.7, 0.999])
@pytest.mark.parametrize("rule", ["transformers", "authors"])
def test_the_nucleus_is_that_of_a_sorted_list(rule, top_p):
    """With ties, which are kept in the order of the vocabulary, and tokens without probability."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        weights = torch.randint(0, 5, (40,), generator=draw).double()
        prob = weights / weights.sum()
        kept, reached = set(), 0.0
        for token in sorted(range(40), key=lambda token: (-prob[token].item(), token)):
            reached += prob[token].item()
            inside = reached - prob[token].item() < top_p - 1e-12
            if inside if rule == "transformers" else reached <= top_p + 1e-12 or not kept:
                kept.add(token)
            else:
                break
        found = in_nucleus(prob, top_p, rule).nonzero()[:, 0].tolist()
        assert set(found) == kept


def test_top_p_acts_on_what_top_k_left():
    frequencies = law(Filters(top_k=2, top_p=0.6))  # 0.6 of 0.95 is 0.63: enough
    assert frequencies.tolist() == [0, 1, 0, 0]


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
