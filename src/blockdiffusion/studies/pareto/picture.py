"""Points as one SVG: quality over what a token costs, in network calls and in seconds.

A line joins the points of a policy, a number stands for each, a hollow dot is dominated, and a ring
is around the authors' setting. The quality has three sides, one above the other: perplexity under
the judge, entropy, the model's own bound; a dashed line is real text. The file stands alone, with
its own light and dark colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockdiffusion.escape import html as escape
from blockdiffusion.evaluate.generation.table import conventions, number
from blockdiffusion.evaluate.likelihood import Z95
from blockdiffusion.reports.pictures import (
    CHART_STYLE,
    Frame,
    log_ticks,
    nice_ticks,
    picture_file,
    tick_label,
)
from blockdiffusion.studies.pareto.table import AUTHORS_MARK, filters

PLOT_WIDTH, PLOT_HEIGHT, LEFT, BETWEEN, RIGHT = 400, 210, 66, 62, 20
HEAD, ROW_GAP, LEGEND_LINE = 96, 66, 20
WIDTH = LEFT + 2 * PLOT_WIDTH + BETWEEN + RIGHT
COLOURS = ("#3b75af", "#c8643a", "#4f9a54", "#9465b8", "#b58a1f", "#c5508a", "#3f98a3")
STYLE = CHART_STYLE + (
    ".name{font-size:12px}.mark{font-size:11px;font-weight:600}.real{stroke:var(--muted);"
    "stroke-dasharray:5 4}.size{font-size:13px;font-weight:600}"
    + "".join(
        f".f{i}{{stroke:{colour};fill:{colour}}}.line.f{i}{{fill:none;stroke-opacity:.55}}"
        f".mark.f{i}{{stroke:none}}"
        for i, colour in enumerate(COLOURS)
    )
    + ".dot{stroke-width:1.6}circle.hollow{fill:var(--paper)}circle.ring{fill:none}"
)
Value = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One side of the quality: a value with the ends of its interval."""

    name: str
    logarithmic: bool
    value: Value
    ends: Callable[[Mapping[str, Any]], tuple[float, float]]
    real: float | None


def pareto_picture(result: Mapping[str, Any]) -> str:
    """The picture as one `<svg>`, of what `run.measure_pareto` gives."""
    points, sides = result["points"], _sides(result)
    families = list(dict.fromkeys(point["policy"] for point in points))
    costs: list[tuple[str, Value]] = [
        ("network calls per token", lambda point: point["calls_per_token"]),
        ("seconds per token", lambda point: point["seconds_per_token"]),
    ]
    parts: list[str] = []
    for row, side in enumerate(sides):
        for column, (cost_name, cost) in enumerate(costs):
            shown = [p for p in points if cost(p) is not None and side.value(p) is not None]
            if not shown:
                continue
            left = LEFT + column * (PLOT_WIDTH + BETWEEN)
            top = HEAD + row * (PLOT_HEIGHT + ROW_GAP)
            frame = _frame(left, top, shown, cost, side)
            parts += _axes(frame, side, cost_name)
            parts += _family_lines(frame, shown, families, cost, side)
            parts += _dots(frame, shown, points, families, cost, side)
    legend_top = HEAD + len(sides) * (PLOT_HEIGHT + ROW_GAP) + 6
    height = legend_top + LEGEND_LINE * len(points) + 44
    title = "Quality of samples against their cost"
    return picture_file("pareto", (WIDTH, height), title, STYLE, [
        '<text class="title" x="16" y="28">Quality of samples against their cost</text>',
        f'<text class="note" x="16" y="47">{escape(result["model"])}: '
        f"{result['sampling']['num_samples']} samples of at most "
        f"{result['sampling']['max_new_tokens']} tokens, {escape(filters(result['sampling']))}"
        "</text>",
        f'<text class="note" x="16" y="63">{escape(conventions(result))}</text>',
        *parts,
        *_legend(points, families, legend_top),
    ])  # fmt: skip


def _sides(result: Mapping[str, Any]) -> list[_Side]:
    reference = result["reference"]
    sign = "upper bound on " if result["judge"]["is_bound"] else ""

    def around(found: Mapping[str, Any]) -> tuple[float, float]:
        reach = Z95 * (found["stderr"] or 0.0)
        return found["value"] - reach, found["value"] + reach

    sides = [
        _Side(
            name=f"{sign}generative perplexity",
            logarithmic=True,
            value=lambda point: point["text"]["perplexity"],
            ends=lambda point: tuple(  # type: ignore[return-value]
                point["text"]["interval"] or [point["text"]["perplexity"]] * 2
            ),
            real=None if reference is None else reference["perplexity"],
        ),
        _Side(
            name="entropy of a sample's tokens (nats)",
            logarithmic=False,
            value=lambda point: point["text"]["entropy"]["value"],
            ends=lambda point: around(point["text"]["entropy"]),
            real=None if reference is None else reference["entropy"]["value"],
        ),
    ]
    if any(point["bound"] is not None for point in result["points"]):
        sides.append(
            _Side(
                name="the model's bound (nats per token)",
                logarithmic=False,
                value=lambda point: point["bound"] and point["bound"]["value"],
                ends=lambda point: around(point["bound"]),
                real=None,
            )
        )
    return sides


def _frame(
    left: int, top: int, points: Sequence[Mapping[str, Any]], cost: Value, side: _Side
) -> Frame:
    ends = [end for point in points for end in side.ends(point)]
    ends += [] if side.real is None else [side.real]
    heights = [math.log10(end) for end in ends] if side.logarithmic else ends
    return Frame(
        width=left + PLOT_WIDTH,
        height=top + PLOT_HEIGHT,
        x_range=_padded([math.log10(_known(cost(point))) for point in points]),
        y_range=_padded(heights),
        left=left,
        right=0,
        top=top,
        bottom=0,
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max(0.1 * (high - low), 0.03)
    return low - pad, high + pad


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _height(side: _Side, value: float) -> float:
    return math.log10(value) if side.logarithmic else value


def _axes(frame: Frame, side: _Side, cost_name: str) -> list[str]:
    bottom, parts = frame.height, []
    for tick in log_ticks(*frame.x_range):
        x = f"{frame.x(math.log10(tick)):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{frame.top}" y2="{bottom}"/>')
        label = tick_label(round(tick, 9))
        parts.append(f'<text class="tick middle" x="{x}" y="{bottom + 15}">{label}</text>')
    ticks = log_ticks(*frame.y_range) if side.logarithmic else nice_ticks(*frame.y_range, 5)
    for tick in ticks:
        y = frame.y(_height(side, tick))
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{frame.left - 7}" y="{y + 4:.1f}">'
            f"{tick_label(round(tick, 9))}</text>"
        )
    if side.real is not None:
        y = frame.y(_height(side, side.real))
        parts.append(
            f'<line class="real" x1="{frame.left}" x2="{frame.width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="note end" x="{frame.width - 4}" y="{y - 5:.1f}">real text</text>'
        )
    parts.append(
        f'<line class="axis" x1="{frame.left}" x2="{frame.width}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="note middle" x="{(frame.left + frame.width) / 2:.0f}" y="{bottom + 31}">'
        f"{cost_name}</text>"
        f'<text class="size" x="{frame.left}" y="{frame.top - 7}">{escape(side.name)}</text>'
    )
    return parts


def _place(frame: Frame, point: Mapping[str, Any], cost: Value, side: _Side) -> tuple[float, float]:
    height = _height(side, _known(side.value(point)))
    return frame.x(math.log10(_known(cost(point)))), frame.y(height)


def _family_lines(
    frame: Frame,
    points: Sequence[Mapping[str, Any]],
    families: Sequence[str],
    cost: Value,
    side: _Side,
) -> list[str]:
    parts = []
    for index, family in enumerate(families):
        places = sorted(
            _place(frame, point, cost, side)
            for point in points
            if point["policy"] == family and not point["is_authors"]
        )
        if len(places) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path class="line f{index % len(COLOURS)}" d="M{path}"/>')
    return parts


def _dots(
    frame: Frame,
    shown: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    families: Sequence[str],
    cost: Value,
    side: _Side,
) -> list[str]:
    parts, placed = [], []
    for point in shown:
        css = f"f{families.index(point['policy']) % len(COLOURS)}"
        x, y = _place(frame, point, cost, side)
        low, high = (frame.y(_height(side, end)) for end in side.ends(point))
        around = [(x + dx, y + dy) for dy in (-6, 14, -18, 26) for dx in (9, -9)]
        name = next(
            (p for p in around if all(abs(p[0] - a) > 13 or abs(p[1] - b) > 10 for a, b in placed)),
            around[0],
        )
        placed.append(name)
        hollow = " hollow" if point["dominated_by"] else ""
        parts.append(
            f"<g><title>{escape(point['label'])}</title>"
            f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            f'<circle class="dot {css}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
            f"{_ring(point, css, x, y)}"
            f'<text class="mark middle {css}" x="{name[0]:.1f}" y="{name[1]:.1f}">'
            f"{points.index(point) + 1}</text></g>"
        )
    return parts


def _ring(point: Mapping[str, Any], css: str, x: float, y: float) -> str:
    if not point["is_authors"]:
        return ""
    return f'<circle class="ring {css}" cx="{x:.1f}" cy="{y:.1f}" r="6.6"/>'


def _legend(points: Sequence[Mapping[str, Any]], families: Sequence[str], top: int) -> list[str]:
    parts = []
    for index, point in enumerate(points):
        y = top + LEGEND_LINE * index
        css = f"f{families.index(point['policy']) % len(COLOURS)}"
        hollow = " hollow" if point["dominated_by"] else ""
        seconds = point["seconds_per_token"]
        values = [
            f"{number(point['calls_per_token'])} calls per token",
            "" if seconds is None else f"{number(1000 * seconds)} ms per token",
            f"perplexity {number(point['text']['perplexity'])}",
            f"entropy {number(point['text']['entropy']['value'])}",
        ]
        parts.append(f'<circle class="dot {css}{hollow}" cx="{LEFT + 6}" cy="{y + 8}" r="3.6"/>')
        parts.append(_ring(point, css, LEFT + 6, y + 8))
        parts.append(f'<text class="mark {css}" x="{LEFT + 16}" y="{y + 12}">{index + 1}</text>')
        parts.append(
            f'<text class="name" x="{LEFT + 38}" y="{y + 12}">{escape(point["label"])}</text>'
        )
        parts += [
            f'<text class="note" x="{LEFT + 300 + 140 * column}" y="{y + 12}">{value}</text>'
            for column, value in enumerate(values)
        ]
    y = top + LEGEND_LINE * len(points) + 14
    words = (
        "hollow: another point costs no more calls and is no worse in perplexity and entropy; "
        f"ring: {AUTHORS_MARK}; lines: 95 % intervals over samples"
    )
    return [*parts, f'<text class="note" x="{LEFT}" y="{y}">{words}</text>']
