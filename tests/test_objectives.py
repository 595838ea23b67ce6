import pytest
import torch

from blockdiffusion.denoiser import masked_nll
from blockdiffusion.objectives import subs_nll
from tests.oracles import subs_log_prob


@pytest.mark.parametrize("mask_id", [0, 4, 10])
def test_subs_equals_the_definition(mask_id):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 11, generator=generator, dtype=torch.float64)
    target = (torch.arange(6) + mask_id + 1) % 11
    expected = subs_log_prob(logits, mask_id)
    nll = subs_nll(logits.clone(), target, mask_id)
    assert torch.allclose(nll, -expected[torch.arange(6), target])


def test_the_mask_token_gets_no_gradient():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    subs_nll(logits * 1, torch.tensor([0, 1, 2, 3]), mask_id=6).sum().backward()
    assert (logits.grad[:, 6] == 0).all() and (logits.grad[:, :6] != 0).all()


def test_masked_nll_is_zero_where_nothing_is_masked(make_model, random_ids):
    model, clean = make_model(), random_ids(2, 16)
    nothing = masked_nll(model, clean[:, None], clean)
    assert (nothing == 0).all()
    noisy = clean.clone()
    noisy[:, 3] = model.config.mask_id
    nll = masked_nll(model, noisy[:, None], clean)[:, 0]
    assert torch.equal((nll != 0).nonzero(), torch.tensor([[0, 3], [1, 3]]))
    logits = model.denoise_logits(noisy, clean)[:, 3]
    expected = -subs_log_prob(logits, model.config.mask_id).gather(1, clean[:, 3:4])[:, 0]
    assert torch.allclose(nll[:, 3], expected)
