"""All charts, drawn by matplotlib (the extra `plots`): the same numbers give the same SVG.

Functions that end in `_figure` return a `Figure`, and `svg` writes it; those of a run are in
`curves`. Texts stay texts, and colours are CSS variables with a light and a dark value.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from blockdiffusion.errors import UserError
from blockdiffusion.escape import one_line
from blockdiffusion.evaluate.generation.table import conventions, real_label
from blockdiffusion.evaluate.likelihood import Z95
from blockdiffusion.reports.numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from blockdiffusion.studies.variance.table import VarianceRow, VarianceTable

# Name of the CSS variable -> (light, dark).
PALETTE = {
    "paper": ("#fdfcfa", "#15171a"),
    "unseen": ("#f3f1ec", "#1f2226"),
    "ink": ("#22252a", "#e9e7e2"),
    "muted": ("#6a6e76", "#9a9ea5"),
    "rule": ("#e5e2dc", "#2d3136"),
    "strong-rule": ("#b9b5ad", "#565b63"),
    "accent": ("#34679c", "#7db0e3"),
    "warm": ("#bf5b33", "#e58a5f"),
    "raw": ("#b9c9da", "#3a4d62"),
    "chosen": ("#d4521e", "#ff7433"),
    "diagonal": ("#c8643c", "#d9794f"),
    "offset": ("#3a6ea5", "#4f8bc9"),
    "clean": ("#93b0c9", "#46627d"),
}
PAPER, INK, MUTED, RULE, STRONG_RULE, ACCENT, WARM, RAW, CHOSEN = (
    PALETTE[name][0]
    for name in ("paper", "ink", "muted", "rule", "strong-rule", "accent", "warm", "raw", "chosen")
)
# Of many curves: readable on a light and a dark ground.
COLOURS = ("#3b75af", "#c8643a", "#4f9a54", "#9465b8", "#b58a1f", "#c5508a", "#3f98a3")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "blockdiffusion",
    "path.simplify_threshold": 0.5,
    "text.parse_math": False,  # a label with a dollar is no formula
    "figure.dpi": 72,  # a point is a pixel
    "figure.facecolor": PAPER,
    "figure.constrained_layout.h_pad": 8 / 72,
    "figure.constrained_layout.w_pad": 8 / 72,
    "font.size": 11.5,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": STRONG_RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": STRONG_RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
}
LONGEST_LABEL = 58
TIP = "tip: "  # prefix of an artist's id; the rest is shown at the pointer


def require() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "charts are drawn by matplotlib, which is not installed: "
            "pip install 'blockdiffusion[plots]'"
        ) from error


def colours(selector: str) -> str:
    """Return CSS that sets the variables of the palette, for light and for dark."""
    light = "".join(f"--{name}:{value};" for name, (value, _) in PALETTE.items())
    dark = "".join(f"--{name}:{value};" for name, (_, value) in PALETTE.items())
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def svg(figure: Figure, inline: str = "") -> str:
    """Return the figure as one `<svg>` with a title.

    Args:
        inline: for a picture within a page, a name that makes its ids unique there; the page must
            define the colours. Without it the picture is a file with its own colours.
    """
    out = io.StringIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts draw the texts
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # a second layout would move everything again
        figure.savefig(out, format="svg", metadata={"Date": None})
    root = ET.fromstring(out.getvalue())
    referred = set(re.findall(r"#([mp]\w+)", out.getvalue()))
    for element in list(root.iter()):
        element.tag = element.tag.partition("}")[2]
        _tidy(element, referred, inline)
    del root[:2]  # metadata, and a style that would hold for a whole page
    title, (width, height) = figure.get_label(), figure.get_size_inches() * 72
    root.attrib.clear()
    root.attrib.update({
        "xmlns": "http://www.w3.org/2000/svg", "width": f"{width:.0f}", "height": f"{height:.0f}",
        "viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img", "aria-label": str(title),
        "style": "max-width:100%;height:auto;font-family:system-ui,sans-serif;"
        "stroke-linejoin:round",
    })  # fmt: skip
    if not inline:
        root.insert(0, _element("style", colours("svg")))
    root.insert(0, _element("title", str(title)))
    return ET.tostring(root, encoding="unicode") + "\n"


def _element(tag: str, text: str) -> ET.Element:
    element = ET.Element(tag)
    element.text = text
    return element


def _tidy(element: ET.Element, referred: set[str], inline: str) -> None:
    """Keep only ids that are used and two decimals; replace colours by CSS variables."""
    name = element.attrib.pop("id", "")
    if name.startswith(TIP):
        element.insert(0, _element("title", name.removeprefix(TIP)))
    elif name in referred:
        element.set("id", inline + name)
    for key, value in list(element.items()):
        del element.attrib[key]
        if key == "style":
            value = re.sub(r"font-family:[^;]*monospace", "font-family: monospace", value)
            value = re.sub(r"font-family:[^;]*sans-serif;? ?", "", value)
            for variable, (light, _) in PALETTE.items():
                value = value.replace(light, f"var(--{variable})")
        elif key.endswith("href") or key == "clip-path":
            key, value = key.rpartition("}")[2], value.replace("#", f"#{inline}")
        else:
            value = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)
        element.set(key, " ".join(value.split()))
    element.tail = None
    if not (element.text or "").strip():
        element.text = None


@contextmanager
def style() -> Iterator[None]:
    """Apply the settings of all charts, whatever the user's own are."""
    require()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    """Make an empty figure of this size in pixels; the title is for readers who cannot see it."""
    from matplotlib.figure import Figure

    return Figure((width / 72, height / 72), layout="constrained", label=one_line(title))


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return all x and all y of points."""
    return [x for x, _ in points], [y for _, y in points]


def ticks(axes: Axes, x: int = 6, y: int = 7) -> None:
    """Set about x and y round ticks, plainly written; on log axes powers of ten, or more."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for axis, most in ((axes.xaxis, x), (axes.yaxis, y)):
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and high > 5 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        else:
            axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _complete(figure: Figure, entries: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Write the title above; below, in added room, notes and a legend (label -> artist)."""
    width, height = figure.get_size_inches() * 72
    lines = [line for n in notes for line in textwrap.wrap(one_line(n), int(width / 6.3))]
    figure.suptitle(
        str(figure.get_label()), x=10 / width, ha="left", fontsize=15, fontweight="bold"
    )
    legend = figure.legend(
        list(entries.values()), [words.replace("  ", "\xa0\xa0") for words in entries],
        loc="outside lower left", title="\n".join(lines), alignment="left",
        title_fontproperties={"size": 11.5}, prop={"family": "monospace", "size": 11},
    )  # fmt: skip
    legend.get_title().set_color(MUTED)
    added = 14 * len(lines) + 16.5 * len(entries) + 34
    figure.set_size_inches(width / 72, (height + added) / 72)
    figure.draw_without_rendering()  # so that positions are known


def _number(axes: Axes, marks: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the mark of every dot (x, y, mark, colour) beside it, clear of other marks."""
    taken: list[tuple[float, float]] = []
    for x, y, mark, colour in marks:
        left, bottom = axes.transData.transform((x, y))
        around = [(dx, dy) for dy in (7, -15, 20, -28, 33, -41) for dx in (10, -10)]
        free = [
            (dx, dy) for dx, dy in around
            if all(abs(left + dx - a) > 13 or abs(bottom + dy - b) > 11 for a, b in taken)
        ]  # fmt: skip
        dx, dy = (free or around)[0]
        taken.append((left + dx, bottom + dy))
        axes.annotate(mark, (x, y), (dx, dy), textcoords="offset points", ha="center",
                      color=colour, fontweight="bold", annotation_clip=False)  # fmt: skip


def _label(text: object) -> str:
    """Return one line, not too long."""
    line = one_line(text)
    return line if len(line) <= LONGEST_LABEL else "…" + line[1 - LONGEST_LABEL :]


def _interval(value: float, ends: Sequence[float] | None) -> Any:
    """Return a value and the reach of its interval down and up, as matplotlib takes it."""
    return value, None if ends is None else [[value - ends[0]], [ends[1] - value]]


def _measured(found: Mapping[str, Any]) -> Any:
    """Return the same of a value with a standard error."""
    return found["value"], found["stderr"] and Z95 * found["stderr"]


# --- samples


@style()
def generation_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw generative perplexity against entropy, with 95 % intervals, and the samples' lengths.

    Better samples are closer to real text (the hollow dots), not lower: low perplexity at low
    entropy is text that repeats itself.

    Args:
        results: from `GenerationResult.to_dict`, all of one scorer.
    """
    lengths = {str(n): r["lengths"] for n, r in enumerate(results, 1) if r["lengths"]}
    spread = {mark: found for mark, found in lengths.items() if len(found["counts"]) > 1}
    heights = [340] + [105] * len(spread)
    figure = new_figure(760, sum(heights), "Generative perplexity against entropy")
    axes, *below = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    marks, entries = [], {}
    for mark, (label, text, colour) in _texts(results).items():
        x, x_error = _measured(text["entropy"])
        y, y_error = _interval(text["perplexity"], text["interval"])
        words = f"{mark}  {label}: perplexity {number(y)}, entropy {number(x)}"
        entries[words], *_ = axes.errorbar(
            x, y, y_error, x_error, fmt="o", color=colour, ms=8, mew=1.6, gid=TIP + words,
            mfc=colour if mark.isdigit() else PAPER,
        )  # fmt: skip
        marks.append((x, y, mark, colour))
    sign = "upper bound on " if results[0]["judge"]["is_bound"] else ""
    axes.set(yscale="log", xlabel="entropy of a sample's tokens (nats)")
    axes.set(ylabel=f"{sign}generative perplexity")
    axes.margins(0.1)
    ticks(axes)
    longest = max((found["edges"][-1] for found in spread.values()), default=1)
    for bars, (mark, found) in zip(below, spread.items(), strict=True):
        edges = np.array(found["edges"])
        bars.bar(edges[:-1], found["counts"], 0.96 * np.diff(edges), align="edge", color=ACCENT)
        bars.set(xlim=(0, longest), xlabel=f"length of {mark} in tokens")
        bars.grid(False)
        ticks(bars, y=2)
    notes = [f"{conventions(results[0])}. Lines: 95 % intervals over samples"]
    notes += [f"{mark}: {_length_words(found)}" for mark, found in lengths.items()]
    _complete(figure, entries, notes)
    _number(axes, marks)
    return figure


def _texts(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, Mapping[str, Any], str]]:
    """Return mark -> (label, numbers, colour) of every result, then of the real texts."""
    texts, real = {}, {}
    for index, result in enumerate(results, 1):
        texts[str(index)] = (_label(result["label"]), result["text"], ACCENT)
        reference, label = result["reference"], _label(real_label(result))
        if reference is not None and reference["perplexity"] is not None:
            same = (label, reference["num_tokens"], reference["pooled_entropy"])
            real.setdefault(same, (label, reference, WARM))
    return texts | {chr(ord("a") + n % 26): text for n, text in enumerate(real.values())}


def _length_words(lengths: Mapping[str, Any]) -> str:
    ended, longest = lengths["ended"], f"{lengths['maximum']:,}"
    share = "" if ended is None else f", {100 * ended:.0f} % ended by EOS"
    if len(lengths["counts"]) == 1:
        return f"all samples have {longest} tokens{share}"
    return f"length in tokens, median {number(lengths['median'])}, longest {longest}{share}"


# --- studies


@style()
def pareto_figure(result: Mapping[str, Any], what: str) -> Figure:
    """Draw the quality of samples against the cost of a token, in network calls and in seconds.

    Quality has three measures, one above the other: perplexity under the scorer, entropy, the
    model's own bound. A line joins the points of a sampler; a dashed line is real text.

    Args:
        result: from `measure_pareto`.
        what: which model was sampled, and how.
    """
    points, sign = result["points"], "upper bound on " if result["judge"]["is_bound"] else ""
    found = [_qualities(sign, p["text"], p["bound"]) for p in points]
    real = _qualities(sign, result["reference"], None) if result["reference"] else {}
    sides = [name for name in found[0] if any(q[name][0] is not None for q in found)]
    costs = {"calls_per_token": "network calls per token", "seconds_per_token": "seconds per token"}
    figure = new_figure(960, 270 * len(sides), "Quality of samples against their cost")
    grid = figure.subplots(len(sides), 2, squeeze=False)
    words, entries, marks = _point_words(points), {}, []
    for axes, (name, cost) in zip(grid.flat, itertools.product(sides, costs), strict=True):
        shown = [(p, p[cost], *q[name]) for p, q in zip(points, found, strict=True)]
        drawn, places = _points(axes, shown, words)
        entries |= drawn
        marks.append((axes, places))
        axes.set(xscale="log", yscale="log" if "perplexity" in name else "linear")
        axes.set(xlabel=costs[cost], visible=bool(drawn))
        axes.set_title(name, loc="left", fontsize=12.5, fontweight="bold")
        axes.margins(0.1)
        if name in real and real[name][0] is not None:
            entries["real text"] = axes.axhline(real[name][0], color=MUTED, ls="--", lw=1)
        ticks(axes, y=5)
    notes = [
        what, conventions(result), "Hollow: another point costs no more calls and is no worse in "
        "perplexity and entropy. Ring: the authors' setting. Bars: 95 % intervals over samples",
    ]  # fmt: skip
    _complete(figure, {w: entries[w] for w in [*words, "real text"] if w in entries}, notes)
    for axes, places in marks:
        _number(axes, places)
    return figure


def _qualities(sign: str, text: Mapping[str, Any], bound: Mapping[str, Any] | None) -> Any:
    """Return name -> (value, reach of its interval) of every measure of quality."""
    return {
        f"{sign}generative perplexity": _interval(text["perplexity"], text["interval"]),
        "entropy of a sample's tokens (nats)": _measured(text["entropy"]),
        "the model's bound (nats per token)": (None, None) if bound is None else _measured(bound),
    }


def _points(axes: Axes, shown: Sequence[Any], words: Sequence[str]) -> Any:
    """Draw points (point, cost, value, reach); return their legend and their marks."""
    samplers = dict.fromkeys(point["policy"] for point, *_ in shown)
    colours = dict(zip(samplers, itertools.cycle(COLOURS), strict=False))
    known = [(n, *found) for n, found in enumerate(shown, 1) if found[1] and found[2] is not None]
    for sampler, colour in colours.items():
        line = [(x, y) for _, p, x, y, _ in known if p["policy"] == sampler and not p["is_authors"]]
        axes.plot(*columns(sorted(line)), color=colour, alpha=0.55)
    entries, marks = {}, []
    for n, point, x, y, reach in known:
        colour = colours[point["policy"]]
        entries[words[n - 1]], *_ = axes.errorbar(
            x, y, reach, fmt="o", color=colour, mfc=PAPER if point["dominated_by"] else colour,
            ms=7, mew=1.6, gid=TIP + one_line(words[n - 1]),
        )  # fmt: skip
        if point["is_authors"]:
            axes.plot(x, y, "o", color=colour, mfc="none", ms=13)
        marks.append((x, y, str(n), colour))
    return entries, marks


def _point_words(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for every point, with the numbers in columns."""
    cells = [
        (
            str(n),
            _label(point["label"]),
            f"{number(point['calls_per_token'])} calls",
            f"{number(1000 * (point['seconds_per_token'] or math.nan))} ms per token",
            f"perplexity {number(point['text']['perplexity'])}",
            f"entropy {number(point['text']['entropy']['value'])}",
        )
        for n, point in enumerate(points, 1)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


@style()
def variance_figure(table: VarianceTable, what: str) -> Figure:
    """Draw the variance of every estimator at equal compute, with its standard error over batches.

    Every block size has a band; loss and gradient stand side by side, each on one axis. Hollow dots
    are biased. `what` names the model and the data.
    """
    kinds = {"loss": "variance of the batch's loss (nats per token)"}
    if table.options.gradients:
        kinds["gradient"] = "variance of its gradient (trace)"
    bands = {size: table.at(size) for size in dict.fromkeys(row.block_size for row in table.rows)}
    heights = [22 * len(rows) + 54 for rows in bands.values()]
    width = 30 + 7 * max(18, *(len(row.label) for row in table.rows)) + 354 * len(kinds)
    figure = new_figure(width, sum(heights), "Variance of the estimators at equal compute")
    grid = figure.subplots(
        len(bands), len(kinds), squeeze=False, sharex="col", sharey="row", height_ratios=heights
    )
    entries: dict[str, Any] = {}
    for (size, rows), line in zip(bands.items(), grid, strict=True):
        for axes, (kind, name) in zip(line, kinds.items(), strict=True):
            entries |= _variances(axes, rows, kind)
            axes.set_xlabel(name)
            axes.grid(axis="y", visible=False)
            ticks(axes)
            axes.tick_params(labelbottom=True)
        own = " (the model's)" if size == table.model_block_size else ""
        line[0].set_title(f"S = {size}{own}", loc="left", fontsize=12.5, fontweight="bold")
        line[0].set_yticks(range(len(rows)), [one_line(row.label) for row in rows])
        line[0].set_ylim(len(rows) - 0.4, -0.6)
    options, cut = table.options, next((r.t_min for r in table.rows if r.t_min is not None), None)
    conditions = (
        f"{options.batches} batches of {options.batch_size} rows of {table.seq_len} tokens, "
        f"{options.replicates} replicates, seed {options.seed}"
    )
    left_out = "" if cut is None else f"; bernoulli leaves mask probabilities below {cut:g} out"
    bars = f"Bars: a standard error over batches{left_out}"
    _complete(figure, entries, [what, conditions, bars])
    return figure


def _variances(axes: Axes, rows: Sequence[VarianceRow], kind: str) -> dict[str, Any]:
    """Draw dots with bars and return their legend. As the axis is logarithmic, a bar down to 0 ends
    at a third of the value."""
    axes.set_xscale("log")
    entries = {}
    for y, row in enumerate(rows):
        found = row.at_equal_compute(f"{kind}_variance")
        assert found is not None
        colour = WARM if row.is_paper else ACCENT
        if found.value == 0:
            axes.annotate("0" if row.is_bound else "0 (clipped)", (0, y), (6, -4),
                          ("axes fraction", "data"), "offset points", color=MUTED)  # fmt: skip
            continue
        if row.is_paper:
            axes.axvline(found.value, color=WARM, ls="--", lw=1)
        error = found.stderr or 0.0
        ends = (max(found.value - error, found.value / 3), found.value + error)
        tip = f"{row.label}: {found.value:.3g}"
        tip += "" if found.stderr is None else f" ± {found.stderr:.2g}"
        artist, *_ = axes.errorbar(
            found.value, y, None, _interval(found.value, ends)[1], fmt="o", color=colour, ms=8,
            mfc=colour if row.is_bound else PAPER, mew=1.6, gid=TIP + one_line(tip),
        )  # fmt: skip
        kinds = ("clipped, so biased", "estimates the bound")
        entries["the paper's" if row.is_paper else kinds[row.is_bound]] = artist
    return entries
