"""The studies' runs are recipes that load, and their tables come from what runs write."""

import json

import pytest

from blockdiffusion.train.recipe import load_recipe
from studies import variance as study


def all_jobs(runs):
    return list(study.jobs(runs, [part.name for part in study.PARTS], seeds=2))


def test_every_run_of_the_variance_study_is_a_valid_recipe(tmp_path):
    found = all_jobs(tmp_path)
    assert len({job.out for job in found}) == len(found) == 2 * (11 + 15) + 2 * 3 + 5 + 4
    bases = list(study.bases(tmp_path, [part.name for part in study.PARTS]))
    assert [job.out.name for job in bases] == ["base", "base-full"]
    for job in [*bases, *found]:
        recipe = load_recipe(study.RECIPE, [f"out={job.out}", *job.overrides])
        assert recipe.train.steps == job.steps
    assert load_recipe(study.RECIPE).train.steps == study.BASE_STEPS


def test_the_important_runs_come_first(tmp_path):
    order = [job.out.parent.name for job in all_jobs(tmp_path)]
    assert order[:4] == ["linear", "clip--0-45--0-95-", "count", "complement"]
    assert order[4:6] == ["complement--clip--0-45--0-95-", "linear"]
    assert order.index("searched-clip") > order.index("autoregressive")


def test_arms_are_compared_per_seed(tmp_path):
    part = study.PARTS[0]
    for seed, (linear, count) in enumerate([(5.0, 4.9), (5.2, 5.0), (5.1, 5.0)]):
        for arm, bound in ((part.arms[0], linear), (part.arms[2], count)):
            out = study.folder_of(tmp_path, part, arm, seed)
            out.mkdir(parents=True)
            line = {"step": part.steps, "valid_bound": bound, "valid_stderr_noise": 0.01 * count}
            (out / "metrics.jsonl").write_text(
                json.dumps({"step": 1, "loss": 6}) + "\n" + json.dumps(line)
            )
    lines = list(study.comparison(tmp_path, part, seeds=3))
    assert lines[2].startswith("| linear | 5.1000 | +0.0000 ± 0.0000 (3) |")
    assert lines[3].startswith("| count | 4.9667 | -0.1333 ± 0.0333 (3) |")
    assert lines[4:] == ["\nNoise of each bound: at most 0.0500."]


@pytest.mark.parametrize("cost", [1.0, 1.5, 2.5])
def test_equal_compute_is_a_whole_step_that_is_evaluated(cost):
    part = study.PARTS[0]
    step = study.at_equal_compute(part, study.Arm("x", (), cost))
    assert step * cost == pytest.approx(part.steps)


def test_the_distance_to_the_autoregressive_model_is_split_at_as_many_tokens(tmp_path):
    part = next(part for part in study.PARTS if part.name == "gap")
    reference, smallest, *_ = part.arms
    for arm, line in (
        (reference, {"step": study.BASE_STEPS + 120, "valid_bound": 4.0}),
        (smallest, {"step": 120, "valid_bound": 4.75, "valid_exact": 4.5}),
        (smallest, {"step": 240, "valid_bound": 4.7, "valid_exact": 4.4}),
    ):
        out = study.folder_of(tmp_path, part, arm, 0)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line | {"valid_stderr_noise": 0.0}) + "\n")
    rows = list(study.gaps(tmp_path, part))[2:]
    assert rows == ["| S = 2 | 120 | 4.7500 | 4.5000 | 0.0000 | 4.0000 | 0.2500 | 0.5000 |"]
