"""A judge is not the model under test, and what it learnt from is told where it can be read."""

import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from blockdiffusion.checkpoints.formats import load
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.independence import check_scorer
from blockdiffusion.evaluate.scorer import CausalScorer, load_scorer
from blockdiffusion.train.recipe import load_recipe
from blockdiffusion.train.run import run_training
from tests.conftest import GOLDEN
from tests.evaluate.scorers import save_gpt2

SMALL = [
    "train.steps=1", "train.batch_size=2", "model.num_hidden_layers=1", "model.hidden_size=32",
    "model.num_attention_heads=2",    "eval.every=null", "sample.every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs: model; judge on the same rows; cut, on the same text in other rows; other text; child,
    which starts from the model's weights."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "a.txt").write_text("Return the number of small blocks.\n\n" * 100)
    (folder / "b.txt").write_text("It was the best of times, it was the worst.\n\n" * 100)
    (folder / "recipe.yaml").write_text("out: none\ndata: {path: none}\ntrain: {steps: 1}\n")
    for name, text, length in (("data", "a", 32), ("cut", "a", 16), ("other", "b", 32)):
        options = PrepareOptions(
            seq_len=length, tokenizer="byte", document_bytes=500, num_workers=1
        )
        prepare([str(folder / f"{text}.txt")], folder / name, options)

    def train(out, data, *more):
        run_training(load_recipe(
            folder / "recipe.yaml",
            [f"out={folder / out}", f"data.path={folder / data}", *SMALL, *more],
        ))  # fmt: skip

    train("model", "data")
    train("judge", "data", "objective.name=ar", "train.seed=1")
    train("judge-cut", "cut", "objective.name=ar")
    train("judge-other", "other", "objective.name=ar")
    train("child", "other", f"model.init_from={folder / 'model'}")
    return folder


def check(place, model, judge):
    return check_scorer(str(place / model), load(place / model), load_scorer(str(place / judge)))


def test_the_model_itself_is_refused(place, tmp_path):
    with pytest.raises(UserError, match="both the model under test and its scorer"):
        check(place, "model", "model")
    with pytest.raises(UserError, match="both the model under test and its scorer"):
        check(place, "model", "model/model")
    copy = tmp_path / "copy"
    shutil.copytree(place / "model" / "model", copy)
    with pytest.raises(UserError, match="has the same weights"):
        check(place, "model", copy)


def test_another_checkpoint_of_the_run_is_refused(place, tmp_path):
    """A copy of the run's directory with other weights in it."""
    copy = tmp_path / "copy"
    shutil.copytree(place / "model", copy)
    shutil.copy(place / "child/model/model.safetensors", copy / "model/model.safetensors")
    with pytest.raises(UserError, match="come from the same run"):
        check(place, "model", copy)


def test_the_same_weights_under_other_names_and_precision(tmp_path):
    name = str(save_gpt2(tmp_path))
    judge = load_scorer(name)
    config = GPT2Config.from_pretrained(name)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(judge.model.state_dict())
    with pytest.raises(UserError, match="has the same weights"):
        check_scorer("elsewhere", model.to(torch.bfloat16), judge)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert check_scorer("elsewhere", model, judge) == []


def test_text_that_both_learnt_from_is_told(place):
    (rows,) = check(place, "model", "judge")
    assert "trained on the same rows as the model" in rows
    (text,) = check(place, "model", "judge-cut")
    assert "trained on the same text as the model (a.txt)" in text
    assert check(place, "model", "judge-other") == []


def test_related_weights_are_told(place):
    for model, judge in (("model", "child"), ("child", "model")):
        (related,) = check(place, model, judge)
        assert "started from the weights of the other" in related


def test_nothing_is_claimed_where_nothing_can_be_read(place):
    judge = load_scorer(str(place / "judge"))
    (unknown,) = check_scorer(None, None, judge)
    assert "not known" in unknown
    assert check_scorer(str(GOLDEN / "bd3lm-hf"), None, judge) == []
    assert isinstance(judge, CausalScorer) is False
