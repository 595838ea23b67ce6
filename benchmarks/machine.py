"""The floor of this machine: matrix FLOP/s and read bandwidth, measured; and what it is.

python -m benchmarks.machine
"""

from __future__ import annotations

import platform
from typing import Any

import torch

from blockdiffusion.runtime.hardware import matrix_flops, read_bandwidth


def describe() -> str:
    """Describe processor, threads and versions in one line."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    capability: Any = torch.backends.cpu.get_cpu_capability()
    return (
        f"{name} ({capability}), {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    print(describe())
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix products {dtype}: {matrix_flops(dtype) / 1e9:.0f} GFLOP/s")
    print(f"read bandwidth: {read_bandwidth() / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
