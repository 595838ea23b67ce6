"""Whether a judge may judge: it is not the model under test, and it learnt from other text."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.data.manifest import Manifest
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.judge import Judge
from blockdiffusion.files.records import Damaged, build, read_yaml
from blockdiffusion.train.checkpoint import latest, read_state


def check_judge(model_name: str | None, model: Any, judge: Judge) -> list[str]:
    """Refuses a judge that is the model itself; warns of one that learnt from the same text.

    Args:
        model_name: directory or hub id of the model under test; None where only its samples are
            known, and nothing can be checked.
        model: the model, or None where it was not loaded.

    Returns:
        Warnings, to be shown with every result. They are about what can be read: the data of our
        own runs.

    Raises:
        UserError: the judge is the model under test, by its place, its run or its weights.
    """
    if model_name is None:
        return ["which model drew the samples is not known, so the judge may be that model"]
    another = "a model that likes its own samples says nothing; take another judge"
    if _home(model_name) == _home(judge.name):
        raise UserError(f"{model_name} is both the model under test and its judge; {another}")
    ours, theirs = _run_config(model_name), _run_config(judge.name)
    if ours is not None and theirs is not None and ours.out == theirs.out:
        raise UserError(
            f"the judge {judge.name} and the model {model_name} come from the same run "
            f"({ours.out}); {another}"
        )
    if model is not None and _weights(model) == _weights(judge.model):
        raise UserError(
            f"the judge {judge.name} has the same weights as the model {model_name}; {another}"
        )
    return [*_same_text(model_name, judge.name), *_related(model_name, judge.name, ours, theirs)]


def _home(name: str) -> Path | str:
    """Where the weights are: a run's are in its folder `model`."""
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve()
    return path / "model" if (path / "model" / "config.json").is_file() else path


def _run(name: str) -> Path | None:
    """The training run that a model's directory belongs to."""
    home = _home(name)
    if isinstance(home, Path) and (home.parent / "config.yaml").is_file():
        return home.parent
    return None


def _run_config(name: str) -> _Recipe | None:
    run = _run(name)
    if run is None:
        return None
    try:
        return build(_Recipe, read_yaml(run / "config.yaml", ""), strict=False)
    except (UserError, Damaged):  # not our file to complain about
        return None


@dataclass(frozen=True, kw_only=True)
class _Data:
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Model:
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What is read of a run's recipe."""

    out: str
    data: _Data
    model: _Model


def _weights(model: Any) -> Counter[tuple[tuple[int, ...], str]]:
    """Shape and content of every parameter, whatever their names; in bf16, so that a copy in
    another precision has the same."""
    found = []
    for parameter in model.parameters():
        rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        content = rounded.view(torch.uint8).numpy().tobytes() if rounded.numel() else b""
        found.append((tuple(parameter.shape), hashlib.sha256(content).hexdigest()))
    return Counter(found)


def _same_text(model_name: str, judge_name: str) -> list[str]:
    rows = [_training_rows(name) for name in (model_name, judge_name)]
    if rows[0] is None or rows[1] is None:
        return []
    if rows[0] == rows[1]:
        shared = "on the same rows as the model"
    elif common := _training_sources(model_name) & _training_sources(judge_name):
        shared = f"on the same text as the model ({', '.join(sorted(n for n, _ in common))})"
    else:
        return []
    return [
        f"the judge {judge_name} was trained {shared}: it rewards samples that copy that text; "
        "take a judge trained on other text"
    ]


def _training_rows(name: str) -> str | None:
    """Fingerprint of the rows that a run was trained on, from its newest checkpoint."""
    run = _run(name)
    checkpoint = None if run is None else latest(run)
    try:
        return None if checkpoint is None else read_state(checkpoint).data
    except UserError:  # not our file to complain about
        return None


def _training_sources(name: str) -> set[tuple[str, int | None]]:
    """Name and size of the files (or name of the data sets) that a run's rows were made from."""
    config = _run_config(name)
    try:
        manifest = Manifest.load(config.data.path) if config and config.data.path else None
    except UserError:  # moved or removed since
        return set()
    return {
        (Path(source["name"]).name, source.get("size"))
        for source in (manifest.sources if manifest else ())
        if not source.get("valid_only")
    }


def _related(
    model_name: str, judge_name: str, ours: _Recipe | None, theirs: _Recipe | None
) -> list[str]:
    """One of the two started from the weights of the other."""
    for config, other in ((ours, judge_name), (theirs, model_name)):
        start = None if config is None else config.model.init_from
        if start is not None and _home(start) == _home(other):
            return [
                f"the model {model_name} and the judge {judge_name} are related: one started from "
                "the weights of the other; take a judge trained on its own"
            ]
    return []
