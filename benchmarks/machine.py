"""The floor of this machine: matrix FLOP/s and read bandwidth, measured; and what it is.

python -m benchmarks.machine
"""

from __future__ import annotations

import torch

from blockdiffusion.runtime.hardware import describe, matrix_flops, read_bandwidth


def main() -> None:
    print(describe())
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix products {dtype}: {matrix_flops(dtype) / 1e9:.0f} GFLOP/s")
    print(f"read bandwidth: {read_bandwidth() / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
