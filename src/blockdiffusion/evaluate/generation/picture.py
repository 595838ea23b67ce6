"""Results of `blockdiff generate-eval` as one SVG: perplexity against entropy, and lengths.

Each result is a numbered dot with its 95 % intervals, real text a hollow dot with a letter. Samples
are better the closer they come to real text, not the lower they lie: low perplexity at low entropy
is text that repeats itself. Below, a histogram of lengths for each result, on one axis. The file
stands alone, with its own light and dark colours.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockdiffusion.escape import html as escape
from blockdiffusion.evaluate.generation.table import conventions, number, real_label
from blockdiffusion.evaluate.likelihood import Z95
from blockdiffusion.reports.pictures import (
    CHART_STYLE,
    Frame,
    log_ticks,
    nice_ticks,
    picture_file,
    tick_label,
)

WIDTH, LEFT, RIGHT = 760, 66, 24
HEAD, PLOT, LEGEND_LINE = 88, 320, 22
BAND, BAND_GAP = 62, 30
LETTER = 5.9  # width of a letter of a note
LONGEST_LABEL = 58
STYLE = CHART_STYLE + (
    ".name{font-size:12px}.error{stroke:var(--accent);stroke-width:1.5}"
    ".dot{fill:var(--accent);stroke:var(--accent);stroke-width:1.6}"
    ".error.real{stroke:var(--warm)}.dot.real{fill:var(--paper);stroke:var(--warm)}"
    ".mark{fill:var(--accent);font-size:12.5px;font-weight:600}.mark.real{fill:var(--warm)}"
    ".bar{fill:var(--accent);opacity:.85}"
)


@dataclass(frozen=True, kw_only=True)
class _Dot:
    """A place in the plot with the ends of its intervals."""

    mark: str
    label: str
    real: bool
    entropy: float
    entropy_ends: tuple[float, float]
    perplexity: float
    perplexity_ends: tuple[float, float]


def generation_picture(results: Sequence[Mapping[str, Any]]) -> str:
    """The picture as one `<svg>`; results are what `GenerationResult.to_dict` gives, of one
    judge."""
    dots = _dots(results)
    legend_top = HEAD + PLOT + 50
    lengths, height = _lengths(results, legend_top + LEGEND_LINE * len(dots) + 34)
    parts = [
        '<text class="title" x="16" y="28">Generative perplexity against entropy</text>',
        *_noted(conventions(results[0])),
        *_plot(dots, results[0]["judge"]["is_bound"]),
        *_legend(dots, legend_top),
        *lengths,
    ]
    title = "Generative perplexity against entropy, and lengths of samples"
    return picture_file("generation", (WIDTH, height), title, STYLE, parts)


def _noted(words: str) -> list[str]:
    lines = textwrap.wrap(words, int((WIDTH - 32) / LETTER))
    return [
        f'<text class="note" x="16" y="{47 + 15 * row}">{escape(line)}</text>'
        for row, line in enumerate(lines)
    ]


def _dots(results: Sequence[Mapping[str, Any]]) -> list[_Dot]:
    """A dot for every result, then one for every different real text."""
    dots, real, seen = [], [], set()
    for index, result in enumerate(results, 1):
        dots.append(_dot(str(index), result["label"], result["text"]))
        reference, label = result["reference"], real_label(result)
        if reference is None or reference["perplexity"] is None:
            continue
        same = (label, reference["num_tokens"], reference["pooled_entropy"])
        if same not in seen:
            seen.add(same)
            real.append(_dot(chr(ord("a") + len(real) % 26), label, reference, real=True))
    return dots + real


def _dot(mark: str, label: str, text: Mapping[str, Any], real: bool = False) -> _Dot:
    perplexity, entropy = text["perplexity"], text["entropy"]
    reach = Z95 * (entropy["stderr"] or 0.0)
    return _Dot(
        mark=mark,
        label=label if len(label) <= LONGEST_LABEL else "…" + label[1 - LONGEST_LABEL :],
        real=real,
        entropy=entropy["value"],
        entropy_ends=(entropy["value"] - reach, entropy["value"] + reach),
        perplexity=perplexity,
        perplexity_ends=tuple(text["interval"] or (perplexity, perplexity)),  # type: ignore
    )


def _plot(dots: Sequence[_Dot], is_bound: bool) -> list[str]:
    entropies = [end for dot in dots for end in dot.entropy_ends]
    logs = [math.log10(end) for dot in dots for end in dot.perplexity_ends]
    frame = Frame(
        width=WIDTH,
        height=HEAD + PLOT,
        x_range=_padded(entropies, 0.1),
        y_range=_padded(logs, 0.05),
        left=LEFT,
        right=RIGHT,
        top=HEAD,
        bottom=0,
    )
    sign = "upper bound on " if is_bound else ""
    middle = HEAD + PLOT / 2
    parts = _axes(frame)
    parts.append(
        f'<text class="note middle" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEAD + PLOT + 34}">'
        "entropy of a sample's tokens (nats)</text>"
    )
    parts.append(
        f'<text class="note middle" transform="translate(15 {middle:.0f}) rotate(-90)">'
        f"{sign}generative perplexity</text>"
    )
    for dot in dots:
        parts += _drawn(frame, dot)
    return parts + _marks(frame, dots)


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of the values with a margin; at least `least` to either side."""
    low, high = min(values), max(values)
    pad = max(0.12 * (high - low), least)
    return low - pad, high + pad


def _axes(frame: Frame) -> list[str]:
    right, bottom, parts = frame.width - frame.right, frame.height, []
    for tick in nice_ticks(*frame.x_range, 7):
        x = f"{frame.x(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{frame.top}" y2="{bottom}"/>')
        label = tick_label(round(tick, 9))
        parts.append(f'<text class="tick middle" x="{x}" y="{bottom + 16}">{label}</text>')
    for mark in log_ticks(*frame.y_range):
        y = f"{frame.y(math.log10(mark)):.1f}"
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick end" x="{frame.left - 8}" y="{float(y) + 4:.1f}">'
            f"{tick_label(mark)}</text>"
        )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _drawn(frame: Frame, dot: _Dot) -> list[str]:
    x, y = f"{frame.x(dot.entropy):.1f}", f"{frame.y(math.log10(dot.perplexity)):.1f}"
    left, right = (f"{frame.x(end):.1f}" for end in dot.entropy_ends)
    low, high = (f"{frame.y(math.log10(end)):.1f}" for end in dot.perplexity_ends)
    css = " real" if dot.real else ""
    return [
        f"<g><title>{escape(dot.label)}: {number(dot.perplexity)} at {number(dot.entropy)} nats"
        "</title>",
        f'<line class="error{css}" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>',
        f'<line class="error{css}" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>',
        f'<circle class="dot{css}" cx="{x}" cy="{y}" r="4"/></g>',
    ]


def _marks(frame: Frame, dots: Sequence[_Dot]) -> list[str]:
    """The number of every dot beside it, where it covers no other number."""
    placed: list[tuple[float, float]] = []
    parts = []
    for dot in dots:
        x, y = frame.x(dot.entropy), frame.y(math.log10(dot.perplexity))
        around = [(x + dx, y + dy) for dy in (-7, 15, -21, 29) for dx in (10, -10)]
        place = next(
            (p for p in around if all(abs(p[0] - a) > 10 or abs(p[1] - b) > 12 for a, b in placed)),
            around[0],
        )
        placed.append(place)
        parts.append(_mark(*place, dot))
    return parts


def _mark(x: float, y: float, dot: _Dot) -> str:
    css = " real" if dot.real else ""
    return f'<text class="mark middle{css}" x="{x:.1f}" y="{y:.1f}">{dot.mark}</text>'


def _legend(dots: Sequence[_Dot], top: int) -> list[str]:
    parts = []
    for index, dot in enumerate(dots):
        y = top + LEGEND_LINE * index
        css = " real" if dot.real else ""
        parts.append(f'<circle class="dot{css}" cx="{LEFT + 6}" cy="{y + 8}" r="4"/>')
        parts.append(_mark(LEFT + 19, y + 12, dot))
        values = f"perplexity {number(dot.perplexity)}, entropy {number(dot.entropy)}"
        parts.append(
            f'<text class="name" x="{LEFT + 32}" y="{y + 12}">{escape(dot.label)}</text>'
            f'<text class="note end" x="{WIDTH - RIGHT}" y="{y + 12}">{values}</text>'
        )
    y = top + LEGEND_LINE * len(dots) + 10
    words = "lines: 95 % intervals over samples"
    return [*parts, f'<text class="note" x="{LEFT}" y="{y}">{words}</text>']


def _lengths(results: Sequence[Mapping[str, Any]], top: int) -> tuple[list[str], int]:
    """A line and a histogram for every result, and where they end; a line alone where all samples
    have one length."""
    known = [(mark, r["lengths"]) for mark, r in enumerate(results, 1) if r["lengths"] is not None]
    spread = [lengths for _, lengths in known if len(lengths["counts"]) > 1]
    longest = max((lengths["edges"][-1] for lengths in spread), default=1)
    parts, bottom = [], top
    for mark, lengths in known:
        parts.append(
            f'<text class="name" x="{LEFT}" y="{bottom + 22}">{mark}: {_words(lengths)}</text>'
        )
        bottom += BAND_GAP
        if len(lengths["counts"]) > 1:
            frame = Frame(
                width=WIDTH,
                height=bottom + BAND,
                x_range=(0, longest),
                y_range=(0, max(lengths["counts"])),
                left=LEFT,
                right=RIGHT,
                top=bottom,
                bottom=0,
            )
            parts += _bars(frame, lengths)
            bottom += BAND + 18
            for tick in nice_ticks(0, longest, 8):
                parts.append(
                    f'<text class="tick middle" x="{frame.x(tick):.1f}" y="{bottom - 3}">'
                    f"{tick_label(tick)}</text>"
                )
    return parts, bottom + 14


def _words(lengths: Mapping[str, Any]) -> str:
    ended = lengths["ended"]
    share = "" if ended is None else f", {100 * ended:.0f} % ended by EOS"
    if len(lengths["counts"]) == 1:
        return f"all samples have {lengths['maximum']:,} tokens{share}"
    return (
        f"length in tokens, median {number(lengths['median'])}, "
        f"longest {lengths['maximum']:,}{share}"
    )


def _bars(frame: Frame, lengths: Mapping[str, Any]) -> list[str]:
    edges, counts = lengths["edges"], lengths["counts"]
    bottom, right, most = frame.height, frame.width - frame.right, max(counts)
    parts = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count == 0:
            continue
        x, y = frame.x(low), frame.y(count)
        width = max(frame.x(high) - x - 1, 2.0)
        parts.append(
            f'<rect class="bar" x="{min(x, right - width):.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{bottom - y:.1f}"><title>{low} to {high - 1} tokens: {count} samples</title>'
            "</rect>"
        )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="tick end" x="{frame.left - 8}" y="{frame.top + 8}">{most:,}</text>'
        f'<text class="tick end" x="{frame.left - 8}" y="{bottom + 4}">0</text>'
    )
    return parts
