"""Training on several processes: the same losses, whoever shares the work; saved, resumed, killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import blockdiffusion
from blockdiffusion.config import build_model, load_recipe, run_training, to_dict
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.ranks import joined
from blockdiffusion.train import checkpoint, loop
from blockdiffusion.train.loggers import read_metrics
from tests.teams import Running, command, start_team, team

STEPS = 50
WAYS = [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")]


def train_in_float64(recipe_path: Path, overrides: list[str], resume: bool = False) -> None:
    """As `run_training`, without what is done every so many steps, and in float64."""
    recipe = load_recipe(recipe_path, overrides)
    rows = TokenRows(recipe.data.path, "train")
    with joined() as processes:
        loop.train(
            build_model(recipe, rows.manifest).double(),
            rows,
            out=Path(recipe.out),
            options=recipe.train,
            objective=recipe.objective,
            optim=recipe.optim,
            checkpoint=recipe.checkpoint,
            config=to_dict(recipe),
            resume=resume,
            team=processes,
        )


@pytest.fixture
def recipe_file(recipe_file) -> Path:
    """Batches that four processes can share, and no dropout, which is drawn per pass."""
    tree = yaml.safe_load(recipe_file.read_text())
    tree["train"] |= {"batch_size": 8, "steps": STEPS}
    tree["model"]["dropout"] = 0.0
    tree["checkpoint"]["every"] = 25
    recipe_file.write_text(yaml.safe_dump(tree))
    return recipe_file


def curve(out: Path, name: str = "loss") -> torch.Tensor:
    """What was logged in every step."""
    lines = read_metrics(out / "metrics.jsonl")
    return torch.tensor([line[name] for line in lines if name in line], dtype=torch.float64)


def assert_same_run(one: Path, two: Path, tolerance: float = 1e-9) -> None:
    for name in ("loss", "grad_norm"):
        assert len(curve(one, name)) == STEPS
        torch.testing.assert_close(curve(two, name), curve(one, name), rtol=0, atol=tolerance)
    released = [load_file(out / "model" / "model.safetensors") for out in (one, two)]
    assert released[0].keys() == released[1].keys()
    for name, tensor in released[0].items():
        torch.testing.assert_close(released[1][name], tensor, rtol=0, atol=1e3 * tolerance)


def ended_well(processes) -> bool:
    return all(process.code == 0 for process in processes) or pytest.fail(str(processes))


def test_the_losses_do_not_depend_on_the_number_of_processes(recipe_file, tmp_path):
    one = tmp_path / "one"
    train_in_float64(recipe_file, [f"out={one}"])
    assert curve(one)[-5:].mean() < 0.8 * curve(one)[0]
    for size, parallel in WAYS:
        out = tmp_path / f"{parallel}{size}"
        overrides = [f"out={out}", f"train.parallel={parallel}"]
        assert ended_well(team(size, train_in_float64, recipe_file, overrides))
        assert_same_run(one, out)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_with_one_and_with_four(recipe_file, tmp_path, parallel):
    whole = tmp_path / "whole"
    train_in_float64(recipe_file, [f"out={whole}"])
    overrides = [f"train.parallel={parallel}", f"out={tmp_path / 'saved'}"]
    half = [*overrides, f"train.steps={STEPS // 2}"]
    assert ended_well(team(2, train_in_float64, recipe_file, half))
    for size in (1, 4):
        out = tmp_path / f"on{size}"
        os.system(f"cp -r {tmp_path / 'saved'} {out}")
        more = [f"train.parallel={parallel}", f"out={out}"]
        assert ended_well(team(size, train_in_float64, recipe_file, more, True))
        assert_same_run(whole, out)
        (note,) = [line["note"] for line in read_metrics(out / "metrics.jsonl") if "note" in line]
        assert f"processes changed from 2 to {size}" in note


def wait_for_step(out: Path, step: int, running: Running) -> None:
    give_up = time.monotonic() + 60
    while not any(line["step"] >= step for line in read_metrics(out / "metrics.jsonl")):
        assert time.monotonic() < give_up and running.processes[0].is_alive(), running.end()
        time.sleep(0.01)


@pytest.mark.parametrize(("parallel", "rank"), [("ddp", 1), ("fsdp", 0)])
def test_a_killed_process_ends_the_job_which_goes_on(recipe_file, tmp_path, parallel, rank):
    out = tmp_path / "run"
    overrides = [f"out={out}", f"train.parallel={parallel}", "checkpoint.every=2"]
    long = [*overrides, "train.steps=100000"]
    running = start_team(2, command, "train", recipe_file, *long)
    wait_for_step(out, 5, running)
    os.kill(running.processes[rank].pid, signal.SIGKILL)
    ended = running.end()
    survivor = ended[1 - rank]
    assert ended[rank].code == -signal.SIGKILL
    assert survivor.code == 1
    assert "another process of this job was killed or has failed" in survivor.err
    assert "--resume" in survivor.err and "Traceback" not in survivor.err
    saved = checkpoint.read_state(checkpoint.latest(out)).step
    more = [*overrides, f"train.steps={saved + 3}", "--resume"]
    ended = team(2, command, "train", recipe_file, *more)
    assert ended_well(ended) and f"resumed from step {saved}" in ended[0].err
    assert not list(out.rglob("*.partial"))
