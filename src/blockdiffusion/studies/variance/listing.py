"""The variances of all estimators in words."""

from __future__ import annotations

import math

from blockdiffusion.evaluate.measured import Measured
from blockdiffusion.reports.numbers import scientific
from blockdiffusion.reports.tables import Column, Table, wrapped
from blockdiffusion.studies.variance.table import VarianceRow, VarianceTable

LEGEND = (
    "  variance    of a batch's loss (nats/token) or gradient (trace) when masks are drawn again",
    "  = compute   the same times the passes that N noisy copies cost",
    "  gain        how many times less than the paper's that is",
    "  blocks      variance of a block's mean loss over all blocks, noise and data: the paper's",
    "  bound, +1σ  an estimator of the bound, one standard error above the exact one",
    "  ±           standard error: of the masks (nats/token, bias), or over batches",
)
GROUP_WORDS = {
    "embedding": "embed", "attention": "attn", "norms and modulation": "norms", "output": "out",
}  # fmt: skip


def variance_lines(table: VarianceTable, what: str) -> list[str]:
    """The variances of all estimators, a block of lines for every block size; 100 columns."""
    options = table.options
    given = "BOS given, not counted" if table.bos else "no BOS given"
    lines = [
        what,
        f"  {options.batches} batches of {options.batch_size} rows of {table.seq_len} tokens, "
        f"{options.replicates} replicates, seed {options.seed}; {given}; {table.seconds:.1f} s",
    ]
    for size in dict.fromkeys(row.block_size for row in table.rows):
        rows = table.at(size)
        own = " (the model's)" if size == table.model_block_size else ""
        exact = f": exact bound {table.exact[size]:.4f}" if size in table.exact else ""
        lines += ["", f"S = {size}{own}{exact}", *Table(LOSS, rows).lines(gap=1)]
        if options.gradients:
            lines += ["", *Table(_gradient(rows[0]), rows).lines(gap=1)]
        lines += wrapped(_notes(table, size))
    cuts = sorted({row.t_min for row in table.rows if row.t_min is not None})
    lines += ["", *LEGEND]
    return lines + [
        f"  t_min       {cut:g}: bernoulli and resampled leave mask probabilities below out"
        for cut in cuts
    ]


def _notes(table: VarianceTable, size: int) -> list[str]:
    rows = table.at(size)
    notes = [f"{row.label}: {row.note}" for row in rows if row.note]
    notes += [f"left out: {why}" for s, _, why in table.left_out if s == size]
    if any(row.bias is not None for row in rows):
        how = "" if size in table.exact else ", with equal seeds"
        notes.append(f"bias: difference from {table.references[size]}{how}")
    return notes


def _bias(row: VarianceRow) -> str:
    if row.bias is not None:
        return f"{row.bias.value:+.4f} ±{row.bias.stderr:.4f}"
    if row.is_bound and row.difference is not None and row.difference.stderr:
        return f"bound, {row.difference.value / row.difference.stderr:+.1f}σ"
    return "bound" if row.is_bound else "unknown"


def _compared(of: str) -> tuple[Column, ...]:
    """The variance, and what it is at equal compute."""

    def equal(row: VarianceRow) -> str:
        variance = row.at_equal_compute(f"{of}_variance")
        return "" if variance is None else scientific(variance.value)

    return (
        Column("variance", lambda row: _scientific(getattr(row, f"{of}_variance"))),
        Column("= compute", equal),
        Column("gain", lambda row: _gain(row.at_equal_compute(f"{of}_gain"))),
    )


LOSS = (
    Column("loss", "label"),
    Column("nats/token", lambda row: f"{row.loss.value:.4f} ±{row.loss.stderr:.4f}"),
    Column("bias", _bias),
    Column("blocks", "block_variance.value"),
    *_compared("loss"),
)


def _gradient(row: VarianceRow) -> tuple[Column, ...]:
    """Variance of the gradient; the share of every parameter group in per cent."""

    def share(group: str) -> Column:
        def of(row: VarianceRow) -> str:
            total = math.fsum(found.value for found in row.groups.values())
            return f"{100 * row.groups[group].value / total:.1f}" if total else ""

        return Column(f"{GROUP_WORDS.get(group, group)}%", of)

    signal = Column("sig/noise", "signal_to_noise.value", ".3g")
    return (Column("gradient", "label"), signal, *map(share, row.groups), *_compared("gradient"))


def _gain(gain: Measured | None) -> str:
    if gain is None:
        return "∞"
    if gain.value >= 10_000:
        return scientific(gain.value, 1) + _share(gain)
    digits = max(0, 2 - int(math.log10(gain.value))) if gain.value >= 1 else 2
    value = f"{gain.value:.{digits}f}"
    return value if gain.stderr is None else f"{value} ±{gain.stderr:.{digits}f}"


def _scientific(found: Measured) -> str:
    """1.92e-3 ±5%"""
    return scientific(found.value) + _share(found)


def _share(found: Measured) -> str:
    """The error in per cent."""
    if found.stderr is None or found.value == 0:
        return ""
    return f" ±{100 * found.stderr / found.value:.0f}%"
