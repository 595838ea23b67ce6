"""Devices: the table, names that drivers give, one that a user describes, one measured here."""

import time

import pytest
import torch

from blockdiffusion.errors import UserError
from blockdiffusion.runtime import hardware
from blockdiffusion.runtime.hardware import (
    GPUS,
    best_seconds,
    choose_hardware,
    find_hardware,
    hardware_of_gpu,
    matrix_flops,
    quick_peak,
    read_bandwidth,
    share_of_peak,
)


def test_the_table_holds_plausible_numbers():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert 1e13 < gpu.flops["float32"] < gpu.flops["bfloat16"] < 1e16
        assert 1e11 < gpu.bandwidth < 1e13 and 1e10 < gpu.memory < 1e12
        assert gpu.cuda and not gpu.measured


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(driver, name):
    found = hardware_of_gpu(driver)
    assert found is not None and found.name == name


def test_an_unknown_gpu_is_not_taken_for_another():
    assert hardware_of_gpu("Tesla T4") is None and hardware_of_gpu("NVIDIA L400") is None


def test_names_are_written_as_one_likes():
    assert find_hardware("H100").name == "h100" and find_hardware("RTX 4090").name == "rtx-4090"


def test_a_device_of_ones_own_is_what_is_said():
    own = choose_hardware("mine", tflops=2.5, bandwidth=100, memory=16)
    assert own.name == "mine" and own.bandwidth == 1e11
    assert own.flops == {"bfloat16": 2.5e12, "float32": 2.5e12}
    assert own.memory == pytest.approx(16e9 * (1 - hardware.CONTEXT_SHARE))
    assert choose_hardware("cpu", tflops=1, bandwidth=1, memory=1).name == "own device"


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("h1000", {}, "--device is 'h1000'; known are b200, "),
        ("x", {"tflops": 1.0}, "needs --tflops, --bandwidth and --memory, and --bandwidth, --mem"),
        (
            "x",
            {"tflops": 1.0, "bandwidth": 0.0, "memory": 1.0},
            "--bandwidth is 0; it must be a po",
        ),
    ],
)
def test_mistakes_are_told(name, numbers, message):
    with pytest.raises(UserError, match=message):
        choose_hardware(name, **numbers)


def test_measuring_finds_what_was_computed(monkeypatch):
    """With a clock that ticks once a call, the rates are the work of one call."""
    ticks = iter(range(100))
    assert matrix_flops(torch.float32, 4, lambda: next(ticks)) == 2 * 4 * 768 * 3072
    monkeypatch.setattr(torch, "ones", lambda count: torch.zeros(()).expand(count))
    assert read_bandwidth(lambda: next(ticks)) == 2**29


def test_calls_go_on_until_none_is_faster():
    """The first calls share the core with another program."""
    seconds, now = [], [0.0]

    def call():
        now[0] += seconds.pop(0)

    def best(*of_calls, most=100.0):
        seconds[:] = [5.0, *of_calls]  # the first one is the warm-up
        return best_seconds(call, 3, lambda: now[0], most=most)

    assert best(*[2.0] * 4, *[1.0] * 9) == 2.0 and len(seconds) == 9
    assert best(2.0, 2.0, 1.5, *[1.0] * 9) == 1.0 and len(seconds) == 5
    assert best(2.0, 2.0, 1.5, *[1.0] * 9, most=5.0) == 1.5


def test_a_peak_that_was_passed_is_none():
    assert share_of_peak(1.0, 4.0) == 0.25 and share_of_peak(4.0, 4.0) == 1.0
    assert share_of_peak(4.1, 4.0) is None


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    matrix_flops(torch.float32, 4)
    assert torch.equal(torch.rand(2), expected)


def test_the_quick_peak_is_quick_and_left_out_where_it_is_not(monkeypatch):
    quick_peak.cache_clear()
    began = time.process_time()
    peak = quick_peak("cpu", "float32", 1)
    assert peak is not None and 1e8 < peak < 1e14
    assert time.process_time() - began < 5  # under a second by itself
    quick_peak.cache_clear()
    monkeypatch.setattr(hardware, "matrix_flops", lambda dtype, rows: 1e8)
    assert quick_peak("cpu", "bfloat16", 1) is None and quick_peak("mps", "float32", 1) is None
    quick_peak.cache_clear()


def test_the_memory_of_this_machine_is_known():
    assert 2e8 < hardware.machine_memory() < 1e14
