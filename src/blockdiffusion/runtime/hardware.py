"""The performance of devices: a table of public specifications, and this machine, measured.

The table has the figures of data sheets: dense products (no sparsity) with float32 sums, without
TF32, which PyTorch leaves off for float32 products. The assumed shares were measured on one GPU, an
H100, and on one CPU, see docs/results/estimate.md.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockdiffusion.errors import UserError, shown

if TYPE_CHECKING:
    import torch

CONTEXT_SHARE = 0.08  # of a GPU's memory: its context and fragmentation


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The share of its peak that a device is assumed to reach.

    Attributes:
        products: of its FLOP/s, in the products of training.
        attention: the same, in attention.
        traffic: of its bandwidth, between the products of training.
        traffic_compiled: the same with `train.compile`.
        reading: of its bandwidth, while a network call in sampling reads the weights.
        call_products: of its FLOP/s, in the small products of a network call.
        call_rows: of its bandwidth there, for keys, values and logits.
        layer_seconds: to start the kernels of a layer in a network call. A GPU reads weights
            meanwhile; on a CPU it is additional.
    """

    products: float
    attention: float
    traffic: float
    traffic_compiled: float
    reading: float
    call_products: float
    call_rows: float
    layer_seconds: float


GPU = Shares(
    products=0.6, attention=0.25, traffic=0.4, traffic_compiled=0.63, reading=0.6,
    call_products=0.31, call_rows=0.12, layer_seconds=100e-6,
)  # fmt: skip
CPU = Shares(
    products=1.0, attention=0.75, traffic=0.23, traffic_compiled=0.23, reading=0.9,
    call_products=1.0, call_rows=0.9, layer_seconds=0.65e-3,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device.

    Attributes:
        name: for `--device`.
        flops: dtype ("float32", "bfloat16") -> peak of matrix products, FLOP/s.
        bandwidth: of memory, bytes/s.
        memory: bytes that a program can use.
        link: bytes/s to another device, each way; PCIe 4.0 x16 if unknown.
        cuda: whether it is a GPU.
        measured: whether the peaks were measured here, not taken from a data sheet.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    link: float = 25e9
    shares: Shares = GPU
    cuda: bool = True
    measured: bool = False


def _gpu(
    name: str, bf16: float, float32: float, bandwidth: float, memory: float, link: float = 25.0
) -> Hardware:
    """Make a device from TFLOP/s, GB/s and GB."""
    return Hardware(
        name=name,
        flops={"bfloat16": bf16 * 1e12, "float32": float32 * 1e12},
        bandwidth=bandwidth * 1e9,
        memory=memory * 1e9 * (1 - CONTEXT_SHARE),
        link=link * 1e9,
    )


# name, bf16 and float32 TFLOP/s, GB/s, GB, GB/s to the next device (NVLink or PCIe, each way)
GPUS = (
    _gpu("b200", 2250, 75, 8000, 180, 900),
    _gpu("h200", 989, 67, 4800, 141, 450),
    _gpu("h100", 989, 67, 3350, 80, 450),
    _gpu("h100-pcie", 756, 51, 2000, 80, 64),
    _gpu("a100-80gb", 312, 19.5, 2039, 80, 300),
    _gpu("a100-40gb", 312, 19.5, 1555, 40, 300),
    _gpu("l40s", 362, 91.6, 864, 48, 32),
    _gpu("l4", 121, 30.3, 300, 24, 32),
    _gpu("rtx-4090", 165, 82.6, 1008, 24, 32),
    _gpu("rtx-3090", 71, 35.6, 936, 24, 32),
)
NAMES = (*(gpu.name for gpu in GPUS), "cpu")


def choose_hardware(
    name: str,
    *,
    tflops: float | None = None,
    bandwidth: float | None = None,
    memory: float | None = None,
) -> Hardware:
    """Return the device called `name`, or another one described by the three numbers.

    Args:
        tflops: peak of dense products in the precision in question, TFLOP/s.
        bandwidth: GB/s.
        memory: GB.

    Raises:
        UserError: see `find_hardware`; or a number is missing or not positive.
    """
    numbers = {"tflops": tflops, "bandwidth": bandwidth, "memory": memory}
    if not any(value is not None for value in numbers.values()):
        return find_hardware(name)
    if missing := ", ".join(f"--{option}" for option, value in numbers.items() if value is None):
        raise UserError(
            f"a device of your own needs --tflops, --bandwidth and --memory, and {missing} is "
            "missing; give all three, or a device by name"
        )
    assert tflops is not None and bandwidth is not None and memory is not None
    for option, value in zip(numbers, (tflops, bandwidth, memory), strict=True):
        if not 0 < value < math.inf:
            raise UserError(f"--{option} is {value:g}; it must be a positive number")
    return _gpu("own device" if name in NAMES else name, tflops, tflops, bandwidth, memory)


def find_hardware(name: str) -> Hardware:
    """Return the device called `name`; "cpu" is this machine, which is measured for some seconds.

    Raises:
        UserError: there is none of that name.
    """
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    if wanted == "cpu":
        return this_cpu()
    for gpu in GPUS:
        if gpu.name == wanted:
            return gpu
    raise UserError(
        f"--device is {shown(name)}; known are {', '.join(NAMES)}, and any other by its --tflops, "
        "--bandwidth and --memory"
    )


def hardware_of_gpu(gpu_name: str) -> Hardware | None:
    """Return the device of the table for a driver's name, such as "NVIDIA H100 80GB HBM3"."""
    words = gpu_name.lower().replace("-", " ").split()
    known = [gpu for gpu in GPUS if set(gpu.name.split("-")) <= set(words)]
    return max(known, key=lambda gpu: len(gpu.name), default=None)


# --- this machine, measured -----------------------------------------------------------------------


def best_seconds(
    function: Callable[[], object],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    most: float = 3.0,
) -> float:
    """Return the shortest time of a call, after one warm-up.

    Calls repeat until `repeats` of them in a row were not 1 % faster than the best before, since
    other programs take a core away for longer than a call. After `most` seconds `repeats` calls are
    enough.
    """
    function()
    best, spent, calls, since = math.inf, 0.0, 0, 0
    while since < repeats and (calls < repeats or spent < most):
        start = clock()
        function()
        seconds = clock() - start
        since = 0 if seconds < 0.99 * best else since + 1
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best


def matrix_flops(
    dtype: torch.dtype, rows: int = 2048, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return FLOP/s of matrix products as in a training step, the fastest of three shapes:
    rows x 768 x 3072, rows x 1536 x 1536 and rows x 3072 x 768."""
    import torch
    import torch.nn.functional as F

    draw = torch.Generator().manual_seed(0)  # not the global stream, which training uses
    times = []
    for width in (768, 1536, 3072):
        a = torch.randn(rows, width, generator=draw).to(dtype)
        w = torch.randn(768 * 3072 // width, width, generator=draw).to(dtype)
        times.append(best_seconds(functools.partial(F.linear, a, w), clock=clock))
    return 2 * rows * 768 * 3072 / min(times)


def share_of_peak(flops: float, peak: float) -> float | None:
    """Return the share of the peak that was reached; None if it was exceeded, so is no peak."""
    return flops / peak if flops <= peak else None


def read_bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Return bytes per second in a sum of 512 MB, which no cache holds."""
    import torch

    x = torch.ones(128 * 1024 * 1024)
    return x.numel() * 4 / best_seconds(lambda: x.sum(), clock=clock)


def this_cpu(clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """Measure this machine's processor with PyTorch's current threads, for some seconds."""
    import torch

    return Hardware(
        name="cpu",
        flops={
            "float32": matrix_flops(torch.float32, clock=clock),
            "bfloat16": matrix_flops(torch.bfloat16, 256, clock),
        },
        bandwidth=read_bandwidth(clock),
        memory=machine_memory(),
        shares=CPU,
        cuda=False,
        measured=True,
    )


@functools.lru_cache(maxsize=8)
def quick_peak(device: str, dtype: str, threads: int) -> float | None:
    """Return the peak FLOP/s of a device, or None if it is not known at once.

    A GPU's is in the table; a CPU's is measured if that takes a second or so.

    Args:
        device: as PyTorch names it.
        dtype: "float32" or "bfloat16".
        threads: in use; a key of the cache.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        found = hardware_of_gpu(torch.cuda.get_device_name(device))
        return None if found is None else found.flops[dtype]
    if kind != "cpu":
        return None
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    guess = matrix_flops(torch_dtype, rows=16)  # below the peak
    seconds = 3 * 7 * 2 * 256 * 768 * 3072 / guess  # three shapes, each a few times
    return matrix_flops(torch_dtype, rows=256) if seconds < 2 else None


def machine_memory() -> float:
    """Return the bytes of memory of this machine or container, or of `ulimit -v`."""
    try:
        import resource
    except ImportError:  # unknown on this system
        return math.inf
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY:
        total = min(total, float(own))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, float(limit)) if limit.isdigit() else total


def check_memory(needed: float, what: str, lower: str, device: Any = "cpu") -> None:
    """Refuse work that cannot fit into memory, before it begins.

    Args:
        needed: bytes, at least.
        what: the work, for the message.
        lower: what to change, for the message.

    Raises:
        UserError: there is less memory.
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    there = torch.cuda.mem_get_info(device)[1] if on_gpu else machine_memory()
    if needed > there:
        raise UserError(
            f"{what} would take {needed / 1e9:,.1f} GB of memory or more, and there are "
            f"{there / 1e9:,.1f} GB; {lower}"
        )
