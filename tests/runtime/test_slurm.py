"""The Slurm script, with stand-ins for Slurm's commands that print what they were asked."""

import os
import subprocess
from pathlib import Path

import pytest

from blockdiffusion.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def submit(tmp_path):
    for name, script in (("scontrol", "printf 'alpha\\nbeta\\n'"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "alpha,beta",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "17",
    }  # fmt: skip

    def submit(*arguments):
        command = ["bash", ROOT / "recipes" / "slurm.sh", *map(str, arguments)]
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return run.stdout.split("\n")[:-1]

    return submit


def test_the_slurm_script_starts_a_run_and_resumes_with_it(submit, tmp_path):
    words = submit("recipes/owt.yaml", tmp_path / "run", "model.block_size=16")
    at = words.index("train")
    assert words[at - 2 : at] == ["-m", "blockdiffusion.cli"]
    assert words[words.index("--rdzv-endpoint") + 1] == "alpha:29500"
    recipe, *overrides = words[at + 1 :]
    assert load_recipe(ROOT / recipe, overrides).out == str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    again = submit("recipes/owt.yaml", tmp_path / "run", "model.block_size=16")
    assert again == [*words, "--resume"]
    assert load_recipe(ROOT / "recipes" / "owt-base.yaml").out == submit()[-1].removeprefix("out=")
