"""Whether what was measured stands in the paper's order, with error bars.

Neighbours in the paper's order are compared. Where both were measured on the same rows, in pairs:
the rows' own difficulty, which is most of the error of each, is then no part of the error of the
difference. (The spread over rows holds the noise of the masks, too; where draws are shared by rows
that can be too little, so the error is at least that of the noise.) Perplexities are compared by
their logarithms, nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from blockdiffusion.evaluate.measured import ratio_of
from blockdiffusion.studies.reproduce.cells import Cell, Cells
from blockdiffusion.studies.reproduce.paper import PaperTable

ERROR_BARS = 2.0  # standard errors from which a difference counts
Verdict = Literal["holds", "within error", "broken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two neighbours of the paper's order; `lower` has the smaller figure there.

    Attributes:
        is_equal: whether the paper has the same figure for both.
        difference: ours of `upper` less that of `lower`: positive where the order is the paper's.
        stderr: of the difference; None where it is not known.
        unit: of the difference.
        is_paired: whether the rows were the same.
    """

    lower: str
    upper: str
    is_equal: bool
    difference: float
    stderr: float | None
    unit: str
    is_paired: bool

    @property
    def verdict(self) -> Verdict:
        """Whether the order is the paper's, by more than the error bars.

        What is equal in the paper is to be equal within the error bars.
        """
        if abs(self.difference) <= ERROR_BARS * (self.stderr or 0.0):
            return "holds" if self.is_equal else "within error"
        if self.is_equal:
            return "broken"
        return "holds" if self.difference > 0 else "broken"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "lower": self.lower, "upper": self.upper, "is_equal": self.is_equal,
            "difference": self.difference, "stderr": self.stderr, "unit": self.unit,
            "is_paired": self.is_paired, "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The expected order of some systems in one column, and what became of it."""

    column: str
    systems: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def holds(self) -> bool:
        """Whether no neighbours are the other way round by more than the error bars."""
        return all(one.verdict != "broken" for one in self.comparisons)


def check_orders(table: PaperTable, cells: Cells) -> list[Order]:
    """Every chain of the table of which two systems at least were measured."""
    orders = []
    for column in table.columns:
        for chain in table.expected(column):
            names = [name for name in chain if (name, column) in cells]
            pairs = pairwise(names)
            compared = [_compare(table, low, high, column, cells) for low, high in pairs]
            if compared:
                orders.append(
                    Order(column=column, systems=tuple(names), comparisons=tuple(compared))
                )
    return orders


def _compare(table: PaperTable, lower: str, upper: str, column: str, cells: Cells) -> Comparison:
    figures = [table.row(name).figures[column].value for name in (lower, upper)]
    low, high = cells[lower, column], cells[upper, column]
    if low.nats is None or high.nats is None:
        difference, unit = high.value - low.value, ""
        stderr, paired = _added(low.stderr, high.stderr), False
    else:
        difference, unit = high.nats - low.nats, "nats per token"
        in_pairs = _in_pairs(low, high)
        paired = in_pairs is not None
        stderr = in_pairs if paired else _added(low.nats_stderr, high.nats_stderr)
    return Comparison(
        lower=lower,
        upper=upper,
        is_equal=figures[0] == figures[1],
        difference=difference,
        stderr=stderr,
        unit=unit,
        is_paired=paired,
    )


def _in_pairs(low: Cell, high: Cell) -> float | None:
    """Standard error of the difference per token, over rows; None if they are not the same rows."""
    if low.per_row is None or high.per_row is None or low.per_row[1] != high.per_row[1]:
        return None
    away = [b - a for a, b in zip(low.per_row[0], high.per_row[0], strict=True)]
    found = ratio_of(away, low.per_row[1])
    if found is None or found.stderr is None:
        return None
    noise = [cell.beside["stderr_noise"] or 0.0 for cell in (low, high)]
    return max(found.stderr, math.hypot(*noise))


def _added(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else math.hypot(one, other)


# --- in words ------------------------------------------------------------------------------------


def order_sentence(table: PaperTable, order: Order) -> str:
    """What became of an order, in one sentence; error bars are `ERROR_BARS` standard errors."""
    label = {row.system: row.label for row in table.rows}
    expected = label[order.systems[0]]
    for one in order.comparisons:
        expected += f" {'=' if one.is_equal else '<'} {label[one.upper]}"
    others = [one for one in order.comparisons if one.verdict != "holds"]
    broken = _listed([one for one in others if one.is_equal or one.difference < 0], label)
    narrow = [one for one in others if not one.is_equal and one.difference >= 0]
    said = f"is broken {broken}" if broken else "holds"
    if narrow:
        said += f"{'; it holds' if broken else ', but'} {_listed(narrow, label)}"
    head = "" if len(table.columns) == 1 else f"{table.columns[order.column]}: "
    return f"{head}{expected}: {said}."


def _listed(found: Sequence[Comparison], label: dict[str, str]) -> str:
    parts = []
    for one in found:
        than = "less" if one.verdict == "within error" else "more"
        between = f"between {label[one.lower]} and {label[one.upper]}"
        parts.append(f"{between} by {than} than the error bars ({_difference(one)})")
    return ", ".join(parts)


def _difference(one: Comparison) -> str:
    error = "" if one.stderr is None else f" ± {one.stderr:.2g}"
    return f"{one.difference:+.3g}{error} {one.unit}".rstrip()


def length_sentences(table: PaperTable, cells: Cells, seq_len: int) -> list[str]:
    """Table 6: which documents are longer than the training rows; the paper's are not SEDD's."""
    sentences = []
    for row in table.built:
        found = cells.get((row.system, "max"))
        if found is None:
            continue
        beyond = found.value > seq_len
        expected = row.system not in ("sedd", "mdlm")
        said = "go beyond" if beyond else "stay within"
        verdict = "as in the paper" if beyond == expected else "other than in the paper"
        sentences.append(
            f"{row.label}: documents {said} the {seq_len} tokens of a training row (longest "
            f"{found.value:,.0f}), {verdict}."
        )
    return sentences
