"""A tiny prepared corpus and a recipe for it; a whole run takes a fraction of a second."""

from pathlib import Path

import pytest
import yaml

from blockdiffusion.data.manifest import Manifest
from blockdiffusion.data.packing import PrepareOptions, prepare

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "one", "lazy", "dog", "and", "sleeps"]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Prepared data: rows of 16 bytes, wrapped."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 9)) for n in range(60)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    options = PrepareOptions(
        seq_len=16, tokenizer="byte", documents="blank-line", valid_fraction=0.1, num_workers=1
    )
    prepare([str(folder / "text.txt")], folder / "prepared", options)
    return folder / "prepared"


@pytest.fixture
def recipe_file(prepared, tmp_path) -> Path:
    """A recipe for a network of one thousandth of the paper's; out is `tmp_path`/run."""
    tree = {
        "out": str(tmp_path / "run"),
        "data": {"path": str(prepared)},
        "model": {
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "cond_dim": 8,
            "block_size": 4,
        },
        "train": {"steps": 12, "batch_size": 6, "device": "cpu", "threads": 1},
        "optim": {"lr": 1e-2, "warmup_steps": 4},
        "eval": {"every": None},
        "sample": {"every": None},
        "checkpoint": {"every": 5},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def no_valid_split(monkeypatch):
    """Prepared data are read as if they had no validation rows."""
    real = Manifest.load

    def without_valid(directory):
        loaded = real(directory)
        loaded.splits.pop("valid")
        return loaded

    monkeypatch.setattr(Manifest, "load", without_valid)
