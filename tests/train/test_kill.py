"""kill -9 at random moments, resumed each time: bit for bit the run that was left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]


def kill_and_resume(recipe_file: Path, num_kills: int, steps: int) -> str:
    tree = yaml.safe_load(recipe_file.read_text())
    tree["train"] |= {"steps": steps, "micro_batch_size": 4}
    tree["checkpoint"] = {"every": 3}
    tree["eval"] = {"every": 10, "rows": 4, "mc_samples": 2}
    tree["search"] = {"every": 4, "rows": 2, "widths": [0.5], "offset_step": 0.5, "replicates": 2}
    recipe_file.write_text(yaml.safe_dump(tree))
    folder = recipe_file.parent
    command = [sys.executable, "-m", "tests.train.kill_and_resume", recipe_file]
    command += [folder / "whole", folder / "killed", str(num_kills), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_three_kills(recipe_file):
    assert "3 kills" in kill_and_resume(recipe_file, num_kills=3, steps=40)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_twenty_kills(recipe_file):
    assert "20 kills" in kill_and_resume(recipe_file, num_kills=20, steps=400)
