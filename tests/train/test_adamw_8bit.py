"""Moments of 8 bits: what a code loses, that steps are nearly AdamW's, and that runs resume."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.train.adamw_8bit import PIECE, AdamW8bit, Coded
from blockdiffusion.train.optim import OptimOptions, make_optimizer, moments_of
from blockdiffusion.train.run import run_training
from tests.models.hugging_face import make_hugging_face
from tests.train.test_adapt import place, recipe

__all__ = ["place", "recipe"]  # fixtures


def numbers(signed, shape=(37, 53), seed=0):
    """Numbers of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    size = 10.0 ** (-6 * torch.rand(shape, generator=draw))
    sign = torch.randint(0, 2, shape, generator=draw) * 2 - 1 if signed else 1
    return size * sign


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_and_takes_a_byte(signed):
    values = numbers(signed)
    coded = Coded(values, signed)
    assert coded.codes.element_size() == 1 and coded.codes.numel() < values.numel() + PIECE
    flat, found = values.flatten().tolist(), coded.decode().flatten().tolist()
    levels = (
        [(k / 127) ** 2 for k in range(128)] if signed else [(k / 255) ** 4 for k in range(256)]
    )
    for start in range(0, len(flat), PIECE):
        part = flat[start : start + PIECE]
        most = max(map(abs, part))
        for value, got in zip(part, found[start : start + PIECE], strict=True):
            root = 0.5 if signed else 0.25
            best = min(levels, key=lambda level: abs(level**root - (abs(value) / most) ** root))
            expected = best * most * (-1 if value < 0 else 1)
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-30)
    # What is decoded has the same codes again: it may be saved so.
    again = Coded(coded.decode(), signed)
    assert torch.equal(again.codes, coded.codes) and torch.equal(again.largest, coded.largest)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_at_random_is_right_in_the_mean(signed):
    """Of 2000 draws, for 1961 numbers: false alarm 1e-5 in all, by the sum's normal limit."""
    values, draw = numbers(signed), torch.Generator().manual_seed(5)
    exact = values.flatten().abs() / Coded(values, signed).largest.repeat_interleave(PIECE)[:1961]
    exact = exact.sqrt() * 127 if signed else exact.sqrt().sqrt() * 255
    total = torch.zeros(1961, dtype=torch.float64)
    for _ in range(2000):
        total += Coded(values, signed, draw).codes.flatten()[:1961].abs().double()
    part = exact.double() % 1
    error = (total / 2000 - exact.double()) / (part * (1 - part) / 2000).sqrt().clamp_min(1e-3)
    assert error.abs().max() < 6


def test_zero_stays_zero():
    for signed in (True, False):
        assert not Coded(torch.zeros(3, 300), signed, torch.Generator()).decode().any()


def test_the_first_step_is_adamws_and_the_next_are_near():
    """At the first step nothing was coded yet. Then a regression ends where AdamW's ends."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(256, 40, generator=draw)
    y = x @ torch.randn(40, 20, generator=draw) + 0.1 * torch.randn(256, 20, generator=draw)
    losses, first = [], []
    for kind in (AdamW8bit, torch.optim.AdamW):
        layer = nn.Linear(40, 20)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(0.01)
        groups = [{"params": [layer.weight], "weight_decay": 0.1},
                  {"params": [layer.bias], "weight_decay": 0.0}]  # fmt: skip
        optimizer = kind(groups, lr=0.02, betas=(0.9, 0.99), eps=1e-8)
        for step in range(300):
            rows = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = (layer(x[rows]) - y[rows]).square().mean()
            loss.backward()
            optimizer.step()
            if step == 0:
                first.append([p.detach().clone() for p in layer.parameters()])
        losses.append(float((layer(x) - y).square().mean().detach()))
    for one, two in zip(*first, strict=True):
        assert torch.allclose(one, two, atol=1e-7)
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] < 0.2


def test_a_small_average_is_not_stuck():
    """Rounding to the nearest code would keep a second moment that changes by 0.1 % a step."""
    parameter = nn.Parameter(torch.zeros(512))
    optimizer = AdamW8bit([{"params": [parameter], "weight_decay": 0.0}], 1e-3, (0.9, 0.999), 1e-8)
    for step in range(3000):
        parameter.grad = torch.full((512,), 2.0 if step < 1000 else 1.0)
        optimizer.step()
    # 4 for the first 1000 steps, 1 for 2000 more.
    expected = 1 + ((4 * (1 - 0.999**1000)) - 1) * 0.999**2000
    square = moments_of(optimizer, parameter)["exp_avg_sq"]
    assert float(square.mean()) == pytest.approx(expected, rel=0.02)


def test_a_run_resumes_bit_for_bit_also_from_adamws_moments(recipe, tmp_path):
    whole = recipe("optim.state=8bit", "checkpoint.every=2")
    run_training(whole)
    resumed = replace(whole, out=str(tmp_path / "again"))
    run_training(replace(resumed, train=replace(whole.train, steps=2)))
    run_training(resumed, resume=True)
    one, two = (blockdiffusion.load(tmp_path / name / "model") for name in ("run", "again"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    other = recipe("checkpoint.every=2", f"out={tmp_path / 'plain'}")
    run_training(other)
    plain = blockdiffusion.load(tmp_path / "plain" / "model")
    differences = [
        float((tensor - plain.state_dict()[name]).abs().max())
        for name, tensor in one.state_dict().items()
    ]
    assert 0 < max(differences) < 1e-3  # of 4 steps at 3e-4


def test_refused():
    with pytest.raises(UserError, match=r"optim.state is 8bit, but optim.name is muon"):
        OptimOptions(state="8bit", name="muon")
    model = make_hugging_face("llama").float()
    assert isinstance(make_optimizer(model.backbone, OptimOptions(state="8bit")), AdamW8bit)
