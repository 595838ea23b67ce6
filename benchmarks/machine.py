"""The floor of this machine: matrix FLOP/s and read bandwidth, measured; and what it is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def best_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Shortest wall time of `repeats` calls after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the matrix products that dominate a training step (2048 x 768 x 3072)."""
    a, w = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    return 2 * 2048 * 768 * 3072 / best_seconds(lambda: F.linear(a, w))


def read_bandwidth() -> float:
    """Bytes per second when summing 512 MB that no cache holds."""
    x = torch.ones(128 * 1024 * 1024)
    return x.numel() * 4 / best_seconds(lambda: x.sum())


def describe() -> str:
    """One line: processor, threads, versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return (
        f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    print(describe())
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix products {dtype}: {matrix_flops(dtype) / 1e9:.0f} GFLOP/s")
    print(f"read bandwidth: {read_bandwidth() / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
