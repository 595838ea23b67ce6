"""The curves of a run: read from `metrics.jsonl`, drawn for the report."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blockdiffusion.evaluate.generation.reference import evenly_spread
from blockdiffusion.evaluate.measured import perplexity_of
from blockdiffusion.files.records import Damaged, build
from blockdiffusion.reports import plots
from blockdiffusion.train.loggers import read_metrics as read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
SATURATED = 8.0  # end of the scale of colours, in times the least variance of a search


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPoint:
    """One evaluation during training: the bound in nats per token and its standard errors.

    `exact` is the exact value below a bound and `orders` a tighter bound, if evaluated. `is_bound`
    is False if the value is itself exact (autoregressive models).
    """

    step: int
    bound: float
    exact: float | None = None
    orders: float | None = None
    is_bound: bool = True
    stderr_noise: float | None = None
    stderr_data: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSearch:
    """One search of the clipped schedule: the variance of every clip (beta, omega), and the best.

    `step` is the first update that was made with `clip`.
    """

    step: int
    clip: tuple[float, float]
    variances: Mapping[tuple[float, float], float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The records of `metrics.jsonl`, each a list of (step, finite value) by rising step; `samples`
    are the texts drawn during training."""

    loss: Sequence[tuple[int, float]] = ()
    learning_rate: Sequence[tuple[int, float]] = ()
    grad_norm: Sequence[tuple[int, float]] = ()
    tokens_per_second: Sequence[tuple[int, float]] = ()
    validation: Sequence[ValidationPoint] = ()
    samples: Sequence[tuple[int, Sequence[str]]] = ()
    searches: Sequence[ClipSearch] = ()

    @property
    def half_width(self) -> int:
        """Half of the window of `smooth`, in records."""
        return max(len(self.loss) // 80, 2)

    @property
    def smooth(self) -> Points:
        """The mean over each record of the loss and its neighbours, if it has all of them."""
        count = 2 * self.half_width + 1
        if len(self.loss) < count:
            return []
        means = np.convolve([value for _, value in self.loss], np.ones(count) / count, "valid")
        steps = [step for step, _ in self.loss[self.half_width :]]
        return list(zip(steps, means.tolist(), strict=False))


def read_metrics(run_dir: str | os.PathLike[str]) -> Curves:
    """Read the curves of a run's `metrics.jsonl`; they are empty if there is no such file.

    A step that was trained again after a resume counts once, the last time. Values that are not
    finite numbers, and lines that a kill cut short, are left out.
    """
    records: dict[str, dict[int, Any]] = {}
    for line in read_lines(Path(run_dir) / "metrics.jsonl"):
        for key, value in line.items():
            records.setdefault(key, {})[line["step"]] = value

    def curve(key: str) -> list[tuple[int, float]]:
        values = sorted(records.get(key, {}).items())
        return [(step, float(value)) for step, value in values if _is_finite(value)]

    is_exact, exact, orders, noise, data = (
        dict(curve(f"valid_{name}"))
        for name in ("perplexity", "exact", "orders", "stderr_noise", "stderr_data")
    )
    return Curves(
        loss=curve("loss"),
        learning_rate=curve("lr"),
        grad_norm=curve("grad_norm"),
        tokens_per_second=curve("tokens_per_second"),
        validation=[
            ValidationPoint(
                step=step,
                bound=bound,
                exact=None if step in is_exact else exact.get(step),
                orders=orders.get(step),
                is_bound=step not in is_exact,
                stderr_noise=noise.get(step),
                stderr_data=data.get(step),
            )
            for step, bound in curve("valid_bound")
        ],
        samples=[
            (step, [str(text) for text in texts])
            for step, texts in sorted(records.get("samples", {}).items())
            if isinstance(texts, list)
        ],
        searches=[
            ClipSearch(
                step=step,
                clip=found.clip,
                variances={(beta, omega): variance for beta, omega, variance in found.clip_grid},
                seconds=found.search_seconds,
            )
            for step, found in reversed([*_searches(records)])
        ],
    )


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """The values that a search leaves in a line."""

    clip: tuple[float, float]
    clip_grid: tuple[tuple[float, float, float], ...]
    search_seconds: float


def _searches(records: Mapping[str, Mapping[int, Any]]) -> Iterator[tuple[int, _Searched]]:
    """Yield the searches over the grid of the last one, without other lines."""
    names = [item.name for item in fields(_Searched)]
    grid: set[tuple[float, float]] = set()
    for step in sorted(records.get("clip_grid", {}), reverse=True):
        with suppress(Damaged):
            line = {name: records.get(name, {}).get(step) for name in names}
            found = build(_Searched, line)
            clips = {entry[:2] for entry in found.clip_grid}
            if found.clip not in clips or not all(0 <= x < 1e300 for x in chain(*found.clip_grid)):
                continue
            grid = grid or clips
            if clips == grid:
                yield step, found


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


# --- drawn


@plots.style()
def loss_figure(curves: Curves, width: float, height: float) -> Figure:
    """Draw the training loss, its running mean, and the evaluations with both standard errors."""
    name = validation_name(curves.validation)
    figure = plots.new_figure(
        width, height, f"Training loss and {name}, in nats per token, against steps"
    )
    axes = figure.subplots()
    if curves.loss:
        axes.plot(
            *plots.columns(curves.loss), color=plots.RAW, lw=1, label="training loss, as recorded"
        )
    if smooth := curves.smooth:
        words = f"its running mean over {2 * curves.half_width + 1} records"
        axes.plot(*plots.columns(smooth), color=plots.ACCENT, lw=2, label=words)
    _evaluations(axes, curves.validation)
    last = max([step for step, _ in curves.loss] + [point.step for point in curves.validation])
    axes.set(xlim=(0, last * 1.012 or 1), ylim=loss_range(curves))
    axes.set(xlabel="step", ylabel="nats per token")
    plots.ticks(axes)
    figure.legend(loc="outside upper left", ncols=3 if width > 600 else 1)
    return figure


def _evaluations(axes: Axes, validation: Sequence[ValidationPoint]) -> None:
    """Draw bounds with their errors, and the tighter values below them."""
    if not validation:
        return
    for name, points in tighter(validation).items():
        axes.plot(*plots.columns(points), color=plots.WARM, lw=1.6, label=name)
    steps, bounds = plots.columns([(p.step, p.bound) for p in validation])
    words = f"{validation_name(validation)}, ± noise (thick), ± data"
    dots: dict[str, Any] = {"color": plots.WARM, "ms": 7, "mec": plots.PAPER}
    axes.plot(steps, bounds, ":o", lw=1.4, label=words, **dots)
    data, noise = (
        [getattr(point, name) or math.nan for point in validation]
        for name in ("stderr_data", "stderr_noise")
    )
    bars: dict[str, Any] = {"fmt": "none", "ecolor": plots.WARM}
    axes.errorbar(steps, bounds, data, elinewidth=1.2, capsize=4, **bars)
    axes.errorbar(steps, bounds, noise, elinewidth=4.5, alpha=0.55, **bars)
    for point in validation:
        axes.plot(point.step, point.bound, "o", gid=plots.TIP + evaluation_words(point), **dots)


def evaluation_words(point: ValidationPoint) -> str:
    """Describe one evaluation."""
    bound, sign = ("bound ", "≤ ") if point.is_bound else ("", "")
    return (
        f"step {point.step:,}: {bound}{point.bound:.4f} nats per token, "
        f"perplexity {sign}{perplexity_of(point.bound):.2f}"
        + ("" if point.exact is None else f"; exact {point.exact:.4f}")
        + ("" if point.orders is None else f"; tighter bound {point.orders:.4f}")
    )


def validation_name(validation: Sequence[ValidationPoint]) -> str:
    """Name the values: a bound if any of them is one."""
    if validation and not any(point.is_bound for point in validation):
        return "validation loss, exact"
    return "validation bound"


def tighter(validation: Sequence[ValidationPoint]) -> dict[str, Points]:
    """Return name -> points of the values that are tighter than the bound, if there are any."""
    exact = [(p.step, p.exact) for p in validation if p.exact is not None]
    orders = [(p.step, p.orders) for p in validation if p.orders is not None]
    known = {"validation, exact": exact, "validation, tighter bound": orders}
    return {name: points for name, points in known.items() if points}


def loss_range(curves: Curves) -> tuple[float, float]:
    """Return the y range of the loss: of the records all but 1 % at either end, the rest whole."""
    ends = [value for points in tighter(curves.validation).values() for _, value in points]
    for point in curves.validation:
        reach = max(point.stderr_noise or 0.0, point.stderr_data or 0.0)
        ends += [point.bound - reach, point.bound + reach]
    if curves.loss:
        values = plots.columns([*curves.loss])[1]
        ends += [*np.quantile(values, (0.01, 0.99), method="nearest").tolist()]
        ends += plots.columns(curves.smooth)[1]
    pad = 0.06 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    return min(ends) - pad, max(ends) + pad


def small_figures(curves: Curves, width: float = 360, height: float = 150) -> Iterator[Figure]:
    """Draw the later evaluations close up, and every other curve from 0 on."""
    if len(curves.validation) > 3:
        later = Curves(validation=curves.validation[len(curves.validation) // 2 :])
        title = f"{validation_name(later.validation).capitalize()}, close up, nats per token"
        yield _small_figure(title, width, height, later)
    for title, points in (
        ("Learning rate", curves.learning_rate),
        ("Gradient norm, before clipping", curves.grad_norm),
        ("Tokens per second", curves.tokens_per_second),
    ):
        if len(points) > 1:
            yield _small_figure(title, width, height, points)


@plots.style()
def _small_figure(title: str, width: float, height: float, shown: Curves | Points) -> Figure:
    figure = plots.new_figure(width, height, title)
    axes = figure.subplots()
    if isinstance(shown, Curves):
        _evaluations(axes, shown.validation)
        axes.set(ylim=loss_range(shown))
    else:
        axes.plot(*plots.columns(shown), color=plots.ACCENT, lw=1.4)
        top = 1.06 * float(np.quantile(plots.columns(shown)[1], 0.99, method="nearest"))
        axes.set(xlim=(0, shown[-1][0] * 1.012 or 1), ylim=(0, top or 1))
    axes.set_title(title, loc="left", fontsize=11.5, color=plots.MUTED)
    plots.ticks(axes, 4, 5)
    return figure


# --- the search of the clipped schedule


@plots.style()
def search_figure(searches: Sequence[ClipSearch], width: float, most: int) -> Figure:
    """Draw the variance of every clip in at most `most` searches, relative to the search's least.

    The clip that a search chose is outlined.
    """
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline

    clips = sorted(searches[-1].variances, key=_by_width)
    widths = [_by_width(clip)[0] for clip in clips]
    # A gap before every width.
    tops = {clip: row + 0.7 * len({*widths[: row + 1]}) for row, clip in enumerate(clips)}
    bottom = tops[clips[-1]] + 1
    title = "Variance of every clip in every search, relative to the least of the search"
    figure = plots.new_figure(width, 13 * bottom + 48, title)
    axes = figure.subplots()
    shown = [searches[index] for index in evenly_spread(len(searches), most)]
    boxes: dict[float, list[Outline]] = {}
    for x, search in enumerate(shown):
        for clip, level in levels(search).items():
            box = Rectangle((x, tops[clip]), 0.9, 0.9)
            outline = box.get_path().transformed(box.get_patch_transform())
            boxes.setdefault(round(1 - level, 1), []).append(outline)
        tip = f"step {search.step:,}: {clip_name(search.clip)}, "
        tip += f"variance {search.variances[search.clip]:.3g}"
        axes.add_patch(Rectangle((x, tops[search.clip]), 0.9, 0.9, fc="none", ec=plots.CHOSEN,
                                 lw=2, zorder=2, gid=plots.TIP + tip))  # fmt: skip
    for strength, parts in boxes.items():
        outline = Outline.make_compound_path(*parts)
        axes.add_patch(PathPatch(outline, fc=plots.ACCENT, alpha=0.08 + 0.92 * strength, lw=0))
    axes.set(xlim=(0, max(len(shown), 5)), ylim=(bottom, 0), xlabel="step")
    names = [
        clip_name(clip) if of in widths[:row] else f"width {of:g}: {clip_name(clip)}"
        for row, (clip, of) in enumerate(zip(clips, widths, strict=True))
    ]
    axes.set_yticks([tops[clip] + 0.45 for clip in clips], names, fontsize=10)
    some = range(0, len(shown), math.ceil(len(shown) * 60 / (width - 150)))
    axes.set_xticks([x + 0.45 for x in some], [f"{shown[x].step:,}" for x in some])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def _by_width(clip: tuple[float, float]) -> tuple[float, float]:
    return round(clip[1] - clip[0], 9), clip[0]


def levels(search: ClipSearch) -> dict[tuple[float, float], float]:
    """Return the level of every clip: 0 for the least variance, 1 from `SATURATED` times it on."""
    least = min(search.variances.values())
    if least == 0:  # everything is masked: all others are beyond the scale
        return {clip: float(variance > 0) for clip, variance in search.variances.items()}
    return {
        clip: min(math.log(variance / least, SATURATED), 1.0)
        for clip, variance in search.variances.items()
    }


def clip_name(clip: tuple[float, float]) -> str:
    """The interval of a clip."""
    return "all masked" if clip == (1, 1) else f"{clip[0]:.2f} – {clip[1]:.2f}"
