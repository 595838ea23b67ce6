"""The adaptation study: its runs are valid recipes; it trains, scores and compares row by row."""

import json
import math

import pytest

import blockdiffusion
from blockdiffusion.train.recipe import load_recipe
from studies import adaptation as study
from tests.tiny import TEXT
from tests.train.test_adapt import L, place  # noqa: F401  (a fixture)


@pytest.mark.parametrize("name", study.RUNS)
def test_every_run_is_a_valid_recipe(name, tmp_path):
    size, overrides = study.RUNS[name]
    settings = {"out": tmp_path, "adapt.parent": "p", "data.path": "d", "model.block_size": size}
    given = [*(f"{key}={value}" for key, value in settings.items()), *overrides]
    assert load_recipe(study.RECIPE, given).model.block_size == size


@pytest.mark.slow
def test_it_trains_scores_and_compares(place, tmp_path):  # noqa: F811
    for name in ("tuned", "s4"):
        study.perform(name, str(place / "parent"), place / "data", 2, tmp_path)
        study.score(name, TEXT, 3, tmp_path)
    readings = json.loads((tmp_path / "s4" / study.RESULT).read_text())["readings"]
    model = blockdiffusion.load(tmp_path / "s4")
    ids = model.tokenizer(TEXT, return_tensors="pt")["input_ids"][:, : 3 * L].view(3, L)
    found = blockdiffusion.likelihood(model, ids, estimator="exact")
    assert readings["exact"] == pytest.approx(found.exact_nats_per_row.tolist(), rel=1e-5)
    assert readings["bound"] == pytest.approx(found.nats_per_row.tolist(), rel=1e-5)
    lines = list(study.table(tmp_path, against="tuned"))
    assert lines[0] == "| run | autoregressive | left to right | exact | bound |"
    tuned = json.loads((tmp_path / "tuned" / study.RESULT).read_text())["readings"]
    perplexity = math.exp(sum(tuned["autoregressive"]) / (3 * L))
    assert lines[2].startswith(f"| tuned | {perplexity:.2f} |")


def test_differences_are_paired(tmp_path):
    for name, rows in (("tuned", [10.0, 20.0]), ("s4", [12.0, 22.0])):
        (tmp_path / name).mkdir()
        result = {"length": 10, "block_size": 4, "readings": {"autoregressive": rows}}
        (tmp_path / name / study.RESULT).write_text(json.dumps(result))
    assert f"| s4 | {math.exp(1.7):.2f} (+0.200 ± 0.000) |" in study.table(tmp_path, "tuned")
