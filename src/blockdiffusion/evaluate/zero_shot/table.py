"""A zero-shot table as lines for the terminal, as Markdown and as CSV."""

from __future__ import annotations

from typing import Any

from blockdiffusion.escape import csv_table
from blockdiffusion.evaluate.likelihood import CUT
from blockdiffusion.evaluate.zero_shot.suite import ZeroShotRow, ZeroShotTable
from blockdiffusion.reports.tables import Column, Table, flat, found


def _exact(row: ZeroShotRow) -> float | None:
    """Return the tighter bound over orders, or the exact perplexity beside a bound."""
    result = row.result
    if result is None or result.orders_perplexity is not None:
        return found(result, "orders_perplexity")
    return result.exact_perplexity if result.is_bound else None


def _error(row: ZeroShotRow, name: str) -> float | None:
    """Return the error of the perplexity: its derivative times the error of the nats."""
    stderr = found(row, f"result.{name}")
    return None if stderr is None else found(row, "result.perplexity") * stderr


COLUMNS = (
    Column("set", "task"),
    Column("perplexity", lambda row: found(row, "result.perplexity") or "missing", ".2f",
           bound="result.is_bound"),
    Column("± noise", lambda row: _error(row, "stderr_noise"), ".2f"),
    Column("± data", lambda row: _error(row, "stderr_data"), ".2f"),
    Column("exact", _exact, ".2f", bound="result.orders_perplexity"),
    Column("bits/byte", "result.bits_per_byte", ".4f", bound="result.is_bound"),
    Column("tokens", "result.num_tokens", ",d"),
    Column("documents", lambda row: row.documents if row.result else None, ",d"),
)  # fmt: skip


def zero_shot_lines(table: ZeroShotTable, what: str) -> list[str]:
    """Return the table as text, with its conventions below; 100 columns wide."""
    return _table(table, what).lines()


def zero_shot_markdown(table: ZeroShotTable, what: str) -> str:
    return _table(table, what).markdown()


def zero_shot_csv(table: ZeroShotTable) -> str:
    """Return one line a set, with every value and the conventions; unknown values are empty."""
    common: dict[str, Any] = {
        "packing": table.options.packing, "context": table.context, "stride": table.stride,
        "frame": table.frame, "document_eos": table.options.document_eos,
    }  # fmt: skip
    rows = [common | row.to_dict() for row in table.rows]
    for row in rows:
        low, high = row.pop("interval", None) or (None, None)
        row["interval"] = {"low": low, "high": high}
    return csv_table([flat(row) for row in rows])


def _table(table: ZeroShotTable, what: str) -> Table:
    missing = [f"{row.task}: missing, {row.missing}" for row in table.rows if row.result is None]
    notes = [*missing, *conventions(table)]
    return Table(COLUMNS, table.rows, f"Zero-shot: {what}", notes)


def conventions(table: ZeroShotTable) -> list[str]:
    """Return the conventions of all numbers, a sentence each."""
    units = "rows" if table.stride is None else "documents"
    measured = [(row, row.result) for row in table.rows if row.result is not None]
    sets = [
        f"{row.task}: {row.source}, detokenizer {row.detokenizer}; {result.num_rows:,} {units}"
        for row, result in measured
    ]
    _, used = measured[0]
    how = f"{used.estimator}, {used.samples} samples"
    if used.estimator == "exact":
        how = "exact" if used.is_bound else "exact in one pass"
    cut = "" if used.t_min is None else f", {CUT.format(used.t_min)}"
    estimator = (
        f"estimator {how}{cut}; noise: of the masks, data: over {units}, each one standard error "
        "of the perplexity; tokens are the model's own, bits/byte compare over tokenizers"
    )
    missed = [
        f"{row.task}: {remark}"
        for row, result in measured
        for remark in result.remarks
        if remark != used.note
    ]
    note = [] if used.note is None else [used.note]
    return [_layout(table), _ends(table), *sets, estimator, *note, *missed]


def _layout(table: ZeroShotTable) -> str:
    """Say how documents became rows."""
    eos = table.options.document_eos
    if table.stride is None:
        between = "an EOS after each, counted" if eos else "nothing between them"
        return (
            f"documents one after the other, {between}, wrapped to rows of {table.context} tokens; "
            "the last partial row is dropped"
        )
    after = ", with an EOS after it, counted" if eos else ""
    return (
        f"each document by itself{after}: windows of {table.context} tokens, {table.stride} apart; "
        f"every token is scored once, with {table.context - table.stride} positions or more before "
        "it if the document has them"
    )


def _ends(table: ZeroShotTable) -> str:
    """Say which tokens stand at the ends of rows."""
    if table.frame == "none":
        return "no BOS given"
    bos = f"a BOS at the beginning of every {'row' if table.stride is None else 'window'}, given"
    eos = table.frame == "bos-eos" and table.stride is None
    return f"{bos} and not counted" + ("; an EOS at its end, counted" if eos else "")
