"""The search of the clipped schedule: its grid, what it measures, and resuming with it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blockdiffusion.data.loader import TokenRows
from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.diffusion.estimators import Bernoulli
from blockdiffusion.diffusion.schedules import Clipped, Cosine, Linear
from blockdiffusion.diffusion.variance import Moments
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.seeding import generator, seeded
from blockdiffusion.train import checkpoint, schedule_search
from blockdiffusion.train.loggers import read_metrics
from blockdiffusion.train.options import ObjectiveOptions
from blockdiffusion.train.recipe import build_model, load_recipe
from blockdiffusion.train.run import run_training
from blockdiffusion.train.schedule_search import (
    ScheduleSearch,
    SearchOptions,
    clip_grid,
    least_variance,
    variance_of,
)

SMALL = SearchOptions(
    every=4, widths=(0.5, 1.0), offset_step=0.5, rows=5, batch_size=3, replicates=3
)
OVERRIDES = [
    "objective.estimator=bernoulli", "search.every=4", "search.widths=[0.5, 0.8]",
    "search.offset_step=0.25", "search.rows=4", "search.batch_size=2", "search.replicates=2",
]  # fmt: skip


@pytest.fixture
def valid(prepared):
    return TokenRows(prepared, "valid")


@pytest.fixture
def make_network(recipe_file, valid):
    """A network with generic weights: an untrained one predicts the same everywhere."""

    def make(block_size=4):
        recipe = load_recipe(recipe_file, [f"model.block_size={block_size}", "model.dropout=0.5"])
        model = build_model(recipe, valid.manifest)
        draws = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
        return model

    return make


# --- the grid


def test_the_papers_grid():
    grid = clip_grid(SearchOptions(), 4)
    assert len(grid) == 11 + 9 + 7 + 5 + 3
    assert grid[0] == (0.0, 0.5) and grid[10] == (0.5, 1.0) and grid[-1] == (0.1, 1.0)
    assert (0.45, 0.95) in grid and (0.3, 0.8) in grid  # as written, not 0.8500000000000001
    assert grid == sorted(grid, key=lambda clip: (round(clip[1] - clip[0], 6), clip[0]))
    assert all(0 <= beta < omega <= 1 for beta, omega in grid)


def test_everything_masked_is_tried_for_blocks_of_one_token_only():
    assert clip_grid(SearchOptions(), 1) == [(1.0, 1.0), *clip_grid(SearchOptions(), 4)]
    for size in (2, 4, 16):
        assert all(omega > beta for beta, omega in clip_grid(SearchOptions(), size))


@pytest.mark.parametrize(
    ("widths", "step", "expected"),
    [
        ((1.0,), 0.3, [(0.0, 1.0)]),
        ((0.4, 0.4), 0.25, [(0.0, 0.4), (0.25, 0.65), (0.5, 0.9)]),
        ((0.9, 0.7), 1.0, [(0.0, 0.7), (0.0, 0.9)]),
        ((0.7,), 0.1, [(0.0, 0.7), (0.1, 0.8), (0.2, 0.9), (0.3, 1.0)]),  # 0.3 fits, rounded or not
    ],
)
def test_other_grids(widths, step, expected):
    assert clip_grid(SearchOptions(widths=widths, offset_step=step), 4) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"search\.widths has 0 widths; give 1 to 100"),
        ({"widths": (0.5, 1.2)}, r"search\.widths has 1\.2; every width must be in \(0, 1\]"),
        ({"widths": (0.0,)}, r"search\.widths has 0\.0"),
        ({"widths": (-0.5,)}, r"search\.widths has -0\.5"),
        ({"widths": (math.nan,)}, r"search\.widths has nan"),
        ({"offset_step": 0.0}, r"search\.offset_step is 0\.0; it must be in"),
        ({"offset_step": -0.1}, r"search\.offset_step is -0\.1"),
        ({"offset_step": math.nan}, r"search\.offset_step is nan"),
        ({"every": 0}, r"search\.every is 0; it must be at least 1"),
        ({"rows": 0}, r"search\.rows is 0"),
        ({"batch_size": 0}, r"search\.batch_size is 0"),
        ({"replicates": 1}, r"search\.replicates is 1; it must be at least 2"),
    ],
)
def test_a_grid_that_leaves_the_unit_interval_is_refused(options, message):
    with pytest.raises(UserError, match=message) as raised:
        SearchOptions(**options)
    assert "\n" not in str(raised.value)


# --- the choice


def test_the_least_variance_wins_and_of_equal_ones_what_masks_most_then_the_widest():
    assert least_variance({(0.0, 0.5): 2.0, (0.5, 1.0): 1.0, (0.0, 0.9): 3.0}, 1) == (0.5, 1.0)
    tied = {(0.0, 0.9): 1.0, (0.05, 0.95): 1.0, (0.15, 0.85): 1.0, (0.1, 0.9): 1.0, (0.5, 1.0): 1.1}
    assert least_variance(tied, 1) == (0.05, 0.95)  # as much as the next two, rounding aside
    tied[1.0, 1.0] = 1.0
    assert least_variance(tied, 1) == (1.0, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_variance_that_is_not_finite_is_refused(value):
    with pytest.raises(UserError, match=r"step 7: the search found a variance of \w+ for .*0\.5"):
        least_variance({(0.0, 0.5): 1.0, (0.5, 1.0): value}, 7)


def test_the_criterion_is_a_function_of_the_moments():
    moments = Moments(
        loss=3.0,
        loss_variance=0.25,
        block_variance=9.0,
        gradient_variance={"a": 1.0, "b": 0.5},
        gradient_square={"a": 7.0, "b": 7.0},
        losses=(2.5, 3.5),
    )
    assert variance_of(moments, "loss") == 0.25
    assert variance_of(moments, "gradient") == 1.5


# --- what is measured, against a slow reference


def brute_force(model, rows, clip, base, options, step, seed):
    """Variances over redrawn masks of the losses, and of their gradients, from their definition."""
    law = Bernoulli(schedule=Clipped(base, *clip))
    of_loss, of_gradient = [], []
    for number, start in enumerate(range(0, options.rows, options.batch_size)):
        ids = rows.rows(np.arange(start, min(start + options.batch_size, options.rows))).ids_BL
        draws = generator(seed, "search", step, number)
        free = torch.ones_like(ids, dtype=torch.bool)
        losses, gradients = [], []
        for _ in range(options.replicates):
            own = seeded(int(torch.randint(2**63 - 1, (), generator=draws)))
            drawn = law(ids, free, model.config.block_size, model.config.mask_id, own)
            model.eval().zero_grad()
            nll = masked_nll(model, drawn.noisy_BNL, ids, drawn.scored_BNL)
            loss = (nll * drawn.weight_BNL).sum() / ids.numel()
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        of_loss.append(torch.tensor(losses, dtype=torch.float64).var().item())
        of_gradient.append(torch.stack(gradients).var(0).sum().item())
    return sum(of_loss) / len(of_loss), sum(of_gradient) / len(of_gradient)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("by", ["loss", "gradient"])
def test_variances_are_those_of_the_definition(make_network, valid, by, schedule):
    model, options = make_network(), replace(SMALL, by=by)
    search = ScheduleSearch(
        options, ObjectiveOptions(estimator="bernoulli", schedule=schedule), valid, 4, seed=5
    )
    found = search.run(model, step=8)
    assert all(parameter.grad is None for parameter in model.parameters())
    base = {"linear": Linear, "cosine": Cosine}[schedule]()
    expected = {
        clip: brute_force(model, valid, clip, base, options, 8, 5)[by == "gradient"]
        for clip in [(0.0, 0.5), (0.5, 1.0), (0.0, 1.0)]
    }
    assert found.variances == pytest.approx(expected, rel=1e-3)
    assert list(found.variances) == list(expected)
    assert found.clip == min(expected, key=expected.__getitem__)
    assert max(expected.values()) > 1.5 * min(expected.values())  # there was something to find


@pytest.mark.parametrize("estimator", ["bernoulli", "resampled", "count", "complement"])
def test_all_clips_see_the_same_numbers_and_other_steps_others(
    make_network, valid, monkeypatch, estimator
):
    objective = ObjectiveOptions(estimator=estimator, clip=(0.2, 0.9))
    search = ScheduleSearch(SMALL, objective, valid, 4, seed=0)
    states = []
    real = schedule_search.batch_moments

    def spy(model, ids, free, padding, law, replicates, draws, **more):
        before = draws.get_state()
        moments = real(model, ids, free, padding, law, replicates, draws, **more)
        states.append((before, draws.get_state()))
        return moments

    monkeypatch.setattr(schedule_search, "batch_moments", spy)
    first = search.run(make_network(), 4)
    assert len(states) == 2 * 3  # batches of three rows and of two; three clips
    for start in (0, 3):
        for state in states[start : start + 3]:
            # As much was drawn for every clip: replicates stay in step, not the first one only.
            assert all(torch.equal(*pair) for pair in zip(state, states[start], strict=True))
    assert not torch.equal(states[0][0], states[3][0])
    assert search.run(make_network(), 4).variances == first.variances
    assert search.run(make_network(), 8).variances != first.variances
    other = ScheduleSearch(SMALL, objective, valid, 4, seed=1)
    assert other.run(make_network(), 4).variances != first.variances


def test_equal_clips_have_equal_variances_thanks_to_common_numbers(make_network, valid):
    """A clip of width one and no clip are one law: the noise of the search cancels."""
    objective = ObjectiveOptions(estimator="bernoulli", t_min=0.0)
    search = ScheduleSearch(SMALL, objective, valid, 4, seed=0)
    model = make_network()
    clipped = search.run(model, 4).variances[0.0, 1.0]
    search.estimators = {(0.0, 1.0): Bernoulli(t_min=0.0)}
    assert search.run(model, 4).variances == {(0.0, 1.0): clipped}


def test_the_state_of_the_network_and_of_the_global_stream_do_not_matter(make_network, valid):
    search = ScheduleSearch(SMALL, ObjectiveOptions(), valid, 4, seed=0)
    model = make_network().train()  # dropout 0.5
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = search.run(model, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert search.run(model.train(), 4).variances == first.variances


def test_blocks_of_one_token_find_that_everything_is_to_be_masked(make_network, valid):
    options = replace(SMALL, widths=(0.5, 0.9))
    objective = ObjectiveOptions(estimator="bernoulli")
    found = ScheduleSearch(options, objective, valid, 1, seed=0).run(make_network(1), 4)
    assert found.clip == (1.0, 1.0)
    assert found.variances[1.0, 1.0] == 0.0
    assert all(v > 1e-4 for clip, v in found.variances.items() if clip != (1.0, 1.0))


@pytest.mark.parametrize("estimator", ["count", "complement"])
def test_blocks_of_one_token_have_one_number_of_masked_tokens(make_network, valid, estimator):
    """All clips are one law at S = 1, and tie: everything is masked, as it is with all of them."""
    options = replace(SMALL, widths=(0.5, 0.9))
    objective = ObjectiveOptions(estimator=estimator)
    found = ScheduleSearch(options, objective, valid, 1, seed=0).run(make_network(1), 4)
    assert set(found.variances.values()) == {0.0}
    assert found.clip == (1.0, 1.0)


# --- refusals


def test_a_clip_that_the_estimator_cannot_use_is_refused_before_training(recipe_file, tmp_path):
    recipe = load_recipe(
        recipe_file,
        [*OVERRIDES, "model.block_size=1", "objective.estimator=resampled", "objective.clip=[0,1]"],
    )
    with pytest.raises(UserError, match=r"no number of masked tokens out of 1 has its share"):
        run_training(recipe)
    assert not (tmp_path / "run").exists()


def test_a_grid_with_clips_below_t_min_is_refused(valid):
    """Nothing would be masked there, and so have the least variance."""
    objective = ObjectiveOptions(estimator="bernoulli", t_min=0.5)
    with pytest.raises(UserError, match=r"t_min is 0\.5, but .* bernoulli\[0,0\.5\] end at 0\.5"):
        ScheduleSearch(SMALL, objective, valid, 4, seed=0)


def test_a_search_needs_validation_rows(recipe_file, tmp_path, no_valid_split):
    with pytest.raises(UserError, match=r"no validation rows; set search\.every=null"):
        run_training(load_recipe(recipe_file, OVERRIDES))
    assert not (tmp_path / "run").exists()


# --- in a run


def files(out):
    """The final tensors, and the numbers of every line that do not depend on the time."""
    last = checkpoint.latest(out)
    tensors = [p for folder in (last, out / "model") for p in folder.glob("*.safetensors")]
    lines = [
        {k: v for k, v in line.items() if not k.endswith(("seconds", "per_second", "_share"))}
        for line in read_metrics(out / "metrics.jsonl")
        if "loss" in line or "clip_grid" in line
    ]
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(tensors)}, lines


def searches(out):
    return [line for line in read_metrics(out / "metrics.jsonl") if "clip_grid" in line]


def test_every_step_is_trained_with_the_clip_found_last(recipe_file, tmp_path, monkeypatch):
    used = []
    real = Bernoulli.__call__

    def spy(law, clean_BL, *rest):
        if len(clean_BL) == 6:  # rows of a training batch; batches of a search have two
            used.append(law.schedule.name)
        return real(law, clean_BL, *rest)

    monkeypatch.setattr(Bernoulli, "__call__", spy)
    state = run_training(load_recipe(recipe_file, [*OVERRIDES, "objective.clip=[0.1,0.7]"]))
    found = searches(tmp_path / "run")
    assert [line["step"] for line in found] == [4, 8, 12]
    names = ["linear[{:g},{:g}]".format(*line["clip"]) for line in found]
    assert used == 3 * ["linear[0.1,0.7]"] + 4 * names[:1] + 4 * names[1:2] + names[2:]
    assert state.clip == tuple(found[-1]["clip"])
    for line in found:
        grid = {(beta, omega): variance for beta, omega, variance in line["clip_grid"]}
        assert list(grid) == [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.0, 0.8)]
        assert grid[tuple(line["clip"])] == min(grid.values()) > 0
        assert line["search_seconds"] > 0


def test_training_is_unclipped_until_the_first_search(recipe_file, tmp_path):
    run_training(load_recipe(recipe_file, [*OVERRIDES, "out=" + str(tmp_path / "plain")]))
    unclipped = [OVERRIDES[0], "out=" + str(tmp_path / "never")]
    run_training(load_recipe(recipe_file, unclipped))
    plain, never = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("plain", "never")
    )
    assert plain[:3] == never[:3] and plain[3] != never[3]


def test_a_search_measures_the_averaged_weights(recipe_file, tmp_path, valid):
    """A search of step 8 with the average that checkpoint 7 holds finds what was logged."""
    recipe = load_recipe(recipe_file, [*OVERRIDES, "train.steps=8", "checkpoint.every=7"])
    run_training(recipe)
    model = build_model(recipe, valid.manifest)
    before = tmp_path / "run" / "checkpoints" / "step-00000007"
    average = load_file(before / checkpoint.AVERAGE)
    model.backbone.load_state_dict(average, strict=False)
    again = ScheduleSearch(recipe.search, recipe.objective, valid, 4, recipe.train.seed)
    logged = searches(tmp_path / "run")[-1]
    assert again.run(model, 8).to_log()["clip_grid"] == logged["clip_grid"]


@pytest.mark.parametrize(
    ("stop", "by"),  # before, on, and between searches
    [(3, "loss"), (4, "loss"), (6, "loss"), (8, "loss"), (4, "gradient")],
)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(recipe_file, tmp_path, stop, by):
    overrides = [*OVERRIDES, f"search.by={by}", "train.steps=10"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_training(load_recipe(recipe_file, [*overrides, f"out={whole}"]))
    overrides.append(f"out={parts}")
    first = run_training(load_recipe(recipe_file, [*overrides, f"train.steps={stop}"]))
    assert (first.clip is None) == (stop < 4)
    state = run_training(load_recipe(recipe_file, overrides), resume=True)
    assert files(parts) == files(whole)
    assert state.clip == checkpoint.read_state(checkpoint.latest(whole)).clip is not None
    # A display that begins anew is told the clip; what is logged twice was cut.
    told = [
        n for n in read_metrics(parts / "metrics.jsonl") if "clip" in n and "clip_grid" not in n
    ]
    assert told == ([] if stop < 4 else [{"step": stop, "clip": list(first.clip)}])


def test_checkpoints_from_before_the_search_can_be_resumed(recipe_file, tmp_path):
    run_training(
        load_recipe(recipe_file, ["objective.clip=[0.3,0.8]", "out=" + str(tmp_path / "a")])
    )
    state = checkpoint.latest(tmp_path / "a") / "state.json"
    values = json.loads(state.read_text())
    del values["clip"], values["config"]["search"]
    state.write_text(json.dumps(values))
    (state.parent / "SHA256SUMS").unlink()  # older than the search, too
    config = tmp_path / "a" / "config.yaml"
    assert checkpoint.read_state(state.parent).clip is None
    recipe = load_recipe(config, ["train.steps=15"])
    assert run_training(recipe, resume=True).step == 15
    run_training(
        load_recipe(
            recipe_file,
            ["objective.clip=[0.3,0.8]", "train.steps=15", "out=" + str(tmp_path / "b")],
        )
    )
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_resume_must_not_change_the_search(recipe_file):
    run_training(load_recipe(recipe_file, OVERRIDES))
    with pytest.raises(UserError, match=r"another search\.rows;"):
        run_training(load_recipe(recipe_file, [*OVERRIDES, "search.rows=2"]), resume=True)
