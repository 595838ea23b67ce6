"""A run's curves: read from `metrics.jsonl`, drawn for the report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdiffusion.evaluate import pictures
from blockdiffusion.evaluate.markup import missing, perplexity_of, script_json
from blockdiffusion.train.loggers import read_metrics as read_lines

MOST_POINTS = 900  # of a curve in the page: more would only make the file larger
SMALL = {"width": 420, "height": 170, "left": 50, "right": 8, "bottom": 26}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPoint:
    """One evaluation during training: the bound in nats per token and its standard errors.

    `is_bound` is False where the value is itself exact (autoregressive models).
    """

    step: int
    bound: float
    is_bound: bool = True
    stderr_noise: float | None = None
    stderr_data: float | None = None


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

    exact = dict(curve("valid_perplexity"))
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
                is_bound=step not in exact,
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
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
    y_range = pictures.value_range(curves.loss, _bars(curves.validation), smooth)
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


def _bars(validation: Sequence[ValidationPoint]) -> list[pictures.ErrorBar]:
    return [
        pictures.ErrorBar(
            step=point.step,
            value=point.bound,
            stderr_noise=point.stderr_noise,
            stderr_data=point.stderr_data,
            label=f"step {point.step:,}: {'bound ' if point.is_bound else ''}{point.bound:.4f} "
            "nats per token, "
            f"perplexity {'≤ ' if point.is_bound else ''}{perplexity_of(point.bound):.2f}",
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
    frame = pictures.Frame(
        **SMALL, x_range=(first - pad, last + pad), y_range=pictures.value_range((), shown)
    )
    line = pictures.Line(points=[(bar.step, bar.value) for bar in shown], css="bound")
    title = f"{_validation_name(validation).capitalize()}, close up, nats per token"
    picture = pictures.curve_picture(
        frame, lines=[line], bars=shown, title=title, chart="close-up", num_ticks=(4, 4)
    )
    return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"
