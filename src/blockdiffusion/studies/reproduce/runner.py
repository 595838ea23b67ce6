"""Runs the steps of a plan: some at a time, each as a `blockdiff` process with a log of its own, or
as several processes that share a step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import append, storage_error, write_whole
from blockdiffusion.runtime.distributed import ENDS_WITH_INPUT, SHARED
from blockdiffusion.studies.reproduce.plan import Plan, Step, recipe_text
from blockdiffusion.studies.reproduce.scales import Scale
from blockdiffusion.studies.reproduce.step_cache import StepCache
from blockdiffusion.train import checkpoint as checkpoints

POLL_SECONDS = 0.2
REPORT_SECONDS = 60.0
ERROR = re.compile(r"^blockdiff: error: (.*)$", re.M)
Log = Callable[[str], None]


class Process(Protocol):
    """A command that runs."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        ...

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal, if it still runs."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a step runs.

    Attributes:
        environment: added to that of this process.
        processes: how many share the step, if it is a command that processes can share.
    """

    environment: Mapping[str, str]
    processes: int = 1


Launch = Callable[[Sequence[str], Path, Slot], Process]


def launch(command: Sequence[str], log: Path, slot: Slot) -> Process:
    """Start `blockdiff COMMAND`, through torchrun if processes share it, and append its output to
    `log`.

    A Ctrl-C at the terminal does not reach the process: a run that is interrupted twice would stop
    without saving. Its standard input, and that of torchrun's processes, is a pipe from this
    process, which the system closes when this process ends in any way; then they end too (see
    `distributed`).

    Raises:
        UserError: the log cannot be written.
    """
    start = [sys.executable, "-m"]
    if slot.processes > 1 and command[0] in SHARED:
        start += ["torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(slot.processes), "-m"]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with append(log) as output:
            return subprocess.Popen(
                [*start, "blockdiffusion.cli", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **slot.environment, ENDS_WITH_INPUT: "1"},
                start_new_session=True,
            )
    except OSError as error:
        raise storage_error(error, log) from error


def slots(scale: Scale) -> list[Slot]:
    """Return where steps run side by side.

    On the CPU the scale gives their number and their threads. Otherwise each GPU is a slot, or all
    of them are one if the scale spreads its steps.
    """
    if scale.jobs is not None:
        return [Slot({"OMP_NUM_THREADS": str(scale.threads)})] * scale.jobs
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    if scale.spread and names:
        return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(names)}, scale.processes(count))]
    return [Slot({"CUDA_VISIBLE_DEVICES": name}) for name in names] or [Slot({})]


@dataclass(eq=False)
class _Running:
    step: Step
    process: Process
    slot: Slot
    log: Path
    log_size: int
    start_time: float


def run_steps(plan: Plan, log: Log, launch: Launch = launch) -> None:
    """Run every step that is not done, one in each of the `slots`.

    Interrupted steps resume. SIGINT and SIGTERM are passed on to the running steps, which save; the
    same call later resumes there.

    Args:
        log: called with a line when a step begins or ends, and about progress.
        launch: starts a command.

    Raises:
        UserError: a step failed; the others that ran were interrupted and saved.
        KeyboardInterrupt: the call was interrupted.
    """
    _Runner(plan, log, launch).run()


class _Runner:
    def __init__(self, plan: Plan, log: Log, launch: Launch) -> None:
        self.plan, self.log, self.launch = plan, log, launch
        self.cache = StepCache(plan)
        self.waiting = list(plan.steps)
        self.running: list[_Running] = []
        self.free_slots = slots(plan.scale)
        self.done: set[str] = set()
        self.not_done: set[str] = set()  # steps whose state was looked up already
        self.last_report = time.monotonic()

    def run(self) -> None:
        with _sigterm_interrupts():
            try:
                while self.waiting or self.running:
                    self.start_ready()
                    if not self.collect():
                        time.sleep(POLL_SECONDS)
            except BaseException:
                self.stop()
                raise

    def start_ready(self) -> None:
        """Start the first steps whose needs are done, as far as there are free slots."""
        for step in list(self.waiting):
            if not self.done.issuperset(step.needs):
                continue
            if step.name not in self.not_done and self.cache.state(step) == "done":
                self.cache.finish(step)
                self.waiting.remove(step)
                self.done.add(step.name)
                self.log(f"{step.name}: done before")
                continue
            self.not_done.add(step.name)
            if self.free_slots:
                self.waiting.remove(step)
                self.start(step, self.free_slots.pop(0))

    def start(self, step: Step, slot: Slot) -> None:
        resumes = self.cache.state(step) == "interrupted"
        self.cache.begin(step)
        command = list(step.command)
        if step.run is not None:
            write_whole(Path(command[1]), recipe_text(step.run))
            if checkpoints.holds_run(step.product):
                command.append("--resume")
        log = self.plan.out / "logs" / f"{step.name}.log"
        step.product.parent.mkdir(parents=True, exist_ok=True)
        self.log(f"{step.name}: {'resumes' if resumes else 'begins'}")
        size = log.stat().st_size if log.exists() else 0
        process = self.launch(command, log, slot)
        self.running.append(_Running(step, process, slot, log, size, time.monotonic()))

    def collect(self) -> bool:
        """Handle the steps that have ended; return whether any has."""
        ended = [(one, code) for one in self.running if (code := one.process.poll()) is not None]
        for one, code in ended:
            self.running.remove(one)
            self.free_slots.append(one.slot)
            if code == 0:
                self.finish(one)
        for one, code in ended:  # only now, so that steps that succeeded are noted first
            if code != 0:
                raise UserError(_failure(one, code))
        if time.monotonic() - self.last_report > REPORT_SECONDS and self.running:
            self.last_report = time.monotonic()
            self.log("; ".join(map(self.progress, self.running)))
        return bool(ended)

    def finish(self, one: _Running) -> None:
        self.cache.finish(one.step)
        self.done.add(one.step.name)
        seconds = time.monotonic() - one.start_time
        left = len(self.waiting) + len(self.running)
        self.log(f"{one.step.name}: done in {seconds:.0f} s; {left} steps left")

    def progress(self, one: _Running) -> str:
        minutes = (time.monotonic() - one.start_time) / 60
        if one.step.run is None:
            return f"{one.step.name}: {minutes:.0f} min"
        saved = self.cache.progress(one.step)
        return f"{one.step.name}: {minutes:.0f} min, saved step {saved} of {one.step.run.steps}"

    def stop(self) -> None:
        """Interrupt the running steps and wait until they have saved."""
        for one in self.running:
            one.process.send_signal(signal.SIGINT)
        if self.running:
            names = ", ".join(one.step.name for one in self.running)
            self.log(f"stopping {names}; they save what they have")
        for one in self.running:
            while one.process.poll() is None:
                time.sleep(POLL_SECONDS)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that running steps are stopped with this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _failure(one: _Running, code: int) -> str:
    """Return one sentence about a step that failed, with its own error message if it has one."""
    output = b""
    if one.log.exists():
        with open(one.log, "rb") as file:
            file.seek(one.log_size)
            output = file.read()
    errors = ERROR.findall(output.decode(errors="replace"))
    why = errors[-1] if errors else f"it ended with code {code}, see {one.log}"
    return f"the step {one.step.name} failed: {why}"
