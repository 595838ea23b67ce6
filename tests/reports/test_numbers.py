"""Numbers as people read them."""

import math

from blockdiffusion.reports.numbers import (
    count,
    duration,
    number,
    scaled,
    scientific,
    two_digits,
    with_error,
    with_errors,
)


def test_four_digits():
    shown = [number(v) for v in (None, 0, 128.0, 12.3456, 0.01234, 88198.6, 6.6e13, math.inf)]
    assert shown == ["", "0", "128", "12.35", "0.0123", "88,199", "6.6e13", "inf"]
    assert [number(v) for v in (-0.25, 6e-4, 0.0000123)] == ["-0.2500", "0.0006", "1.23e-5"]


def test_a_value_has_as_many_places_as_its_error():
    assert with_error({"value": 12.3456, "stderr": 0.0321}) == "12.346 ± 0.032"
    assert with_error({"value": 12345.6, "stderr": 321.0}) == "12,346 ± 321"
    assert with_error({"value": 0.0, "stderr": 0.0}) == "0" and with_error(None) == ""
    assert with_error({"value": 2.5, "stderr": None}) == "2.500"
    assert with_error({"value": 2.5, "stderr": math.inf}) == "2.500"
    assert with_error({"value": 3e8, "stderr": 2e7}) == "3e8 ± 2e7"


def test_a_format_holds_for_value_and_error():
    assert with_error({"value": 1234.567, "stderr": 0.321}, ",.2f") == "1,234.57 ± 0.32"
    assert with_error({"value": 1234.567, "stderr": None}, ",.2f") == "1,234.57"
    shown = with_errors(5.4363, ".4f", noise=0.0, data=0.0191)
    assert shown == "5.4363 ± 0.0000 (noise) ± 0.0191 (data)"
    assert with_errors(5.4363, ".2f", noise=None, data=0.0191) == "5.44 ± 0.02 (data)"


def test_errors_have_two_digits():
    assert [two_digits(error) for error in (0.00312, 2.34, 123.4)] == ["0.0031", "2.3", "123"]


def test_large_and_small_numbers():
    assert [count(n) for n in (999, 9_999, 25_300, 999_999, 169_000_000, 65.5e9, 3e15)] == [
        "999", "9,999", "25.3K", "1M", "169M", "65.5B", "3e+03T",
    ]  # fmt: skip
    assert [scaled(n, "B") for n in (0, 999.9, 25_300, 1.5e12)] == [
        "0 B", "1 kB", "25.3 kB", "1.5 TB",
    ]  # fmt: skip
    assert [scientific(n) for n in (0.00192, 0, -12.0)] == ["1.92e-3", "0", "-1.20e1"]


def test_durations():
    seconds = (8.1e-6, 0.0034, 0.5, 61, 3 * 3600 + 125, 3.5 * 86_400)
    assert [duration(s) for s in seconds] == [
        "8.1 us", "3.4 ms", "0.5 s", "1 min 1 s", "3 h 2 min", "3.5 days",
    ]  # fmt: skip
