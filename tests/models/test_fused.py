"""The gradients of `fused` against those of autograd through the plain layer."""

import pytest
import torch

from blockdiffusion.models import fused
from blockdiffusion.models.fused import kept_by_dropout
from blockdiffusion.models.transformer import Layer


def as_pytorch_does(x, dropout):
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)


def loss_and_gradients(model, noisy, clean, *, plain, monkeypatch, autocast=False):
    with monkeypatch.context() as patched:
        patched.setattr(fused, "kept_by_dropout", as_pytorch_does)
        if plain:
            patched.setattr(Layer, "_is_plain", lambda self: False)
        torch.manual_seed(3)  # of dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.encode(noisy, clean, scored_BNL=noisy == model.config.mask_id)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        model.zero_grad()
        (out * weight).sum().backward()
    return [out.detach(), *(p.grad for p in model.backbone.layers.parameters())]


@pytest.mark.parametrize("sizes", [{}, {"adaln": False}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_layer(
    sizes, checkpointing, make_model, random_ids, monkeypatch
):
    model = make_model(num_hidden_layers=2, **sizes).train()
    model.backbone.activation_checkpointing = checkpointing
    clean = random_ids(2, 16)
    noisy = torch.stack([clean, clean], 1)
    noisy[:, 0, ::3] = noisy[:, 1, 1::2] = model.config.mask_id
    plain, ours = (
        loss_and_gradients(model, noisy, clean, plain=x, monkeypatch=monkeypatch)
        for x in (True, False)
    )
    for expected, found in zip(plain, ours, strict=True):
        assert (expected - found).abs().max() < 1e-12 * expected.abs().max().clamp(min=1)


def test_under_autocast_they_agree_within_the_rounding_of_bf16(make_model, random_ids, monkeypatch):
    """Both against float64: the fused gradient is as near as the plain one, or nearer than 1 %."""
    model = make_model(num_hidden_layers=2, dropout=0.0).train()
    clean = random_ids(2, 16)
    noisy = clean[:, None].clone()
    noisy[:, 0, ::2] = model.config.mask_id
    exact = loss_and_gradients(model, noisy, clean, plain=True, monkeypatch=monkeypatch)
    model.float()
    errors = []
    for plain in (True, False):
        found = loss_and_gradients(
            model, noisy, clean, plain=plain, monkeypatch=monkeypatch, autocast=True
        )
        errors.append([
            ((x - e).norm() / e.norm().clamp(min=1e-9)).item()
            for x, e in zip(found, exact, strict=True)
        ])  # fmt: skip
    for plain, ours in zip(*errors, strict=True):
        assert ours < max(1.5 * plain, 0.01)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999])
def test_dropout_keeps_its_share_and_each_number_for_itself(dropout):
    """Counts of kept numbers, and of neighbours kept together (also across the two halves of a
    word), within 5 standard deviations: false alarms 6e-7 for each of the 9 counts."""
    torch.manual_seed(0)
    number = 2**20 + 1
    kept = kept_by_dropout(torch.empty(number), dropout)
    assert kept.shape == (number,) and kept.dtype == torch.bool
    for found, share in (
        (kept, 1 - dropout),
        (kept[:-1:2] & kept[1::2], (1 - dropout) ** 2),
        (kept[1:-1:2] & kept[2::2], (1 - dropout) ** 2),
    ):
        deviation = (share * (1 - share) * len(found)) ** 0.5
        assert abs(found.sum().item() - share * len(found)) < 5 * deviation
