"""Learning rates, AdamW's groups, clipping and the moving average, by hand."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from blockdiffusion.errors import UserError
from blockdiffusion.runtime.distributed import is_sharded, local, process_group, whole
from blockdiffusion.train.optim import (
    MovingAverage,
    OptimOptions,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from tests.launch import assert_ended_well, launch


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
        ({"name": "muon", "momentum": 1.0}, "optim.momentum is 1.0; it must be in"),
        ({"momentum": 0.9}, "optim.momentum is 0.9, but optim.name is adamw"),
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


class Hidden(nn.Module):
    """A layer's matrix, its norm and modulation, and an output."""

    def __init__(self):
        super().__init__()
        layer = nn.Module()
        layer.mlp_in, layer.norm = nn.Linear(4, 6), nn.LayerNorm(4, bias=False)
        layer.modulation = nn.Linear(2, 4)
        self.layers, self.output = nn.ModuleList([layer]), nn.Linear(6, 5)

    def hidden_matrices(self):
        (layer,) = self.layers
        mlp = [layer.mlp_in, *([layer.mlp_out] if hasattr(layer, "mlp_out") else [])]
        return [part.weight for part in mlp]


def test_muon_takes_hidden_matrices_and_adamw_the_rest_by_hand():
    """One update of each: Muon's is orthogonal, and scaled to the size of AdamW's, 0.2 a number."""
    torch.manual_seed(0)
    model, twin = Hidden(), Hidden()
    twin.load_state_dict(model.state_dict())
    draw = torch.Generator().manual_seed(1)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        ours.grad = torch.randn(ours.shape, generator=draw)
        theirs.grad = ours.grad.clone()
    optimizer = make_optimizer(model, OptimOptions(name="muon", lr=0.01, weight_decay=0.5))
    optimizer.step()
    hidden = twin.layers[0].mlp_in.weight
    rest = [p for p in twin.parameters() if p is not hidden]
    decayed = [{"params": [p for p in rest if p.ndim == n], "weight_decay": d}
               for n, d in ((2, 0.5), (1, 0.0))]  # fmt: skip
    torch.optim.AdamW(decayed, lr=0.01).step()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name != "layers.0.mlp_in.weight":
            torch.testing.assert_close(ours, theirs)
    step = (hidden * (1 - 0.01 * 0.5) - model.layers[0].mlp_in.weight) / 0.01
    values = torch.linalg.svdvals(step) / (0.2 * math.sqrt(6))
    assert ((values > 0.6) & (values < 1.3)).all()  # "orthogonal" as Muon's five rounds have it
    assert 0.1 < step.square().mean().sqrt() < 0.3


def test_a_learning_rate_is_that_of_both():
    optimizer = make_optimizer(Hidden(), OptimOptions(name="muon", lr=0.01))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3


def test_loaded_state_reaches_both():
    torch.manual_seed(0)
    model = Hidden()
    optimizer = make_optimizer(model, OptimOptions(name="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    keys = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    assert keys.pop("layers.0.mlp_in.weight") == {"momentum_buffer"}
    assert all(found == {"step", "exp_avg", "exp_avg_sq"} for found in keys.values())
    other = make_optimizer(model, OptimOptions(name="muon"))
    other.load_state_dict(optimizer.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    other.step()
    assert {int(s["step"]) for s in other.state.values() if "step" in s} == {2}
    assert not any(map(torch.equal, before, model.parameters()))


def update_shards_and_whole_matrices(rows: list[list[int]]) -> None:
    """Three updates from equal gradients; the processes hold `rows` of the two matrices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    model = Hidden()
    model.layers[0].mlp_out = nn.Linear(7, 5)
    options = OptimOptions(name="muon", lr=0.01, weight_decay=0.5)
    with process_group() as processes:
        mesh = init_device_mesh("cpu", (processes.size,))
        sharded = fully_shard(deepcopy(model), mesh=mesh)
        optimizers = [make_optimizer(network, options) for network in (sharded, model)]
        for _ in range(3):
            for ours, theirs in zip(sharded.parameters(), model.parameters(), strict=True):
                theirs.grad = torch.randn_like(theirs)
                ours.grad = distribute_tensor(theirs.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        for name, held in zip(("mlp_in", "mlp_out"), rows, strict=True):
            weights = [getattr(network.layers[0], name).weight for network in (sharded, model)]
            momenta = [
                optimizer.state[weight]["momentum_buffer"]
                for optimizer, weight in zip(optimizers, weights, strict=True)
            ]
            for shard, oracle in (weights, momenta):
                assert is_sharded(shard) and len(local(shard)) == held[processes.rank]
                assert torch.equal(whole(shard), oracle)


def test_muon_of_shards_makes_the_numbers_of_whole_matrices():
    """Bit for bit, of a tall and of a wide matrix, where a process holds fewer rows or none."""
    rows = [[2, 2, 2, 0], [2, 2, 1, 0]]
    assert_ended_well(launch(4, update_shards_and_whole_matrices, rows))


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
