"""Where the numbers of a run go: metrics.jsonl always, other services through three methods."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from blockdiffusion.errors import UserError
from blockdiffusion.escape import markdown_prose
from blockdiffusion.files.directories import writing
from blockdiffusion.files.disk import append, written_aside
from blockdiffusion.files.records import json_lines
from blockdiffusion.options import option


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """Which services get the numbers, besides metrics.jsonl."""

    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), "services that get the numbers besides metrics.jsonl"
    )


class Logger(Protocol):
    """Receives what a run reports. Steps never decrease; a step may be logged several times."""

    def start(self, config: Mapping[str, Any], first_step: int) -> None:
        """Called once, before any step; `first_step` is more than 1 when a run is resumed.

        Steps from `first_step` on may have been logged before, by a process that was killed.
        """
        ...

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers after update `step`; also `samples` (list of str), `note` (str), and what a
        schedule search found before it: `clip` (two numbers) and `clip_grid` (a list of three).
        """
        ...

    def finish(self) -> None:
        """Called once, also when the run fails or is interrupted."""
        ...


class JsonLines:
    """metrics.jsonl: one JSON object per line, each written in one piece."""

    def __init__(self, path: Path):
        self.path = path

    def start(self, config: Mapping[str, Any], first_step: int) -> None:
        self._file = append(self.path, buffering=0)  # closed by finish

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        size = os.fstat(self._file.fileno()).st_size
        line = _json_line({"step": step, **values})
        try:
            with writing(f"line of step {step} of {self.path}"):
                if self._file.write(line) != len(line):  # the last bytes of the disk
                    self._file.write(line)
        except UserError:
            self._file.truncate(size)
            raise

    def finish(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, without those that are cut short or have no step."""
    if not path.exists():
        return []
    lines = json_lines(path, finite=False)
    return [line for line in lines if type(line.get("step")) is int and line["step"] >= 0]


def cut_metrics(path: Path, step: int) -> None:
    """Drop all lines after `step`, which a resumed run writes again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with written_aside(path) as file:
        file.writelines(_json_line(line) for line in kept)


class TensorBoard:
    """Event files in `out`/tensorboard."""

    def __init__(self, out: Path):
        self._module = _import("torch.utils.tensorboard", "tensorboard")
        self._folder = out / "tensorboard"

    def start(self, config: Mapping[str, Any], first_step: int) -> None:
        self._writer = self._module.SummaryWriter(str(self._folder), purge_step=first_step)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)
        for name in ("samples", "note"):
            if name in values:
                texts = [values[name]] if isinstance(values[name], str) else values[name]
                self._writer.add_text(name, "\n\n---\n\n".join(map(markdown_prose, texts)), step)

    def finish(self) -> None:
        self._writer.close()


class Trackio:
    """A Trackio run named after the output directory; resumed with the run.

    Samples and the grid of a schedule search stay in metrics.jsonl.
    """

    package = "trackio"

    def __init__(self, out: Path):
        self._module = _import(self.package, self.package)
        self._out = out

    def start(self, config: Mapping[str, Any], first_step: int) -> None:
        self._run = self._module.init(
            project="blockdiffusion",
            name=self._out.resolve().name,
            config=dict(config),
            resume="allow",
            **self._more(),
        )

    def _more(self) -> dict[str, str]:
        return {}

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if numbers := _numbers(values):
            self._run.log(numbers, step=step)

    def finish(self) -> None:
        self._run.finish()


class WandB(Trackio):
    """The same on Weights & Biases, which knows a run again by an id."""

    package = "wandb"

    def _more(self) -> dict[str, str]:
        path = self._out / "wandb-id"
        if not path.exists():
            with written_aside(path) as file:
                file.write(uuid.uuid4().hex.encode())
        return {"id": path.read_text(encoding="utf-8"), "dir": str(self._out)}


def make_loggers(options: LogOptions, out: Path) -> list[Logger]:
    """Make the loggers that `options` names.

    Raises:
        UserError: a package is not installed.
    """
    makers = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
    return [makers[name](out) for name in options.loggers]


def _json_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are single numbers, and the two ends of a clip."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    if "clip" in values:
        numbers["clip_low"], numbers["clip_high"] = values["clip"]
    return numbers


def _import(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"log.loggers names {package}, which is not installed; "
            "run pip install 'blockdiffusion[loggers]', or take it out of log.loggers"
        ) from error
