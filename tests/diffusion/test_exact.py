import pytest
import torch

from blockdiffusion.diffusion.exact import exact_blocks
from blockdiffusion.errors import UserError
from tests.oracles import exact_block, subs_log_prob


def oracle(model, clean, free, row, block):
    """(NELBO, NLL) of one block by orders and subsets, one network call per mask set."""
    size, mask_id = model.config.block_size, model.config.mask_id
    members = [l for l in range(block * size, (block + 1) * size) if free[row, l]]

    def log_prob_of(subset):
        noisy = clean[row : row + 1].clone()
        noisy[0, list(subset)] = mask_id
        logits = model.denoise_logits(noisy, clean[row : row + 1])[0]
        return {l: float(subs_log_prob(logits[l], mask_id)[clean[row, l]]) for l in subset}

    return exact_block(log_prob_of, members)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_enumeration_equals_orders_and_subsets(make_model, random_ids, size):
    """The recursion over subsets equals the average over all orders, given tokens included."""
    model = make_model(block_size=size, seq_len=8)
    clean = random_ids(2, 8)
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, 0] = False
    free[1, 5] = False
    blocks = exact_blocks(model, clean, free)
    with torch.no_grad():
        for row in range(2):
            for block in range(8 // size):
                nelbo, nll = oracle(model, clean, free, row, block)
                assert abs(blocks.nelbo_BK[row, block] - nelbo) < 1e-9
                assert abs(blocks.nll_BK[row, block] - nll) < 1e-9


def test_the_bound_is_a_bound_and_tight_for_single_tokens(make_model, random_ids):
    model, clean = make_model(), random_ids(4, 16)
    free = torch.ones_like(clean, dtype=torch.bool)
    blocks = exact_blocks(model, clean, free)
    assert (blocks.nelbo_BK > blocks.nll_BK).all()
    single = exact_blocks(make_model(block_size=1), clean, free)
    assert torch.allclose(single.nelbo_BK, single.nll_BK, atol=1e-12)


def test_pass_size_and_padding_do_not_change_the_result(make_model, random_ids, monkeypatch):
    model, clean = make_model(), random_ids(2, 16)
    free = torch.ones_like(clean, dtype=torch.bool)
    whole = exact_blocks(model, clean, free)
    monkeypatch.setattr("blockdiffusion.diffusion.exact.PASS_TOKENS", 32)
    calls = []
    pieces = exact_blocks(model, clean, free, progress=calls.append)
    assert torch.allclose(whole.nll_BK, pieces.nll_BK, atol=1e-12)
    assert sum(calls) == 15 and len(calls) == 15
    valid = torch.arange(16)[None].expand(2, 16) < 12
    padded = exact_blocks(model, clean, free & valid, valid)
    assert torch.allclose(padded.nelbo_BK[:, :3], whole.nelbo_BK[:, :3], atol=1e-12)
    assert (padded.nelbo_BK[:, 3] == 0).all() and (padded.nll_BK[:, 3] == 0).all()


def test_tiny_law(tiny_law, tiny_law_expected):
    """The golden bound within 1e-5 per sequence, and the log of the golden probabilities."""
    clean = tiny_law_expected["sequences"]
    blocks = exact_blocks(tiny_law.double(), clean, torch.ones_like(clean, dtype=torch.bool))
    difference = blocks.nelbo_BK.sum(1) - tiny_law_expected["exact_nelbo"]
    assert difference.abs().max() < 1e-5
    log_prob = -blocks.nll_BK.sum(1)
    assert (log_prob - tiny_law_expected["probabilities"].log()).abs().max() < 1e-5
    assert abs(log_prob.exp().sum() - 1) < 1e-9


def test_long_blocks_are_refused(make_model, random_ids):
    clean = random_ids(1, 16)
    with pytest.raises(UserError, match="S = 16"):
        exact_blocks(make_model(block_size=16), clean, torch.ones_like(clean, dtype=torch.bool))
