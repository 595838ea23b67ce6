"""What devices can do: a table of public specifications, and this machine, measured.

The figures of the table are those of the makers' data sheets: dense products (no sparsity) with
float32 sums, without TF32, which PyTorch leaves off for float32 products. The assumed shares were
found on one GPU, an H100, and on one CPU, see docs/results/estimate.md.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockdiffusion.errors import UserError, shown

if TYPE_CHECKING:
    import torch

CONTEXT_SHARE = 0.08  # of a GPU's memory: its context, and what allocation in pieces loses


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of its peak a device is assumed to reach.

    Attributes:
        products: of its FLOP/s, in the products of training.
        attention: the same, in attention.
        traffic: of its bandwidth, between the products of training.
        traffic_compiled: the same with `train.compile`.
        reading: of its bandwidth, when a network call in sampling reads the weights.
        call_products: of its FLOP/s, in the small products of a network call.
        call_rows: of its bandwidth there, for keys, values and the logits that are drawn from.
        layer_seconds: to start the kernels of a layer in a network call, all small ones besides. On
            a GPU weights are read meanwhile; on a CPU it comes besides.
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
        name: as `--device` takes it.
        flops: dtype ("float32", "bfloat16") -> peak of matrix products, FLOP/s.
        bandwidth: of memory, bytes/s.
        memory: bytes that a program can use.
        link: bytes/s to another device, each way; where no table knows, that of PCIe 4.0 x16.
        cuda: whether it is a GPU.
        measured: whether the peaks were measured here, and not taken from a data sheet.
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
    name: str,
    bf16: float,
    float32: float,
    bandwidth: float,
    memory: float,
    link: float = 25.0,
) -> Hardware:
    """From TFLOP/s, GB/s and GB."""
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
    """The device called `name`, or another one that the three numbers describe.

    Args:
        tflops: peak of dense products in the precision that is asked about, TFLOP/s.
        bandwidth: GB/s. memory: GB.

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
    """The device called `name`; "cpu" is this machine, which is measured for some seconds.

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
    """The device of the table that a driver calls `gpu_name`, such as "NVIDIA H100 80GB HBM3"."""
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
    """Shortest time of a call, after one warm-up.

    Calls repeat until `repeats` of them in a row were not faster by 1 % than the best before: other
    programs take a core away for longer than a call. After `most` seconds `repeats` calls do.
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
    """FLOP/s of matrix products as in a training step, the fastest of three shapes.

    They are rows x 768 x 3072, rows x 1536 x 1536 and rows x 3072 x 768.
    """
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
    """How much of the peak was reached; None where it was passed, so that it is no peak."""
    return flops / peak if flops <= peak else None


def read_bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second when summing 512 MB that no cache holds."""
    import torch

    x = torch.ones(128 * 1024 * 1024)
    return x.numel() * 4 / best_seconds(lambda: x.sum(), clock=clock)


def this_cpu(clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """This machine's processor with as many threads as PyTorch uses now; takes some seconds."""
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
    """Peak FLOP/s of where a run takes place, or None where it is not known at once.

    On a GPU that of the table; on a CPU it is measured where that takes a second or so.

    Args:
        device: as PyTorch names it.
        dtype: "float32" or "bfloat16".
        threads: in use; for the memory of this function only.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        found = hardware_of_gpu(torch.cuda.get_device_name(device))
        return None if found is None else found.flops[dtype]
    if kind != "cpu":
        return None
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    guess = matrix_flops(torch_dtype, rows=16)  # of few rows: lower than the peak
    seconds = 3 * 7 * 2 * 256 * 768 * 3072 / guess  # three shapes, each a few times
    return matrix_flops(torch_dtype, rows=256) if seconds < 2 else None


def machine_memory() -> float:
    """Bytes of memory of this machine, of the container that it is, or that `ulimit -v` leaves."""
    try:
        import resource
    except ImportError:  # not told on this system
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
    """Refuses work that cannot fit into memory, before any of it is begun.

    Args:
        needed: bytes, at the least.
        what: needs them. lower: what to change.

    Raises:
        UserError: there are not so many.
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    there = torch.cuda.mem_get_info(device)[1] if on_gpu else machine_memory()
    if needed > there:
        raise UserError(
            f"{what} would take {needed / 1e9:,.1f} GB of memory or more, and there are "
            f"{there / 1e9:,.1f} GB; {lower}"
        )


def describe() -> str:
    """One line: processor, threads, versions."""
    import torch

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
