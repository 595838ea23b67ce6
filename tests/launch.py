"""Several processes for a test, as torchrun would start them, but forked: imports cost seconds.

`launch(size, function, *arguments)` calls a function in every process of a group. They are
forked by multiprocessing's fork server, which imports the libraries once and has no threads.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "blockdiffusion.train.recipe",
    "blockdiffusion.cli",
    "blockdiffusion.models.transformer",
    "blockdiffusion.data.tokenizers",
    "blockdiffusion.evaluate.generation.run",
    "blockdiffusion.evaluate.prepared",
    "blockdiffusion.train.display",
    "tests.command",
]
SECONDS = 300  # after which a group hangs


@dataclass(frozen=True)
class Ended:
    """How a process of a group ended: its exit code (minus a signal's number), what it wrote."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """Processes at work."""

    processes: list[Any]
    folder: Path
    store: TCPStore  # lives in this process, as it does in torchrun

    def end(self) -> list[Ended]:
        """Waits until all have ended; by rank."""
        for process in self.processes:
            process.join(SECONDS)
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in hanging:
            self.processes[rank].kill()
            self.processes[rank].join()
        ended = [
            Ended(
                p.exitcode, *((self.folder / f"{name}{r}").read_text() for name in ("out", "err"))
            )
            for r, p in enumerate(self.processes)
        ]
        assert not hanging, f"processes {hanging} did not end: {ended}"
        return ended


def start_processes(size: int, function: Callable[..., object], *arguments: Any) -> Running:
    """Calls `function(*arguments)`, a module's, in `size` processes; does not wait for them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = Path(tempfile.mkdtemp())
    processes = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        process = context.Process(target=_run, args=(environment, folder, function, arguments))
        process.start()
        processes.append(process)
    return Running(processes, folder, store)


def launch(size: int, function: Callable[..., object], *arguments: Any) -> list[Ended]:
    """Calls `function(*arguments)`, a module's, in `size` processes; how each ended, by rank."""
    return start_processes(size, function, *arguments).end()


def assert_ended_well(ended: list[Ended]) -> None:
    """Fails, with what they wrote, unless all exited with 0."""
    assert [process.code for process in ended] == [0] * len(ended), ended


def _run(
    environment: dict[str, str], folder: Path, function: Callable[..., object], arguments: Any
) -> None:
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(folder / f"{name}{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.update(environment)
    code = 0
    try:
        import torch

        torch.set_num_threads(1)
        function(*arguments)
    except SystemExit as end:
        code = int(str(end.code or 0))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # at once, as nothing is to be left that could hang


def command(*arguments: object) -> None:
    """The command line `blockdiff` in this process."""
    from blockdiffusion.cli import main

    sys.argv = ["blockdiff", *map(str, arguments)]
    main()
