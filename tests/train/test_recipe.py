"""Recipes: strict reading, overrides, what is refused and how it is said."""

import dataclasses
import math
import re

import pytest
import yaml

from blockdiffusion.errors import UserError
from blockdiffusion.train.recipe import Recipe, differences, load_recipe, to_dict

MINIMAL = {"out": "runs/x", "data": {"path": "prepared"}, "train": {"steps": 10}}


@pytest.fixture
def write(tmp_path):
    def write(tree) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return str(path)

    return write


def test_defaults_are_the_papers(write):
    recipe = load_recipe(write(MINIMAL))
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.warmup_steps) == (
        3e-4,
        (0.9, 0.999),
        2500,
    )
    assert (recipe.model.num_hidden_layers, recipe.model.hidden_size, recipe.model.dropout) == (
        12,
        768,
        0.1,
    )
    assert recipe.train.batch_size == 512


def test_overrides_win_and_take_yaml_values(write):
    recipe = load_recipe(
        write(MINIMAL | {"optim": {"lr": 1}}),
        [
            "optim.lr=1e-4",
            "optim.clip_norm=null",
            "optim.betas=[0.8, 0.99]",
            "objective.clip=[3e-1, 1]",
            "train.steps=20",
            "log.loggers=[tensorboard]",
            "data.path=2024",
            "out=a=b",
        ],
    )
    assert recipe.optim.lr == 1e-4
    assert recipe.optim.clip_norm is None
    assert recipe.optim.betas == (0.8, 0.99)
    assert recipe.objective.clip == (0.3, 1.0)
    assert recipe.train.steps == 20
    assert recipe.log.loggers == ("tensorboard",)
    assert recipe.data.path == "2024"
    assert recipe.out == "a=b"


def test_numbers_written_as_yaml_strings_and_ints_become_floats(write):
    recipe = load_recipe(write(MINIMAL | {"optim": {"lr": "1e-4", "weight_decay": 1}}))
    assert recipe.optim.lr == 1e-4
    assert recipe.optim.weight_decay == 1.0 and type(recipe.optim.weight_decay) is float


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.learning_rate=1",
            r"unknown key optim\.learning_rate.*\(known here: name, lr, betas",
        ),
        ("optim.weight_decy=1", r"unknown key optim\.weight_decy; .* is optim\.weight_decay "),
        ("train.lr=1", r"unknown key train\.lr; the nearest known one is optim\.lr "),
        ("trian.steps=1", r"unknown key trian; the nearest known one is train"),
        ("train.steps=1.5", r"train\.steps is 1\.5; it must be a whole number"),
        ("train.steps=true", r"train\.steps is True; it must be a whole number"),
        ("train.steps=ten", r"train\.steps is 'ten'; it must be a whole number"),
        ("train.steps=null", r"train\.steps is null; it must be a whole number"),
        ("optim.lr=fast", r"optim\.lr is 'fast'; it must be a number"),
        ("optim.lr=true", r"optim\.lr is True; it must be a number"),
        ("optim.clip_norm=x", r"optim\.clip_norm is 'x'; it must be a number or null"),
        ("optim.betas=[0.9]", r"optim\.betas is \[0\.9\]; it must be a list of 2"),
        ("train.dtype=fp16", r"train\.dtype is 'fp16'; it must be float32 or bfloat16"),
        ("log.loggers=[csv]", r"log\.loggers is .*; it must be a list of: tensorboard or wandb"),
        ("optim=3", r"optim is '3'; it is a section"),
        ("optim.lr.x=3", r"lr is a value, not a section"),
        ("optim.lr", r"'optim\.lr' is no override"),
        ("train.batch_size=0", r"train\.batch_size is 0; it must be at least 1"),
        ("train.micro_batch_size=600", r"train\.micro_batch_size is 600; it must be at most"),
        ("optim.lr=-1", r"optim\.lr is -1\.0; it must be above 0"),
        ("optim.lr=.nan", r"optim\.lr is nan; it must be a number"),
        (
            "model.hidden_size=100",
            r"model\.hidden_size is 100; it must be a multiple of 2 \* model\.num_attention_heads",
        ),
        ("model.dropout=1", r"model\.dropout is 1\.0; it must be in"),
        ("eval.every=0", r"eval\.every is 0"),
        ("sample.num=0", r"sample\.num is 0"),
        ("checkpoint.keep=0", r"checkpoint\.keep is 0"),
        ("objective.schedule=lag", r"unknown schedule 'lag'"),
        ("objective.name=lm", r"objective\.name is 'lm'; it must be bd3lm or mdlm or sedd or d3pm"),
        ("objective.timesteps=0", r"objective\.timesteps is 0, but objective\.name is bd3lm"),
        ("objective.t_min=2", r"objective\.t_min is 2\.0"),
        ("search.widths=[0.5,1.5]", r"search\.widths has 1\.5; every width must be in \(0, 1\]"),
        ("search.widths=0.5", r"search\.widths is 0\.5; it must be a list of: a number"),
        ("search.offset_step=0", r"search\.offset_step is 0\.0; it must be in"),
        ("search.by=both", r"search\.by is 'both'; it must be loss or gradient"),
    ],
)
def test_mistakes_get_one_sentence_that_names_the_key(write, override, message):
    source = write(MINIMAL | {"optim": {"lr": 1e-3}})
    with pytest.raises(UserError, match=message) as raised:
        load_recipe(source, [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.estimator=count", r"objective\.estimator is count, but .* is ar, which draws"),
        (
            "objective.clip=[0.3,0.8]",
            r"objective\.clip is \(0\.3, 0\.8\), .*; set objective\.clip=null$",
        ),
        (
            "objective.schedule=cosine",
            r"objective\.schedule is cosine, .*; set objective\.schedule=linear$",
        ),
        ("objective.num_noisy=2", r"objective\.num_noisy is 2"),
        ("objective.t_min=0", r"objective\.t_min is 0\.0"),
        ("objective.stratify=none", r"objective\.stratify is none"),
        (
            "model.block_size=8",
            r"model\.block_size is 8, but .* has no blocks .*; set model\.block_size=1$",
        ),
        ("model.cond_dim=64", r"model\.cond_dim is 64, .*; set model\.cond_dim=128$"),
        ("model.clean_attention=causal", r"model\.clean_attention is causal"),
        ("eval.estimator=count", r"eval\.estimator is count, .* whose likelihood is exact"),
        ("search.every=5", r"search\.every .* is ar, which draws no masks and has no clip; set"),
    ],
)
def test_what_ar_does_not_read_is_refused(write, override, message):
    source = write(MINIMAL | {"objective": {"name": "ar"}})
    with pytest.raises(UserError, match=message):
        load_recipe(source, [override])


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ({"model": {"cond_dim": 64}}, "objective.name=ar"),
        ({"model": {"block_size": 16}}, "objective.name=ar"),
        ({"model": {"clean_attention": "causal"}}, "objective.name=ar"),
        ({"eval": {"estimator": "count"}}, "objective.name=ar"),
        ({"objective": {"estimator": "bernoulli", "clip": [0.3, 0.8]}}, "objective.name=ar"),
        ({"objective": {"estimator": "bernoulli", "t_min": 0.01}}, "objective.estimator=null"),
        ({"optim": {"name": "muon", "momentum": 0.9}}, "optim.name=adamw"),
        ({"search": {"every": 5}}, "objective.name=d3pm"),
    ],
)
def test_what_a_message_says_can_be_written_behind_the_command(write, recipe, override):
    """An override cannot take a key out of a recipe; each message names one that mends it."""
    source, overrides = write(MINIMAL | recipe), [override]
    for _ in range(3):
        try:
            assert load_recipe(source, overrides) and len(overrides) > 1
            return
        except UserError as told:
            (found,) = re.findall(r"; set ([a-z_.]+=\S+?),?(?: or .*)?$", str(told))
            overrides.append(found)
    raise AssertionError(overrides)


@pytest.mark.parametrize("block_size", [1, 4])
def test_ar_has_no_blocks(write, block_size):
    recipe = load_recipe(write(MINIMAL), ["objective.name=ar", f"model.block_size={block_size}"])
    assert recipe.model.block_size == 1
    assert load_recipe(write(yaml.safe_dump(to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("bd3lm", "objective.transition=uniform", r"transition is uniform, .* has no such choice"),
        (
            "mdlm",
            "objective.timesteps=5",
            r"timesteps is 5, .* mdlm, .*; set objective\.timesteps=1000$",
        ),
        ("sedd", "objective.timesteps=5", r"timesteps is 5, but objective\.name is sedd"),
        ("d3pm", "objective.estimator=count", r"estimator is count, .* whose time is discrete"),
        ("d3pm", "objective.clip=[0.3,0.8]", r"clip is .* d3pm, .*; set objective\.clip=null$"),
        ("d3pm", "objective.t_min=0", r"t_min is 0\.0, .* d3pm"),
        ("d3pm", "objective.timesteps=0", r"objective\.timesteps is 0; it must be at least 1"),
        ("d3pm", "search.every=5", r"search\.every .* is d3pm, whose time is discrete and has no"),
    ],
)
def test_what_an_objective_does_not_read_is_refused(write, name, override, message):
    source = write(MINIMAL | {"objective": {"name": name}})
    with pytest.raises(UserError, match=message):
        load_recipe(source, [override])


@pytest.mark.parametrize("more", ["objective.clip=[0.3,0.8]", "search.every=5"])
def test_sedd_has_clips_with_bernoulli_only(write, more):
    recipe = write(MINIMAL | {"objective": {"name": "sedd"}})
    load_recipe(recipe, [more, "objective.estimator=bernoulli"])
    message = r"objective\.estimator is {0}, which draws .* sedd reads.*bernoulli"
    with pytest.raises(UserError, match=message.format("count")):
        load_recipe(recipe, [more, "objective.estimator=count"])
    with pytest.raises(UserError, match=message.format("complement")):
        load_recipe(recipe, [more])


@pytest.mark.parametrize("override", ["objective.schedule=cosine", "objective.t_min=0.01"])
def test_times_belong_to_estimators_that_draw_them(write, override):
    recipe = write(MINIMAL)
    load_recipe(recipe, [override, "objective.estimator=bernoulli"])
    for more in ([], ["objective.estimator=count"], ["objective.name=sedd"]):
        with pytest.raises(UserError, match=r"draws no times; .*estimator=bernoulli"):
            load_recipe(recipe, [override, *more])


def test_the_schedule_matters_to_the_weights_of_a_clip(write):
    clipped = ["objective.clip=[0.3,0.8]", "objective.schedule=cosine"]
    assert load_recipe(write(MINIMAL), clipped).objective.used_estimator == "complement"
    assert load_recipe(write(MINIMAL), ["objective.name=d3pm"]).objective.schedule == "linear"


def test_the_usual_block_size(write):
    for name, size in (("bd3lm", 4), ("sedd", 4), ("d3pm", 4), ("ar", 1), ("mdlm", None)):
        assert load_recipe(write(MINIMAL), [f"objective.name={name}"]).model.block_size == size


def test_bools_are_not_ints_in_a_file_either(write):
    with pytest.raises(UserError, match=r"train\.steps is True; it must be a whole number"):
        load_recipe(write(MINIMAL | {"train": {"steps": True}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys with values are needed"),
        ("- a", "keys with values are needed"),
        ("a: [", "not valid YAML"),
        ("out: x\ntrain: {steps: 1}", r"data\.path is missing"),
        ("out: x\ndata: {path: y}", r"train\.steps is missing"),
        ("train:\n  steps: 1\n  steps: 2", "line 3: steps is given twice"),
    ],
)
def test_bad_files_are_refused(write, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(text))


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read "):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_the_resolved_recipe_is_a_recipe(write):
    recipe = load_recipe(write(MINIMAL), ["optim.lr=1e-5", "objective.clip=[0.3,0.8]"])
    assert load_recipe(write(yaml.safe_dump(to_dict(recipe)))) == recipe


def test_every_option_has_a_section_that_shows_in_the_resolved_recipe(write):
    tree = to_dict(load_recipe(write(MINIMAL)))
    assert list(tree) == [item.name for item in dataclasses.fields(Recipe)]
    assert tree["eval"]["every"] == 1000
    assert not math.isnan(tree["optim"]["lr"])


def test_differences_are_dotted_keys():
    before = {"a": {"x": 1, "y": [1, 2]}, "b": 3, "gone": {"z": 0}}
    after = {"a": {"x": 1, "y": [1, 3]}, "b": 4, "new": {"w": None}}
    assert differences(before, after) == ["a.y", "b", "gone.z", "new.w"]
    assert differences(before, before) == []
