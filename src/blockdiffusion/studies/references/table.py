"""A table of coders as Markdown."""

from __future__ import annotations

from blockdiffusion.reports.tables import Column, Table
from blockdiffusion.studies.references.coders import CoderTable

COLUMNS = (
    Column("coder", "coder"),
    Column("bits/byte", "bits_per_byte", ".4f", bound="is_bound"),
    Column("± data", "stderr_data", ".4f"),
    Column("± noise", "stderr_noise", ".4f"),
    Column("bits/token", "bits_per_token", ".4f", bound="is_bound"),
    Column("reads", "reads"),
)


def coders_markdown(table: CoderTable, what: str) -> str:
    """The table, its conventions below."""
    return Table(COLUMNS, table.rows, f"Bits: {what}", conventions(table)).markdown()


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
