"""Text from outside where it is shown: what each place makes of it, and that there is no other."""

import ast
import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockdiffusion
from blockdiffusion.cli import main
from blockdiffusion.cli.shared import load_model
from blockdiffusion.errors import UserError
from blockdiffusion.escape import (
    Forgiving,
    csv_table,
    html,
    markdown,
    markdown_prose,
    markdown_table,
    say,
    terminal,
)
from tests.command import blockdiff
from tests.hostile import HOSTILE, STEERING, check_csv, check_markdown

ROOT = Path(blockdiffusion.__file__).parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_signs_for_what_would_steer_it(monkeypatch):
    assert terminal("a\tb\r\nc\n") == "a\tb\r\nc\n"
    assert terminal("a\rb\x1b[2J\x9b\x7f\x00\u202eé\ud800") == (
        "a\\rb\\x1b[2J\\x9b\\x7f\\x00\\u202eé\\ud800"
    )
    for stream, shown in ((io.StringIO(), HOSTILE), (Terminal(), terminal(HOSTILE))):
        monkeypatch.setattr(sys, "stdout", stream)
        say(HOSTILE)
        assert stream.getvalue() == shown + "\n"
    assert not STEERING.search(terminal(HOSTILE)) and STEERING.search(HOSTILE)


@pytest.mark.parametrize("first", [*"=+-@\t\r\n＝＠", " =", "\u00a0-", "\ufeff+", "\u200b@"])
def test_no_cell_of_a_csv_file_is_a_formula(first):
    text = csv_table([{"a": f"{first}1+1\r=2", "b": -1.5, "c": None}, {"d": True}])
    (row, other) = csv.DictReader(io.StringIO(text, newline=""))
    first = first.replace("\r", "\n")
    assert row == {"a": f"'{first}1+1\n=2", "b": "-1.5", "c": "", "d": ""} and other["d"] == "True"


def test_markdown_has_no_tag_no_link_and_no_line_more():
    assert markdown("a <b> <= 3 & 1 < 2\n# t\r\n[x](y) &lt;") == (
        "a &lt;b> <= 3 & 1 < 2 # t [x]\\(y) &amp;lt;"
    )
    head, rule, row = markdown_table([["x", "y"], ["---", "---:"], ["a|b\\|`c`", 5]])
    assert (head, rule) == ("| x | y |", "| --- | ---: |")
    assert row == r"| a\|b\\\|\`c\` | 5 |"
    check_markdown("\n".join(markdown_table([["x"], ["---"], [HOSTILE]])))
    check_csv(csv_table([{"x": HOSTILE}]))
    check_csv(csv_table([{HOSTILE: 1}]))
    assert html("<a b='c'>\x1b&\ud800") == "&lt;a b=&#x27;c&#x27;&gt;\ufffd&amp;\ufffd"


@pytest.mark.parametrize(
    "link",
    ["[a](javascript:x)", "[a](\nJavaScript:x)", "![a]( data:text/html,x)",
     "[a](&#106;avascript:x)", "[a](java&Tab;script:x)", "[a]: javascript:x",
     "[a](<javascript:x>)"],
)  # fmt: skip
def test_no_link_of_a_note_runs_code(link):
    harmless = "[a](https://x.y/z:1) [b](../x.md#y) [c](mailto:x@y.z)\n\n[d]: http://x"
    shown = markdown_prose(f"{harmless} {link}")
    assert shown.startswith(harmless) and re.search(r"\]\\[(:]", shown)
    assert not re.search(r"\](?=[(:])", markdown(f"{harmless} {link}"))


def test_the_line_while_a_model_loads_cannot_steer_a_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(UserError):
        load_model("there is none \x1b[5m", "cpu", "auto")
    assert "loading there is none" in stream.getvalue() and "\x1b[5m" not in stream.getvalue()


@pytest.mark.parametrize(
    "command",
    [["eval", "{}", "--data", "{}"], ["sample", "{}"], ["train", "{}"], ["report", "{}"],
     ["estimate", "{}", "--device", "{}"], ["generate-compare", "{}"],
     ["convert", "{}", "--out", "x"], ["eval", "x", "--{}"],
     ["prepare", "{}", "--out", "{}"], ["{}"]],
    ids=" ".join,
)  # fmt: skip
def test_a_message_that_quotes_what_was_given_cannot_steer_a_terminal(command, monkeypatch):
    text = HOSTILE.replace("\0", "")
    with monkeypatch.context() as patch:
        patch.setattr(io, "StringIO", Terminal)
        ended = blockdiff(*(part.format(text) for part in command))
    assert ended.returncode == 2
    _, message = ended.stderr.split("blockdiff: error: ")  # after a progress bar, if any
    assert not STEERING.search(ended.stdout + message)


def test_a_message_is_never_as_long_as_what_was_given():
    ended = blockdiff("estimate", "recipe.yaml", f"--{'x' * 1_000_000}")
    assert ended.returncode == 2 and len(ended.stderr) < 3000


def test_what_an_encoding_lacks_is_shown_by_a_sign(monkeypatch):
    """A terminal that is not UTF-8 ends nothing."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("blockdiffusion.data.registry.set_lines", lambda: ["é █ \udc80"])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["blockdiff", "datasets"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and out.buffer.getvalue() == b"\\xe9 \\u2588 \\udc80\n"


def names_called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_nothing_else_writes_to_a_stream_or_builds_cells():
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "escape.py":
            continue
        text = path.read_text()
        called = names_called(ast.parse(text))
        assert not called & {
            "print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write",
            "csv.writer", "csv.DictWriter", "html.escape", "rich.print",
        }, path  # fmt: skip
        assert "from html import" not in text and "import html\n" not in text, path
        assert '" | ".join' not in text and "' | '.join" not in text, path


@pytest.mark.parametrize(
    ("command", "code"),
    [("datasets >&-", 0), ("datasets <&- >&- 2>&-", 0), ("datasets >/dev/full", 2),
     ("sample nothing 2>&-", 2), ("sample nothing 2>/dev/full", 2)],
)  # fmt: skip
def test_standard_streams_may_be_closed_or_full(command, code):
    """Also a file that is opened later must not get the number of a stream that is closed."""
    line = f"{sys.executable} -m blockdiffusion {command}"
    ended = subprocess.run(line, shell=True, capture_output=True, text=True, env=os.environ)
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    assert ("no room left to write standard output" in ended.stderr) == (
        ">/dev/full" in command[:20]
    )


def test_what_cannot_be_told_on_standard_error_ends_nothing():
    class Full(io.StringIO):
        def write(self, text: str = "") -> int:
            raise OSError(28, "No space left on device")

        flush = write  # type: ignore[assignment]

    stream = Forgiving(Full())
    assert stream.write("text") == 4 and not stream.isatty()
    stream.flush()
