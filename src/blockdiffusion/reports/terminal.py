"""Live output of the command line: progress bars, and a sample as its blocks fill in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from blockdiffusion.escape import say, terminal
from blockdiffusion.renamed import moved_name
from blockdiffusion.reports.numbers import clock
from blockdiffusion.text import Detokenizer, token_text

if TYPE_CHECKING:
    from blockdiffusion.files.checksums import Report as Stages
    from blockdiffusion.sampling import Event

__getattr__ = partial(moved_name, __name__)
HIDDEN = "░"
SECONDS_BETWEEN_LINES = 30.0
LIVE_CHARACTERS = 4000  # of a sample that are drawn again with every token


def error_console() -> Console:
    """Progress and messages go to standard error; results go to standard output."""
    return Console(stderr=True)


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[Stages]:
    """Yield a function (stage, done, total) that draws a bar with rate and time left.

    If the output is not a terminal (a log file) it prints a line every `SECONDS_BETWEEN_LINES`;
    with `quiet`, for all processes of a job but the first, nothing.
    """
    if quiet:
        yield lambda stage, done, total: None
        return
    console = error_console()
    if not console.is_terminal:
        yield _ProgressLines(title)
        return
    # On a narrow terminal the name is cut, not the digits after it.
    elapsed = [TimeElapsedColumn()] if console.width >= 60 else []
    width = min(30, max(console.width - 60, 6))
    name = Column(
        no_wrap=True, overflow="ellipsis", max_width=console.width - width - 24 - 8 * len(elapsed)
    )
    bar = Progress(
        TextColumn("{task.description}", "bold", markup=False, table_column=name),
        BarColumn(bar_width=width),
        TaskProgressColumn(show_speed=True),
        *elapsed,
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(terminal(title), total=None)

        def report(stage: str, done: int, total: int | None) -> None:
            words = terminal(f"{title} {stage}".strip())
            bar.update(task, description=words, completed=done, total=total)

        yield report


class _ProgressLines:
    """Progress for a log file: a line now and then, and none for short tasks."""

    def __init__(self, title: str):
        self.title = title
        self.began = self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        line = f"{self.title} {stage}: {done:,}"
        if total:
            left = (now - self.began) * (total - done) / max(done, 1)
            line += f" of {total:,}, {clock(left)} left"
        say(line, err=True)


def show_stream(
    events: Iterator[Event], tokenizer: Any, prompt: list[int], text: str | None = None
) -> Event:
    """Draw one sample while it is denoised; return the last event. `text` is that of the prompt.

    On a terminal the current block fills in token by token; elsewhere the text of each finished
    block is printed. A long text costs no more per token than a short one.
    """
    from blockdiffusion.sampling import BlockDone, Finished, TokensRevealed

    console = Console()
    view = _SampleView(tokenizer, prompt, text)
    view.hidden = "." if console.options.ascii_only else HIDDEN
    if not console.is_terminal:
        return _print_blocks(events, view)
    with Live(
        view.text(), console=console, refresh_per_second=30, vertical_overflow="visible"
    ) as live:
        for event in events:
            settled = None
            if isinstance(event, TokensRevealed):
                view.decide(event)
            elif isinstance(event, BlockDone):
                view.finish(event)
                settled = view.settle()
            elif isinstance(event, Finished):
                view.end()
            live.update(view.text(), refresh=settled is not None)
            if settled is not None:
                console.print(settled)  # above what is still drawn anew
            if isinstance(event, Finished):
                return event
    raise AssertionError("the block loop always ends with Finished")


def _print_blocks(events: Iterator[Event], view: _SampleView) -> Event:
    from blockdiffusion.sampling import BlockDone, Finished

    for event in events:
        if isinstance(event, BlockDone):
            view.finish(event)
        elif isinstance(event, Finished):
            view.end()
        done = isinstance(event, Finished)
        say(view.take(), end="\n" * done)  # a console would turn tabs into spaces
        if done:
            return event
    raise AssertionError("the block loop always ends with Finished")


class _SampleView:
    """The first row's tokens as text: given, finished, just decided, hidden.

    `shown` is the text of the finished tokens, without the part that was taken or settled before.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], text: str | None):
        self.tokenizer, self.hidden = tokenizer, HIDDEN
        self.finished = len(prompt)  # tokens
        self.block: dict[int, int] = {}
        self.stream = Detokenizer(tokenizer)
        self.shown = self.stream.give(prompt, text)
        self.given = len(self.shown)  # characters of the prompt in `shown`

    def decide(self, event: Any) -> None:
        for position, token in zip(event.positions.tolist(), event.ids.tolist(), strict=True):
            self.block[position] = token

    def finish(self, event: Any) -> None:
        """Add a block, up to the end of the kept text."""
        start, end = int(event.starts[0]), int(event.ends[0])
        self.shown += self.stream.push(event.ids[0].tolist()[self.finished - start : end - start])
        self.finished = end
        self.block = {}

    def end(self) -> None:
        """End the text: bytes that waited for later tokens are shown as they are."""
        self.shown += self.stream.end()
        self.block = {}

    def take(self) -> str:
        """Return the shown text and forget it."""
        taken, self.shown = self.shown, ""
        return taken

    def settle(self) -> Text | None:
        """Return and forget the lines of a long text that will not change any more."""
        cut = max(self.shown.rfind("\n"), 0) or self.shown.rfind(" ")
        if len(self.shown) <= LIVE_CHARACTERS or cut <= 0:
            return None
        lines = _styled(self.shown[:cut], self.given)
        self.shown, self.given = self.shown[cut + 1 :], max(self.given - cut - 1, 0)
        return lines

    def text(self) -> Text:
        out = _styled(self.shown, self.given)
        if self.block:
            last = max(self.block)
            for position in range(self.finished, last + 1):
                if position in self.block:
                    text = token_text(self.tokenizer, self.block[position])
                    out.append(terminal(text), style="bold green")
                else:
                    out.append(self.hidden, style="dim")
            out.append(self.hidden, style="dim")
        return out


def _styled(text: str, given: int) -> Text:
    """Return text whose first `given` characters, those of the prompt, are bold."""
    return Text().append(terminal(text[:given]), style="bold").append(terminal(text[given:]))
