"""One table in every format."""

import csv
import io
import json
from types import SimpleNamespace

import pytest

from blockdiffusion.reports.tables import Column, Table, described, flat
from tests.hostile import HOSTILE, check_csv, check_markdown

COLUMNS = (
    Column("model", "name", name="model"),
    Column("perplexity", "text.loss", ".2f", name="loss", bound="is_bound"),
    Column("interval", "text.interval", name="perplexity"),
    Column("distinct", "text.distinct", name="distinct"),
    Column("", lambda row: row["seconds"], name="seconds"),
    Column("ms", lambda row: 1000 * row["seconds"], ",d"),
)
ROWS = (
    {
        "name": "one", "is_bound": True, "seconds": 2,
        "text": SimpleNamespace(
            loss={"value": 7.125, "stderr": 0.25},
            interval={"value": 12.0, "low": 11.5, "high": 12.5},
            distinct={1: 0.5, 2: {"value": 0.25, "stderr": 0.1}, 3: None},
        ),
    },
    {"name": "another", "is_bound": False, "seconds": 3, "text": {"distinct": {1: None}}},
)  # fmt: skip


@pytest.fixture
def table():
    return Table(COLUMNS, ROWS, "Two models", ["errors: one standard error"])


def test_lines(table):
    assert table.lines() == [
        "Two models",
        "  model        perplexity             interval           distinct     ms",
        "  one      <= 7.12 ± 0.25  12 (11.50 .. 12.50)  0.5000  0.2500  -  2,000",
        "  another                                                       -  3,000",
        "  errors: one standard error",
    ]


def test_facts_set_the_rows_side_by_side(table):
    assert table.facts(width=20) == [
        "Two models",
        "  model                 one                 another",
        "  perplexity            <= 7.12 ± 0.25",
        "  interval              12 (11.50 .. 12.50)",
        "  distinct              0.5000  0.2500  -   -",
        "  ms                    2,000               3,000",
        "  errors: one standard error",
    ]


def test_markdown(table):
    assert table.markdown().split("\n") == [
        "# Two models",
        "",
        "| model | perplexity | interval | distinct | ms |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| one | <= 7.12 ± 0.25 | 12 (11.50 .. 12.50) | 0.5000 0.2500 - | 2,000 |",
        "| another |  |  | - | 3,000 |",
        "",
        "* errors: one standard error",
        "",
    ]


def test_csv_and_json_have_every_number(table):
    one, other = csv.DictReader(io.StringIO(table.csv()))
    assert one == {
        "model": "one", "loss": "7.125", "loss_stderr": "0.25", "perplexity": "12.0",
        "perplexity_low": "11.5", "perplexity_high": "12.5", "distinct_1": "0.5",
        "distinct_2": "0.25", "distinct_2_stderr": "0.1", "distinct_3": "", "seconds": "2",
    }  # fmt: skip
    assert other["model"] == "another" and other["loss_stderr"] == "" and other["seconds"] == "3"
    first, second = json.loads(json.dumps(table.records()))
    assert first["loss"] == {"value": 7.125, "stderr": 0.25} and second["loss"] is None
    assert flat({"a": {"b": {"value": 1, "low": 0}}}) == {"a_b": 1, "a_b_low": 0}


def test_text_from_outside_does_no_harm():
    table = Table(COLUMNS[:1], [{"name": HOSTILE}], HOSTILE, [HOSTILE])
    check_csv(table.csv())
    check_markdown(table.markdown())


def test_what_no_row_has_is_not_shown():
    columns = (Column("model", "name"), Column("MAUVE", "mauve", name="mauve"))
    table = Table(columns, [{"name": "one"}])
    assert table.markdown_lines()[0] == "| model |" and table.csv() == 'mauve\n""\n'
    assert table.facts() == ["", "  model                 one"]
    assert described("x", {"a name of twenty-two ch": "1"})[1] == "  a name of twenty-two ch 1"


def test_facts_without_a_value_have_no_line():
    note = "word " * 30
    title, fact, *notes = described("x", {"known": "1", "unknown": ""}, [note])
    assert (title, fact) == ("x", "  known                 1")
    assert len(notes) == 2 and all(len(line) <= 98 for line in notes)
    assert notes[0].startswith("  word") and notes[1].startswith("    word")
