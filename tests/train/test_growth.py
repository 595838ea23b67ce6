"""Blocks that grow in training, and parts of the network that are frozen."""

import json

import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.train.adapt import adapted_for
from blockdiffusion.train.optim import make_optimizer, trainable
from blockdiffusion.train.options import TrainOptions
from blockdiffusion.train.recipe import load_recipe, with_block_size
from blockdiffusion.train.run import run_training
from tests.train.test_adapt import place, recipe, rows_of  # noqa: F401


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: (line["loss"], line.get("block_size")) for line in lines if "loss" in line
    }


def test_the_sizes_take_equal_parts_of_the_steps():
    options = TrainOptions(steps=7, block_sizes=(1, 2, 4))
    assert [options.block_size_at(s) for s in range(1, 8)] == [1, 1, 1, 2, 2, 4, 4]
    assert TrainOptions(steps=7).block_size_at(3) is None


def test_each_step_is_that_of_its_block_size(recipe, tmp_path):  # noqa: F811
    """The first update of each size has the loss of a run of that size from the same weights."""
    sizes = ["train.block_sizes=[1,2,4]", "model.block_size=4", "train.steps=6"]
    run_training(recipe(*sizes, "checkpoint.every=2", "checkpoint.keep=9"))
    grown = losses(tmp_path / "run")
    assert [size for _, size in grown.values()] == [1, 1, 2, 2, 4, 4]
    for size in (1, 2):
        alone = recipe(f"model.block_size={size}", "train.steps=2", f"out={tmp_path / str(size)}")
        run_training(alone)
        assert (losses(tmp_path / str(size))[1][0] == grown[1][0]) == (size == 1)
    assert blockdiffusion.load(tmp_path / "run").config.block_size == 4


def test_a_resumed_run_has_the_same_sizes(recipe, tmp_path):  # noqa: F811
    made = ["train.block_sizes=[1,2,4]", "model.block_size=4", "train.steps=6"]
    run_training(recipe(*made, f"out={tmp_path / 'whole'}"))
    run = recipe(*made, "checkpoint.every=3")
    run_training(run)
    # What a kill after step 3 leaves.
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name.endswith("6"):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    run_training(load_recipe(tmp_path / "run" / "config.yaml"), resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match="block sizes depend on it"):
        run_training(recipe(*made, "checkpoint.every=3", "train.steps=9"), resume=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.block_sizes=[2,4]", "model.block_size=8"], "the last of them must be equal"),
        (["train.block_sizes=[2,3]", "model.block_size=3"], "each size dividing the next"),
        (["train.block_sizes=[4,4]"], "it must grow"),
        (["train.block_sizes=[0,4]"], "train.block_sizes is 0"),
        (
            ["train.block_sizes=[1" + "0" * 5000 + "]"],
            "must be a list of: a whole number",
        ),
        (["train.block_sizes=[1,2,4]", "train.steps=2"], "at most as many sizes"),
        (["adapt.freeze=[nothing.*]"], "matches no parameter"),
        (["adapt.freeze=['*']"], "nothing is trained"),
        (["adapt.freeze=['*']", "adapt.lora_rank=2"], "LoRA trains no weight"),
    ],
)
def test_what_does_not_fit_is_refused(recipe, overrides, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        made = recipe(*overrides)
        with_block_size(made, rows_of(made).manifest)
        adapted_for(made, rows_of(made).manifest)


def test_other_objectives_have_one_size(recipe_file):
    made = load_recipe(
        recipe_file, ["objective.name=mdlm", "model.block_size=null", "train.block_sizes=[1]"]
    )
    with pytest.raises(UserError, match="which has one block size"):
        with_block_size(made, type("Manifest", (), {"seq_len": 16}))


def test_frozen_parts_keep_their_values(recipe, place, tmp_path):  # noqa: F811
    frozen = ["adapt.freeze=['model.layers.0.*','*embed*']", "optim.lr=1e-2", "optim.ema_decay=0"]
    before = adapted_for(recipe(), rows_of(recipe()).manifest).backbone.model.state_dict()
    made = recipe(*frozen)
    run_training(made)
    after = blockdiffusion.load(tmp_path / "run").backbone.model.state_dict()
    for name, tensor in before.items():
        kept = "layers.0." in name or "embed" in name
        assert torch.equal(after[name], tensor) == kept, name
    network = adapted_for(made, rows_of(made).manifest).backbone
    optimizer = make_optimizer(network, made.optim)
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in trainable(network).values())
    assert held < 0.7 * sum(p.numel() for p in network.parameters())
