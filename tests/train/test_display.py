"""What a run shows on a terminal and elsewhere."""

import io
import re

import pytest
from rich.console import Console

from blockdiffusion.train.display import (
    LiveDisplay,
    LossCurve,
    PlainDisplay,
    _rate,
    make_display,
)


def show(display, steps=5):
    display.start({}, 1)
    for step in range(1, steps + 1):
        values = {
            "loss": 5.0 - step / 10,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 1234.0,
            "tflops_per_second": 0.0456,
            "peak_share": 0.38,
        }
        display.log(step, values)
    display.log(
        steps, {"valid_bound": 4.25, "valid_stderr_data": 0.5, "valid_perplexity_bound": 70.105}
    )
    display.log(steps, {"samples": ["one [bold]two\n three " + "x" * 300, "second"]})
    display.log(steps, {"note": "resumed from step 3"})
    grid = [[0.0, 0.5, 2.0], [0.45, 0.95, 1.0]]
    display.log(steps, {"clip": [0.45, 0.95], "clip_grid": grid, "search_seconds": 3.21})
    display.finish()


def test_pipes_get_plain_lines():
    out = io.StringIO()
    display = make_display(5, Console(file=out, width=100))
    assert isinstance(display, PlainDisplay)
    show(display)
    lines = out.getvalue().splitlines()
    assert (
        lines[0].startswith("step 5/5  loss 4.")
        and "1,234 tokens/s  45.6 GFLOP/s (38%)  0:00:00 left" in lines[0]
    )
    assert (
        lines[1] == "step 5: validation bound 4.2500 nats per token ± 0.5000, perplexity <= 70.11"
    )
    assert lines[2].startswith("step 5: one [bold]two three xx") and lines[2].endswith("x…")
    assert lines[3] == "resumed from step 3"
    assert lines[4] == "step 5: of 2 clips 0.45-0.95 has the least variance (3.2 s)"
    assert len(lines) == 5


@pytest.mark.parametrize("terminal", [False, True])
def test_an_exact_value_is_not_called_a_bound(terminal):
    out = io.StringIO()
    display = make_display(5, Console(file=out, width=100, force_terminal=terminal))
    display.start({}, 1)
    display.log(5, {"valid_bound": 4.25, "valid_perplexity": 70.105})
    display.finish()
    assert "step 5: validation 4.2500 nats per token, perplexity 70.11" in out.getvalue()
    assert "bound" not in out.getvalue() and "<=" not in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("name", "words"),
    [("valid_exact", "; exact 4.1250, perplexity 61.87"),
     ("valid_orders", "; tighter bound 4.1250, perplexity <= 61.87")],
)  # fmt: skip
def test_what_is_known_better_than_the_bound_stands_behind_it(terminal, name, words):
    out = io.StringIO()
    display = make_display(5, Console(file=out, width=150, force_terminal=terminal))
    display.start({}, 1)
    display.log(5, {"valid_bound": 4.25, "valid_perplexity_bound": 70.105, name: 4.125})
    display.finish()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert f"bound 4.2500 nats per token, perplexity <= 70.11{words}" in shown
    assert ("bound 4.250 exact 4.125" in shown) == (terminal and name == "valid_exact")


def test_plain_lines_come_every_few_seconds():
    out = io.StringIO()
    display = make_display(9, Console(file=out, width=100), every_seconds=0)
    show(display, steps=3)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 1/9", "step 2/9", "step 3/9"]


def test_terminals_get_a_live_line():
    out = io.StringIO()
    display = make_display(5, Console(file=out, width=140, force_terminal=True))
    assert isinstance(display, LiveDisplay)
    show(display)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())  # without colours
    for text in ("step 5/5", "loss 4.", "1,234 tok/s", "validation bound 4.2500", "[bold]two"):
        assert text in shown
    assert "bound 4.250 clip 0.45-0.95 0:00:00 left 1,234 tok/s 45.6 GFLOP/s (38%) lr" in shown


@pytest.mark.parametrize(("encoding", "drawn"), [("ascii", False), ("utf-8", True)])
def test_the_live_line_draws_no_curve_that_an_encoding_lacks(encoding, drawn):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    display = make_display(5, Console(file=file, width=140, force_terminal=True))
    display.start({}, 1)
    for step, loss in ((1, 5.0), (5, 4.0)):
        display.log(step, {"loss": loss, "lr": 1e-3, "tokens_per_second": 9.0})
    display.finish()
    file.flush()
    line = raw.getvalue().decode(encoding)
    assert "loss" in line and "\\u" not in line and ("▁" in line) == drawn


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_live_line_keeps_what_must_be_told_at_every_width(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    display = make_display(140_000, console)
    display.start({}, 1)
    display.log(99, {"valid_bound": 4.25, "valid_perplexity_bound": 70.105, "valid_exact": 4.125})
    display.log(99, {"clip": [0.45, 0.95]})
    for step in (100, 35_000):
        display._drawn = 0.0
        display.log(step, {"loss": 4.5, "lr": 1e-3, "tokens_per_second": 12345.0})
    display.finish()
    with console.capture() as captured:
        console.print(*display._progress.get_renderables())
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.get()).split("\n")
    shown = " ".join(lines)
    assert max(map(len, lines)) <= width
    parts = ["step 35000/140000 ━", "loss 4.500", "bound 4.250", " left", "12,345 tok/s"]
    places = [shown.index(part) for part in parts]
    assert places == sorted(places) and re.search(r"\d:\d\d:\d\d left", shown)
    assert ("exact 4.125" in shown) == (width == 120)


def test_the_live_display_shows_what_would_steer_a_terminal():
    out = io.StringIO()
    display = make_display(5, Console(file=out, width=120, force_terminal=True))
    display.start({}, 1)
    display.log(1, {"samples": ["a\x1b]0;title\x07b\x9b2Jc\u202ed"], "note": "n\x1b[2J"})
    display.finish()
    assert "a\\x1b]0;titleb\\x9b2Jc\\u202ed" in out.getvalue() and "n\\x1b[2J" in out.getvalue()
    plain = io.StringIO()
    display = make_display(5, Console(file=plain, width=120))
    display.start({}, 1)
    display.log(1, {"samples": ["a\x1b[2Jb"]})
    assert plain.getvalue() == "step 1: a\x1b[2Jb\n"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tflops_per_second": 0.0005}, ["500 MFLOP/s"]),
        ({"tflops_per_second": 312.4, "peak_share": 0.316}, ["312 TFLOP/s (32%)"]),
        ({}, []),
    ],
)
def test_a_rate_is_told_with_its_share_where_that_is_known(values, expected):
    assert _rate(values) == expected


def test_a_clip_that_was_found_earlier_is_shown_from_the_start():
    out = io.StringIO()
    display = make_display(9, Console(file=out, width=140, force_terminal=True))
    display.start({}, 6)
    assert "clip" not in out.getvalue()
    display.log(5, {"clip": [0.3, 1.0]})
    display.finish()
    assert "clip 0.3-1" in out.getvalue() and "least variance" not in out.getvalue()


def test_the_smoothed_loss_starts_at_the_first_loss():
    curve = LossCurve()
    curve.add(7.0)
    assert curve.value == pytest.approx(7.0)
    curve.add(5.0)
    assert 5.9 < curve.value < 6.0


def test_the_curve_stays_short_and_falls_with_the_loss():
    curve = LossCurve(width=8)
    assert curve.spark() == ""
    for step in range(1000):
        curve.add(1000.0 - step)
        assert len(curve.spark()) <= 8
    assert curve.spark()[0] == "█" and curve.spark()[-1] == "▁"
    assert list(curve.spark()) == sorted(curve.spark(), reverse=True)
