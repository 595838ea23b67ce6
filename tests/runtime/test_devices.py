import os
import platform
import subprocess
import sys

import pytest
import torch

from blockdiffusion.errors import UserError
from blockdiffusion.runtime.devices import SPINS, is_busy, select_device


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("auto").type == "cpu" and select_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"train\.device is cuda, but this machine has only cpu"):
        select_device("cuda", "train.device")
    with pytest.raises(UserError, match="--device is tpu"):
        select_device("tpu", "--device")


def test_auto_prefers_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto").type == "cuda"


FAULTS = """
import resource, torch
from blockdiffusion.runtime.devices import keep_freed_memory
print(keep_freed_memory())
for _ in range(12):  # until the heap is as large as it will be
    torch.empty(2**24).fill_(1.0)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.empty(2**24).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the C library in question")
@pytest.mark.parametrize("own", [{}, {"MALLOC_MMAP_THRESHOLD_": "65536"}])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(own):
    """64 MiB are 16,384 pages of 4 KiB (or 32 of 2 MiB): got from the kernel once, or each time."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean | own, capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    assert kept == str(not own)
    assert int(faults) < 16 if not own else int(faults) >= 4 * 32


WAITING = """
import os, sys
from blockdiffusion import cli, devices
devices.is_busy = lambda: sys.argv[1] == "busy"
cli.app = lambda *args, **options: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
cli.main()
"""


@pytest.mark.parametrize(("given", "spins"), [
    ({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
])  # fmt: skip
@pytest.mark.parametrize("busy", [True, False])
def test_the_command_lets_waiting_threads_sleep_on_a_busy_machine(given, spins, busy):
    """Set before PyTorch is imported, which reads it then."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", WAITING, "busy" if busy else "quiet"],
        env=environment | given,
        capture_output=True,
        text=True,
        check=True,
    )
    if not busy:
        spins = given.get("GOMP_SPINCOUNT")
    assert done.stdout.split() == [str(spins), "False"]


def test_a_machine_is_busy_while_others_compute():
    """More processes than cores that compute without end."""
    endless = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(endless) for _ in range(os.cpu_count() or 1)]
    try:
        assert any(is_busy() for _ in range(20))
    finally:
        for other in others:
            other.kill()
            other.wait()
