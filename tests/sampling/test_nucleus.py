"""The nucleus, found without sorting, equals that of a sorted list, and so do its draws."""

import pytest
import torch

from blockdiffusion.sampling.nucleus import Nucleus, draw_from_sorted, sorted_nuclei


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
        ours = torch.stack([Nucleus(p, top_p, "transformers").mask() for p in logits.softmax(-1)])
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
        found = Nucleus(prob, top_p, rule).mask().nonzero()[:, 0].tolist()
        assert set(found) == kept


@pytest.mark.parametrize("rule", ["transformers", "authors"])
@pytest.mark.parametrize("scale", [0.01, 1, 6])
def test_sorting_gives_the_same(rule, scale):
    """What a GPU does, for a batch."""
    draw = torch.Generator().manual_seed(2)
    prob_MV = (scale * torch.randn(16, 300, generator=draw)).softmax(-1)
    prob_MV[:, 7] = 0
    for top_p in (0.05, 0.5, 0.9):
        kept_MV, ids_MV = sorted_nuclei(prob_MV, top_p, rule)
        back_MV = torch.zeros_like(prob_MV).scatter(1, ids_MV, kept_MV)
        inside_MV = torch.stack([Nucleus(prob, top_p, rule).mask() for prob in prob_MV])
        assert torch.equal(back_MV, prob_MV * inside_MV)


@pytest.mark.parametrize("rule", ["transformers", "authors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 2])  # one bin of many tokens, many bins of few
def test_draws_have_the_law_of_the_nucleus(rule, dtype, scale):
    """Every token is drawn for its share of the numbers in [0, 1): no chance in this."""
    draw = torch.Generator().manual_seed(3)
    prob_V = (scale * torch.randn(30, generator=draw, dtype=dtype)).softmax(-1)
    prob_V[4] = 0
    for top_p in (0.02, 0.4, 0.9, 0.999):
        nucleus = Nucleus(prob_V, top_p, rule)
        expected_V = prob_V.double() * nucleus.mask()
        expected_V /= expected_V.sum()
        points = 3000
        ids = torch.stack([nucleus.draw((i + 0.5) / points) for i in range(points)])
        shares_V = torch.bincount(ids, minlength=30) / points
        assert (shares_V - expected_V).abs().max() <= 1.001 / points
        assert expected_V[nucleus.draw(1 - 2**-53)] > 0 and expected_V[nucleus.draw(0.0)] > 0


@pytest.mark.parametrize("rule", ["transformers", "authors"])
@pytest.mark.parametrize("top_p", [0.05, 0.7, 0.95])
def test_draws_from_the_sorted_list_have_its_law(rule, top_p):
    """Numbers on a fine grid in [0, 1) meet every token as often as its probability says."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[7] = float("-inf")
    prob, grid = logits.softmax(-1), torch.arange(20_000, dtype=torch.float64) / 20_000
    tokens = draw_from_sorted(prob.expand(len(grid), -1), top_p, rule, grid)
    found = torch.bincount(tokens, minlength=30) / len(grid)
    kept, ids = sorted_nuclei(prob[None], top_p, rule)
    expected = torch.zeros(30, dtype=torch.float64).scatter(0, ids[0], kept[0] / kept.sum())
    assert (found - expected).abs().max() <= 1.01 / len(grid)
