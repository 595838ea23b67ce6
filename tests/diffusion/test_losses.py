import pytest
import torch

from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.diffusion.losses import (
    Pieces,
    prior_kl,
    score_entropy,
    subs_nll,
    uniform_kl,
    uniform_reverse,
    weighted_subs_nll,
)
from tests.noise_oracles import log_score
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
    nothing = masked_nll(model, clean[:, None], clean, torch.zeros(2, 1, 16, dtype=torch.bool))
    assert (nothing == 0).all()
    noisy = clean.clone()
    noisy[:, 3] = model.config.mask_id
    nll = masked_nll(model, noisy[:, None], clean, (noisy != clean)[:, None])[:, 0]
    assert torch.equal((nll != 0).nonzero(), torch.tensor([[0, 3], [1, 3]]))
    logits = model.denoise_logits(noisy, clean)[:, 3]
    expected = -subs_log_prob(logits, model.config.mask_id).gather(1, clean[:, 3:4])[:, 0]
    assert torch.allclose(nll[:, 3], expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pieces", [(1, 1), (33, 1), (10_000, 1), (33, 8), (10_000, 64)])
def test_the_loss_in_pieces_is_the_weighted_sum_with_its_gradients(pieces, bias):
    generator = torch.Generator().manual_seed(2)
    output = torch.nn.Linear(5, 11, bias=bias, dtype=torch.float64)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 10, (7,), generator=generator)
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    inputs = [hidden, *output.parameters()]
    expected = (weight * subs_nll(output(hidden), target, mask_id=10)).sum()
    gradients = torch.autograd.grad(3 * expected, inputs)
    loss = weighted_subs_nll(hidden, output, target, weight, 10, pieces=Pieces(*pieces))
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(torch.autograd.grad(3 * loss, inputs), gradients, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("aligned", [1, 64])
def test_the_loss_in_pieces_computes_under_autocast_what_the_logits_would(aligned):
    generator = torch.Generator().manual_seed(3)
    output = torch.nn.Linear(16, 33)
    hidden = torch.randn(9, 16, generator=generator).requires_grad_()
    target, weight = torch.arange(9), torch.rand(9, generator=generator)
    inputs = [hidden, *output.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        expected = (weight * subs_nll(output(hidden).float(), target, mask_id=32)).sum()
        loss = weighted_subs_nll(hidden, output, target, weight, 32, pieces=Pieces(100, aligned))
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


# --- SEDD and D3PM ------------------------------------------------------------------------------


def test_score_entropy_is_the_published_formula():
    """sum of s - r log s_x0 + r (log r - 1), from the scores themselves."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(5, 9, generator=generator, dtype=torch.float64)
    target, sigma = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1e-3, 0.1, 1, 3, 6.9]).double()
    scores = log_score(logits, torch.full((5,), 8), sigma)
    assert (scores[:, 8] == 0).all()
    r = 1 / sigma.expm1()
    formula = scores[:, :8].exp().sum(-1) - r * scores[torch.arange(5), target] + r * (r.log() - 1)
    assert torch.allclose(score_entropy(logits.clone(), target, 8), formula / r)


@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("absorbing", [True, False])
def test_the_prior_is_a_divergence(tokens, absorbing):
    for keep in (0.0, 1e-3, 0.4, 1.0):
        q = torch.zeros(tokens + absorbing, dtype=torch.float64)
        q += 0.0 if absorbing else (1 - keep) / tokens
        q[0] += keep
        prior = torch.full_like(q, 1 / tokens)
        if absorbing:
            q[-1] = 1 - keep
            prior[:-1], prior[-1] = keep / tokens, 1 - keep
        some = q > 0
        expected = (q[some] * (q[some] / prior[some]).log()).sum()
        assert prior_kl(keep, tokens, absorbing) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniform_kl_is_the_divergence_of_its_reverse_step(dtype):
    """Term by term from the normalised laws; at s = 0 the reconstruction -log p(x_0 | x_t)."""
    logits = 2 * torch.randn(8, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    target, noisy = torch.tensor([0, 1, 2, 3] * 2), torch.tensor([0, 2, 2, 6] * 2)
    for keep, before in ((0.0, 0.25), (0.25, 0.6), (0.999, 0.9991), (0.7, 1.0)):
        given = torch.zeros_like(logits).scatter(-1, target[:, None], 1.0)
        guess = subs_log_prob(logits, 4).exp()
        true, ours = (uniform_reverse(p, noisy, keep, before, 4).double() for p in (given, guess))
        true, ours = true / true.sum(-1, keepdim=True), ours / ours.sum(-1, keepdim=True)
        expected = torch.where(true > 0, true * (true / ours).log(), 0.0).sum(-1)
        keeps = [torch.full((8,), k, dtype=torch.float64) for k in (keep, before)]
        kl = uniform_kl(logits.clone(), target, noisy, *keeps, mask_id=4)
        exact = 1e-12 if dtype == torch.float64 else 3e-6
        assert (kl - expected).abs().max() < exact
        assert (ours[:, 4] == 0).all()
        if before == 1:
            assert torch.allclose(kl.double(), -ours.gather(-1, target[:, None])[:, 0].log())


def test_uniform_kl_has_a_finite_gradient_where_the_network_is_sure():
    logits = torch.zeros(2, 6).index_fill(1, torch.tensor([2]), 200.0).requires_grad_()
    keeps = [torch.full((2,), k, dtype=torch.float64) for k in (0.9, 1.0)]
    kl = uniform_kl(logits * 1, torch.tensor([2, 1]), torch.tensor([2, 1]), *keeps, mask_id=5)
    kl.sum().backward()
    assert kl.isfinite().all() and logits.grad.isfinite().all()
