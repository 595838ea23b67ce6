"""Compiled layers compute what layers compute."""

import shutil

import pytest
import torch

from blockdiffusion.diffusion.denoiser import causal_loss, masked_loss
from blockdiffusion.models.transformer import Layer

KINDS = {
    "block": {},
    "timed": dict(time_conditioning=True),
    "autoregressive": dict(objective="autoregressive", adaln=False, block_size=1),
}


def test_layers_are_not_compiled_unless_asked(make_model):
    model = make_model()
    assert not any(layer.compiled for layer in model.backbone.layers)
    model.backbone.compile_layers()
    assert all(layer.compiled for layer in model.backbone.layers)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of a CPU needs g++")
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_same(make_model, random_ids, kind):
    """With the number of masked tokens, which differs from pass to pass, nothing is compiled again:
    the last layer's masked tokens go through it as it is."""
    model = make_model(**KINDS[kind], num_hidden_layers=3).train()
    seen = []
    for seed, share in ((0, 2), (1, 3)):
        clean = random_ids(2, 16, seed=seed)
        weight = torch.rand(2, 1, 16, generator=torch.Generator().manual_seed(seed)).double()
        noisy = clean[:, None].masked_fill(clean[:, None] % share == 0, model.config.mask_id)
        sigma = torch.rand(2, 1, 4).double() if kind == "timed" else None

        def loss(clean=clean, noisy=noisy, weight=weight, sigma=sigma):
            if kind == "autoregressive":
                return causal_loss(model, clean, torch.ones_like(clean, dtype=torch.bool))
            return masked_loss(model, noisy, clean, noisy == 12, weight, None, sigma)

        results = []
        for compiled in (False, True):
            for layer in model.backbone.layers:
                layer.compiled = compiled
            value = loss()
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            results.append([value.detach(), *(g for g in gradients if g is not None)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert seen[1] == seen[0] and Layer.compiled is False
