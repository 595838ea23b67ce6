"""Modules that moved: their old names are still imported, with a warning, for one version."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "account": "estimate",
    "attention": "models.attention",
    "cache": "models.cache",
    "checksums": "files.checksums",
    "config": "train.recipe",
    "corruption": "diffusion.estimators",
    "costs": "estimate.flops",
    "denoiser": "diffusion.denoiser",
    "devices": "runtime.devices",
    "diffusions": "diffusion.objectives",
    "evaluate.pareto": "studies.pareto",
    "evaluate.references": "studies.references",
    "evaluate.report": "reports",
    "evaluate.variance": "studies.variance",
    "exact": "diffusion.exact",
    "hardware": "runtime.hardware",
    "masks": "models.masks",
    "models.bd3lm": "checkpoints.bd3lm",
    "models.card": "checkpoints.card",
    "models.formats": "checkpoints.formats",
    "models.lightning": "checkpoints.lightning",
    "models.settings": "checkpoints.settings",
    "models.tensors": "checkpoints.tensors",
    "models.unpickling": "checkpoints.unpickling",
    "objectives": "diffusion.losses",
    "orders": "diffusion.orders",
    "ranks": "runtime.distributed",
    "recording": "models.cuda_graphs",
    "records": "files.records",
    "release": "checkpoints.release",
    "reproduce": "studies.reproduce",
    "schedules": "diffusion.schedules",
    "seeding": "runtime.seeding",
    "terminal": "reports.terminal",
    "variance": "diffusion.variance",
    "verify": "checkpoints.verify",
}
PACKAGE = "blockdiffusion."


class MovedModules(MetaPathFinder, Loader):
    """Finds a module of `MOVED`, or one below it, by its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if new_name(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = new_name(old)
        assert new is not None
        message = f"{old} is now {new}; the old name will not be read by the next version"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def new_name(old: str) -> str | None:
    """The full name of the module that was called `old`; None: it has not moved."""
    moved, below = old.removeprefix(PACKAGE), ""
    while old.startswith(PACKAGE) and moved:
        if moved in MOVED:
            return PACKAGE + MOVED[moved] + below
        moved, dot, last = moved.rpartition(".")
        below = dot + last + below
    return None
