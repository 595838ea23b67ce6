"""Curves with their names below, as a picture of its own for the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockdiffusion.reports import plots
from blockdiffusion.reports.plots import COLOURS as COLOURS


@plots.style()
def named_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    end: float,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """One SVG of at most as many curves as there are `COLOURS`, over 0 to `end`."""
    figure = plots.new_figure(720, 340 + 20 * len(curves), title)
    axes = figure.subplots()
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        axes.plot(*plots.columns(points), color=colour, lw=1.8, label=name)
    top = max(y for curve in curves.values() for _, y in curve)
    axes.set(xlim=(0, end), ylim=(0, 1.1 * top), xlabel=x_label, ylabel=y_label)
    plots.ticks(axes)
    figure.legend(loc="outside lower left")
    return plots.svg(figure)
