"""The table of variances as one SVG: a band for every block size, loss and gradient side by side.

Each estimator is a line, its variance at equal compute a dot on a logarithmic axis with its
standard error over batches; hollow where the estimator is biased. The axis is the same for all
block sizes. The file stands alone, with its own light and dark colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from blockdiffusion.escape import html as escape
from blockdiffusion.reports.pictures import (
    CHART_STYLE,
    Frame,
    picture_file,
    tick_label,
)
from blockdiffusion.studies.variance.table import PAPER, Measured, VarianceRow, VarianceTable

PLOT, BETWEEN, RIGHT = 330, 34, 24
LETTER = 7.2  # width of a letter of a label, amply
LINE = 21
HEAD, BAND_HEAD, BAND_FOOT, FOOT = 104, 30, 38, 58
STYLE = CHART_STYLE + (
    ".size{font-size:13px;font-weight:600}.paper-line{stroke:var(--warm);stroke-dasharray:2 3}"
    ".dot{fill:var(--accent);stroke:var(--accent);stroke-width:1.6}.bar{stroke:var(--accent);"
    "stroke-width:1.6}.hollow{fill:var(--paper)}.of-paper{stroke:var(--warm)}"
    "circle.of-paper{fill:var(--warm)}"
)


def variance_picture(table: VarianceTable, what: str) -> str:
    """The picture as one `<svg>`; `what` says which model and data are measured."""
    kinds = ["loss", "gradient"] if table.options.gradients else ["loss"]
    ranges = {kind: _log_range(table.rows, kind) for kind in kinds}
    sizes = list(dict.fromkeys(row.block_size for row in table.rows))
    left = 30 + math.ceil(LETTER * max(18, *(len(row.label) for row in table.rows)))
    width = left + len(kinds) * PLOT + (len(kinds) - 1) * BETWEEN + RIGHT
    parts: list[str] = []
    top = HEAD
    for size in sizes:
        rows = table.at(size)
        own = " (the model's)" if size == table.model_block_size else ""
        parts.append(f'<text class="size" x="16" y="{top + 18}">S = {size}{own}</text>')
        height = BAND_HEAD + LINE * len(rows) + BAND_FOOT
        for index, row in enumerate(rows):
            y = top + BAND_HEAD + LINE * (index + 0.5) + 4
            parts.append(
                f'<text class="end" x="{left - 14}" y="{y:.1f}">{escape(row.label)}</text>'
            )
        for column, kind in enumerate(kinds):
            frame = Frame(
                width=left + PLOT + RIGHT,
                height=top + height - BAND_FOOT,
                x_range=ranges[kind],
                y_range=(len(rows), 0),
                left=left,
                right=RIGHT,
                top=top + BAND_HEAD,
                bottom=0,
            )
            shift = column * (PLOT + BETWEEN)
            parts.append(f'<g transform="translate({shift} 0)">')
            parts += [*_axis(frame), *_dots(frame, rows, kind), "</g>"]
        top += height
    parts = [*_head(table, what, kinds, left), *parts, *_legend(table, left, top + 10)]
    title = "Variance of the estimators at equal compute"
    return picture_file("variance", (width, top + FOOT), title, STYLE, parts)


def _log_range(rows: Sequence[VarianceRow], kind: str) -> tuple[float, float]:
    """log10 of the smallest and the largest end of a bar, with a margin."""
    ends = [
        math.log10(end)
        for row in rows
        if (found := row.at_equal_compute(f"{kind}_variance")) is not None and found.value > 0
        for end in _ends(found)
    ]
    if not ends:  # nothing has any variance
        return -1.0, 0.0
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low) + 0.1
    return low - pad, high + pad


def _ends(found: Measured) -> tuple[float, float]:
    """The value and one standard error to either side; a bar down to 0 ends at a third."""
    error = found.stderr or 0.0
    return max(found.value - error, found.value / 3), found.value + error


def _axis(frame: Frame) -> list[str]:
    low, high = frame.x_range
    exponents = range(math.ceil(low), math.floor(high) + 1)
    # Few powers of ten: also twice and five times them.
    between = (1, 2, 5) if len(exponents) < 3 else (1,)
    marks = [
        math.log10(m) + e for e in range(math.floor(low), math.floor(high) + 1) for m in between
    ]
    bottom = frame.height
    parts = []
    for mark in (mark for mark in marks if low <= mark <= high):
        x = f"{frame.x(mark):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{frame.top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick middle" x="{x}" y="{bottom + 16}">{tick_label(10**mark)}</text>'
        )
    right = frame.width - frame.right
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _dots(frame: Frame, rows: Sequence[VarianceRow], kind: str) -> list[str]:
    parts = []
    for index, row in enumerate(rows):
        found = row.at_equal_compute(f"{kind}_variance")
        assert found is not None
        y = f"{frame.y(index + 0.5):.1f}"
        css = ("" if row.is_bound else " hollow") + (" of-paper" if row.label == PAPER else "")
        if found.value == 0:
            words = "0" if row.is_bound else "0 (clipped)"
            parts.append(
                f'<text class="note" x="{frame.left + 6}" y="{float(y) + 4:.1f}">{words}</text>'
            )
            continue
        x = f"{frame.x(math.log10(found.value)):.1f}"
        if row.label == PAPER:
            parts.append(f'<path class="paper-line" d="M{x} {frame.top}V{frame.height}"/>')
        low, high = (f"{frame.x(math.log10(end)):.1f}" for end in _ends(found))
        words = f"{row.label}: {found.value:.3g}" + (
            "" if found.stderr is None else f" ± {found.stderr:.2g}"
        )
        parts.append(
            f"<g><title>{escape(words)}</title>"
            f'<line class="bar{css}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot{css}" cx="{x}" cy="{y}" r="4"/></g>'
        )
    return parts


def _head(table: VarianceTable, what: str, kinds: Sequence[str], left: int) -> list[str]:
    options = table.options
    conditions = (
        f"{options.batches} batches of {options.batch_size} rows of {table.seq_len} tokens, "
        f"{options.replicates} replicates, seed {options.seed}"
    )
    names = {
        "loss": "variance of the batch's loss (nats per token)",
        "gradient": "variance of its gradient (trace)",
    }
    parts = [
        '<text class="title" x="16" y="28">Variance of the estimators at equal compute</text>',
        f'<text class="note" x="16" y="47">{escape(what)}</text>',
        f'<text class="note" x="16" y="63">{conditions}</text>',
    ]
    for column, kind in enumerate(kinds):
        x = left + column * (PLOT + BETWEEN)
        parts.append(f'<text class="size" x="{x}" y="{HEAD - 4}">{names[kind]}</text>')
    return parts


def _legend(table: VarianceTable, left: int, y: int) -> list[str]:
    entries = (
        ("dot", "estimates the bound"),
        ("dot hollow", "clipped, so biased"),
        ("dot of-paper", "the paper's"),
    )
    parts, x = [], left
    for css, words in entries:
        parts.append(f'<circle class="{css}" cx="{x + 5}" cy="{y + 8}" r="4"/>')
        parts.append(f'<text class="note" x="{x + 15}" y="{y + 12}">{words}</text>')
        x += 32 + 6 * len(words)
    cut = next((row.t_min for row in table.rows if row.t_min is not None), None)
    words = "bars: a standard error over batches" + (
        "" if cut is None else f"; bernoulli leaves mask probabilities below {cut:g} out"
    )
    return [*parts, f'<text class="note" x="{left}" y="{y + 32}">{words}</text>']
