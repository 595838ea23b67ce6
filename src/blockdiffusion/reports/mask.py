"""The attention mask as a picture, computed from `blockdiffusion.models.masks`.

It needs no library, so every report has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from blockdiffusion.reports.plots import colours

if TYPE_CHECKING:
    from blockdiffusion.models.masks import CleanAttention

# Letter in the rows of a mask -> (class and colour, name, meaning). "." is not seen.
PARTS = {
    "d": ("diagonal", "block diagonal", "a noisy token sees the noisy tokens of its own block"),
    "o": ("offset", "offset block causal", "a noisy token sees the clean tokens before its block"),
    "c": ("clean", "block causal", "a clean token sees the clean tokens up to its own block"),
}
TOKEN_CAUSAL = ("clean", "block causal, token by token",
                "a clean token sees the clean tokens up to itself")  # fmt: skip
LARGEST_DRAWN_BLOCK = 16
LEFT, TOP, SIDE = 74, 74, 384
STYLE = (
    "svg{font-family:system-ui,sans-serif}.mask text{fill:var(--muted);font-size:11.5px;"
    "text-anchor:middle}.mask .stream{fill:var(--ink);font-size:13px;font-weight:600}"
    ".mask rect{shape-rendering:crispEdges}.unseen{fill:var(--unseen)}"
    + "".join(f".{name}{{fill:var(--{name})}}" for name, *_ in PARTS.values())
    + ".mask tspan{fill:var(--ink);font-weight:600}"
    ".mask path{fill:none;stroke:var(--paper);stroke-width:.6}.mask .line-block{stroke-width:1.4}"
    ".mask .line-stream{stroke:var(--ink);stroke-width:1.3}.mask .words{text-anchor:start}"
)


def drawn_blocks(block_size: int, seq_len: int) -> tuple[int, int]:
    """Return (block size, number of blocks) of a picture that is small enough to read."""
    size = min(block_size, LARGEST_DRAWN_BLOCK)
    return size, max(1, min(seq_len // block_size, max(3, min(8, 16 // size))))


def mask_rows(
    block_size: int, num_blocks: int, clean_attention: CleanAttention = "block"
) -> list[str]:
    """Return the mask on [noisy ; clean], a string per query: a part's letter, or `.` if unseen."""
    from blockdiffusion.models.masks import Streams, dense_mask

    streams = Streams(block_size * num_blocks, block_size, clean_attention=clean_attention)
    length = streams.seq_len
    return [
        # The three parts differ in the streams of query and key alone.
        "".join(
            "doc"[(query >= length) + (key >= length)] if seen else "."
            for key, seen in enumerate(row)
        )
        for query, row in enumerate(dense_mask(streams).tolist())
    ]


def causal_rows(num_tokens: int) -> list[str]:
    """Return the mask of an autoregressive network: a token sees those up to itself."""
    return [("c" * seen).ljust(num_tokens, ".") for seen in range(1, num_tokens + 1)]


def legend(clean_attention: CleanAttention = "block") -> list[tuple[str, str, str]]:
    """Return (CSS class, name, meaning) of the mask's three parts."""
    last = TOKEN_CAUSAL if clean_attention == "causal" else PARTS["c"]
    return [PARTS["d"], PARTS["o"], last]


def mask_picture(
    rows: Sequence[str],
    block_size: int,
    streams: Sequence[str] = ("noisy", "clean"),
    words: Sequence[tuple[str, str, str]] | None = None,
) -> str:
    """Draw the mask as one `<svg>`: rows are queries, columns are keys.

    With `words`, a legend, it is a complete file; without, a part of a page, which has the colours.
    """
    cell, length = SIDE / len(rows), len(rows) // len(streams)
    names = [f"{stream} token {n + 1}" for stream in streams for n in range(length)]
    title = "Attention mask: which key each query sees"
    width, height = LEFT + SIDE + (26 if words else 8), TOP + SIDE + (92 if words else 8)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mask" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><title>{title}</title>'
        f"<style>{colours('svg') if words else ''}{STYLE}</style>",
        f'<rect fill="var(--paper)" width="{width}" height="{height}"/>' if words else "",
        f'<rect class="unseen" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>',
    ]
    for query, row in enumerate(rows):
        for letter, run in groupby(range(len(row)), row.__getitem__):
            keys = list(run)
            if letter != ".":
                parts.append(
                    f'<rect class="{PARTS[letter][0]}" x="{LEFT + keys[0] * cell:.2f}" '
                    f'y="{TOP + query * cell:.2f}" width="{len(keys) * cell:.2f}" '
                    f'height="{cell:.2f}"><title>{names[query]} sees {names[keys[0]]} to '
                    f"{names[keys[-1]]}: {PARTS[letter][1]}</title></rect>"
                )
    for css, every in (("", 1), ("line-block", block_size), ("line-stream", length)):
        if every * cell >= 6:  # else the lines would only make grey
            marks = [index * cell for index in range(0, len(rows) + 1, every)]
            path = "".join(
                f"M{LEFT + m:.2f} {TOP}v{SIDE}M{LEFT} {TOP + m:.2f}h{SIDE}" for m in marks
            )
            parts.append(f'<path class="{css}" d="{path}"/>')
    parts += _labels(streams, len(rows) // block_size // len(streams))
    for line, (css, name, meaning) in enumerate(words or ()):
        y = TOP + SIDE + 22 + 22 * line
        parts.append(f'<rect class="{css}" x="24" y="{y}" width="13" height="13"/>')
        parts.append(
            f'<text class="words" x="45" y="{y + 11}"><tspan>{name}</tspan>: {meaning}</text>'
        )
    return "".join([*parts, "</svg>"])


def _labels(streams: Sequence[str], num_blocks: int) -> list[str]:
    """Label the axes above and on the left: their names, streams, and numbers of blocks."""
    part = SIDE / len(streams)
    labels = [("", SIDE / 2, 16, "key: what is looked at", "query: what looks")]
    for start, stream in enumerate(streams):
        labels.append(("stream", (start + 0.5) * part, 40, *2 * (f"{stream} tokens".strip(),)))
        for number in range(num_blocks):
            place = (start + (number + 0.5) / num_blocks) * part
            labels.append(("number", place, 62, *2 * (str(number + 1),)))
    parts = []
    for css, along, across, key, query in labels:
        turned = "" if css == "number" else " rotate(-90)"
        place = f"translate({across} {TOP + along + 4 * (not turned):.1f}){turned}"
        parts.append(f'<text class="{css}" x="{LEFT + along:.1f}" y="{across}">{key}</text>')
        parts.append(f'<text class="{css}" transform="{place}">{query}</text>')
    return parts
