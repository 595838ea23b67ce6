"""Kills a training run at random moments, resumes it each time, and compares with an unkilled one.

A script, so that the runs are forked from a process that has imported everything and nothing else:

    python -m tests.train.kill_and_resume RECIPE WHOLE KILLED NUM_KILLS SEED

Exits with 0 if every file could be read after every kill and the final files are equal to the last
byte.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from blockdiffusion.evaluate import likelihood  # noqa: F401 (imported before the forks)
from blockdiffusion.files.checksums import SUMS, differing, read_sums
from blockdiffusion.models import transformer  # noqa: F401
from blockdiffusion.train import display  # noqa: F401
from blockdiffusion.train.loggers import read_metrics
from blockdiffusion.train.recipe import load_recipe
from blockdiffusion.train.run import run_training


def start(recipe_path: str, out: Path) -> int:
    """A child process that trains, or resumes training, in `out`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            recipe = load_recipe(recipe_path, [f"out={out}"])
            run_training(recipe, resume=(out / "config.yaml").exists())
            code = 0
        finally:
            os._exit(code)
    return child


def check_files(out: Path) -> None:
    """Reads every file that has its final name, and compares its checksum."""
    readers = {
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".safetensors": load_file,
        ".md": lambda path: yaml.safe_load(path.read_text().split("---")[1])["library_name"],
    }
    for path in out.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
        if path.name == SUMS:
            assert not differing(path.parent, read_sums(path.parent) or {}), path
        elif path.is_file() and not hidden:
            readers[path.suffix](path)
    for folder in (out / "checkpoints").glob("step-*"):
        assert len(list(folder.iterdir())) == 5, folder


def final_files(out: Path) -> dict[str, bytes]:
    """The tensors and the logged losses; states hold times, which differ."""
    steps = sorted((out / "checkpoints").glob("step-*"))[-1:]
    paths = [path for folder in [*steps, out / "model"] for path in sorted(folder.iterdir())]
    timed = ("state.json", "SHA256SUMS")
    files = {str(p.relative_to(out)): p.read_bytes() for p in paths if p.name not in timed}
    for card in ("model/card.json", "model/README.md"):  # they tell the run's name
        files[card] = files[card].replace(out.name.encode(), b"NAME")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [n for n in lines if "note" not in n and n.keys() != {"step", "clip"}]  # of a resume
    times = {
        "seconds", "tokens_per_second", "tflops_per_second", "peak_share", "search_seconds",
    }  # fmt: skip
    kept = [[(k, v) for k, v in n.items() if k not in times] for n in lines]
    return files | {"metrics": json.dumps(kept).encode()}


def wait_for_step(metrics: Path, step: int) -> None:
    """Returns when the run has logged `step`; at once for step 0."""
    give_up = time.monotonic() + 300
    while step > 0:
        lines = read_metrics(metrics)
        if lines and lines[-1]["step"] >= step:
            return
        assert time.monotonic() < give_up, f"step {step} was never reached"
        time.sleep(0.001)


def main(recipe_path: str, whole: Path, killed: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(seed)
    steps = load_recipe(recipe_path).train.steps
    # One kill before the first step, the others at any moment of a step, its evaluation, or its
    # checkpoint; and early enough that the run cannot have ended.
    targets = [0, *sorted(moments.sample(range(1, steps - 10), num_kills - 1))]
    for target in targets:
        child = start(recipe_path, killed)
        wait_for_step(killed / "metrics.jsonl", target)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before the kill"
        if killed.exists():
            check_files(killed)
    for out in (killed, whole):
        assert os.waitpid(start(recipe_path, out), 0)[1] == 0
        check_files(out)
    one, two = final_files(whole), final_files(killed)
    assert one.keys() == two.keys(), (one.keys(), two.keys())
    different = [name for name in one if one[name] != two[name]]
    assert not different, different
    assert not list(killed.rglob("*.partial"))
    print(f"{len(targets)} kills")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
