"""Carries out a plan: some steps at a time, each a `blockdiff` process with a log of its own, or
several that share a step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import append, storage_error, write_whole
from blockdiffusion.runtime.distributed import ENDS_WITH_INPUT, SHARED
from blockdiffusion.studies.reproduce.kept import Kept
from blockdiffusion.studies.reproduce.plan import Plan, Step, recipe_text
from blockdiffusion.studies.reproduce.scales import Scale
from blockdiffusion.train import checkpoint as checkpoints

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_LINES = 60.0
ERROR = re.compile(r"^blockdiff: error: (.*)$", re.M)
Say = Callable[[str], None]


class Process(Protocol):
    """A command that runs."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def interrupt(self) -> None:
        """Asks it to save what it has and to stop."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step runs.

    Attributes:
        environment: what is added to that of this process.
        processes: that share the step, where it is one of the commands that they can share.
    """

    environment: Mapping[str, str]
    processes: int = 1


Launch = Callable[[Sequence[str], Path, Place], Process]


class _Subprocess:
    """A command in a process of its own, which a Ctrl-C at the terminal does not reach by itself:
    a run that is interrupted twice would stop without saving."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def interrupt(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)


def launch(command: Sequence[str], log: Path, place: Place) -> Process:
    """Starts `blockdiff COMMAND`, through torchrun where processes share it; what it says is added
    to `log`.

    Its standard input, and that of torchrun's processes, is a pipe from this process, which the
    system closes when this process ends, however that happens: then they end, too (`distributed`).

    Raises:
        UserError: the log cannot be written.
    """
    start = [sys.executable, "-m"]
    if place.processes > 1 and command[0] in SHARED:
        start += ["torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(place.processes), "-m"]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with append(log) as output:
            process = subprocess.Popen(
                [*start, "blockdiffusion.cli", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **place.environment, ENDS_WITH_INPUT: "1"},
                start_new_session=True,
            )
    except OSError as error:
        raise storage_error(error, log) from error
    return _Subprocess(process)


def places(scale: Scale) -> list[Place]:
    """Where steps run side by side.

    On the CPU as many as the scale says, of so many threads each; else one for each GPU, or one for
    all of them where the scale spreads its steps.
    """
    if scale.jobs is not None:
        return [Place({"OMP_NUM_THREADS": str(scale.threads)})] * scale.jobs
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    if scale.spread and names:
        return [Place({"CUDA_VISIBLE_DEVICES": ",".join(names)}, scale.processes(count))]
    return [Place({"CUDA_VISIBLE_DEVICES": name}) for name in names] or [Place({})]


@dataclass(eq=False)
class _Running:
    step: Step
    process: Process
    place: Place
    log: Path
    log_size: int
    began: float


def carry_out(plan: Plan, say: Say, launch: Launch = launch) -> None:
    """Performs every step that is not done, one in each of the `places`.

    What is finished is left alone and what was interrupted goes on. SIGINT and SIGTERM are passed
    on to the running steps, which save; the same call later goes on there.

    Args:
        say: told what begins, ends and how far it is, a line at a time.
        launch: starts a command.

    Raises:
        UserError: a step failed; the others that ran were interrupted and saved.
        KeyboardInterrupt: it was interrupted.
    """
    _Conductor(plan, say, launch).run()


class _Conductor:
    def __init__(self, plan: Plan, say: Say, launch: Launch) -> None:
        self.plan, self.say, self.launch = plan, say, launch
        self.kept = Kept(plan)
        self.waiting = list(plan.steps)
        self.running: list[_Running] = []
        self.free = places(plan.scale)
        self.done: set[str] = set()
        self.missing: set[str] = set()  # steps that were looked at, and have to be performed
        self.spoke = time.monotonic()

    def run(self) -> None:
        with _Terminated():
            try:
                while self.waiting or self.running:
                    self.start_ready()
                    if not self.collect():
                        time.sleep(SECONDS_BETWEEN_LOOKS)
            except BaseException:
                self.stop()
                raise

    def start_ready(self) -> None:
        """Starts the first steps whose needs are done, as far as there is room."""
        for step in list(self.waiting):
            if not self.done.issuperset(step.needs):
                continue
            if step.name not in self.missing and self.kept.state(step) == "done":
                self.kept.finish(step)
                self.waiting.remove(step)
                self.done.add(step.name)
                self.say(f"{step.name}: done before")
                continue
            self.missing.add(step.name)
            if self.free:
                self.waiting.remove(step)
                self.start(step, self.free.pop(0))

    def start(self, step: Step, place: Place) -> None:
        again = self.kept.state(step) == "interrupted"
        self.kept.begin(step)
        command = list(step.command)
        if step.run is not None:
            write_whole(Path(command[1]), recipe_text(step.run))
            if checkpoints.holds_run(step.product):
                command.append("--resume")
        log = self.plan.out / "logs" / f"{step.name}.log"
        step.product.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{step.name}: {'goes on' if again else 'begins'}")
        size = log.stat().st_size if log.exists() else 0
        process = self.launch(command, log, place)
        self.running.append(_Running(step, process, place, log, size, time.monotonic()))

    def collect(self) -> bool:
        """Takes note of what has ended; whether anything has."""
        ended = [(one, code) for one in self.running if (code := one.process.poll()) is not None]
        for one, code in ended:
            self.running.remove(one)
            self.free.append(one.place)
            if code == 0:
                self.finish(one)
        for one, code in ended:  # only now, so that what has succeeded is kept
            if code != 0:
                raise UserError(_failure(one, code))
        if time.monotonic() - self.spoke > SECONDS_BETWEEN_LINES and self.running:
            self.spoke = time.monotonic()
            self.say("; ".join(map(self.how_far, self.running)))
        return bool(ended)

    def finish(self, one: _Running) -> None:
        self.kept.finish(one.step)
        self.done.add(one.step.name)
        seconds = time.monotonic() - one.began
        left = len(self.waiting) + len(self.running)
        self.say(f"{one.step.name}: done in {seconds:.0f} s; {left} steps left")

    def how_far(self, one: _Running) -> str:
        minutes = (time.monotonic() - one.began) / 60
        if one.step.run is None:
            return f"{one.step.name}: {minutes:.0f} min"
        saved = self.kept.progress(one.step)
        return f"{one.step.name}: {minutes:.0f} min, saved step {saved} of {one.step.run.steps}"

    def stop(self) -> None:
        """Interrupts what runs, and waits until it has saved."""
        for one in self.running:
            one.process.interrupt()
        if self.running:
            names = ", ".join(one.step.name for one in self.running)
            self.say(f"stopping {names}; they save what they have")
        for one in self.running:
            while one.process.poll() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)


class _Terminated:
    """SIGTERM is a KeyboardInterrupt inside, so that running steps are stopped with it."""

    def __enter__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous: Any = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)


def _failure(one: _Running, code: int) -> str:
    """One sentence about a step that failed: its own, if it has one."""
    said = ""
    if one.log.exists():
        with open(one.log, "rb") as file:
            file.seek(one.log_size)
            said = file.read().decode(errors="replace")
    errors = ERROR.findall(said)
    why = errors[-1] if errors else f"it ended with code {code}, see {one.log}"
    return f"the step {one.step.name} failed: {why}"
