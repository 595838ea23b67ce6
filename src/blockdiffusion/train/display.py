"""The display of a run: a live line on a terminal, plain lines elsewhere.

Both are loggers (see `loggers.Logger`) to the training loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from blockdiffusion.escape import for_stream, terminal
from blockdiffusion.reports.numbers import clock, scaled
from blockdiffusion.train.loggers import Logger

SMOOTHING = 0.95  # of the loss that is shown; the true one is in metrics.jsonl
LONGEST_BAR, SHORTEST_BAR = 16, 4
SPARK = "▁▂▃▄▅▆▇█"
TIGHTER = (("valid_exact", "exact", ""), ("valid_orders", "tighter bound", "<= "))


def make_display(steps: int, console: Console | None = None, every_seconds: float = 10) -> Logger:
    """Return the live display if `console` (default: standard error) is a terminal, else the plain
    one, with `every_seconds` between two lines."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        return LiveDisplay(steps, console)
    return PlainDisplay(steps, console, every_seconds)


class LossCurve:
    """The smoothed loss and its history in fewer than `2 * width` points."""

    def __init__(self, width: int = 24):
        self.width = width
        self._sum = self._weight = 0.0
        self._points: list[float] = []
        self._stride = 1
        self.seen = 0

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def add(self, loss: float) -> None:
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.seen += 1
        if self.seen % self._stride == 0:
            self._points.append(self.value)
            if len(self._points) == 2 * self.width:
                self._points = self._points[1::2]
                self._stride *= 2

    def spark(self) -> str:
        points = self._points[-self.width :] if self._stride == 1 else self._points
        if len(points) > self.width:
            points = points[len(points) % 2 :: 2]
        low, high = min(points, default=0.0), max(points, default=0.0)
        scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
        return "".join(SPARK[round((point - low) * scale)] for point in points)


@dataclass(frozen=True)
class _Part:
    """A piece of the live line; one with a `rank` needs room, and the lowest rank comes first."""

    text: Text
    rank: int = 0


class _LiveLine(Progress):
    """The progress of a run in one line, or in several if the necessary parts need them."""

    parts: Callable[[Task], tuple[str, Sequence[_Part]]]

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            step, parts = self.parts(task)
            yield _fitted(task, step, parts, self.console.width)


def _fitted(task: Task, step: str, parts: Sequence[_Part], width: int) -> RenderableType:
    """Return step, bar and parts, with as many optional ones as fit in the width."""

    def length(kept: Sequence[_Part]) -> int:
        return len(step) + sum(1 + part.text.cell_len for part in kept)

    kept = [part for part in parts if not part.rank]
    bar = max(min(LONGEST_BAR, width - length(kept) - 1), SHORTEST_BAR)
    for part in sorted((part for part in parts if part.rank), key=lambda part: part.rank):
        if length([*kept, part]) + 1 + bar <= width:
            kept.append(part)
    lines, room = [Text()], width - len(step) - 1 - bar
    for part in (part for part in parts if part in kept):
        if room < 1 + part.text.cell_len:
            lines.append(Text())
            room = width + 1
        lines[-1].append(" ").append_text(part.text)
        room -= 1 + part.text.cell_len
    head = Table.grid()
    head.add_row(
        Text(f"{step} ", style="bold"),
        ProgressBar(total=task.total, completed=task.completed, width=bar),
        lines[0],
    )
    return Group(head, *(line[1:] for line in lines[1:]))


class LiveDisplay:
    """A progress bar with loss, bound, time left and speed, and more if there is room."""

    def __init__(self, steps: int, console: Console):
        self._steps, self._console = steps, console
        self._curve = LossCurve()
        self._bound = self._exact = self._clip = self._speed = ""
        self._rest: list[str] = []
        self._drawn = 0.0
        self._task = TaskID(0)

    def start(self, config: Mapping[str, Any], first_step: int) -> None:
        self._progress = _LiveLine(console=self._console)
        self._progress.parts = self._parts
        self._task = self._progress.add_task("train", total=self._steps, completed=first_step - 1)
        self._progress.start()

    def _parts(self, task: Task) -> tuple[str, list[_Part]]:
        """Return the step, and the parts behind the bar."""
        left, plain = task.time_remaining, self._console.options.ascii_only
        loss = f"{self._curve.value:.3f}" if self._curve.seen else "-"
        parts = [
            _Part(Text(f"loss {loss}", style="cyan")),
            _Part(Text("" if plain else self._curve.spark(), style="dim"), rank=6),
            _Part(Text(self._bound, style="green")),
            _Part(Text(self._exact, style="green"), rank=1),
            _Part(Text(self._clip, style="magenta"), rank=2),
            _Part(Text(f"{'-:--:--' if left is None else clock(left)} left", style="blue")),
            _Part(Text(self._speed)),
            *(_Part(Text(text), rank) for rank, text in enumerate(self._rest, 3)),
        ]  # fmt: skip
        return f"step {task.completed:.0f}/{self._steps}", [part for part in parts if part.text]

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if "loss" in values:
            self._curve.add(values["loss"])
            now = time.monotonic()
            if now - self._drawn < 0.1 and step < self._steps:
                return
            self._drawn = now
            self._speed = f"{values['tokens_per_second']:,.0f} tok/s"
            self._rest = [*_rate(values), f"lr {values['lr']:.1e}"]
            self._progress.update(self._task, completed=step)
        if "valid_bound" in values:
            kind = "valid" if "valid_perplexity" in values else "bound"
            self._bound = f"{kind} {values['valid_bound']:.3f}"
            known = kind == "bound" and "valid_exact" in values
            self._exact = f"exact {values['valid_exact']:.3f}" if known else ""
        if "clip" in values:
            self._clip = f"clip {_clip(values['clip'])}"
        for line in _sentences(step, values):
            self._console.print(Text(terminal(line.plain), style=line.style))

    def finish(self) -> None:
        self._progress.stop()


class PlainDisplay:
    """One line every few seconds, for logs and pipes."""

    def __init__(self, steps: int, console: Console, every_seconds: float):
        self._steps, self._console, self._every_seconds = steps, console, every_seconds
        self._curve = LossCurve()
        self._began = self._printed = time.monotonic()
        self._logged = 0

    def start(self, config: Mapping[str, Any], first_step: int) -> None:
        self._began = self._printed = time.monotonic()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if "loss" in values:
            self._curve.add(values["loss"])
            self._logged += 1
            now = time.monotonic()
            if now - self._printed >= self._every_seconds or step == self._steps:
                self._printed = now
                left = (self._steps - step) * (now - self._began) / self._logged
                parts = [
                    f"step {step}/{self._steps}  loss {self._curve.value:.4f}",
                    f"lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s",
                    *_rate(values),
                    f"{clock(left)} left",
                ]
                self._line("  ".join(parts))
        for line in _sentences(step, values):
            self._line(line.plain)

    def finish(self) -> None:
        pass

    def _line(self, text: str) -> None:
        shown = for_stream(text, self._console.file)
        self._console.print(shown, markup=False, highlight=False, soft_wrap=True)


def _sentences(step: int, values: Mapping[str, Any]) -> Sequence[Text]:
    """Return one line for an evaluation, a search, a set of samples and a note."""
    lines = []
    if "valid_bound" in values:
        exact = "valid_perplexity" in values
        bound = "" if exact else " bound"
        line = f"step {step}: validation{bound} {values['valid_bound']:.4f} nats per token"
        if values.get("valid_stderr_data") is not None:
            line += f" ± {values['valid_stderr_data']:.4f}"
        if exact:
            line += f", perplexity {values['valid_perplexity']:.2f}"
        elif "valid_perplexity_bound" in values:
            line += f", perplexity <= {values['valid_perplexity_bound']:.2f}"
            for name, kind, sign in TIGHTER:
                if name in values:
                    nats = values[name]
                    line += f"; {kind} {nats:.4f}, perplexity {sign}{math.exp(nats):.2f}"
        lines.append(Text(line, style="green"))
    if "clip_grid" in values:
        line = f"step {step}: of {len(values['clip_grid'])} clips {_clip(values['clip'])} has the "
        line += f"least variance ({values['search_seconds']:.1f} s)"
        lines.append(Text(line, style="magenta"))
    for sample in values.get("samples", [])[:1]:
        words = " ".join(sample.split())
        lines.append(Text(f"step {step}: {words[:200]}{'…' * (len(words) > 200)}", style="dim"))
    if "note" in values:
        lines.append(Text(values["note"], style="yellow"))
    return lines


def _rate(values: Mapping[str, Any]) -> list[str]:
    """Return FLOP/s, and the share of the device's peak if known."""
    if "tflops_per_second" not in values:
        return []
    rate, share = scaled(1e12 * values["tflops_per_second"], "FLOP/s"), values.get("peak_share")
    return [rate if share is None else f"{rate} ({share:.0%})"]


def _clip(ends: Sequence[float]) -> str:
    return f"{ends[0]:g}-{ends[1]:g}"
