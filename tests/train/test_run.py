"""`run_training`: data, network, evaluation, samples and loop together."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

import blockdiffusion
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.reports.run import report_run
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.train import checkpoint
from blockdiffusion.train.loggers import read_metrics
from blockdiffusion.train.recipe import build_model, load_recipe, to_dict
from blockdiffusion.train.run import run_training

AR = ["objective.name=ar", "model.cond_dim=128"]  # the recipe's cond_dim is another


def test_a_run_from_recipe_to_a_model_that_loads(recipe_file, prepared, tmp_path):
    overrides = ["eval.every=8", "eval.rows=4", "eval.mc_samples=2", "sample.every=12"]
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
    again = likelihood(model, batch.ids_BL, mc_samples=2, generator=generator(0, "evaluate"))
    bounds = [n["valid_bound"] for n in lines if "valid_bound" in n]
    assert again.nats_per_token == pytest.approx(bounds[-1], abs=1e-6)
    assert state.best_bound == min(bounds)


def test_initial_weights_are_a_function_of_the_seed(recipe_file, prepared):
    manifest = TokenRows(prepared, "train").manifest
    recipe = load_recipe(recipe_file)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build_model(recipe, manifest).backbone.embedding.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(one, build_model(recipe, manifest).backbone.embedding.weight)
    other = build_model(load_recipe(recipe_file, ["train.seed=1"]), manifest)
    assert not torch.equal(one, other.backbone.embedding.weight)


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


def test_data_without_a_split_for_validation(recipe_file, tmp_path, no_valid_split):
    with pytest.raises(UserError, match=r"no validation rows; set eval\.every=null"):
        run_training(load_recipe(recipe_file, ["eval.every=5"]))
    assert not (tmp_path / "run").exists()
    assert run_training(load_recipe(recipe_file)).step == 12


def test_a_batch_larger_than_the_data_is_told(recipe_file, prepared, tmp_path):
    rows = TokenRows(prepared, "train").num_rows
    run_training(load_recipe(recipe_file, [f"train.batch_size={2 * rows}", "train.steps=1"]))
    note = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["note"]
    assert note.startswith(f"train.batch_size is {2 * rows}, more than the {rows} rows of the data")


# --- the autoregressive baseline ------------------------------------------------------------------


def test_an_autoregressive_run(recipe_file, prepared, tmp_path):
    overrides = [*AR, "eval.every=8", "eval.rows=4", "sample.every=12", "sample.num=2"]
    recipe = load_recipe(recipe_file, overrides)
    run_training(recipe)
    out = tmp_path / "run"
    lines = read_metrics(out / "metrics.jsonl")
    assert not any("note" in n for n in lines)
    (texts,) = [n["samples"] for n in lines if "samples" in n]
    assert len(texts) == 2 and all(texts)
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["block_size"] == 1
    assert load_recipe(out / "config.yaml") == recipe
    run_training(load_recipe(out / "config.yaml"), resume=True)

    model = blockdiffusion.load(out)
    assert (model.config.objective, model.config.block_size) == ("autoregressive", 1)
    result = likelihood(model, TokenRows(prepared, "valid").rows(range(4)).ids_BL)
    values = [n for n in lines if "valid_bound" in n][-1]
    assert values["valid_bound"] == values["valid_exact"] == pytest.approx(result.nats_per_token)
    assert values["valid_perplexity"] == pytest.approx(result.perplexity)
    assert "valid_perplexity_bound" not in values and values["valid_stderr_noise"] == 0

    page = report_run(out).read_text()
    for words in ("An autoregressive language model", "leftmost", "network passes"):
        assert words in page
    assert "enoising" not in page.partition("<main>")[2].partition("</main>")[0]
    assert "validation loss, exact" in page and "validation bound" not in page
    assert "blockdiff sample" in page and "masked diffusion" not in page


# --- other diffusions -----------------------------------------------------------------------------

D3PM = ["objective.name=d3pm", "objective.timesteps=6", "objective.schedule=square"]


@pytest.mark.parametrize(
    ("overrides", "estimator"),
    [
        (["objective.name=sedd"], "complement"),
        (["objective.name=sedd", "objective.estimator=complement", "model.block_size=16"], "auto"),
        (D3PM, "timesteps"),
        ([*D3PM, "objective.transition=uniform"], "auto"),
    ],
    ids=["sedd", "sedd-whole", "absorbing", "uniform"],
)
def test_a_run_of_another_diffusion(recipe_file, prepared, tmp_path, overrides, estimator):
    """Trained, measured, sampled and reported; stopped and resumed bit for bit."""
    out = tmp_path / "run"
    more = ["eval.every=8", "eval.rows=4", "eval.mc_samples=2", f"eval.estimator={estimator}"]
    recipe = load_recipe(
        recipe_file, [*overrides, *more, "sample.every=12", "sample.max_new_tokens=10"]
    )
    run_training(recipe)
    lines = read_metrics(out / "metrics.jsonl")
    assert len([n for n in lines if n.get("samples")]) == 1
    model = blockdiffusion.load(out)
    assert load_recipe(out / "config.yaml") == recipe
    batch = TokenRows(prepared, "valid").rows(range(4))
    again = likelihood(model, batch.ids_BL, mc_samples=2, generator=generator(0, "evaluate"))
    bounds = [n["valid_bound"] for n in lines if "valid_perplexity_bound" in n]
    assert again.nats_per_token == pytest.approx(bounds[-1], abs=1e-5)
    page = report_run(out, num_samples=1, max_new_tokens=8).read_text()
    assert "validation bound" in page
    if "d3pm" in overrides[0]:
        assert (model.config.timesteps, model.config.noise_schedule) == (6, "square")

    cut = tmp_path / "cut"
    run_training(load_recipe(recipe_file, [*overrides, f"out={cut}", "train.steps=7"]))
    run_training(load_recipe(recipe_file, [*overrides, f"out={cut}"]), resume=True)
    assert all(torch.equal(released(cut)[name], t) for name, t in released(out).items())


def test_mdlm_is_one_block_a_row(recipe_file, prepared, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"block_size is 4, but .* mdlm, .* whole row of 16 tokens"):
        run_training(load_recipe(recipe_file, ["objective.name=mdlm"]))
    mdlm = ["objective.name=mdlm", "model.block_size=null"]
    run_training(load_recipe(recipe_file, mdlm))
    config = blockdiffusion.load(out).config
    assert (config.objective, config.block_size) == ("block_diffusion", 16)
    assert load_recipe(out / "config.yaml").model.block_size == 16
    run_training(load_recipe(recipe_file, mdlm), resume=True)
    run_training(load_recipe(out / "config.yaml"), resume=True)
    same = tmp_path / "same"
    run_training(load_recipe(recipe_file, ["model.block_size=16", f"out={same}"]))
    assert all(torch.equal(released(same)[name], t) for name, t in released(out).items())


def test_weights_of_another_noise_are_no_start(recipe_file, tmp_path):
    run_training(load_recipe(recipe_file, D3PM))
    start = [f"model.init_from={tmp_path / 'run'}", f"out={tmp_path / 'other'}"]
    for overrides, message in (
        ([*D3PM, "objective.transition=uniform"], "transition is absorbing there and uniform here"),
        (["objective.name=sedd"], "objective is d3pm there"),
    ):
        with pytest.raises(UserError, match=message):
            run_training(load_recipe(recipe_file, [*start, *overrides]))
    longer = [*start, *D3PM, "objective.timesteps=50", "train.steps=1"]
    assert run_training(load_recipe(recipe_file, longer)).step == 1


# --- starting from other weights ------------------------------------------------------------------


def released(out):
    return load_file(out / "model" / "model.safetensors")


def started(out):
    """Weights and average after no update at all (the learning rate was next to nothing)."""
    newest = checkpoint.latest(out)
    return load_file(newest / checkpoint.WEIGHTS), load_file(newest / checkpoint.AVERAGE)


def test_a_smaller_block_size_starts_from_the_weights_of_a_larger(recipe_file, tmp_path):
    whole, small = tmp_path / "whole", tmp_path / "small"
    run_training(load_recipe(recipe_file, [f"out={whole}", "model.block_size=16"]))
    start = [f"model.init_from={whole}", "model.dropout=0.2", "model.block_size=4"]
    run_training(load_recipe(recipe_file, [*start, f"out={small}", "train.steps=30"]))
    lines = read_metrics(small / "metrics.jsonl")
    assert lines[0]["note"] == f"started from the weights in {whole}"
    assert blockdiffusion.load(small).config.block_size == 4
    losses = [n["loss"] for n in lines if "loss" in n]
    fresh = [n["loss"] for n in read_metrics(whole / "metrics.jsonl") if "loss" in n]
    assert losses[0] < fresh[0] - 0.3 and len(losses) == 30
    # The first step starts at the source's weights, and so does the average.
    frozen = [f"out={tmp_path / 'frozen'}", "train.steps=1", "optim.lr=1e-30"]
    run_training(load_recipe(recipe_file, [*start, *frozen]))
    for tensors in started(tmp_path / "frozen"):
        assert tensors.keys() == released(whole).keys()
        assert all(torch.equal(tensors[name], t) for name, t in released(whole).items())


def test_a_resume_needs_the_first_weights_no_more(recipe_file, tmp_path):
    source = tmp_path / "source"
    run_training(load_recipe(recipe_file, [f"out={source}"]))
    start = [f"model.init_from={source}", "optim.schedule=constant"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_training(load_recipe(recipe_file, [*start, f"out={whole}"]))
    run_training(load_recipe(recipe_file, [*start, f"out={cut}", "train.steps=7"]))
    shutil.rmtree(source)
    run_training(load_recipe(recipe_file, [*start, f"out={cut}"]), resume=True)
    assert load_recipe(cut / "config.yaml").model.init_from == str(source)
    assert all(torch.equal(released(cut)[name], t) for name, t in released(whole).items())
    with pytest.raises(UserError, match=r"another model\.init_from;"):
        run_training(load_recipe(recipe_file, [f"out={cut}"]), resume=True)
    with pytest.raises(UserError, match="does not exist; give a model directory"):
        run_training(load_recipe(recipe_file, [*start, f"out={tmp_path / 'new'}"]))
    assert not (tmp_path / "new").exists()


def test_a_resume_before_the_first_checkpoint_starts_from_the_same_weights(recipe_file, tmp_path):
    source, out = tmp_path / "source", tmp_path / "run"
    run_training(load_recipe(recipe_file, [f"out={source}"]))
    recipe = load_recipe(recipe_file, [f"model.init_from={source}"])
    run_training(recipe)
    expected = released(out)
    shutil.rmtree(out / "checkpoints")  # as if killed before the first one
    run_training(recipe, resume=True)
    assert all(torch.equal(released(out)[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_run_cannot_start_from_itself(recipe_file, tmp_path, inside):
    run_training(load_recipe(recipe_file))
    with pytest.raises(UserError, match=r"model\.init_from and out are both"):
        run_training(load_recipe(recipe_file, [f"model.init_from={tmp_path / 'run' / inside}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.estimator=exact", "model.block_size=16"], "S = 16; use the estimator auto"),
        (["eval.estimator=cuont"], "unknown estimator.*auto, exact or orders"),
        (["eval.estimator=count[0.3,0.8]"], "clipped"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_the_first_step(
    recipe_file, tmp_path, overrides, message
):
    with pytest.raises(UserError, match=message):
        run_training(load_recipe(recipe_file, ["eval.every=8", *overrides]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
