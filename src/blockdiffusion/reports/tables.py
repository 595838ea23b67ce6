"""One table for a terminal, Markdown, CSV and JSON.

A row is a mapping or an object; a column finds its value in it by a dotted path or a function. A
value is text, a number, {"value", "stderr"} or {"value", "low", "high"} for a number with its error
or interval, or another mapping of several numbers by name.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockdiffusion.escape import csv_table, markdown, markdown_table
from blockdiffusion.reports.numbers import number, with_error

WIDTH = 98  # of a line


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: its heading; empty if only CSV and JSON have the column.
        of: dotted path to its value, or function of a row. None is an empty cell.
        show: format of numbers; see `shown` for the default.
        name: its name in CSV and JSON, which leave out a column without one.
        bound: path to whether the value is an upper bound, which is then marked.
    """

    head: str
    of: str | Callable[[Any], Any]
    show: str | None = None
    name: str = ""
    bound: str = ""

    def value(self, row: Any) -> Any:
        """Return the column's value of a row."""
        return found(row, self.of) if isinstance(self.of, str) else self.of(row)

    def cell(self, row: Any) -> str:
        """Return the value as text."""
        text = shown(value := self.value(row), self.show)
        bound = self.bound and found(row, self.bound) and not isinstance(value, str)
        return f"<= {text}" if text and bound else text


@dataclass(frozen=True)
class Table:
    """Columns, rows, and notes on what the numbers depend on."""

    columns: Sequence[Column]
    rows: Sequence[Any]
    title: str = ""
    notes: Sequence[str] = ()

    def lines(self, gap: int = 2) -> list[str]:
        """Return a line for every row, `gap` spaces between columns, and the notes."""
        columns = self._shown()
        cells = [[column.head for column in columns]]
        cells += [[column.cell(row) for column in columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [self.title] if self.title else []
        for first, *others in cells:
            right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append(f"  {(' ' * gap).join([first.ljust(widths[0]), *right])}".rstrip())
        return lines + wrapped(self.notes)

    def facts(self, width: int = 38) -> list[str]:
        """Return a line for every column that has a value, with the rows side by side."""
        cells = {column.head: [column.cell(row) for row in self.rows] for column in self._shown()}
        rows = {
            head: "".join(f"{text:<{width}}" for text in texts).rstrip()
            for head, texts in cells.items()
        }
        return described(self.title, rows, self.notes)

    def markdown(self) -> str:
        """Return a page: title, table, notes."""
        head = [f"# {markdown(self.title)}", ""] if self.title else []
        return "\n".join([*head, *self.markdown_lines(), "", *bullets(self.notes), ""])

    def markdown_lines(self) -> list[str]:
        """Return the lines of the table alone."""
        columns = self._shown()
        rules = ["---" if self._is_text(column) else "---:" for column in columns]
        cells = [[column.cell(row) for column in columns] for row in self.rows]
        return markdown_table([[column.head for column in columns], rules, *cells])

    def records(self) -> list[dict[str, Any]]:
        """Return every row as plain values, for JSON."""
        named = [column for column in self.columns if column.name]
        return [{column.name: column.value(row) for column in named} for row in self.rows]

    def csv(self) -> str:
        """Return the records as CSV, with a column for every number."""
        return csv_table([flat(record) for record in self.records()])

    def _shown(self) -> list[Column]:
        """Return the columns that are not empty."""
        return [c for c in self.columns if c.head and any(map(c.cell, self.rows))]

    def _is_text(self, column: Column) -> bool:
        values = [column.value(row) for row in self.rows]
        return all(value is None or isinstance(value, str) for value in values)


def found(row: Any, path: str) -> Any:
    """Return the value at a dotted path of mappings and objects; None if it ends early."""
    for name in path.split("."):
        row = row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)
    return row


def shown(value: Any, spec: str | None = None) -> str:
    """Return a value as text: numbers in the format `spec`, or to four digits."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Mapping) and "stderr" in value:
        return with_error(value, spec)
    if isinstance(value, Mapping) and "low" in value:
        ends = "" if value["low"] is None else f" ({shown(value['low'])} .. {shown(value['high'])})"
        return text + ends if (text := shown(value["value"], spec)) else ""
    if isinstance(value, Mapping):
        return "  ".join(
            shown(one["value"] if isinstance(one, Mapping) else one, spec) or "-"
            for one in value.values()
        )
    return number(value) if spec is None else f"{value:{spec}}"


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested values: {"a": {"value": 1, "low": 0}} -> {"a": 1, "a_low": 0}."""
    out = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            for key, inner in flat({str(key): inner for key, inner in value.items()}).items():
                below = key.removeprefix("value").lstrip("_")
                out[f"{name}_{below}" if below else name] = inner
        else:
            out[name] = value
    return out


def described(title: str, facts: Mapping[str, str], notes: Iterable[str] = ()) -> list[str]:
    """Return lines for a terminal: a title, named facts that are not empty, and notes."""
    known = {name: text for name, text in facts.items() if text}
    width = max([22, *(len(name) + 1 for name in known)])
    return [title, *(f"  {name:<{width}}{text}" for name, text in known.items()), *wrapped(notes)]


def wrapped(notes: Iterable[str]) -> list[str]:
    """Wrap notes to indented lines; those after a note's first are indented further."""
    wrapper = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [line for note in notes for line in wrapper.wrap(note)]


def bullets(notes: Iterable[str]) -> list[str]:
    """Return notes as a list in Markdown."""
    return [f"* {markdown(note)}" for note in notes]
