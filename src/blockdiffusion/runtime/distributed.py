"""The processes that share one job: their ranks, shares of the work, and collective operations.

`torchrun` starts a command N times and gives each process its number, the rank. Each does a share
of the work; only the first reports and writes. Without `torchrun` there is one process, `SINGLE`,
and nothing here does anything.

The messages here are small and go through the CPU (gloo), even if the networks are on GPUs and
exchange gradients there (NCCL).
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from blockdiffusion.errors import PeerFailure, UserError, reason, shown

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
ENVIRONMENT = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
MOST_PROCESSES = 10**6
SECONDS_TO_FIND = 10  # for the machine that processes meet at
SECONDS_TO_MEET = 300  # for the start of the last process
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|socket", re.IGNORECASE)
SHARED = (
    "train",
    "adapt",
    "eval",
    "generate",
    "generate-eval",
)  # commands whose processes share the work
SPEAKERS = 2  # ranks that report a lost process: one may be the lost one


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a job, as one of them sees them.

    All processes must call *collective* methods, in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        local_rank: the number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's part of `count` items; the number of processes divides `count`."""
        assert count % self.size == 0
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def is_mine(self, number: int) -> bool:
        """Return whether piece `number` (from 0) of work dealt out in turn is this process's."""
        return number % self.size == self.rank

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; collective."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def collect(self, values: dict[int, T]) -> list[T]:
        """Return the numbered pieces of all processes, in order; collective."""
        pieces = {n: piece for part in self.gather(values) for n, piece in part.items()}
        return [pieces[number] for number in sorted(pieces)]

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return to all processes what `make` returns to the first; collective.

        If it fails there, the other processes end with `PeerFailure`.
        """
        if self.size == 1:
            return make()
        import torch.distributed as dist

        values = [make() if self.is_first else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def sum(self, value: float) -> float:
        """Return the sum of a number over the processes, added by rank; collective."""
        return sum(self._numbers(value))

    def max(self, value: int) -> int:
        """Return the largest value of a number; collective."""
        return int(max(self._numbers(value)))

    def barrier(self) -> None:
        """Return when all processes have called it; collective."""
        self._numbers(0)

    def _numbers(self, value: float) -> list[float]:
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        values = [torch.empty((), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(values, torch.tensor(value, dtype=torch.float64))
        return [number.item() for number in values]

    def set_device(self, device: torch.device) -> torch.device:
        """Make this process's own device of this kind the current one.

        Raises:
            UserError: the machine has too few of them, or several processes cannot use them.
        """
        if self.size == 1:
            return device
        if device.type == "mps":
            raise UserError(
                "several processes cannot train on mps; use the device cpu, or one process"
            )
        if device.type == "cuda":
            import torch

            found = torch.cuda.device_count()
            if self.local_rank >= found:
                raise UserError(
                    f"this machine has {found} CUDA devices, too few for its process number "
                    f"{self.local_rank + 1}; start one process for each device, or use the CPU"
                )
            torch.cuda.set_device(self.local_rank)
        return device


SINGLE = ProcessGroup()
ENDS_WITH_INPUT = "BLOCKDIFFUSION_ENDS_WITH_INPUT"  # an environment variable


def end_with_input() -> None:
    """End this process as a kill would when its standard input ends, if it was started so.

    The input is a pipe from the parent process, which closes even if the parent is killed.
    """
    if os.environ.get(ENDS_WITH_INPUT):

        def wait() -> None:
            while os.read(0, 1):
                pass
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def several_processes() -> bool:
    """Return whether this process was started as one of several, without importing PyTorch.

    Raises:
        UserError: the launcher's variables contradict each other, for example after an earlier job
            in this shell.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return False
    if os.environ.get("WORLD_SIZE") == "1" and os.environ.get("RANK", "0") == "0":
        return False
    if missing := [name for name in ENVIRONMENT if not os.environ.get(name)]:
        raise UserError(
            f"torchrun's variable {missing[0]} is not set; start the processes by torchrun, or "
            f"unset {', '.join(ENVIRONMENT)} for one process"
        )
    size = _variable("WORLD_SIZE", 1, MOST_PROCESSES)
    _variable("RANK", 0, size - 1)
    _variable("MASTER_PORT", 1, 65535)
    _variable("LOCAL_RANK", 0, size - 1)
    return size > 1


def _variable(name: str, least: int, most: int) -> int:
    """Return a number that the launcher put into the environment; `least` if there is none."""
    text = os.environ.get(name, str(least)).strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(
            f"torchrun's variable {name} is {shown(text)}; it must be a whole number from {least} "
            f"to {most}: start the processes by torchrun, or unset {', '.join(ENVIRONMENT)}"
        )
    return int(text)


def current_group() -> ProcessGroup:
    """Return the processes that this process has joined, or `SINGLE`."""
    if not several_processes():
        return SINGLE
    import torch.distributed as dist

    if not dist.is_initialized():
        return SINGLE
    return ProcessGroup(
        dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    )


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the processes of this job for the context; a nested context has the same processes.

    One of the processes that fail with a `UserError` reports it; the others end with `PeerFailure`,
    whether they failed too or lost contact.

    Raises:
        PeerFailure: another process ended; it has an exit code, and a sentence if no other process
            reports.
    """
    if not several_processes() or current_group() is not SINGLE:
        yield current_group()
        return
    import torch.distributed as dist

    rank, notes = _meet()
    try:
        yield current_group()
    except UserError:
        if _told_before(notes, this=True):
            raise PeerFailure("", exit_code=2) from None
        raise
    except (RuntimeError, ConnectionError) as error:
        if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
            raise
        if _told_before(notes, this=False):
            raise PeerFailure("", exit_code=2) from None
        lost = f"{LOST_SENTENCE} (noticed by process {rank}: {reason(error)})"
        raise PeerFailure(lost if rank < SPEAKERS else "", exit_code=1) from error
    # Not after a failure: the others may never get here.
    dist.destroy_process_group()


def _meet() -> tuple[int, Any]:
    """Join the other processes; return this one's rank and a store for notes.

    Raises:
        UserError: the address cannot be found, or the others do not join.
    """
    import torch
    import torch.distributed as dist

    place = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    for attempt in range(SECONDS_TO_FIND):  # machines that start together resolve names late
        try:
            socket.getaddrinfo(*place)
            break
        except (OSError, UnicodeError) as error:
            if attempt == SECONDS_TO_FIND - 1:
                raise UserError(
                    f"torchrun's variable MASTER_ADDR is {shown(place[0])}, which cannot be "
                    f"found ({error}); start the processes by torchrun, or unset "
                    f"{', '.join(ENVIRONMENT)}"
                ) from error
            time.sleep(1)
    try:
        patience = timedelta(seconds=SECONDS_TO_MEET)
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        has_nccl = dist.is_nccl_available() and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        store.set_timeout(dist.constants.default_pg_timeout)  # for later waits
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes could not meet at {':'.join(place)} "
            f"({reason(error)}); check that all were started and that "
            "the port is free, or unset torchrun's variables for one process"
        ) from error
    return rank, dist.PrefixStore("blockdiffusion", store)


LOST_SENTENCE = (
    "another process of this job was killed or has failed; what was saved is intact: start the job "
    "again (training resumes with --resume)"
)


def _told_before(notes: Any, this: bool) -> bool:
    """Return whether another process has reported the error before `this` one does."""
    with suppress(Exception):  # the process that keeps the store may be gone
        return notes.add("told", int(this)) > int(this)
    return this


# --- Sharded tensors ------------------------------------------------------------------------------


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: all of it, or the rows of a shard."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor that may be sharded; collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether each process holds some rows of the tensor (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def first_row(tensor: torch.Tensor) -> int:
    """Return the number of the first row of a tensor that this process holds."""
    if not is_sharded(tensor):
        return 0
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    rows = len(tensor)
    return min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())
