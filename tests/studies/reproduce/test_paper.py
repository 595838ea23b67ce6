"""The paper's figures are all there, and in their order."""

import pytest

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.zero_shot.options import SUITES
from blockdiffusion.studies.reproduce.paper import TABLES, find_table


def test_every_table_has_its_figures():
    counts = {name: sum(len(row.figures) for row in table.rows) for name, table in TABLES.items()}
    assert counts == {
        "T1": 4 + 2, "T2": 24, "T3": 7, "T4": 6, "T5": 28, "T6": 8, "T7": 15, "T8": 20,
    }  # fmt: skip


def test_the_orders_are_those_of_the_paper():
    below = ["ar", "s4", "s8", "s16", "mdlm", "sedd", "d3pm"]
    assert TABLES["T3"].expected("perplexity") == [below]
    assert TABLES["T4"].expected("perplexity") == [below[:-1]]
    assert TABLES["T7"].expected("L") == [below[:-1]]
    assert TABLES["T7"].expected("2L") == [below[:-2]]
    assert TABLES["T5"].expected("lambada") == [["mdlm", "sedd", "s4", "ar"]]
    assert TABLES["T8"].expected("perplexity") == [
        ["t8-s4-0.45-0.95", "t8-s4-0.3-0.8", "t8-s4-linear", "t8-s4-log", "t8-s4-sqrt"],
        ["t8-s16-0.3-0.8", "t8-s16-cosine", "t8-s16-0.45-0.95", "t8-s16-square", "t8-s16-linear"],
    ]
    assert TABLES["T2"].expected("variance")[2] == [
        "t2-s4-0.5-1", "t2-s4-0.3-0.8", "t2-s4-0-1", "t2-s4-0-0.5",
    ]  # fmt: skip


def test_what_has_no_figure_is_measured_and_stands_in_no_order():
    without = {(t.name, row.system): row.measured for t in TABLES.values() for row in t.built
               if not row.figures}  # fmt: skip
    assert without == {("T6", "mdlm"): ("median", "max"), ("T7", "d3pm"): ("L",)}
    for table in TABLES.values():
        for row in table.built:
            assert set(row.measured) <= table.columns.keys() and not set(row.also) & set(
                row.figures
            )
    assert not any("d3pm" in chain for c in ("L", "2L") for chain in TABLES["T7"].expected(c))


def test_bounds_and_quoted_rows_are_marked():
    bounds = {row.system: row.figures["perplexity"].is_bound for row in TABLES["T3"].rows}
    assert [name for name, is_bound in bounds.items() if not is_bound] == ["ar"]
    quoted = {row.system for table in TABLES.values() for row in table.rows if row.quoted}
    assert quoted == {"t1-ar-random", "data", "ssd-lm-slow", "ssd-lm-fast"}
    assert not any(row.quoted for row in TABLES["T7"].built)


def test_columns_of_table_5_are_the_tasks_of_the_suite():
    assert list(TABLES["T5"].columns) == [task.name for task in SUITES["paper"]]
    lowest = min(TABLES["T5"].rows, key=lambda row: row.figures["pubmed"].value)
    assert lowest.system == "s4"


@pytest.mark.parametrize("name", ["T3", "t3", "3"])
def test_a_table_is_found_by_its_number(name):
    assert find_table(name) is TABLES["T3"]


def test_an_unknown_table_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no table 'T33' to reproduce; the nearest is T3 \(there"):
        find_table("T33")
