"""`run_training`: data, network, evaluation, samples and loop together."""

import pytest
import torch
import yaml

import blockdiffusion
from blockdiffusion.config import build_model, load_recipe, run_training, to_dict
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.seeding import generator
from blockdiffusion.train.loggers import read_metrics


def test_a_run_from_recipe_to_a_model_that_loads(recipe_file, prepared, tmp_path):
    overrides = ["eval.every=8", "eval.rows=4", "eval.samples=2", "sample.every=12"]
    recipe = load_recipe(recipe_file, [*overrides, "sample.num=2", "sample.max_new_tokens=10"])
    state = run_training(recipe)
    out = tmp_path / "run"
    lines = read_metrics(out / "metrics.jsonl")
    assert state.step == 12
    assert [n["step"] for n in lines if "valid_bound" in n] == [8, 12]
    texts = [n["samples"] for n in lines if "samples" in n]
    assert len(texts) == 1 and len(texts[0]) == 2
    assert yaml.safe_load((out / "config.yaml").read_text()) == to_dict(recipe)
    assert load_recipe(out / "config.yaml") == recipe

    # What was logged as the bound is what the released model has.
    model = blockdiffusion.load(out)
    assert model.tokenizer is not None and model.config.block_size == 4
    batch = TokenRows(prepared, "valid").rows(range(4))
    again = likelihood(model, batch.ids_BL, samples=2, generator=generator(0, "evaluate"))
    bounds = [n["valid_bound"] for n in lines if "valid_bound" in n]
    assert again.nats_per_token == pytest.approx(bounds[-1], abs=1e-6)
    assert state.best_bound == min(bounds)


def test_initial_weights_are_a_function_of_the_seed(recipe_file, prepared):
    manifest = TokenRows(prepared, "train").manifest
    recipe = load_recipe(recipe_file)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build_model(recipe, manifest).embedding.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(one, build_model(recipe, manifest).embedding.weight)
    other = build_model(load_recipe(recipe_file, ["train.seed=1"]), manifest)
    assert not torch.equal(one, other.embedding.weight)


def test_the_block_size_must_divide_the_rows(recipe_file, prepared):
    recipe = load_recipe(recipe_file, ["model.block_size=5"])
    with pytest.raises(UserError, match=r"model\.block_size is 5, which does not divide the 16"):
        build_model(recipe, TokenRows(prepared, "train").manifest)


def test_a_resume_may_change_what_does_not_touch_the_weights(recipe_file):
    run_training(load_recipe(recipe_file))
    harmless = ["checkpoint.every=2", "eval.every=7", "eval.rows=2", "train.steps=14"]
    assert run_training(load_recipe(recipe_file, harmless), resume=True).step == 14


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["optim.lr=1", "model.dropout=0"], r"another model\.dropout, optim\.lr;"),
        (["train.seed=4"], r"another train\.seed;"),
        (["optim.schedule=cosine", "train.steps=20"], r"another train\.steps, optim\.schedule;"),
    ],
)
def test_a_resume_with_a_changed_recipe_names_the_keys(recipe_file, overrides, keys):
    run_training(load_recipe(recipe_file))
    with pytest.raises(UserError, match=keys):
        run_training(load_recipe(recipe_file, overrides), resume=True)


def test_more_steps_need_a_constant_learning_rate(recipe_file):
    run_training(load_recipe(recipe_file, ["optim.schedule=linear"]))
    longer = load_recipe(recipe_file, ["optim.schedule=linear", "train.steps=20"])
    with pytest.raises(UserError, match=r"another train\.steps \(the learning rate depends on it"):
        run_training(longer, resume=True)


def test_data_without_a_split_for_validation(recipe_file, prepared, tmp_path, monkeypatch):
    from blockdiffusion.data import manifest

    real = manifest.Manifest.load

    def without_valid(directory):
        loaded = real(directory)
        loaded.splits.pop("valid")
        return loaded

    monkeypatch.setattr(manifest.Manifest, "load", without_valid)
    with pytest.raises(UserError, match=r"no validation rows; set eval\.every=null"):
        run_training(load_recipe(recipe_file, ["eval.every=5"]))
    assert not (tmp_path / "run").exists()
    assert run_training(load_recipe(recipe_file)).step == 12
