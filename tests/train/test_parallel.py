"""Training in several processes: the losses of one; saved, resumed, killed."""

import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import blockdiffusion
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.runtime.distributed import local, process_group
from blockdiffusion.train import checkpoint, loop
from blockdiffusion.train.loggers import read_metrics
from blockdiffusion.train.recipe import build_model, load_recipe, to_dict
from blockdiffusion.train.run import run_training
from tests.launch import Running, assert_ended_well, command, launch, start_processes

STEPS = 50
# What two runs of the same numbers do not share.
UNLIKE = {
    "seconds", "tokens_per_second", "tflops_per_second", "peak_share", "search_seconds", "samples",
}  # fmt: skip


def train_in_float64(
    recipe_path: Path,
    overrides: list[str],
    resume: bool = False,
    dtype: torch.dtype = torch.float64,
) -> None:
    """As `run_training`, without what is done every so many steps, and in float64."""
    recipe = load_recipe(recipe_path, overrides)
    rows = TokenRows(recipe.data.path, "train")
    with process_group() as processes:
        loop.train(
            build_model(recipe, rows.manifest).to(dtype),
            rows,
            out=Path(recipe.out),
            options=recipe.train,
            objective=recipe.objective,
            optim=recipe.optim,
            checkpoint=recipe.checkpoint,
            config=to_dict(recipe),
            resume=resume,
            processes=processes,
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


@pytest.mark.parametrize(
    ("optimizer", "parallel", "sizes"),
    [
        ("adamw", "ddp", (2,)),
        pytest.param("adamw", "ddp", (2, 4), marks=pytest.mark.slow),
        ("adamw", "fsdp", (2,)),
        pytest.param("adamw", "fsdp", (2, 4), marks=pytest.mark.slow),
        pytest.param("muon", "ddp", (2, 4), marks=pytest.mark.slow),
        pytest.param("muon", "fsdp", (2,), marks=pytest.mark.slow),
        pytest.param("muon", "fsdp", (2, 4), marks=pytest.mark.slow),
    ],
)
def test_the_losses_are_those_of_one_process_whoever_resumes(
    recipe_file, tmp_path, optimizer, parallel, sizes
):
    """50 steps by 1, 2 and 4 processes, and the second half of those of 2 by 1 and by 4."""
    one, two = tmp_path / "1", tmp_path / "2"
    common = [f"optim.name={optimizer}", f"train.parallel={parallel}"]
    train_in_float64(recipe_file, [*common, f"out={one}"])
    assert curve(one)[-5:].mean() < 0.8 * curve(one)[0]
    for size in sizes:
        overrides = [*common, f"out={tmp_path / str(size)}"]
        assert_ended_well(launch(size, train_in_float64, recipe_file, overrides))
        assert_same_run(one, tmp_path / str(size))
    shutil.rmtree(checkpoint.latest(two))  # what is left is the one half way
    for size in (1, 4):
        out = tmp_path / f"2-{size}"
        shutil.copytree(two, out)
        overrides = [*common, f"out={out}"]
        assert_ended_well(launch(size, train_in_float64, recipe_file, overrides, True))
        assert_same_run(one, out)
        (note,) = [line["note"] for line in read_metrics(out / "metrics.jsonl") if "note" in line]
        assert f"from step {STEPS // 2}; processes changed from 2 to {size}" in note


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("optimizer", "limit"), [("adamw", 1e-4), ("muon", 1e-3)])
def test_in_float32_losses_differ_by_rounding(recipe_file, tmp_path, optimizer, limit, parallel):
    """How much, the documentation says; it is printed here. Muon rounds a direction to bf16, where
    a difference of the last bit in float32 now and then becomes one of the last bit in bf16; so do
    the micro-batches of one process."""
    single = (False, torch.float32)
    common = [f"train.parallel={parallel}", f"optim.name={optimizer}"]
    if optimizer == "muon":
        common.append("optim.lr=3e-3")
    train_in_float64(recipe_file, [*common, f"out={tmp_path / '1'}"], *single)
    one = curve(tmp_path / "1")
    for size in (2, 4):
        overrides = [*common, f"out={tmp_path / str(size)}"]
        assert_ended_well(launch(size, train_in_float64, recipe_file, overrides, *single))
        away = (curve(tmp_path / str(size)) - one).abs().max().item()
        print(f"{optimizer}, {parallel}, {size} processes: losses within {away:.1e} in float32")
        assert len(one) == STEPS and away < limit


def test_dropout_is_that_of_as_many_micro_batches(recipe_file, tmp_path):
    drop = ["model.dropout=0.2", "train.steps=4", "checkpoint.every=4"]
    train_in_float64(recipe_file, [*drop, f"out={tmp_path / 'one'}", "train.micro_batch_size=4"])
    assert_ended_well(launch(2, train_in_float64, recipe_file, [*drop, f"out={tmp_path / 'two'}"]))
    losses = curve(tmp_path / "one"), curve(tmp_path / "two")
    torch.testing.assert_close(*losses, rtol=0, atol=1e-9)


def wait_for_step(out: Path, step: int, running: Running) -> None:
    give_up = time.monotonic() + 300
    while not any(line["step"] >= step for line in read_metrics(out / "metrics.jsonl")):
        assert time.monotonic() < give_up and running.processes[0].is_alive(), running.end()
        time.sleep(0.01)


@pytest.mark.parametrize(("parallel", "rank"), [("ddp", 1), ("fsdp", 0)])
def test_a_killed_process_ends_the_job_which_resumes(recipe_file, tmp_path, parallel, rank):
    out = tmp_path / "run"
    overrides = [f"out={out}", f"train.parallel={parallel}", "checkpoint.every=2"]
    long = [*overrides, "train.steps=100000"]
    running = start_processes(2, command, "train", recipe_file, *long)
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
    ended = launch(2, command, "train", recipe_file, *more)
    assert_ended_well(ended)
    assert f"resumed from step {saved}" in ended[0].err
    assert not list(out.rglob("*.partial"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(recipe_file, tmp_path):
    out = tmp_path / "run"
    running = start_processes(2, command, "train", recipe_file, f"out={out}", "train.steps=100000")
    wait_for_step(out, 3, running)
    for _ in range(2):  # from who stops the job, and from torchrun
        os.kill(running.processes[1].pid, signal.SIGTERM)
    first, second = running.end()
    assert (first.code, second.code) == (143, 143)
    step = checkpoint.read_state(checkpoint.latest(out)).step
    assert f"SIGTERM: saved step {step} in {out}; resume with: " in first.err
    assert second.err == ""


def test_mistakes_are_told_once(recipe_file, tmp_path):
    for size, overrides, sentence in (
        (3, [], r"train.batch_size is 8, which 3 processes cannot share equally"),
        (2, ["train.steps=0"], "train.steps is 0; it must be at least 1"),
        (2, ["--resume"], "holds no run to resume"),
    ):
        ended = launch(size, command, "train", recipe_file, f"out={tmp_path / 'new'}", *overrides)
        said = "".join(process.err for process in ended)
        assert sentence in said and said.count("\n") == 1
        assert [process.code for process in ended] == [2] * size
    assert not (tmp_path / "new").exists()


def train_with_nan(recipe_path: Path, rank: int, place: str) -> None:
    """A network whose loss, or a gradient of which, is not finite in the second step of a rank."""
    from blockdiffusion.train.parallel import FSDP

    real_nats, real_backward, steps = FSDP.nats, FSDP.backward, []

    def nats(self, *arguments):
        steps.append(None)
        here = place == "loss" and len(steps) == 2 and self.processes.rank == rank
        return real_nats(self, *arguments) * (math.nan if here else 1.0)

    def backward(self, loss):
        real_backward(self, loss)
        if place == "gradient" and len(steps) == 2 and self.processes.rank == rank:
            local(self.model.backbone.output.bias.grad)[-1] = math.inf

    FSDP.nats, FSDP.backward = nats, backward
    command("train", recipe_path, "train.parallel=fsdp")


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("loss", r"step 2: the loss is nan in micro-batch 2 of 2 \(rows "),
        ("gradient", r"step 2: the loss is [\d.]+ but the gradient of output\.bias is not finite"),
    ],
)
def test_a_number_that_is_not_finite_is_found_wherever_it_is(recipe_file, place, where):
    ended = launch(2, train_with_nan, recipe_file, 1, place)
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
    ended = launch(2, train_on_a_full_disk, recipe_file, rank)
    assert sum("the disk is full: the checkpoint" in process.err for process in ended) == 1
    assert [process.code for process in ended] == [2, 2]
    out = tmp_path / "run"
    assert checkpoint.latest(out).name == "step-00000005"
    assert_ended_well(launch(2, command, "train", recipe_file, "train.steps=6", "--resume"))


def test_the_clip_and_the_bound_are_those_of_one_process(recipe_file, tmp_path):
    overrides = [
        "train.steps=4", "objective.estimator=bernoulli", "eval.every=2", "eval.rows=null",
        "search.every=2", "search.widths=[0.5,0.7]", "search.offset_step=0.1", "search.rows=6",
        "search.batch_size=2", "search.replicates=2", "search.by=gradient", "sample.every=4",
        "sample.max_new_tokens=8", "model.num_hidden_layers=1",
    ]  # fmt: skip
    runs = []
    for size, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = tmp_path / f"{parallel}{size}"
        arguments = [*overrides, f"out={out}", f"train.parallel={parallel}"]
        if size == 1:
            run_training(load_recipe(recipe_file, arguments))
        else:
            assert_ended_well(launch(size, command, "train", recipe_file, *arguments))
        runs.append(read_metrics(out / "metrics.jsonl"))
        assert blockdiffusion.load(out).tokenizer is not None
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert one.keys() - UNLIKE == two.keys() - UNLIKE
            for name in one.keys() - UNLIKE:
                torch.testing.assert_close(
                    torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-3, atol=1e-6
                )


@pytest.mark.slow
def test_under_torchrun_a_killed_process_ends_the_job(recipe_file, tmp_path):
    """What `torchrun` itself says and returns, too."""
    psutil = pytest.importorskip("psutil")
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    train = ["-m", "blockdiffusion.cli", "train", recipe_file, f"out={out}", "checkpoint.every=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    wrong = subprocess.run(
        [*torchrun, "3", *train], env=environment, capture_output=True, text=True, check=False
    )
    told = "blockdiff: error: train.batch_size is 8, which 3 processes cannot share"
    assert wrong.returncode == 1 and wrong.stderr.count(told) == 1
    assert re.search(r"exitcode +: 2 ", wrong.stderr) and not out.exists()

    job = subprocess.Popen(
        [*torchrun, "2", *train, "train.steps=100000", "train.parallel=fsdp"],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    give_up = time.monotonic() + 300
    while checkpoint.latest(out) is None:
        assert time.monotonic() < give_up and job.poll() is None
        time.sleep(0.1)
    workers = [p for p in psutil.Process(job.pid).children() if "blockdiffusion.cli" in p.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 1 and "another process of this job was killed" in said
    assert "Signal 9 (SIGKILL)" in said
    saved = checkpoint.read_state(checkpoint.latest(out)).step
    command = [*torchrun, "2", *train, f"train.steps={saved + 2}", "--resume"]
    subprocess.run(command, env=environment, check=True)
    assert checkpoint.read_state(checkpoint.latest(out)).step == saved + 2
