"""Curves with their names below, as a picture of its own for the records."""

from __future__ import annotations

from collections.abc import Mapping

from blockdiffusion.reports import pictures

COLOURS = ("#34679c", "#bf5b33", "#3f8f63", "#8a5fa8", "#a08a2d", "#5b6b78")
WIDTH, HEIGHT = 720, 340  # of the frame, without the names
STYLE = (
    pictures.STANDALONE_STYLE
    + (
        "svg{--rule:#e5e2dc;--strong-rule:#b9b5ad}@media (prefers-color-scheme:dark){svg{"
        "--rule:#2d3136;--strong-rule:#565b63}}.grid{stroke:var(--rule)}.axis{stroke:"
        "var(--strong-rule)}.tick,.label{fill:var(--muted);font-size:11px}.end{text-anchor:end}"
        ".paper{stroke:none}"
    )
    + "".join(
        f".line{n}{{stroke:{colour};stroke-width:1.8}}text.line{n}{{fill:{colour};stroke:none}}"
        for n, colour in enumerate(COLOURS)
    )
)


def named_curves(
    curves: Mapping[str, pictures.Points], *, end: float, title: str, x_label: str, y_label: str
) -> str:
    """One SVG of at most as many curves as there are `COLOURS`, over 0 to `end`."""
    top = max(y for curve in curves.values() for _, y in curve)
    chart = pictures.curve_picture(
        pictures.Frame(
            width=WIDTH,
            height=HEIGHT,
            x_range=(0, end),
            y_range=(0, 1.1 * top),
        ),
        lines=[pictures.Line(points=c, css=f"line{n}") for n, c in enumerate(curves.values())],
        x_label=x_label,
        y_label=y_label,
        title=title,
    )
    names = "".join(
        f'<path class="line{n}" d="M52 {HEIGHT + 20 * n + 8}h24"/>'
        f'<text class="line{n}" x="84" y="{HEIGHT + 20 * n + 12}">{name}</text>'
        for n, name in enumerate(curves)
    )
    body = chart[chart.index(">") + 1 :].removesuffix("</svg>")
    height = HEIGHT + 20 * len(curves) + 12
    return pictures.picture_file("curves", (WIDTH, height), title, STYLE, [body, names]) + "\n"
