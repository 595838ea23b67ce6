"""Moved modules and names: the old ones are still imported, with a warning, for one version."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "account": "estimate",
    "attention": "models.attention",
    "cache": "models.cache",
    "checksums": "files.checksums",
    "config": "train.recipe",
    "corruption": "diffusion.estimators",
    "costs": "estimate.flops",
    "data.python_docs": "data.python_library",
    "data.python_source": "data.python_library",
    "data.splits": "data.registry",
    "denoiser": "diffusion.denoiser",
    "devices": "runtime.devices",
    "diffusions": "diffusion.objectives",
    "evaluate.generation.judge": "evaluate.scorer",
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
    "models.meta": "models.transformer",
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
    "sampling.policies": "sampling.samplers",
    "sampling.processes": "sampling.samplers",
    "schedules": "diffusion.schedules",
    "seeding": "runtime.seeding",
    "studies.reproduce.conductor": "studies.reproduce.runner",
    "studies.reproduce.kept": "studies.reproduce.step_cache",
    "terminal": "reports.terminal",
    "train.spread": "train.parallel",
    "variance": "diffusion.variance",
    "verify": "checkpoints.verify",
}
MOVED_NAMES = {
    "reports.terminal.amount": "reports.numbers.count",
    "reports.terminal.generation_lines": "evaluate.generation.table.generation_lines",
    "reports.terminal.length_lines": "evaluate.listing.length_lines",
    "reports.terminal.likelihood_lines": "evaluate.listing.likelihood_lines",
    "reports.terminal.short_exponent": "reports.numbers.scientific",
    "reports.terminal.variance_lines": "studies.variance.listing.variance_lines",
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
        _warn(old, new)
        sys.modules[old] = importlib.import_module(new)


def moved_name(module: str, name: str) -> Any:
    """Return the object that was called `name` in a module, for that module's `__getattr__`.

    Raises:
        AttributeError: no such name has moved.
    """
    new = MOVED_NAMES.get(f"{module.removeprefix(PACKAGE)}.{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", PACKAGE + new)
    home, _, own = new.rpartition(".")
    return getattr(importlib.import_module(PACKAGE + home), own)


def new_name(old: str) -> str | None:
    """Return the full new name of the module `old`; None if it has not moved."""
    moved, below = old.removeprefix(PACKAGE), ""
    while old.startswith(PACKAGE) and moved:
        if moved in MOVED:
            return PACKAGE + MOVED[moved] + below
        moved, dot, last = moved.rpartition(".")
        below = dot + last + below
    return None


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}; the old name will not be read by the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
