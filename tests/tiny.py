"""The smallest runs and the kinds of networks that tests of several modules use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import blockdiffusion.evaluate.replicates as replicates

TEXT = "".join(f"The cat {i} sat on the mat, as {i % 7} of them do.\n\n" for i in range(99))
TIMED = dict(time_conditioning=True)
NOISES = {
    "masked": {},
    "timed": TIMED,
    "sedd": dict(objective="score_entropy", **TIMED),
    "absorbing": dict(objective="d3pm", timesteps=5, **TIMED),
    "uniform": dict(objective="d3pm", transition="uniform", timesteps=3, **TIMED),
}


def write_recipe(
    place: Path, data: Path, out: Path, *, steps: int = 2, **sections: dict[str, Any]
) -> Path:
    """Writes the recipe of a run of a second or less; `sections` are those that differ."""
    recipe = {
        "out": str(out),
        "data": {"path": str(data)},
        "model": {
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "cond_dim": 4,
            "dropout": 0.0,
        },
        "train": {"steps": steps, "batch_size": 2, "threads": 1},
        "optim": {"warmup_steps": 1},
        "eval": {"every": None},
        "sample": {"every": None},
    }
    place.write_text(yaml.safe_dump(recipe | sections))
    return place


def stop_at_third_group(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a likelihood draws the masks of its third group of rows."""
    real, groups = replicates.Replicates._masked, []

    def stopped(*arguments: Any) -> Any:
        groups.append(1)
        if len(groups) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    patch.setattr(replicates.Replicates, "_masked", stopped)
