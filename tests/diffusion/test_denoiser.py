"""The next-token loss against the chain rule, one token at a time."""

import pytest
import torch

from blockdiffusion.diffusion.denoiser import causal_nll, is_autoregressive
from tests.oracles import network, subs_log_prob


def by_the_chain_rule(model, row, given, start):
    """-log p of every token after the `given` ones, each from a pass over the tokens before it."""
    mask_id = model.config.mask_id
    nll = torch.zeros(len(row), dtype=torch.float64)
    for token in range(given, len(row)):
        past = torch.cat([torch.tensor([mask_id] * start, dtype=torch.long), row[:token]])
        visible = torch.ones(len(past), len(past)).tril() > 0
        logits = network(model, past, torch.arange(len(past)), visible)[-1]
        nll[token] = -subs_log_prob(logits, mask_id)[row[token]]
    return nll


@pytest.mark.parametrize(
    ("bos", "given", "start"),
    [
        (False, 0, 1),
        (False, 1, 1),  # trained with the start symbol: it stays, though token 0 is not scored
        (True, 1, 0),
        (True, 0, 1),
        (None, 1, 0),  # the authors' way
        (None, 0, 1),
    ],
)
@torch.no_grad()
def test_it_is_the_chain_rule(make_ar, random_ids, bos, given, start):
    model, clean = make_ar(bos=bos), random_ids(3, 9)
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, :given] = False
    nll = causal_nll(model, clean, free)
    for row in range(3):
        expected = by_the_chain_rule(model, clean[row], given, start)
        assert torch.allclose(nll[row], expected, atol=1e-10)


@torch.no_grad()
def test_padding_is_neither_seen_nor_scored(make_ar, random_ids):
    model, clean = make_ar(bos=False), random_ids(2, 9)
    valid = torch.arange(9) < torch.tensor([9, 4])[:, None]
    nll = causal_nll(model, clean, valid, valid)
    other = causal_nll(model, torch.where(valid, clean, 11), valid, valid)
    assert torch.equal(nll, other) and (nll[~valid] == 0).all()
    assert torch.allclose(nll[1, :4], by_the_chain_rule(model, clean[1, :4], 0, 1), atol=1e-10)


@torch.no_grad()
def test_all_texts_together_have_probability_one(make_ar):
    """The mask token has probability zero: the 3^4 texts of the other tokens are all there are."""
    model = make_ar(vocab_size=4, bos=False)
    texts = torch.cartesian_prod(*[torch.arange(3)] * 4)
    nll = causal_nll(model, texts, torch.ones_like(texts, dtype=torch.bool))
    assert (-nll.sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_models_are_told_apart(make_model, make_ar):
    assert is_autoregressive(make_ar()) and not is_autoregressive(make_model(block_size=1))
