"""The table beside the paper's, as Markdown and as JSON."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from blockdiffusion.reports.tables import Column, Table, bullets, found
from blockdiffusion.runtime.versions import versions
from blockdiffusion.studies.reproduce.cells import Cells, read_cells
from blockdiffusion.studies.reproduce.order import (
    ERROR_BARS,
    Order,
    check_orders,
    length_sentences,
    order_sentence,
)
from blockdiffusion.studies.reproduce.paper import PaperTable
from blockdiffusion.studies.reproduce.plan import Plan
from blockdiffusion.studies.reproduce.scales import Steps

PAPERS_DATA = ("lm1b", "openwebtext")


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
    rows = _rows(table, cells)
    return _values(plan, table, rows, orders, said, notes), _page(plan, table, rows, said, notes)


def machine() -> dict[str, Any]:
    """What this runs on, and the versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "system": platform.system(),
        "versions": versions(),
    }


def _conventions(plan: Plan, table: PaperTable) -> list[str]:
    scale, model, text = plan.scale, plan.scale.model, plan.text(table)
    tokens = text.batch_size * text.seq_len
    notes = [
        f"Networks of {model['num_hidden_layers']} layers and width {model['hidden_size']}; "
        f"an update reads {tokens:,} tokens. {_budget(scale.steps, table.name)}",
        f"Seed {scale.train['seed']}, one run each: errors are of the noise and of the text, not "
        "of training again.",
    ]
    named = {"lm1b": "LM1B", "owt": "OpenWebText"}[table.corpus]
    if text.data_set not in PAPERS_DATA:
        notes.append(f"{text.data_set} stands for {named} at this scale.")
    here = machine()
    used = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    where = here["machine"] + ("" if here["gpu"] is None else f", {here['gpu']}")
    return [*notes, f"{where}; {used}."]


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


def _rows(table: PaperTable, cells: Cells) -> list[dict[str, Any]]:
    """Plain values of every row: the paper's figures, and ours."""
    return [
        {
            "system": row.system,
            "label": row.label,
            "quoted": row.quoted,
            "paper": {
                column: {"value": figure.value, "is_bound": figure.is_bound}
                for column, figure in row.figures.items()
            },
            "ours": {
                column: cells[row.system, column].to_dict()
                for column in table.columns
                if (row.system, column) in cells
            },
        }
        for row in table.rows
    ]


def _values(
    plan: Plan,
    table: PaperTable,
    rows: list[dict[str, Any]],
    orders: list[Order],
    said: list[str],
    notes: list[str],
) -> dict[str, Any]:
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


def _page(
    plan: Plan,
    table: PaperTable,
    rows: list[dict[str, Any]],
    said: list[str],
    notes: list[str],
) -> str:
    explained = READ
    if plan.scale.name != "paper":
        elsewhere = plan.text(table).data_set not in PAPERS_DATA
        explained += f" {OTHER_SIZES.format(', on other data' if elsewhere else '')}"
    bars = f"Neighbours of the paper's order; error bars are {ERROR_BARS:g} standard errors."
    quoted = [f"* {row.label}: {row.quoted}." for row in table.rows if row.quoted is not None]
    lines = [
        f"# {table.name} at the scale {plan.scale.name}: {table.title}", "",
        *_table(table, rows).markdown_lines(), "", explained, "",
        "## The order", "", *([] if table.name == "T6" else [bars, ""]),
        *bullets(said), "",
    ]  # fmt: skip
    if quoted:
        lines += ["## Quoted rows", "", *quoted, ""]
    return "\n".join([*lines, "## Conditions", "", *bullets(notes), ""])


def _table(table: PaperTable, rows: list[dict[str, Any]]) -> Table:
    """A column of ours and of the paper's for each of the table's that was measured."""
    columns = [Column("system", _system)]
    for name, head in table.columns.items():
        if any(name in row["ours"] for row in rows):
            columns += [
                Column(f"{head}, ours", f"ours.{name}", _spec(table, name),
                       bound=f"ours.{name}.is_bound"),
                *_beside(table, name),
                Column(f"{head}, paper", f"paper.{name}.value", f",.{table.places}f",
                       bound=f"paper.{name}.is_bound"),
            ]  # fmt: skip
    return Table(columns, rows)


def _system(row: Mapping[str, Any]) -> str:
    return row["label"] + ("" if row["quoted"] is None else " (quoted)")


def _spec(table: PaperTable, column: str) -> str | None:
    """Lengths are whole, perplexities have two places, variances as many as their errors say."""
    if column == "variance":
        return None
    return ",.0f" if table.name == "T6" else ",.2f"


def _beside(table: PaperTable, column: str) -> list[Column]:
    """What stands beside a value, by table."""
    ours = f"ours.{column}"

    def exact(row: Mapping[str, Any]) -> float | None:
        value, bound = found(row, f"{ours}.exact_perplexity"), found(row, f"{ours}.value")
        return None if value is None or math.isclose(value, bound) else value

    match table.name, column:
        case "T7", _:
            entropy = Column("entropy", f"{ours}.entropy", ".2f")
            return [entropy, Column("network calls", f"{ours}.nfe", ",.0f")]
        case (("T3" | "T4"), _):
            return [Column("exact", exact, ",.2f")]
        case "T6", "max":
            return [Column("cut at the limit", f"{ours}.share_cut", ".1%")]
    return []
