"""Check that a scorer is independent: not the model under test, and trained on other text."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.data.manifest import Manifest
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.scorer import Scorer
from blockdiffusion.files.records import Damaged, build, read_yaml
from blockdiffusion.train.checkpoint import latest, read_state


def check_scorer(model_name: str | None, model: Any, scorer: Scorer) -> list[str]:
    """Refuse a scorer that is the model itself, and warn of one that learnt from the same text.

    Args:
        model_name: directory or hub id of the model under test; None if only its samples are known
            and nothing can be checked.
        model: the model, or None if it was not loaded.

    Returns:
        Warnings to show with every result. Only the data of our own runs are known.

    Raises:
        UserError: the scorer has the location, the run or the weights of the model under test.
    """
    if model_name is None:
        return ["which model drew the samples is not known, so the scorer may be that model"]
    another = "a model that likes its own samples says nothing; take another scorer"
    if _home(model_name) == _home(scorer.name):
        raise UserError(f"{model_name} is both the model under test and its scorer; {another}")
    ours, theirs = _run_config(model_name), _run_config(scorer.name)
    if ours is not None and theirs is not None and ours.out == theirs.out:
        raise UserError(
            f"the scorer {scorer.name} and the model {model_name} come from the same run "
            f"({ours.out}); {another}"
        )
    if model is not None and _weights(model) == _weights(scorer.model):
        raise UserError(
            f"the scorer {scorer.name} has the same weights as the model {model_name}; {another}"
        )
    return [*_same_text(model_name, scorer.name), *_related(model_name, scorer.name, ours, theirs)]


def _home(name: str) -> Path | str:
    """Return the location of the weights; a run has them in its folder `model`."""
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve()
    return path / "model" if (path / "model" / "config.json").is_file() else path


def _run(name: str) -> Path | None:
    """Return the training run that a model's directory belongs to."""
    home = _home(name)
    if isinstance(home, Path) and (home.parent / "config.yaml").is_file():
        return home.parent
    return None


def _run_config(name: str) -> _Recipe | None:
    if (run := _run(name)) is not None:
        with suppress(UserError, Damaged):  # it is not checked here
            return build(_Recipe, read_yaml(run / "config.yaml", ""), strict=False)
    return None


@dataclass(frozen=True)
class _Data:
    path: str | None = None


@dataclass(frozen=True)
class _Model:
    init_from: str | None = None


@dataclass(frozen=True)
class _Recipe:
    """The keys of a run's recipe that are read here."""

    out: str
    data: _Data
    model: _Model


def _weights(model: Any) -> Counter[tuple[tuple[int, ...], str]]:
    """Return shape and content of every parameter without their names, in bfloat16, so that a copy
    in another precision has the same."""
    found = []
    for parameter in model.parameters():
        rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        content = rounded.view(torch.uint8).numpy().tobytes() if rounded.numel() else b""
        found.append((tuple(parameter.shape), hashlib.sha256(content).hexdigest()))
    return Counter(found)


def _same_text(model_name: str, scorer_name: str) -> list[str]:
    ours, theirs = _training_rows(model_name), _training_rows(scorer_name)
    if ours is None or theirs is None:
        return []
    if ours == theirs:
        shared = "on the same rows as the model"
    elif common := _training_sources(model_name) & _training_sources(scorer_name):
        shared = f"on the same text as the model ({', '.join(sorted(n for n, _ in common))})"
    else:
        return []
    return [
        f"the scorer {scorer_name} was trained {shared}: it rewards samples that copy that text; "
        "take a scorer trained on other text"
    ]


def _training_rows(name: str) -> str | None:
    """Return the fingerprint of the rows that a run was trained on, from its newest checkpoint."""
    if (run := _run(name)) is not None and (checkpoint := latest(run)) is not None:
        with suppress(UserError):  # it is not checked here
            return read_state(checkpoint).data
    return None


def _training_sources(name: str) -> set[tuple[str, int | None]]:
    """Return name and size of the files (or the names of data sets) of a run's rows."""
    config = _run_config(name)
    if config is not None and config.data.path:
        with suppress(UserError):  # moved or removed since
            return {
                (Path(source["name"]).name, source.get("size"))
                for source in Manifest.load(config.data.path).sources
                if not source.get("valid_only")
            }
    return set()


def _related(
    model_name: str, scorer_name: str, ours: _Recipe | None, theirs: _Recipe | None
) -> list[str]:
    """Warn if one of the two started from the weights of the other."""
    for config, other in ((ours, scorer_name), (theirs, model_name)):
        start = None if config is None else config.model.init_from
        if start is not None and _home(start) == _home(other):
            return [
                f"the model {model_name} and the scorer {scorer_name} are related: one started "
                "from the weights of the other; take a scorer trained on its own"
            ]
    return []
