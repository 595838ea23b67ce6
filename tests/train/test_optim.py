"""Learning rates, AdamW's groups, clipping and the moving average, by hand."""

import math

import pytest
import torch
from torch import nn

from blockdiffusion.errors import UserError
from blockdiffusion.train.optim import (
    MovingAverage,
    OptimOptions,
    clip_gradients,
    learning_rate,
    make_optimizer,
)


def rates(steps, **options):
    return [learning_rate(OptimOptions(**options), step, steps) for step in range(1, steps + 1)]


def test_constant_warms_up_linearly_and_stays():
    assert rates(6, lr=0.4, warmup_steps=4) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert rates(3, lr=0.4, warmup_steps=0) == [0.4, 0.4, 0.4]


def test_linear_decay_would_reach_zero_one_step_after_the_last():
    got = rates(6, lr=1.0, warmup_steps=2, schedule="linear")
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_decay_follows_half_a_cosine():
    got = rates(10, lr=2.0, warmup_steps=2, schedule="cosine")
    expected = [2.0 * 0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    assert got == pytest.approx([1.0, 2.0, *expected])


def test_a_warm_up_longer_than_the_run_only_warms_up():
    got = rates(3, lr=1.0, warmup_steps=10, schedule="cosine")
    assert got == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "optim.lr is 0.0"),
        ({"lr": math.nan}, "optim.lr is nan"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"eps": 0.0}, "optim.eps"),
        ({"weight_decay": -1.0}, "optim.weight_decay"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"clip_norm": 0.0}, "optim.clip_norm"),
        ({"ema_decay": 1.0}, "optim.ema_decay"),
    ],
)
def test_impossible_options_name_their_key(options, message):
    with pytest.raises(UserError, match=message):
        OptimOptions(**options)


def test_only_matrices_are_decayed():
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimOptions(weight_decay=0.1))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decay == {id(model.weight): 0.1, id(model.bias): 0.0}


def test_clipping_returns_the_norm_and_scales_to_the_limit():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    unused = nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert clip_gradients([a, b, unused], 3.5).item() == pytest.approx(7.0)
    torch.testing.assert_close(a.grad, torch.tensor([1.0, 1.5]), rtol=1e-5, atol=0)
    torch.testing.assert_close(b.grad, torch.tensor([3.0]), rtol=1e-5, atol=0)
    assert clip_gradients([a, b], None).item() == pytest.approx(3.5, rel=1e-5)
    torch.testing.assert_close(b.grad, torch.tensor([3.0]), rtol=1e-5, atol=0)


def test_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, decay=0.25)
    expected = 1.0
    for step, weight in enumerate([5.0, -3.0, 2.0], start=1):
        model.weight.data.fill_(weight)
        average.update(step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert [average.decay_at(n) for n in (1, 2, 3)] == [2 / 11, 0.25, 0.25]
    assert average.average["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_swapping_the_average_in_and_out_restores_the_weights_exactly():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    average = MovingAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1)
    weights, averaged = model.weight.detach().clone(), average.average["weight"].clone()
    pointer = model.weight.data_ptr()
    with pytest.raises(RuntimeError, match="inside"), average.swapped():
        assert torch.equal(model.weight, averaged)
        raise RuntimeError("inside")
    assert torch.equal(model.weight, weights)
    assert torch.equal(average.average["weight"], averaged)
    assert model.weight.data_ptr() == pointer  # what the optimizer and the gradients refer to


def test_frozen_parameters_are_neither_averaged_nor_optimized():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(MovingAverage(model, 0.9).average) == ["weight"]
    groups = make_optimizer(model, OptimOptions()).param_groups
    assert [len(group["params"]) for group in groups] == [1]
