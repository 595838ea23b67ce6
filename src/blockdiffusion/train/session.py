"""What surrounds the training loop: the run's directory and log, and signals that end it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import written_aside
from blockdiffusion.runtime.distributed import ProcessGroup
from blockdiffusion.train import checkpoint as checkpoints
from blockdiffusion.train.checkpoint import TrainState
from blockdiffusion.train.loggers import JsonLines, Logger, cut_metrics

Report = Callable[[int, Mapping[str, Any]], None]


class Interrupted(Exception):
    """A signal ended the run after its step was finished and saved.

    Attributes:
        exit_code: by the shell's convention for the signal (130, 143).
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


@contextmanager
def running(
    out: Path,
    loggers: Sequence[Logger],
    config: Mapping[str, Any],
    first_step: int,
    processes: ProcessGroup,
) -> Iterator[Report]:
    """Yield a function that reports into the run's directory, which the first process claims."""
    if processes.is_first:
        with checkpoints.claimed(out), _reporting(out, loggers, config, first_step) as report:
            processes.barrier()
            yield report
        return
    processes.barrier()
    if not (out / "checkpoints").is_dir():
        raise UserError(
            f"out is {out}, which process {processes.rank} does not see; choose a directory "
            "that all machines share"
        )
    yield lambda step, values: None


@contextmanager
def _reporting(
    out: Path, loggers: Sequence[Logger], config: Mapping[str, Any], first_step: int
) -> Iterator[Report]:
    """Save the configuration; yield a function that logs to metrics.jsonl and every logger."""
    with written_aside(out / "config.yaml") as file:
        file.write(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())
    cut_metrics(out / "metrics.jsonl", first_step - 1)
    everyone = [JsonLines(out / "metrics.jsonl"), *loggers]

    def report(step: int, values: Mapping[str, Any]) -> None:
        for logger in everyone:
            logger.log(step, values)

    with ExitStack() as stack:
        for logger in everyone:
            logger.start(config, first_step)
            stack.callback(logger.finish)
        yield report


TWICE = 2.0  # seconds in which a signal that comes twice counts once


class StopSignals:
    """Remembers the first SIGINT or SIGTERM; a second one acts as usual.

    One of several processes may get the same signal twice, from the user and from torchrun.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes
        self._signal = 0
        self._again = 0.0  # when a second signal starts to count
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def seen(self) -> int:
        """Return the signal that a process got, 0 for none; collective."""
        return self._processes.max(self._signal)

    def _remember(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._signal == 0:
            self._signal, self._again = number, now + (TWICE if self._processes.size > 1 else 0)
            if self._processes.is_first:
                # Not print: a handler may run in the middle of another write to the same stream.
                os.write(2, b"\nfinishing this step, then saving; once more stops at once\n")
        elif now >= self._again:
            self.__exit__()
            signal.raise_signal(number)


def farewell(number: int, state: TrainState, out: Path, resume_command: str | None) -> str:
    message = f"{signal.Signals(number).name}: saved step {state.step} in {out}"
    return f"{message}; resume with: {resume_command}" if resume_command else message
