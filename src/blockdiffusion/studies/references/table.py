"""A table of coders as Markdown."""

from __future__ import annotations

from blockdiffusion.escape import markdown, markdown_table
from blockdiffusion.studies.references.coders import CoderRow, CoderTable

HEADS = ("coder", "bits/byte", "± data", "± noise", "bits/token", "reads")


def coders_markdown(table: CoderTable, what: str) -> str:
    """The table, its conventions below."""
    cells = [HEADS, ("---", *("---:" for _ in HEADS[1:-1]), "---")]
    cells += [_cells(row) for row in table.rows]
    notes = [f"* {markdown(note)}" for note in conventions(table)]
    return "\n".join([f"# Bits: {markdown(what)}", "", *markdown_table(cells), "", *notes, ""])


def conventions(table: CoderTable) -> list[str]:
    """What every number of the table depends on."""
    given = "a BOS given in each row, not counted" if table.bos else "no BOS given"
    notes = [
        f"{table.num_tokens:,} tokens ({table.num_bytes:,.0f} bytes of text) in the first "
        f"{table.num_rows:,} rows of {table.seq_len} of the split {table.options.split}; V = "
        f"{table.vocab_size}; {given}",
        f"n-grams: interpolated Kneser-Ney, three discounts, counted in {table.train_tokens:,} "
        "training tokens; like models, they begin anew in every row",
        "compressors: the rows as one text, an EOS as one byte; after the training text: size of "
        "both together less that of the training text (its last 64 MiB at most)",
        "± data: over rows, ± noise: of the masks, each one standard error of bits/byte",
    ]
    for name, result in table.models.items():
        how = f"{result['estimator']}, {result['samples']} samples"
        if result["estimator"] == "exact":
            how = "all mask sets enumerated" if result["is_bound"] else "exact in one pass"
        note = "" if result["note"] is None else f" ({result['note']})"
        notes.append(f"{name}: S = {result['block_size']}, {how}{note}")
    return notes


def _cells(row: CoderRow) -> tuple[str, ...]:
    sign = "<= " if row.is_bound else ""
    return (
        row.coder,
        f"{sign}{row.bits_per_byte:.4f}",
        _error(row.stderr_data),
        _error(row.stderr_noise),
        f"{sign}{row.bits_per_token:.4f}",
        row.reads,
    )


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f"{stderr:.4f}"
