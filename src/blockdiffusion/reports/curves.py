"""A run's curves: read from `metrics.jsonl`, drawn for the report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from blockdiffusion.files.records import Damaged, build
from blockdiffusion.reports import pictures
from blockdiffusion.reports.markup import duration, missing, perplexity_of, script_json
from blockdiffusion.train.loggers import read_metrics as read_lines

MOST_POINTS = 900  # of a curve in the page: more would only make the file larger
SMALL = {"width": 420, "height": 170, "left": 50, "right": 8, "bottom": 26}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPoint:
    """One evaluation during training: the bound in nats per token and its standard errors.

    `is_bound` is False where the value is itself exact (autoregressive models). `exact` is the
    exact value below a bound, `orders` a tighter bound, where the evaluation gave one.
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
    """What `metrics.jsonl` recorded, each a list of (step, finite value) by rising step.

    `samples` are the texts drawn during training.
    """

    loss: Sequence[tuple[int, float]] = ()
    learning_rate: Sequence[tuple[int, float]] = ()
    grad_norm: Sequence[tuple[int, float]] = ()
    tokens_per_second: Sequence[tuple[int, float]] = ()
    validation: Sequence[ValidationPoint] = ()
    samples: Sequence[tuple[int, Sequence[str]]] = ()
    searches: Sequence[ClipSearch] = ()


def read_metrics(run_dir: str | os.PathLike[str]) -> Curves:
    """The curves of a run's `metrics.jsonl`; empty ones where there is no such file.

    A step that was trained again after a resume counts once, the last time. What is not a finite
    number, and a line that a kill cut short, is left out.
    """
    records: dict[str, dict[int, Any]] = {}
    for line in read_lines(Path(run_dir) / "metrics.jsonl"):
        for key, value in line.items():
            records.setdefault(key, {})[line["step"]] = value

    def curve(key: str) -> list[tuple[int, float]]:
        values = sorted(records.get(key, {}).items())
        return [(step, float(value)) for step, value in values if _is_finite(value)]

    is_exact = dict(curve("valid_perplexity"))
    exact, orders = dict(curve("valid_exact")), dict(curve("valid_orders"))
    noise, data = dict(curve("valid_stderr_noise")), dict(curve("valid_stderr_data"))
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
    """What a search leaves in a line."""

    clip: tuple[float, float]
    clip_grid: tuple[tuple[float, float, float], ...]
    search_seconds: float


def _searches(records: Mapping[str, Mapping[int, Any]]) -> Iterator[tuple[int, _Searched]]:
    """Those over one grid, the last one's, without lines of something else."""
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


def curves_section(curves: Curves) -> str:
    if not curves.loss and not curves.validation:
        return missing("There are no curves: the run recorded neither a loss nor an evaluation.")
    half_width = max(len(curves.loss) // 80, 2)
    means = pictures.running_mean(curves.loss, half_width)
    smooth = [mean for mean in means if mean is not None]
    legend = []
    if curves.loss:
        legend.append('<li><i class="key raw"></i>training loss, as recorded</li>')
        legend.append(
            f'<li><i class="key smooth"></i>its running mean over {2 * half_width + 1} records</li>'
        )
    if curves.validation:
        legend.append(
            f'<li><i class="key bound"></i>{_validation_name(curves.validation)}; '
            "thick bar ± noise, thin bar ± data</li>"
        )
    tighter = _tighter(curves.validation)
    legend += [f'<li><i class="key tighter"></i>{name}</li>' for name in tighter]
    shown = [point for points in tighter.values() for point in points]
    y_range = pictures.value_range(curves.loss, _bars(curves.validation), [*smooth, *shown])
    pictured = _responsive(
        lambda width, height: _loss_picture(curves, smooth, y_range, width, height), (880, 380)
    )
    notes = []
    if not curves.validation:
        notes.append("The run has no evaluation on validation text yet.")
    notes += _off_frame_note(curves.loss, y_range)
    caption = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    rows = [(*point, mean and mean[1]) for point, mean in zip(curves.loss, means, strict=True)]
    data = {
        "rows": rows[:: max(len(rows) // MOST_POINTS, 1)],
        "exact": not any(point.is_bound for point in curves.validation),
        "bars": [(p.step, p.bound, p.stderr_noise, p.stderr_data) for p in curves.validation],
        "tighter": {name: dict(points) for name, points in tighter.items()},
    }
    return (
        f'<ul class="legend">{"".join(legend)}</ul>{pictured}{caption}{_small_curves(curves)}'
        f'<script type="application/json" id="data-loss">{script_json(data)}</script>'
    )


def _responsive(draw: Callable[[int, int], str], size: tuple[int, int]) -> str:
    """The picture drawn twice, for wide and for narrow screens: letters keep their size."""
    return f'<div class="wide">{draw(*size)}</div><div class="narrow">{draw(400, 300)}</div>'


def _loss_picture(
    curves: Curves,
    smooth: pictures.Points,
    y_range: tuple[float, float],
    width: int,
    height: int,
) -> str:
    steps = [step for step, _ in curves.loss] + [point.step for point in curves.validation]
    last = max(steps)
    frame = pictures.Frame(
        width=width, height=height, x_range=(0, last * 1.012 or 1), y_range=y_range
    )
    thinned = smooth[:: max(len(smooth) // MOST_POINTS, 1)]
    lines = [
        pictures.Line(points=pictures.thin_out(curves.loss, MOST_POINTS), css="raw"),
        pictures.Line(points=thinned, css="smooth"),
        pictures.Line(points=[(p.step, p.bound) for p in curves.validation], css="bound"),
        *_tighter_lines(curves.validation),
    ]
    return pictures.curve_picture(
        frame,
        lines=[line for line in lines if len(line.points) > 1],
        bars=_bars(curves.validation),
        x_label="step",
        y_label="nats per token",
        title=f"Training loss and {_validation_name(curves.validation)}, in nats per token, "
        "against steps",
        chart="loss",
    )


def _validation_name(validation: Sequence[ValidationPoint]) -> str:
    """What the values are; a bound where any of them is one."""
    if validation and not any(point.is_bound for point in validation):
        return "validation loss, exact"
    return "validation bound"


def _tighter(validation: Sequence[ValidationPoint]) -> dict[str, list[tuple[float, float]]]:
    """Name -> points of what is known better than the bound, where anything is."""
    curves: dict[str, list[tuple[float, float]]] = {
        "validation, exact": [(p.step, p.exact) for p in validation if p.exact is not None],
        "validation, tighter bound": [
            (p.step, p.orders) for p in validation if p.orders is not None
        ],
    }
    return {name: points for name, points in curves.items() if points}


def _tighter_lines(validation: Sequence[ValidationPoint]) -> list[pictures.Line]:
    return [pictures.Line(points=points, css="tighter") for points in _tighter(validation).values()]


def _bars(validation: Sequence[ValidationPoint]) -> list[pictures.ErrorBar]:
    return [
        pictures.ErrorBar(
            step=point.step,
            value=point.bound,
            stderr_noise=point.stderr_noise,
            stderr_data=point.stderr_data,
            label=f"step {point.step:,}: {'bound ' if point.is_bound else ''}{point.bound:.4f} "
            "nats per token, "
            f"perplexity {'≤ ' if point.is_bound else ''}{perplexity_of(point.bound):.2f}"
            + ("" if point.exact is None else f"; exact {point.exact:.4f}")
            + ("" if point.orders is None else f"; tighter bound {point.orders:.4f}"),
        )
        for point in validation
    ]


def _off_frame_note(loss: pictures.Points, y_range: tuple[float, float]) -> list[str]:
    outside = sum(not y_range[0] <= value <= y_range[1] for _, value in loss)
    if not outside:
        return []
    lie = "record lies" if outside == 1 else "records lie"
    return [f"{outside:,} of {len(loss):,} {lie} outside the frame."]


def _small_curves(curves: Curves) -> str:
    figures = [_close_up(curves.validation)] if len(curves.validation) > 3 else []
    for title, points in (
        ("Learning rate", curves.learning_rate),
        ("Gradient norm, before clipping", curves.grad_norm),
        ("Tokens per second", curves.tokens_per_second),
    ):
        if len(points) < 2:
            continue
        high = pictures.value_range(points)[1]
        frame = pictures.Frame(
            **SMALL, x_range=(0, points[-1][0] * 1.012 or 1), y_range=(0.0, max(high, 1e-12))
        )
        line = pictures.Line(points=pictures.thin_out(points, 300), css="small")
        picture = pictures.curve_picture(
            frame, lines=[line], title=title, chart=f"small{len(figures)}", num_ticks=(4, 4)
        )
        figures.append(f"<figure><figcaption>{title}</figcaption>{picture}</figure>")
    return f'<div class="small-curves">{"".join(figures)}</div>' if figures else ""


def _close_up(validation: Sequence[ValidationPoint]) -> str:
    """The later half of the evaluations at a scale that shows their error bars."""
    shown = _bars(validation[len(validation) // 2 :])
    first, last = shown[0].step, shown[-1].step
    pad = 0.04 * (last - first)
    tighter = _tighter_lines(validation[len(validation) // 2 :])
    also = [point for line in tighter for point in line.points]
    frame = pictures.Frame(
        **SMALL, x_range=(first - pad, last + pad), y_range=pictures.value_range((), shown, also)
    )
    line = pictures.Line(points=[(bar.step, bar.value) for bar in shown], css="bound")
    title = f"{_validation_name(validation).capitalize()}, close up, nats per token"
    picture = pictures.curve_picture(
        frame,
        lines=[line, *tighter],
        bars=shown,
        title=title,
        chart="close-up",
        num_ticks=(4, 4),
    )
    return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"


# --- the search of the clipped schedule

MOST_COLUMNS = {"wide": 80, "narrow": 24}
SATURATED = 8.0  # times the least variance: what is worse than that is not told apart


def search_section(searches: Sequence[ClipSearch], by: str) -> str:
    """The variance of every clip in every search; `by` is what it is the variance of."""
    clips = sorted(searches[-1].variances, key=_by_width)
    what = {"loss": "the loss of a batch", "gradient": "the gradient of a batch's loss"}[by]
    last = searches[-1].clip
    changes = sum(a.clip != b.clip for a, b in pairwise(searches))
    seconds = sum(search.seconds for search in searches)
    changed = {0: "never changed", 1: "changed once"}.get(changes, f"changed {changes:,} times")
    notes = [
        f"{len(searches):,} search{'es' * (len(searches) > 1)} of {len(clips)} clips took "
        f"{duration(seconds)}; the choice {changed}."
    ]
    if len(searches) > MOST_COLUMNS["wide"]:
        notes.append(f"Drawn are {MOST_COLUMNS['wide']} of them, evenly spread.")
    ramp = (
        '<li>1×<i class="heat-ramp"></i>'
        f"{SATURATED:g}× the least variance of the search, or more</li>"
    )
    pictures_html = "".join(
        f'<div class="{css}">{_search_picture(searches, clips, width, MOST_COLUMNS[css])}</div>'
        for css, width in (("wide", 880), ("narrow", 400))
    )
    return (
        '<p class="lead">A clip keeps the share of masked tokens in an interval. Each search tries '
        f"a grid of them on held-out text, draws the masks again and again, and takes the one "
        f"under which {what} scatters least. The last one took {_clip_name(last)}.</p>"
        f'<ul class="legend">{ramp}<li><i class="heat-chosen"></i>taken</li></ul>'
        f'{pictures_html}<p class="note">{" ".join(notes)}</p>'
    )


def _by_width(clip: tuple[float, float]) -> tuple[float, float]:
    return round(clip[1] - clip[0], 9), clip[0]


def _clip_name(clip: tuple[float, float]) -> str:
    return "all masked" if clip == (1, 1) else f"{clip[0]:.2f} – {clip[1]:.2f}"


def _search_picture(
    searches: Sequence[ClipSearch],
    clips: Sequence[tuple[float, float]],
    width: int,
    most_columns: int,
) -> str:
    columns = []
    for index in pictures.evenly_spread(len(searches), most_columns):
        search = searches[index]
        # With a least variance of zero (everything masked) all others are beyond the scale.
        least = search.variances[search.clip]
        levels = [
            min(math.log(search.variances[clip] / least) / math.log(SATURATED), 1.0)
            if least > 0
            else float(search.variances[clip] > 0)
            for clip in clips
        ]
        columns.append(
            pictures.HeatColumn(
                label=pictures.tick_label(search.step),
                levels=levels,
                marked=clips.index(search.clip),
                title=f"step {search.step:,}: {_clip_name(search.clip)}, variance {least:.3g}",
            )
        )
    rows = [(f"width {_by_width(clip)[0]:g}", _clip_name(clip)) for clip in clips]
    return pictures.heat_picture(
        width,
        rows=rows,
        columns=columns,
        x_label="step",
        title="Variance of every clip in every search, relative to the least of the search",
    )
