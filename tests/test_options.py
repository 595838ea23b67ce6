"""Options have one description each, and are read by the names of the version before."""

import inspect
import json
import warnings

import pytest
import torch

import blockdiffusion
from blockdiffusion.cli import COMMANDS
from blockdiffusion.cli.options import OLD_NAMES
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.options import Renamed
from blockdiffusion.train.recipe import load_recipe
from tests.command import blockdiff
from tests.tiny import write_recipe


def recipe_of(tmp_path, **evaluation):
    return write_recipe(tmp_path / "recipe.yaml", tmp_path, tmp_path / "run", eval=evaluation)


def test_a_likelihood_takes_options_as_an_object_or_by_name(make_model, random_ids):
    model, ids = make_model(), random_ids(3, 16)
    options = LikelihoodOptions(estimator="count", mc_samples=3)
    found = blockdiffusion.likelihood(model, ids, options)
    for more in (
        blockdiffusion.likelihood(model, ids, "count", mc_samples=3),
        blockdiffusion.likelihood(model, ids, estimator="count", mc_samples=3),
        blockdiffusion.likelihood(model, ids, options, mc_samples=3),
    ):
        assert (more.nats_per_token, more.samples) == (found.nats_per_token, 3)
    assert blockdiffusion.likelihood(model, ids, options, mc_samples=2).samples == 2
    with pytest.raises(UserError, match=r"'sample' is no option; there are estimator, mc_samples"):
        blockdiffusion.likelihood(model, ids, sample=3)


def test_draws_by_their_old_name(make_model, random_ids, tmp_path):
    model, ids = make_model(), random_ids(3, 16)
    for old in (dict(samples=3), dict(estimator="count", samples=3)):
        with pytest.warns(Renamed, match="samples is now mc_samples"):
            assert blockdiffusion.likelihood(model, ids, **old).samples in (1, 3)
    with pytest.warns(Renamed):
        assert blockdiffusion.likelihood(model, ids, "count", 3).samples == 3
    with pytest.warns(Renamed, match=r"eval\.samples is now eval\.mc_samples"):
        assert load_recipe(recipe_of(tmp_path, samples=3)).eval.mc_samples == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_recipe(recipe_of(tmp_path, mc_samples=3)).eval.mc_samples == 3
    with pytest.raises(UserError, match=r"eval\.samples is eval\.mc_samples by its old name"):
        load_recipe(recipe_of(tmp_path, samples=3), ["eval.mc_samples=2"])


def test_sizes_and_types_by_their_old_names(make_model, tmp_path):
    model = make_model(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    old = {"width": 8, "num_layers": 1, "num_heads": 2}
    new = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.warns(Renamed, match="width is now hidden_size"):
        config = blockdiffusion.BlockDiffusionConfig(**old)
    assert config.to_diff_dict() == blockdiffusion.BlockDiffusionConfig(**new).to_diff_dict()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    for before, now in zip(old, new, strict=True):
        raw[before] = raw.pop(now)
    path.write_text(json.dumps(raw))
    (tmp_path / "model" / "SHA256SUMS").unlink(missing_ok=True)
    with pytest.warns(Renamed, match="num_layers is now num_hidden_layers"):
        again = blockdiffusion.load(tmp_path / "model")
    state = again.state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, tmp_path / "run", model={**new, **old})
    with pytest.raises(UserError, match=r"model\.\w+ is model\.\w+ by its old name"):
        load_recipe(recipe)
    overrides = ["train.dtype=bf16", "train.steps=3"]
    with pytest.warns(Renamed, match=r"train\.dtype bf16 is now bfloat16"):
        assert load_recipe(recipe_of(tmp_path), overrides).train.dtype == "bfloat16"


def test_recipes_name_the_section_of_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"eval\.target_stderr is -1.0; it must be above 0"):
        load_recipe(recipe_of(tmp_path, target_stderr=-1))
    with pytest.raises(UserError, match=r"eval\.mc_samples is 0"):
        load_recipe(recipe_of(tmp_path, mc_samples=0))


@pytest.mark.parametrize("command", ["eval", "zero-shot", "references"])
def test_measurements_have_the_same_options_of_a_likelihood(command):
    shown = blockdiff(command, "--help").stdout
    for name in ("--estimator", "--mc-samples", "--orders", "--target-stderr"):
        assert f"  {name} " in shown
    assert not [old for old in OLD_NAMES if f"  {old} " in shown]


def test_an_old_option_is_read_with_one_warning():
    """By commands that have the new one; the value that follows is what is refused."""
    for old, new in OLD_NAMES.items():
        name = new.removeprefix("--").replace("-", "_")
        takers = [
            c for c, command in COMMANDS.items() if name in inspect.signature(command).parameters
        ]
        assert takers, new
        for command in takers:
            run = blockdiff(command, "--no-such-option", old, "x", f"{old}=y")
            assert run.stderr.count(f"{old} is now {new}") == 1, command
            assert f"no such option: {old}" not in run.stderr.lower()
    run = blockdiff("verify", "--samples", "3")
    assert "is now" not in run.stderr and "--samples" in run.stderr
