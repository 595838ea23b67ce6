import pytest
import torch

from blockdiffusion.denoiser import masked_nll
from blockdiffusion.objectives import subs_nll, weighted_subs_nll
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("most_logits", [1, 33, 10_000])
def test_the_loss_in_pieces_is_the_weighted_sum_with_its_gradients(most_logits, bias):
    generator = torch.Generator().manual_seed(2)
    output = torch.nn.Linear(5, 11, bias=bias, dtype=torch.float64)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 10, (7,), generator=generator)
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    inputs = [hidden, *output.parameters()]
    expected = (weight * subs_nll(output(hidden), target, mask_id=10)).sum()
    gradients = torch.autograd.grad(3 * expected, inputs)
    loss = weighted_subs_nll(hidden, output, target, weight, 10, most_logits=most_logits)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(torch.autograd.grad(3 * loss, inputs), gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_loss_in_pieces_computes_under_autocast_what_the_logits_would():
    generator = torch.Generator().manual_seed(3)
    output = torch.nn.Linear(16, 33)
    hidden = torch.randn(9, 16, generator=generator).requires_grad_()
    target, weight = torch.arange(9), torch.rand(9, generator=generator)
    inputs = [hidden, *output.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        expected = (weight * subs_nll(output(hidden).float(), target, mask_id=32)).sum()
        loss = weighted_subs_nll(hidden, output, target, weight, 32, most_logits=100)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    gradients = torch.autograd.grad(expected, inputs)
    for found, wanted in zip(torch.autograd.grad(loss, inputs), gradients, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=5e-3)


def test_the_loss_in_pieces_of_nothing_is_zero():
    output = torch.nn.Linear(4, 6)
    nothing = torch.zeros(0, dtype=torch.long)
    loss = weighted_subs_nll(torch.zeros(0, 4), output, nothing, torch.zeros(0), 5)
    loss.backward()
    assert loss.item() == 0 and output.weight.grad is not None and not output.weight.grad.any()
