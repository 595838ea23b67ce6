"""The report's pictures as inline SVG: curves and heat maps over steps, the attention mask.

Every picture is a string that stands alone in a page: no script is needed to read it. Colours are
CSS variables with a fallback, so that a page's light or dark scheme (`page.css`) reaches into
them. The mask is drawn from `blockdiffusion.models.masks`, never from a second description of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockdiffusion.escape import html as escape

if TYPE_CHECKING:
    from blockdiffusion.models.masks import CleanAttention

Points = Sequence[tuple[float, float]]

# What a cell of the mask picture belongs to: its character in `mask_rows`, CSS class, name, words.
MASK_PARTS = (
    (
        "d",
        "part-diagonal",
        "block diagonal",
        "a noisy token sees the noisy tokens of its own block",
    ),
    (
        "o",
        "part-offset",
        "offset block causal",
        "a noisy token sees the clean tokens before its block",
    ),
    ("c", "part-clean", "block causal", "a clean token sees the clean tokens up to its own block"),
)
TOKEN_CAUSAL = ("block causal, token by token", "a clean token sees the clean tokens up to itself")
LARGEST_DRAWN_BLOCK = 16
WIDEST_CELL = 184  # of a heat map


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve: `points` are (step, value) by rising step; `css` is a class of `page.css`."""

    points: Points
    css: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBar:
    """A measured value with two standard errors, either of which may be unknown (None)."""

    step: float
    value: float
    stderr_noise: float | None
    stderr_data: float | None
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A plot's size and data range; `x` and `y` give the place of a value in the picture."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 52
    right: int = 14
    top: int = 12
    bottom: int = 44

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        bottom = self.height - self.bottom
        return bottom - (value - low) / (high - low) * (bottom - self.top)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.75 * rough)
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [index * spacing for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between 10^low and 10^high: powers of ten, or more where few of them fit."""
    if high - low < 0.7:
        return [tick for tick in nice_ticks(10**low, 10**high, 6) if tick > 0]
    steps = (1, 2, 5) if high - low < 3 else (1,)
    exponents = range(math.floor(low), math.floor(high) + 1)
    every = max(1, len(exponents) // 8)
    marks = [m * 10.0**e for e in exponents if e % every == 0 for m in steps]
    return [mark for mark in marks if low <= math.log10(mark) <= high]


def tick_label(value: float) -> str:
    """A short label without trailing zeros: 0.0003 -> 3e-4, 1500 -> 1,500, 25000 -> 25k."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000_000:
        return f"{value / 1e6:,.10g}M"
    if abs(value) >= 10_000:
        return f"{value / 1e3:,.10g}k"
    if abs(value) < 0.01:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**exponent:.3g}e{exponent}"
    return f"{value:,.6g}"


def running_mean(points: Points, half_width: int) -> list[tuple[float, float] | None]:
    """The mean over each point and up to `half_width` neighbours on either side.

    Near an end the window shrinks on both sides alike, so that the curve is not pulled askew; where
    fewer than half the neighbours are left, the mean would be as noisy as the points: None.
    """
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth: list[tuple[float, float] | None] = []
    for index, (step, _) in enumerate(points):
        reach = min(half_width, index, len(points) - 1 - index)
        first, last = index - reach, index + reach + 1
        enough = 2 * reach >= half_width
        smooth.append((step, (sums[last] - sums[first]) / (last - first)) if enough else None)
    return smooth


def thin_out(points: Points, most: int) -> list[tuple[float, float]]:
    """At most about `most` points that keep every bucket's smallest and largest value."""
    if len(points) <= most:
        return list(points)
    buckets = max(most // 2, 1)
    kept: list[tuple[float, float]] = []
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def value_range(
    points: Points, bars: Sequence[ErrorBar] = (), always: Points = ()
) -> tuple[float, float]:
    """The range to show: `bars` and `always` whole, `points` but for the 1 % on either side."""
    values = sorted(value for _, value in points)
    cut = len(values) // 100
    shown = values[cut : len(values) - cut] + [value for _, value in always]
    for bar in bars:
        reach = max(bar.stderr_noise or 0.0, bar.stderr_data or 0.0)
        shown += [bar.value - reach, bar.value + reach]
    low, high = min(shown), max(shown)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def curve_picture(
    frame: Frame,
    *,
    lines: Sequence[Line],
    bars: Sequence[ErrorBar] = (),
    x_label: str = "",
    y_label: str = "",
    title: str,
    chart: str = "",
    num_ticks: tuple[int, int] = (6, 7),
) -> str:
    """Curves and error bars in a frame with ticks and labels, as one `<svg>`.

    `chart` names the page's data for this picture: `page.js` shows the values under the pointer.
    """
    clip = f"clip-{chart}-{frame.width}"
    plot_width = frame.width - frame.left - frame.right
    plot_height = frame.height - frame.top - frame.bottom
    parts = [
        f'<svg class="chart" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(title)}" data-chart="{chart}" '
        f'data-left="{frame.left}" data-plot="{plot_width}" data-top="{frame.top}" '
        f'data-bottom="{frame.height - frame.bottom}" '
        f'data-low="{frame.x_range[0]:g}" data-high="{frame.x_range[1]:g}">',
        f'<clipPath id="{clip}"><rect x="{frame.left}" y="{frame.top}" '
        f'width="{plot_width}" height="{plot_height}"/></clipPath>',
        *_axes(frame, x_label, y_label, num_ticks),
        f'<g clip-path="url(#{clip})">',
    ]
    for line in lines:
        path = "L".join(f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in line.points)
        parts.append(f'<path class="{line.css}" d="M{path}"/>')
    parts += ["</g>", *(_error_bar(frame, bar) for bar in bars), "</svg>"]
    return "".join(parts)


def _axes(frame: Frame, x_label: str, y_label: str, num_ticks: tuple[int, int]) -> list[str]:
    left, bottom = frame.left, frame.height - frame.bottom
    right = frame.width - frame.right
    parts = []
    for tick in nice_ticks(*frame.y_range, num_ticks[1]):
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick end" x="{left - 8}" y="{y + 4:.1f}">{tick_label(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for tick in nice_ticks(*frame.x_range, num_ticks[0]):
        x = frame.x(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        )
        parts.append(
            f'<text class="tick middle" x="{x:.1f}" y="{bottom + 19}">{tick_label(tick)}</text>'
        )
    middle_x, middle_y = (left + right) / 2, (frame.top + bottom) / 2
    if x_label:
        parts.append(
            f'<text class="label middle" x="{middle_x:.0f}" y="{frame.height - 6}">'
            f"{escape(x_label)}</text>"
        )
    if y_label:
        parts.append(
            f'<text class="label middle" transform="translate(13 {middle_y:.0f}) rotate(-90)">'
            f"{escape(y_label)}</text>"
        )
    return parts


def _error_bar(frame: Frame, bar: ErrorBar) -> str:
    x = f"{frame.x(bar.step):.1f}"
    parts = [f'<g class="measured"><title>{escape(bar.label)}</title>']
    for css, error in (("bar-data", bar.stderr_data), ("bar-noise", bar.stderr_noise)):
        if error:
            top, bottom = frame.y(bar.value + error), frame.y(bar.value - error)
            parts.append(f'<path class="{css}" d="M{x} {top:.1f}V{bottom:.1f}"/>')
            if css == "bar-data":
                parts.append(
                    f'<path class="{css}" d="M{x} {top:.1f}m-4 0h8m-8 {bottom - top:.1f}h8"/>'
                )
    parts.append(f'<circle cx="{x}" cy="{frame.y(bar.value):.1f}" r="3"/></g>')
    return "".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatColumn:
    """A column of a heat map: `levels` from 0 (best) to 1, by row; `marked` is a row's number."""

    label: str
    levels: Sequence[float]
    marked: int
    title: str


def evenly_spread(number: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. number - 1, evenly spread, the last one among them."""
    kept = min(number, most)
    return [(index + 1) * number // kept - 1 for index in range(kept)]


def heat_picture(
    width: int,
    *,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[HeatColumn],
    x_label: str,
    title: str,
) -> str:
    """A heat map as one `<svg>`; `rows` are (group, label), equal groups lie together.

    The marked cell of every column is outlined and has the column's title.
    """
    groups = [group for group, _ in rows]
    left, right, top, row_height, gap = 136, 8, 8, 13, 9
    tops = []
    y = float(top)
    for index, group in enumerate(groups):
        y += gap if index and group != groups[index - 1] else 0
        tops.append(y)
        y += row_height
    cell = min((width - left - right) / len(columns), WIDEST_CELL)
    space = 1.5 if cell > 8 else 0.0  # between columns, where it would not eat them
    bottom = y
    parts = [
        f'<svg class="heat" viewBox="0 0 {width} {bottom + 44:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    parts += _heat_names(rows, tops, left, row_height)
    for number, column in enumerate(columns):
        x = left + number * cell
        parts += [
            f'<rect x="{x:.2f}" y="{place:g}" width="{cell - space:.2f}" height="{row_height - 1}" '
            f'style="--v:{level:.2f}"/>'
            for place, level in zip(tops, column.levels, strict=True)
        ]
    every = math.ceil(52 / cell)
    for number, column in enumerate(columns):
        x, place = left + number * cell, tops[column.marked]
        parts.append(
            f'<rect class="chosen" x="{x:.2f}" y="{place:g}" width="{cell - space:.2f}" '
            f'height="{row_height - 1}" rx="1.5">'
            f"<title>{escape(column.title)}</title></rect>"
        )
        if number % every == 0:
            parts.append(
                f'<text class="tick middle" x="{x + cell / 2:.1f}" y="{bottom + 17:.0f}">'
                f"{column.label}</text>"
            )
    parts.append(
        f'<text class="label middle" x="{left + len(columns) * cell / 2:.0f}" '
        f'y="{bottom + 38:.0f}">{escape(x_label)}</text></svg>'
    )
    return "".join(parts)


def _heat_names(
    rows: Sequence[tuple[str, str]], tops: Sequence[float], left: int, row_height: int
) -> list[str]:
    """A label for every row; for every group its name, at its first row."""
    parts = []
    for index, ((group, label), y) in enumerate(zip(rows, tops, strict=True)):
        base = y + row_height - 3
        parts.append(f'<text class="row end" x="{left - 8}" y="{base:g}">{escape(label)}</text>')
        if index == 0 or group != rows[index - 1][0]:
            parts.append(f'<text class="group" x="0" y="{base:g}">{escape(group)}</text>')
    return parts


def drawn_blocks(block_size: int, seq_len: int) -> tuple[int, int]:
    """(block size, number of blocks) of a mask picture that is small enough to read."""
    size = min(block_size, LARGEST_DRAWN_BLOCK)
    return size, max(1, min(seq_len // block_size, max(3, min(8, 16 // size))))


def mask_rows(
    block_size: int, num_blocks: int, clean_attention: CleanAttention = "block"
) -> list[str]:
    """The mask on [noisy ; clean], one string per query: a part's letter, or `.` where unseen."""
    from blockdiffusion.models.masks import Streams, dense_mask

    streams = Streams(block_size * num_blocks, block_size, clean_attention=clean_attention)
    rows = []
    for query, seen in enumerate(dense_mask(streams).tolist()):
        letters = []
        for key, visible in enumerate(seen):
            # The three parts differ in the streams of query and key alone.
            part = (query >= streams.seq_len) + (key >= streams.seq_len)
            letters.append(MASK_PARTS[part][0] if visible else ".")
        rows.append("".join(letters))
    return rows


def mask_picture(
    block_size: int,
    num_blocks: int,
    clean_attention: CleanAttention = "block",
    *,
    standalone: bool = False,
) -> str:
    """The attention mask on [noisy ; clean] as one `<svg>`: rows are queries, columns are keys.

    `standalone` makes it a file of its own, with its own colours, for documentation.
    """
    rows = mask_rows(block_size, num_blocks, clean_attention)
    left, top, side = 74, 74, 384
    cell = side / len(rows)
    height = top + side + (92 if standalone else 8)
    width = left + side + (26 if standalone else 8)
    parts = [f'<rect class="unseen" x="{left}" y="{top}" width="{side}" height="{side}"/>']
    parts += _mask_cells(rows, left, top, cell)
    parts += _mask_lines(len(rows), block_size, left, top, cell)
    parts += _mask_labels(num_blocks, left, top, side)
    title = "Attention mask: which key each query sees"
    if standalone:
        parts += _mask_legend(24, top + side + 22, clean_attention)
        return picture_file("mask", (width, height), title, STANDALONE_STYLE, parts)
    # What `page.js` reads to name the cell under the pointer.
    data = f'data-left="{left}" data-top="{top}" data-side="{side}" data-block="{block_size}"'
    return (
        f'<svg class="mask" viewBox="0 0 {width} {height}" role="img" aria-label="{title}" {data} '
        f'data-rows="{" ".join(rows)}">{"".join(parts)}</svg>'
    )


def causal_picture(num_tokens: int) -> str:
    """The attention mask of an autoregressive network: a token sees those up to itself."""
    rows: list[str] = [("c" * seen).ljust(num_tokens, ".") for seen in range(1, num_tokens + 1)]
    left, top, side = 40, 30, 300
    parts = [
        f'<svg viewBox="0 0 {left + side + 8} {top + side + 8}" role="img" '
        'aria-label="Attention mask: which key each query sees">',
        f'<rect class="unseen" x="{left}" y="{top}" width="{side}" height="{side}"/>',
        *_mask_cells(rows, left, top, side / num_tokens),
    ]
    middle = side / 2
    for words, place in (
        ("key: what is looked at", f'x="{left + middle}" y="18"'),
        ("query: what looks", f'transform="translate(22 {top + middle}) rotate(-90)"'),
    ):
        parts.append(f'<text class="axis-name middle" {place}>{words}</text>')
    return "".join([*parts, "</svg>"])


def _mask_cells(rows: list[str], left: int, top: int, cell: float) -> list[str]:
    """Rectangles of equal letters: runs along a row, joined with the same run in the rows below."""
    parts = []
    open_runs: dict[tuple[int, int, str], int] = {}
    for number, row in enumerate([*rows, ""]):
        runs = {}
        start = 0
        for end in range(1, len(row) + 1):
            if end == len(row) or row[end] != row[start]:
                if row[start] != ".":
                    runs[start, end, row[start]] = number
                start = end
        for run in [run for run in open_runs if run not in runs]:
            first, (a, b, letter) = open_runs.pop(run), run
            css = next(name for key, name, *_ in MASK_PARTS if key == letter)
            parts.append(
                f'<rect class="{css}" x="{left + a * cell:.2f}" y="{top + first * cell:.2f}" '
                f'width="{(b - a) * cell:.2f}" height="{(number - first) * cell:.2f}"/>'
            )
        open_runs = runs | open_runs
    return parts


def _mask_lines(tokens: int, block_size: int, left: int, top: int, cell: float) -> list[str]:
    """Lines between tokens (not where they would only make grey), between blocks and streams."""
    parts = []
    side = tokens * cell
    for kind in ("token", "block", "stream"):
        every = {"token": 1, "block": block_size, "stream": tokens // 2}[kind]
        if kind == "token" and cell < 6:
            continue
        marks = [index * cell for index in range(0, tokens + 1, every)]
        path = "".join(
            f"M{left + m:.2f} {top}v{side:.2f}M{left} {top + m:.2f}h{side:.2f}" for m in marks
        )
        parts.append(f'<path class="line-{kind}" d="{path}"/>')
    return parts


def _mask_labels(num_blocks: int, left: int, top: int, side: int) -> list[str]:
    parts = []
    half, size = side / 2, side / (2 * num_blocks)

    def text(css: str, x: float, y: float, words: str, turned: bool = False) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}"'
        if turned:
            place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"'
        parts.append(f'<text class="{css} middle" {place}>{words}</text>')

    text("axis-name", left + half, 16, "key: what is looked at")
    text("axis-name", 16, top + half, "query: what looks", turned=True)
    for stream, name in enumerate(("noisy", "clean")):
        start = stream * half
        text("stream", left + start + half / 2, 40, f"{name} tokens")
        text("stream", 40, top + start + half / 2, f"{name} tokens", turned=True)
        for block in range(num_blocks):
            place = start + (block + 0.5) * size
            text("block-name", left + place, 62, str(block + 1))
            text("block-name", 62, top + place + 4, str(block + 1))
    return parts


def _mask_legend(left: int, top: int, clean_attention: CleanAttention) -> list[str]:
    parts = []
    for index, (css, name, words) in enumerate(mask_legend(clean_attention)):
        y = top + index * 22
        parts.append(f'<rect class="{css}" x="{left}" y="{y}" width="13" height="13" rx="2"/>')
        parts.append(
            f'<text class="legend" x="{left + 21}" y="{y + 11}"><tspan class="strong">{name}'
            f"</tspan> · {words}</text>"
        )
    return parts


def mask_legend(clean_attention: CleanAttention = "block") -> list[tuple[str, str, str]]:
    """(CSS class, name, what it means) of the mask's three parts."""
    entries = [(css, name, words) for _, css, name, words in MASK_PARTS]
    if clean_attention == "causal":
        entries[2] = (entries[2][0], *TOKEN_CAUSAL)
    return entries


def picture_file(
    css: str, size: tuple[int, int], title: str, style: str, parts: Sequence[str]
) -> str:
    """A picture as a file of its own: one `<svg>` with a name, its style and its ground.

    Args:
        css: its class. size: width and height. parts: what is drawn, as SVG.
    """
    width, height = size
    return "".join([
        f'<svg class="{css}" xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{style}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>',
        *parts,
        "</svg>",
    ])  # fmt: skip


STANDALONE_STYLE = """
svg{--paper:#fdfcfa;--unseen:#f3f1ec;--ink:#22252a;--muted:#6d7178;
--diagonal:#c8643c;--offset:#3a6ea5;--clean:#8aa9c4;font-family:system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg{--paper:#15171a;--unseen:#202327;--ink:#e8e6e1;
--muted:#989ca3;--diagonal:#d9794f;--offset:#4f8bc9;--clean:#4a6279}}
.paper{fill:var(--paper)}.unseen{fill:var(--unseen)}.part-diagonal{fill:var(--diagonal)}
.part-offset{fill:var(--offset)}.part-clean{fill:var(--clean)}path{fill:none;stroke:var(--paper)}
.line-token{stroke-width:.6;opacity:.7}.line-block{stroke-width:1.4}
.line-stream{stroke:var(--ink);stroke-width:1.3}text{fill:var(--ink);font-size:12px}
.middle{text-anchor:middle}.axis-name{fill:var(--muted);font-size:11.5px}
.stream{font-size:13px;font-weight:600}.block-name{fill:var(--muted);font-size:11px}
.legend{font-size:10.5px;fill:var(--muted)}.strong{fill:var(--ink);font-weight:600}
""".replace("\n", "")
# The same for charts, with axes and two colours.
CHART_STYLE = STANDALONE_STYLE + (
    "svg{--rule:#e5e2dc;--strong-rule:#b9b5ad;--accent:#34679c;--warm:#bf5b33}"
    "@media (prefers-color-scheme:dark){svg{--rule:#2d3136;--strong-rule:#565b63;"
    "--accent:#7db0e3;--warm:#e58a5f}}"
    ".grid{stroke:var(--rule)}.axis{stroke:var(--strong-rule)}.tick,.note{fill:var(--muted);"
    "font-size:11px}.end{text-anchor:end}.title{font-size:15px;font-weight:600}"
)
