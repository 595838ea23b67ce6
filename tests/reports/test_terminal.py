"""What commands show, with and without a terminal."""

import io
import re

import pytest
import torch
from rich.console import Console

from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.reports import terminal
from blockdiffusion.sampling import BlockEvent, DoneEvent, StepEvent


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 45.0, 80.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress_bar("eval") as report:
        for done in (1, 4, 5, 8):
            report("exact", done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["eval exact: 4 of 10, 0:01:00 left", "eval exact: 8 of 10, 0:00:20 left"]


def test_what_nobody_waits_for_is_not_counted_in_days(monkeypatch, capsys):
    clock = iter([0.0, 40.0, 80.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress_bar("eval") as report:
        report("count", 1, 3001)
        report("count", 2, 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("1 of 3,001, 1 day, 9:20:00 left")
    assert lines[1].endswith("2 of 1,000,000,000, more than 30 days left")


def test_what_is_done_soon_prints_nothing(capsys):
    with terminal.progress_bar("prepare") as report:
        report("tokenise", 5, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_bar_keeps_its_digits_at_every_width(width, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    monkeypatch.setattr(terminal, "error_console", lambda: console)
    with terminal.progress_bar("zero-shot") as report:
        report("[bold]x\x1b[2J" + "y" * 200, 5, 10)
        report("[bold]x\x1b[2J" + "y" * 200, 5, 10)
    *_, line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).strip().split("\r")
    assert line.startswith("zero-shot [bo"[: width // 5]) and "\x1b" not in line
    assert re.search(r" 50% .*\d:\d\d:\d\d|-:--:--", line) and len(line) <= width
    assert ("\\x1b" in line) == (width >= 60)


# --- a sample while it is made --------------------------------------------------------------------


def told(ids, prompt=(), size=4):
    """The events of a text of these ids, block by block, each decided backwards."""
    ids = [*prompt, *ids]
    for start in range(len(prompt) // size * size, len(ids), size):
        block = ids[start : start + size]
        for step, position in enumerate(
            reversed(range(max(start, len(prompt)), start + len(block)))
        ):
            one = torch.tensor([ids[position]])
            yield StepEvent(step, torch.zeros(1), torch.tensor([position]), one, torch.ones(1))
        padded = torch.tensor([block + [0] * (size - len(block))])  # what is cut
        ends = torch.tensor([start + len(block)])
        yield BlockEvent(torch.zeros(1), torch.tensor([start]), padded, ends)
    whole = torch.tensor([ids])
    lengths = torch.tensor([len(ids)])
    yield DoneEvent(whole, lengths, torch.tensor([len(prompt)]), lengths)


TEXT = "naïve – 深い学習 \U0001f600\tand so on.\n\nA second one"


@pytest.mark.parametrize("data", [TEXT.encode(), TEXT.encode()[:-30], b"ab\xed\xa0", b"\xff\xffab"])
def test_printed_blocks_are_the_whole_text(data, capsys):
    """Characters of several tokens, across blocks; half a one at the end; what is no character."""
    tokenizer, ids = byte_tokenizer(), list(data)
    terminal.show_stream(told(ids[3:], ids[:3]), tokenizer, ids[:3])
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self):
        self.decoded = 0
        self.inner = byte_tokenizer()

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self.inner.decode(ids, **options)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_long_text_costs_no_more_per_token(is_terminal, monkeypatch):
    monkeypatch.setattr(
        terminal,
        "Console",
        lambda: Console(file=io.StringIO(), force_terminal=is_terminal, width=80),
    )
    work = []
    for length in (400, 4000):
        tokenizer = Counting()
        terminal.show_stream(told([97] * length), tokenizer, [])
        work.append(tokenizer.decoded / length)
    assert work[1] == pytest.approx(work[0], rel=0.05) and work[1] < 10


def test_a_terminal_keeps_the_lines_of_a_long_text(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    monkeypatch.setattr(terminal, "LIVE_CHARACTERS", 40)
    monkeypatch.setattr(terminal, "Console", lambda: console)
    lines = [f"line {n} of many" for n in range(30)]
    ids = list("\n".join(lines).encode())
    terminal.show_stream(told(ids[7:], ids[:7]), byte_tokenizer(), ids[:7])
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())  # without colours and movements
    places = [shown.rindex(line) for line in lines]
    assert places == sorted(places)
    assert shown.count(lines[10]) < 40  # drawn anew only until it was settled


def test_sampled_text_cannot_steer_the_terminal(monkeypatch, capsys):
    text = "a\x1b]0;t\x07[bold]\u202e\n"
    ids = list(text.encode())
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    monkeypatch.setattr(terminal, "Console", lambda: console)
    terminal.show_stream(told(ids[4:], ids[:4]), byte_tokenizer(), ids[:4])
    assert "\x1b]" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "\u202e" not in out.getvalue() and "[bold]\\u202e" in out.getvalue()
    monkeypatch.undo()
    terminal.show_stream(told(ids[4:], ids[:4]), byte_tokenizer(), ids[:4])
    assert capsys.readouterr().out == text + "\n"
