"""The table beside the paper's, as Markdown and as JSON."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import transformers

import blockdiffusion
from blockdiffusion.escape import markdown, markdown_table
from blockdiffusion.studies.reproduce.cells import Cell, Cells, read_cells
from blockdiffusion.studies.reproduce.order import (
    ERROR_BARS,
    Order,
    check_orders,
    length_sentences,
    order_sentence,
)
from blockdiffusion.studies.reproduce.paper import PaperRow, PaperTable
from blockdiffusion.studies.reproduce.plan import Plan
from blockdiffusion.studies.reproduce.scales import Steps

PAPERS_DATA = ("lm1b", "openwebtext")

# What stands beside a value, by table: the head, and how it is shown.
Shown = tuple[str, Callable[[Cell], str]]


def table_result(plan: Plan, table: PaperTable) -> tuple[dict[str, Any], str]:
    """A finished table as (plain values, a Markdown page).

    Raises:
        UserError: see `cells.read_cells`.
    """
    cells, notes = read_cells(plan, table)
    orders = check_orders(table, cells)
    if table.name == "T6":
        orders = []  # medians of other data stand in no order
        said = length_sentences(table, cells, plan.text(table).seq_len)
    else:
        said = [order_sentence(table, order) for order in orders]
    notes = [*notes, *_conventions(plan, table)]
    return _values(plan, table, cells, orders, said, notes), _page(plan, table, cells, said, notes)


def machine() -> dict[str, Any]:
    """What this runs on, and the versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "system": platform.system(),
        "versions": {
            "blockdiffusion": blockdiffusion.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _conventions(plan: Plan, table: PaperTable) -> list[str]:
    scale, model, text = plan.scale, plan.scale.model, plan.text(table)
    tokens = text.batch_size * text.seq_len
    notes = [
        f"Networks of {model['num_layers']} layers and width {model['width']}; an update reads "
        f"{tokens:,} tokens. {_budget(scale.steps, table.name)}",
        f"Seed {scale.train['seed']}, one run each: errors are of the noise and of the text, not "
        "of training again.",
    ]
    named = {"lm1b": "LM1B", "owt": "OpenWebText"}[table.corpus]
    if text.data_set not in PAPERS_DATA:
        notes.append(f"{text.data_set} stands for {named} at this scale.")
    found = machine()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = found["machine"] + ("" if found["gpu"] is None else f", {found['gpu']}")
    return [*notes, f"{where}; {versions}."]


def _budget(steps: Steps, table: str) -> str:
    base = f"{steps.base:,} at S = L, then {steps.fine_tune:,}"
    match table:
        case "T1":
            return f"{steps.single_token:,} updates each, from scratch."
        case "T2":
            return f"Updates: {base} more, then {steps.clips:,} of each row from there."
        case "T8":
            return f"Updates: {base} more, then {steps.schedules:,} of each row from there."
    return (
        f"Updates: {base} at each block size and of MDLM itself; of models from scratch "
        f"{steps.base + steps.fine_tune:,}, the same number of tokens."
    )


def _values(
    plan: Plan,
    table: PaperTable,
    cells: Cells,
    orders: list[Order],
    said: list[str],
    notes: list[str],
) -> dict[str, Any]:
    rows = []
    for row in table.rows:
        figures = {
            column: {"value": figure.value, "is_bound": figure.is_bound}
            for column, figure in row.figures.items()
        }
        ours = {
            column: cells[row.system, column].to_dict()
            for column in table.columns
            if (row.system, column) in cells
        }
        rows.append(
            {
                "system": row.system, "label": row.label, "quoted": row.quoted, "paper": figures,
                "ours": ours,
            }
        )  # fmt: skip
    return {
        "table": table.name,
        "title": table.title,
        "scale": plan.scale.name,
        "columns": table.columns,
        "rows": rows,
        "orders": [
            {
                "column": order.column,
                "expected": list(order.systems),
                "holds": order.holds,
                "comparisons": [one.to_dict() for one in order.comparisons],
            }
            for order in orders
        ],
        "said": said,
        "notes": notes,
        "sizes": asdict(plan.scale),
        **machine(),
    }


# --- Markdown ------------------------------------------------------------------------------------


READ = (
    "Ours is ± one standard error (of a perplexity, the larger of those of noise and data); <= "
    "marks bounds."
)
OTHER_SIZES = "The paper's models are larger and were trained for longer{}: compare the order."


def _page(plan: Plan, table: PaperTable, cells: Cells, said: list[str], notes: list[str]) -> str:
    explained = READ
    if plan.scale.name != "paper":
        elsewhere = plan.text(table).data_set not in PAPERS_DATA
        explained += f" {OTHER_SIZES.format(', on other data' if elsewhere else '')}"
    bars = f"Neighbours of the paper's order; error bars are {ERROR_BARS:g} standard errors."
    quoted = [f"* {row.label}: {row.quoted}." for row in table.rows if row.quoted is not None]
    lines = [
        f"# {table.name} at the scale {plan.scale.name}: {table.title}", "",
        *_table(table, cells), "", explained, "",
        "## The order", "", *([] if table.name == "T6" else [bars, ""]),
        *(f"* {markdown(sentence)}" for sentence in said), "",
    ]  # fmt: skip
    if quoted:
        lines += ["## Quoted rows", "", *quoted, ""]
    return "\n".join([*lines, "## Conditions", "", *(f"* {markdown(note)}" for note in notes), ""])


def _table(table: PaperTable, cells: Cells) -> list[str]:
    """A column of ours and of the paper's for each of the table's that was measured."""
    columns = [column for column in table.columns if any(c == column for _, c in cells)]
    more = {column: _beside(table, column) for column in columns}
    heads, rules = ["system"], ["---"]
    for column in columns:
        head = table.columns[column]
        heads += [f"{head}, ours", *(name for name, _ in more[column]), f"{head}, paper"]
        rules += ["---:"] * (2 + len(more[column]))
    lines = [heads, rules]
    for row in table.rows:
        line = [row.label + ("" if row.quoted is None else " (quoted)")]
        for column in columns:
            cell = cells.get((row.system, column))
            line.append("" if cell is None else shown(cell, table, column))
            line += ["" if cell is None else show(cell) for _, show in more[column]]
            line.append(_figure(row, column, table.places))
        lines.append(line)
    return markdown_table(lines)


def _figure(row: PaperRow, column: str, places: int) -> str:
    if (figure := row.figures.get(column)) is None:
        return ""
    return f"{'<= ' if figure.is_bound else ''}{figure.value:,.{places}f}"


def shown(cell: Cell, table: PaperTable, column: str) -> str:
    """A value with its error: lengths whole, perplexities to two places."""
    bound = "<= " if cell.is_bound else ""
    if table.name == "T6":
        value, error = f"{cell.value:,.0f}", f" ± {cell.stderr:,.0f}" if cell.stderr else ""
    elif column == "variance":
        value, error = f"{cell.value:.3g}", f" ± {cell.stderr:.2g}" if cell.stderr else ""
    else:
        value, error = f"{cell.value:,.2f}", f" ± {cell.stderr:.2f}" if cell.stderr else ""
    return f"{bound}{value}{error}"


def _beside(table: PaperTable, column: str) -> list[Shown]:
    match table.name, column:
        case "T7", _:
            return [("entropy", _entropy), ("network calls", _calls)]
        case (("T3" | "T4"), _):
            return [("exact", _exact)]
        case "T6", "max":
            return [("cut at the limit", _cut)]
    return []


def _entropy(cell: Cell) -> str:
    found = cell.beside["entropy"]
    if found is None:
        return ""
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.2f}"
    return f"{found['value']:.2f}{error}"


def _calls(cell: Cell) -> str:
    return f"{cell.beside['nfe']:,.0f}"


def _exact(cell: Cell) -> str:
    value = cell.beside["exact_perplexity"]
    return "" if value is None or math.isclose(value, cell.value) else f"{value:,.2f}"


def _cut(cell: Cell) -> str:
    share = cell.beside.get("share_cut")
    return "" if share is None else f"{100 * share:.1f} %"
