"""A zero-shot table as lines for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import textwrap

from blockdiffusion.escape import csv_table, markdown, markdown_table
from blockdiffusion.evaluate.likelihood import CUT, Likelihood
from blockdiffusion.evaluate.zero_shot.suite import ZeroShotRow, ZeroShotTable

HEADS = (
    "set", "perplexity", "± noise", "± data", "exact", "bits/byte", "tokens", "documents",
)  # fmt: skip


def zero_shot_lines(table: ZeroShotTable, what: str) -> list[str]:
    """The table in words, its conventions below; 100 columns."""
    cells = [HEADS, *(_cells(row) for row in table.rows if row.result is not None)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADS))]
    lines = [what]
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(["", row[0].ljust(len(first)), *others]))
    for note in [*_missing(table), *conventions(table)]:
        lines += textwrap.wrap(note, 98, initial_indent="  ", subsequent_indent="    ")
    return lines


def zero_shot_markdown(table: ZeroShotTable, what: str) -> str:
    """The same as a page."""
    cells = [HEADS, ("---", *("---:" for _ in HEADS[1:]))]
    cells += [_cells(row) for row in table.rows]
    notes = [f"* {markdown(note)}" for note in [*_missing(table), *conventions(table)]]
    head = f"# Zero-shot: {markdown(what)}"
    return "\n".join([head, "", *markdown_table(cells), "", *notes, ""])


def zero_shot_csv(table: ZeroShotTable) -> str:
    """One line a set, with every value and the conventions; what is not known is empty."""
    common = {
        "packing": table.options.packing, "context": table.context, "stride": table.stride,
        "frame": table.frame, "document_eos": table.options.document_eos,
    }  # fmt: skip
    return csv_table([common | _flat(row) for row in table.rows])


def conventions(table: ZeroShotTable) -> list[str]:
    """What every number of the table depends on."""
    units = "rows" if table.stride is None else "documents"
    notes = [_layout(table), _ends(table)]
    for row in table.rows:
        if (result := row.result) is not None:
            notes.append(
                f"{row.task}: {row.source}, detokenizer {row.detokenizer}; "
                f"{result.num_rows:,} {units}"
            )
    used = next(row.result for row in table.rows if row.result is not None)
    how = f"{used.estimator}, {used.samples} samples"
    if used.estimator == "exact":
        how = "exact" if used.is_bound else "exact in one pass"
    cut = "" if used.t_min is None else f", {CUT.format(used.t_min)}"
    notes.append(
        f"estimator {how}{cut}; noise: of the masks, data: over {units}, each one standard error "
        "of the perplexity; tokens are the model's own, bits/byte compare over tokenizers"
    )
    if used.note is not None:
        notes.append(used.note)
    missed = [
        (row.task, remark)
        for row in table.rows
        if row.result is not None
        for remark in row.result.remarks
        if remark != used.note
    ]
    return notes + [f"{task}: {remark}" for task, remark in missed]


def _layout(table: ZeroShotTable) -> str:
    """How documents became rows."""
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
        "it where the document has them"
    )


def _ends(table: ZeroShotTable) -> str:
    """What stands at the ends of rows."""
    if table.frame == "none":
        return "no BOS given"
    bos = f"a BOS at the beginning of every {'row' if table.stride is None else 'window'}, given"
    eos = table.frame == "bos-eos" and table.stride is None
    return f"{bos} and not counted" + ("; an EOS at its end, counted" if eos else "")


def _missing(table: ZeroShotTable) -> list[str]:
    return [f"{row.task}: missing, {row.missing}" for row in table.rows if row.result is None]


def _cells(row: ZeroShotRow) -> tuple[str, ...]:
    result = row.result
    if result is None:
        return (row.task, "missing", *("" for _ in HEADS[2:]))
    tighter = result.exact_perplexity if result.is_bound else None
    exact = "" if tighter is None else f"{tighter:.2f}"
    if result.orders_perplexity is not None:
        exact = f"<= {result.orders_perplexity:.2f}"
    sign = "<= " if result.is_bound else ""
    bits = "" if result.bits_per_byte is None else f"{sign}{result.bits_per_byte:.4f}"
    return (
        row.task,
        f"{sign}{result.perplexity:.2f}",
        _error(result, result.stderr_noise),
        _error(result, result.stderr_data),
        exact,
        bits,
        f"{result.num_tokens:,}",
        f"{row.documents:,}",
    )


def _error(result: Likelihood, stderr: float | None) -> str:
    """Of the perplexity: its derivative times the error of the nats."""
    return "" if stderr is None else f"{result.perplexity * stderr:.2f}"


def _flat(row: ZeroShotRow) -> dict[str, object]:
    values = row.to_dict()
    interval = values.pop("interval", None)
    low, high = interval or (None, None)
    for name in ("order_bounds", "order_bounds_stderr_noise"):
        values.pop(name, None)
    return values | {"interval_low": low, "interval_high": high}
