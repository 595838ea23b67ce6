"""Training in several processes: the losses of one; saved, resumed, killed."""

import errno
import math
import os
import re
import shutil
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
from blockdiffusion.ranks import joined, local
from blockdiffusion.train import checkpoint, loop
from blockdiffusion.train.loggers import read_metrics
from tests.teams import Running, assert_ended_well, command, start_team, team

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


def test_the_losses_do_not_depend_on_the_number_of_processes(recipe_file, tmp_path):
    one = tmp_path / "one"
    train_in_float64(recipe_file, [f"out={one}"])
    assert curve(one)[-5:].mean() < 0.8 * curve(one)[0]
    for size, parallel in WAYS:
        out = tmp_path / f"{parallel}{size}"
        overrides = [f"out={out}", f"train.parallel={parallel}"]
        assert_ended_well(team(size, train_in_float64, recipe_file, overrides))
        assert_same_run(one, out)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_with_one_and_with_four(recipe_file, tmp_path, parallel):
    whole = tmp_path / "whole"
    train_in_float64(recipe_file, [f"out={whole}"])
    overrides = [f"train.parallel={parallel}", f"out={tmp_path / 'saved'}"]
    half = [*overrides, f"train.steps={STEPS // 2}"]
    assert_ended_well(team(2, train_in_float64, recipe_file, half))
    for size in (1, 4):
        out = tmp_path / f"on{size}"
        shutil.copytree(tmp_path / "saved", out)
        more = [f"train.parallel={parallel}", f"out={out}"]
        assert_ended_well(team(size, train_in_float64, recipe_file, more, True))
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
    assert_ended_well(ended)
    assert f"resumed from step {saved}" in ended[0].err
    assert not list(out.rglob("*.partial"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(recipe_file, tmp_path):
    out = tmp_path / "run"
    running = start_team(2, command, "train", recipe_file, f"out={out}", "train.steps=100000")
    wait_for_step(out, 3, running)
    for _ in range(2):  # from who stops the job, and from torchrun
        os.kill(running.processes[1].pid, signal.SIGTERM)
    first, second = running.end()
    assert (first.code, second.code) == (143, 143)
    step = checkpoint.read_state(checkpoint.latest(out)).step
    assert f"SIGTERM: saved step {step} in {out}; go on with: " in first.err
    assert second.err == ""


def test_mistakes_are_told_once(recipe_file, tmp_path):
    for size, overrides, sentence in (
        (3, [], r"train.batch_size is 8, which 3 processes cannot share equally"),
        (2, ["train.steps=0"], "train.steps is 0; it must be at least 1"),
        (2, ["--resume"], "holds no run to resume"),
    ):
        ended = team(size, command, "train", recipe_file, f"out={tmp_path / 'new'}", *overrides)
        said = "".join(process.err for process in ended)
        assert sentence in said and said.count("\n") == 1
        assert [process.code for process in ended] == [2] * size
    assert not (tmp_path / "new").exists()


def train_with_nan(recipe_path: Path, rank: int, place: str) -> None:
    """A network whose loss, or a gradient of which, is not finite in the second step of a rank."""
    from blockdiffusion.train.spread import Shards

    real_nats, real_backward, steps = Shards.nats, Shards.backward, []

    def nats(self, *arguments):
        steps.append(None)
        here = place == "loss" and len(steps) == 2 and self.team.rank == rank
        return real_nats(self, *arguments) * (math.nan if here else 1.0)

    def backward(self, loss):
        real_backward(self, loss)
        if place == "gradient" and len(steps) == 2 and self.team.rank == rank:
            local(self.model.output.bias.grad)[-1] = math.inf

    Shards.nats, Shards.backward = nats, backward
    command("train", recipe_path, "train.parallel=fsdp")


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("loss", r"step 2: the loss is nan in micro-batch 2 of 2 \(rows "),
        ("gradient", r"step 2: the loss is [\d.]+ but the gradient of output\.bias is not finite"),
    ],
)
def test_a_number_that_is_not_finite_is_found_wherever_it_is(recipe_file, place, where):
    ended = team(2, train_with_nan, recipe_file, 1, place)
    said = [line for p in ended for line in p.err.splitlines() if "error" in line]
    assert len(said) == 1 and re.search(where, said[0])
    assert [process.code for process in ended] == [2, 2]


def train_on_a_full_disk(recipe_path: Path, rank: int) -> None:
    """A network whose second checkpoint does not fit on the disk of one of the processes."""
    real, calls = checkpoint.save_tensors, []

    def save_tensors(tensors, path, processes):
        calls.append(path)
        if len(calls) > 3 and processes.rank == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensors, path, processes)

    checkpoint.save_tensors = save_tensors
    command("train", recipe_path, "train.parallel=fsdp", "checkpoint.every=5")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_leaves_the_earlier_checkpoint(recipe_file, tmp_path, rank):
    ended = team(2, train_on_a_full_disk, recipe_file, rank)
    assert sum("the disk is full: the checkpoint" in process.err for process in ended) == 1
    assert [process.code for process in ended] == [2, 2]
    out = tmp_path / "run"
    assert checkpoint.latest(out).name == "step-00000005"
    assert_ended_well(team(2, command, "train", recipe_file, "train.steps=6", "--resume"))


def test_the_clip_and_the_bound_are_those_of_one_process(recipe_file, tmp_path):
    overrides = [
        "train.steps=4", "objective.estimator=bernoulli", "eval.every=2", "eval.rows=null",
        "search.every=2", "search.widths=[0.5,0.7]", "search.offset_step=0.1", "search.rows=6",
        "search.batch_size=2", "search.replicates=2", "search.by=gradient", "sample.every=4",
        "sample.max_new_tokens=8", "model.num_layers=1",
    ]  # fmt: skip
    runs = []
    for size, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = tmp_path / f"{parallel}{size}"
        arguments = [*overrides, f"out={out}", f"train.parallel={parallel}"]
        if size == 1:
            run_training(load_recipe(recipe_file, arguments))
        else:
            assert_ended_well(team(size, command, "train", recipe_file, *arguments))
        runs.append(read_metrics(out / "metrics.jsonl"))
        assert blockdiffusion.load(out).tokenizer is not None
    for other in runs[1:]:
        assert [line.keys() for line in other] == [line.keys() for line in runs[0]]
        for one, two in zip(runs[0], other, strict=True):
            for name in one.keys() - {"seconds", "tokens_per_second", "search_seconds", "samples"}:
                torch.testing.assert_close(
                    torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-4, atol=1e-6
                )
