"""Charts: what is in them, safe, the same each time, and what is said without matplotlib."""

import math
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blockdiffusion.errors import UserError
from blockdiffusion.reports import plots
from blockdiffusion.reports.curves import (
    ClipSearch,
    Curves,
    ValidationPoint,
    levels,
    loss_figure,
    search_figure,
    small_figures,
)
from tests.hostile import HOSTILE, check_picture

CURVES = Curves(
    loss=[(step, 7.0 - step / 30) for step in range(1, 61)],
    grad_norm=[(step, 1.0) for step in range(1, 61)],
    learning_rate=[(step, 0.0) for step in range(1, 61)],
    validation=[
        ValidationPoint(step=step, bound=6.5 - step / 30, stderr_noise=0.1, stderr_data=0.2)
        for step in (10, 20, 30, 40, 50, 60)
    ],
)


def series(axes, label):
    """The points of the curve that has the label in the legend."""
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return line.get_xydata().tolist()


def bars(axes):
    """(x, low, high) of every error bar, thin ones first."""
    found = [segment for c in axes.collections for segment in c.get_segments()]
    return [(low[0], low[1], high[1]) for low, high in filter(len, found)]


def texts(picture):
    return [e.text for e in ET.fromstring(picture).iter() if e.tag.endswith("}text")]


def titles(picture):
    return [e.text for e in ET.fromstring(picture).iter() if e.tag.endswith("}title")]


# --- SVG


def hostile_figure():
    with plots.style():
        figure = plots.new_figure(300, 200, HOSTILE)
        axes = figure.subplots()
        for colour in (plots.ACCENT, plots.COLOURS[0]):
            axes.plot([0, 1], [0, 1], "o", color=colour, label=plots.one_line(f"${HOSTILE}$"))
        axes.plot(0, 1, "o", color=plots.WARM, gid=plots.TIP + plots.one_line(HOSTILE))
        figure.legend()
    return figure


def test_a_picture_is_the_same_each_time_and_says_nothing_of_when_and_where():
    figure = hostile_figure()
    first = plots.svg(figure)
    assert plots.svg(figure) == first == plots.svg(hostile_figure())
    assert "matplotlib" not in first and "dc:" not in first and "<script" not in first


def test_texts_stay_texts():
    picture = plots.svg(hostile_figure())
    check_picture(picture)
    assert picture.encode()
    assert sum("<script>" in text and text.startswith("$") for text in texts(picture)) == 2
    assert plots.one_line(HOSTILE) in titles(picture)[1:]  # of the point


def test_a_title_for_the_pointer_is_at_its_point():
    picture = ET.fromstring(plots.svg(hostile_figure()))
    (group,) = [e for e in picture.iter() if e.tag.endswith("}g") and e[:1]
                and e[0].tag.endswith("}title")]  # fmt: skip
    assert [e for e in group.iter() if e.tag.endswith("}use")]


def test_colours_have_a_light_and_a_dark_value():
    picture = plots.svg(hostile_figure())
    assert "@media (prefers-color-scheme:dark)" in picture
    drawn = picture.partition("</style>")[2]
    used = set(re.findall(r"#[0-9a-f]{6}\b", drawn))
    assert used <= set(plots.COLOURS)
    assert "var(--accent)" in drawn and "var(--paper)" in drawn
    assert len({light for light, _ in plots.PALETTE.values()}) == len(plots.PALETTE)


@pytest.mark.parametrize("scheme", [0, 1])
def test_what_is_written_can_be_read(scheme):
    """Contrast as WCAG 2 defines it: 4.5 for words, 2.5 for lines."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    palette = {name: values[scheme] for name, values in plots.PALETTE.items()}
    assert all(contrast(palette[name], palette["paper"]) > 4.5 for name in ("ink", "muted"))
    curves = (palette["accent"], palette["warm"], palette["chosen"], *plots.COLOURS)
    assert all(contrast(colour, palette["paper"]) > 2.5 for colour in curves)


def test_pictures_of_one_page_share_no_ids():
    ids = [
        set(re.findall(r' id="([^"]*)"', plots.svg(hostile_figure(), name)))
        for name in ("a-", "b-")
    ]
    assert ids[0] and not ids[0] & ids[1]
    picture = plots.svg(hostile_figure(), "a-")
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', picture)) == ids[0]
    assert "prefers-color-scheme" not in picture  # the page has the colours


def test_a_picture_shrinks_with_its_page():
    root = ET.fromstring(plots.svg(hostile_figure()))
    assert (root.get("width"), root.get("viewBox")) == ("300", "0 0 300 200")
    assert "max-width:100%;height:auto" in root.get("style")


def test_a_users_own_settings_change_nothing():
    import matplotlib

    before = plots.svg(hostile_figure())
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "svg.fonttype": "path"}):
        assert plots.svg(hostile_figure()) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plots.require, lambda: loss_figure(CURVES, 400, 300)):
        with pytest.raises(UserError, match=r"^charts .*: pip install 'blockdiffusion\[plots\]'$"):
            draw()


def test_every_picture_of_the_documentation_has_a_name():
    for path in (Path(__file__).parents[2] / "docs").rglob("*.svg"):
        picture = ET.fromstring(path.read_bytes())
        assert picture.get("role") == "img", path
        assert picture[0].tag.endswith("title") and picture[0].text == picture.get("aria-label")


# --- ticks


@pytest.mark.parametrize(
    ("scale", "limits", "labels"),
    [
        ("linear", (0, 810), ["0", "200", "400", "600", "800"]),
        ("linear", (0, 3.1e-4), ["0", "0.0001", "0.0002", "0.0003"]),
        ("linear", (0, 30_000), ["0", "10,000", "20,000", "30,000"]),
        ("log", (15, 45), ["20", "30", "40"]),
        ("log", (0.9, 110), ["1", "2", "5", "10", "20", "50", "100"]),
        ("log", (1e-2, 1e3), ["0.01", "0.1", "1", "10", "100", "1,000"]),
    ],
)
def test_ticks_are_round_and_plain(scale, limits, labels):
    with plots.style():
        figure = plots.new_figure(400, 300, "x")
        axes = figure.subplots()
        axes.set(xscale=scale, xlim=limits)
        plots.ticks(axes, x=5)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    shown = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == labels


# --- a run


def test_the_loss_its_mean_and_the_evaluations_are_drawn():
    figure = loss_figure(CURVES, 880, 420)
    (axes,) = figure.axes
    assert series(axes, "training loss") == [list(point) for point in CURVES.loss]
    mean = series(axes, "its running mean over 5")  # of a straight line: the line
    assert np.allclose(mean, CURVES.loss[2:-2])
    evaluated = [[p.step, p.bound] for p in CURVES.validation]
    assert series(axes, "validation bound") == evaluated
    expected = [(x, y - e, y + e) for e in (0.2, 0.1) for x, y in evaluated]
    assert np.allclose(bars(axes), expected)
    tips = [title for title in titles(plots.svg(figure)) if title.startswith("step ")]
    assert len(tips) == 6
    assert tips[-1] == "step 60: bound 4.5000 nats per token, perplexity ≤ 90.02"


@pytest.mark.parametrize(
    ("name", "words"), [("exact", "exact"), ("orders", "tighter bound")], ids=["exact", "orders"]
)
def test_what_is_known_better_than_the_bound_is_drawn_with_it(name, words):
    points = [replace(p, **{name: p.bound - 0.5}) for p in CURVES.validation]
    figures = [loss_figure(Curves(validation=points), 400, 300), next(small_figures(Curves(
        validation=points)))]  # fmt: skip
    for figure, shown in zip(figures, (points, points[3:]), strict=True):
        assert series(figure.axes[0], f"validation, {words}") == [
            [p.step, p.bound - 0.5] for p in shown
        ]
        low, high = figure.axes[0].get_ylim()
        assert all(low < p.bound - 0.5 < p.bound + 0.2 < high for p in shown)
        assert f"; {words} 4.0000" in plots.svg(figure)
    plain = loss_figure(CURVES, 400, 300)
    assert not [line for line in plain.axes[0].lines if words in str(line.get_label())]


def test_an_exact_value_is_not_called_a_bound():
    points = [replace(p, is_bound=False, stderr_noise=0.0) for p in CURVES.validation]
    picture = plots.svg(loss_figure(Curves(validation=points), 400, 300))
    assert "validation loss, exact" in picture and "bound" not in picture and "≤" not in picture


def test_unknown_errors_are_not_drawn():
    points = [replace(CURVES.validation[0], stderr_noise=None)]
    (axes,) = loss_figure(Curves(validation=points), 400, 300).axes
    assert np.allclose(bars(axes), [(10, 5.966667, 6.366667)])


def test_a_few_wild_records_do_not_set_the_scale():
    wild = [(step, 1e9 if step == 333 else 1.0 + step / 1000) for step in range(1000)]
    (axes,) = loss_figure(Curves(loss=wild), 400, 300).axes
    mean_of_wild = 1e9 / 25
    assert axes.get_ylim()[1] < 1.1 * mean_of_wild


def test_the_other_curves_have_a_picture_each():
    figures = list(small_figures(CURVES))
    assert [figure.get_label() for figure in figures] == [
        "Validation bound, close up, nats per token", "Learning rate",
        "Gradient norm, before clipping",
    ]  # fmt: skip
    assert series(figures[0].axes[0], "validation bound")[0] == [40, 6.5 - 40 / 30]
    assert figures[2].axes[0].lines[0].get_xydata().tolist() == [[s, 1] for s in range(1, 61)]
    assert all(figure.axes[0].get_ylim()[0] == 0 for figure in figures[1:])


@pytest.mark.parametrize(
    "curves",
    [
        Curves(loss=[(1, 2.0)]),
        Curves(loss=[(0, 0.0)]),
        Curves(loss=[(1, 2.0), (2, 2.0)]),
        Curves(validation=[ValidationPoint(step=0, bound=5.0)]),
        Curves(validation=[ValidationPoint(step=s, bound=900.0) for s in range(5)]),
        Curves(loss=[(s, 1e9 if s == 3 else 1.0) for s in range(5000)]),
    ],
)
def test_odd_curves_are_drawn(curves):
    for figure in (loss_figure(curves, 400, 300), *small_figures(curves)):
        picture = plots.svg(figure)
        drawn = [e.get("d", "") for e in ET.fromstring(picture).iter()]
        assert not any("nan" in path or "inf" in path for path in drawn)


def test_long_curves_make_no_long_pictures():
    noise = np.random.default_rng(0).normal(size=100_000)
    curves = Curves(loss=[(step, float(value)) for step, value in enumerate(noise)])
    assert len(plots.svg(loss_figure(curves, 880, 420))) < 500_000


# --- the search of the schedule

FIRST = {(0.5, 1.0): 0.1, (0.0, 0.9): 0.4, (0.0, 0.5): 1.0}


def search(step, variances):
    clip = min(variances, key=variances.get)
    return ClipSearch(step=step, clip=clip, variances=variances, seconds=1.5)


def test_a_level_is_the_logarithm_of_how_much_worse_a_clip_is():
    assert levels(search(15, FIRST)) == pytest.approx(
        {(0.5, 1.0): 0, (0.0, 0.9): math.log(4) / math.log(8), (0.0, 0.5): 1}
    )
    none = search(5, {(1.0, 1.0): 0.0, (0.0, 0.5): 1e-9})
    assert levels(none) == {(1.0, 1.0): 0, (0.0, 0.5): 1}


def test_the_search_is_drawn_by_width_and_offset_with_its_choice_outlined():
    second = {**FIRST, (0.5, 1.0): 0.4, (0.0, 0.9): 0.1}
    figure = search_figure([search(15, FIRST), search(30, second)], 880, 80)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "width 0.5: 0.00 – 0.50", "0.50 – 1.00", "width 0.9: 0.00 – 0.90",
    ]  # fmt: skip
    rows = [place - 0.45 for place in axes.get_yticks()]
    outlined = [p.get_xy() for p in axes.patches if p.get_edgecolor()[0] > 0.8]
    assert outlined == [(0, rows[1]), (1, rows[2])]
    strongest = max((p for p in axes.patches if p.get_alpha()), key=lambda p: p.get_alpha())
    assert {(min(x), min(y)) for x, y in (box.T for box in strongest.get_path().vertices.reshape(
        -1, 5, 2))} == {(0, rows[1]), (1, rows[2])}  # fmt: skip
    tips = titles(plots.svg(figure))[1:]
    assert tips[0] == "step 15: 0.50 – 1.00, variance 0.1"


def test_many_searches_are_thinned():
    many = [search(15 * n, FIRST) for n in range(1, 1001)]
    for most in (80, 14):
        tips = titles(plots.svg(search_figure(many, 880, most)))[1:]
        assert len(tips) == most and tips[-1].startswith("step 15,000: ")
