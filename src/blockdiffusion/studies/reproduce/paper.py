"""The paper's tables as data (Arriola et al., arXiv 2503.09573v3, tables 1 to 8).

Nothing is computed here. A table has rows (systems) and columns; a figure that is an upper bound is
marked, and so are rows that are only quoted: systems that are not rebuilt.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from blockdiffusion.errors import UserError, shown


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the paper; `is_bound` where it is an upper bound (of a perplexity)."""

    value: float
    is_bound: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """One line of a table.

    Attributes:
        system: what it is called in a plan (see `systems`).
        label: as the paper calls it.
        figures: by column; a column may be missing.
        also: columns that are measured here and have no figure in the paper: such a cell stands in
            no order.
        quoted: why the row is not rebuilt; None: it is.
    """

    system: str
    label: str
    figures: dict[str, Figure]
    also: tuple[str, ...] = ()
    quoted: str | None = None

    @property
    def measured(self) -> tuple[str, ...]:
        """The columns that are measured here."""
        return (*self.figures, *self.also)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """A table.

    Attributes:
        corpus: which of a scale's corpora it is about, "lm1b" or "owt".
        budget: what the paper trained with, in words.
        columns: column -> its head.
        places: of the paper's figures, after the point.
        chains: groups of systems whose order is compared, per column; by default all of them.
    """

    name: str
    title: str
    corpus: str
    budget: str
    columns: dict[str, str]
    places: int = 2
    rows: tuple[PaperRow, ...]
    chains: tuple[tuple[str, ...], ...] = ()

    @property
    def built(self) -> tuple[PaperRow, ...]:
        """The rows that are rebuilt here."""
        return tuple(row for row in self.rows if row.quoted is None)

    def row(self, system: str) -> PaperRow:
        """The row of a system."""
        return next(row for row in self.rows if row.system == system)

    def expected(self, column: str) -> list[list[str]]:
        """Systems from the smallest figure of a column to the largest, for every group of them."""
        chains = []
        for names in self.chains or (tuple(row.system for row in self.built),):
            figures = {name: self.row(name).figures.get(column) for name in names}
            known = {name: figure.value for name, figure in figures.items() if figure is not None}
            chains.append(sorted(known, key=lambda name: known[name]))
        return chains


def find_table(name: str) -> PaperTable:
    """The table called `name` ("T3", "t3" or "3").

    Raises:
        UserError: there is none.
    """
    given = name.upper() if name.upper().startswith("T") else f"T{name}"
    if given in TABLES:
        return TABLES[given]
    near = difflib.get_close_matches(given, TABLES, n=1, cutoff=0.0)
    raise UserError(
        f"the paper has no table {shown(name)} to reproduce; the nearest is {near[0]} (there are "
        f"{', '.join(TABLES)})"
    )


# --- the figures ---------------------------------------------------------------------------------


def _row(
    system: str, label: str, figures: dict[str, float], bounds: Iterable[str] = (), **more: Any
) -> PaperRow:
    """A row; `bounds`: the columns whose figure is an upper bound."""
    marked = {name: Figure(value, name in bounds) for name, value in figures.items()}
    return PaperRow(system=system, label=label, figures=marked, **more)


def _exact(system: str, label: str, perplexity: float, **more: Any) -> PaperRow:
    return _row(system, label, {"perplexity": perplexity}, **more)


def _bound(system: str, label: str, perplexity: float) -> PaperRow:
    return _row(system, label, {"perplexity": perplexity}, bounds=["perplexity"])


def _noise(system: str, label: str, perplexity: float, variance: float) -> PaperRow:
    figures = {"perplexity": perplexity, "variance": variance}
    return _row(system, label, figures, bounds=["perplexity"])


def _noise_rows(
    table: str, block: str, *figures: tuple[str, str, float, float]
) -> tuple[PaperRow, ...]:
    """(clip or schedule, label, perplexity, variance) of the fine-tunes of tables 2 and 8."""
    return tuple(
        _noise(f"{table}-s{block}-{key}", f"S = {block}, {label}", *values)
        for key, label, *values in figures
    )


def _systems(*groups: tuple[PaperRow, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.system for row in rows) for rows in groups)


_PERPLEXITY = {"perplexity": "test perplexity"}
_WITH_VARIANCE = {"perplexity": "test perplexity", "variance": "variance of the bound, by blocks"}

_T1 = PaperTable(
    name="T1",
    title="LM1B at S = 1: the noise of the loss is what separates diffusion from autoregression",
    corpus="lm1b",
    budget="16B tokens",
    columns=_PERPLEXITY | {"variance": "variance of the training loss, by blocks"},
    rows=(
        _exact("t1-ar", "AR", 22.88),
        _exact(
            "t1-ar-random", "AR, random batch size", 24.37,
            quoted="training has no random batch size",
        ),
        _noise("t1-linear", "BD3-LM S = 1, linear U[0, 1]", 25.56, 1.52),
        _row(
            "t1-tuned", "BD3-LM S = 1, tuned (everything masked)",
            {"perplexity": 22.88, "variance": 0.11},
        ),
    ),
)  # fmt: skip

_T2_ROWS = (
    _noise_rows(
        "t2", "L",
        ("0-0.5", "U[0, 0.5]", 31.72, 1.03),
        ("0.3-0.8", "U[0.3, 0.8]", 31.78, 1.35),
        ("0.5-1", "U[0.5, 1]", 31.92, 1.83),
        ("0-1", "U[0, 1]", 31.78, 3.80),
    ),
    _noise_rows(
        "t2", "16",
        ("0-0.5", "U[0, 0.5]", 31.27, 7.90),
        ("0.3-0.8", "U[0.3, 0.8]", 31.19, 3.62),
        ("0.5-1", "U[0.5, 1]", 31.29, 3.63),
        ("0-1", "U[0, 1]", 31.33, 7.39),
    ),
    _noise_rows(
        "t2", "4",
        ("0-0.5", "U[0, 0.5]", 29.23, 32.68),
        ("0.3-0.8", "U[0.3, 0.8]", 29.37, 10.39),
        ("0.5-1", "U[0.5, 1]", 29.16, 8.28),
        ("0-1", "U[0, 1]", 29.23, 23.65),
    ),
)  # fmt: skip
_T2 = PaperTable(
    name="T2",
    title="LM1B: perplexity and variance of the bound by clip and block size",
    corpus="lm1b",
    budget="65B tokens at S = L, then 10B with every clip and block size",
    columns=_WITH_VARIANCE,
    rows=tuple(chain.from_iterable(_T2_ROWS)),
    chains=_systems(*_T2_ROWS),
)

_T3 = PaperTable(
    name="T3",
    title="LM1B test perplexity",
    corpus="lm1b",
    budget="65B tokens",
    columns=_PERPLEXITY,
    rows=(
        _exact("ar", "Transformer (AR)", 22.83),
        _bound("d3pm", "D3PM", 82.34),
        _bound("sedd", "SEDD", 32.68),
        _bound("mdlm", "MDLM", 31.78),
        _bound("s16", "BD3-LM S = 16", 30.60),
        _bound("s8", "BD3-LM S = 8", 29.83),
        _bound("s4", "BD3-LM S = 4", 28.23),
    ),
)

_T4 = PaperTable(
    name="T4",
    title="OpenWebText test perplexity",
    corpus="owt",
    budget="524B tokens",
    columns=_PERPLEXITY,
    rows=(
        _exact("ar", "AR", 17.54),
        _bound("sedd", "SEDD", 24.10),
        _bound("mdlm", "MDLM", 22.98),
        _bound("s16", "BD3-LM S = 16", 22.27),
        _bound("s8", "BD3-LM S = 8", 21.68),
        _bound("s4", "BD3-LM S = 4", 20.73),
    ),
)

# Columns are the tasks of the suite `paper` (evaluate.zero_shot).
_T5_COLUMNS = {
    "ptb": "PTB", "wikitext": "Wikitext", "lm1b": "LM1B", "lambada": "Lambada",
    "ag_news": "AG News", "pubmed": "PubMed", "arxiv": "arXiv",
}  # fmt: skip


def _zero_shot(system: str, label: str, *values: float) -> PaperRow:
    figures = dict(zip(_T5_COLUMNS, values, strict=True))
    return _row(system, label, figures, bounds=() if system == "ar" else _T5_COLUMNS)


_T5 = PaperTable(
    name="T5",
    title="zero-shot perplexity of the OpenWebText models",
    corpus="owt",
    budget="524B tokens",
    columns=_T5_COLUMNS,
    rows=(
        _zero_shot("ar", "AR", 81.07, 25.32, 51.14, 52.13, 52.11, 48.59, 41.22),
        _zero_shot("sedd", "SEDD", 96.33, 35.98, 68.14, 48.93, 67.82, 45.39, 40.03),
        _zero_shot("mdlm", "MDLM", 90.96, 33.22, 64.94, 48.29, 62.78, 43.13, 37.89),
        _zero_shot("s4", "BD3-LM S = 4", 96.81, 31.31, 60.88, 50.03, 61.67, 42.52, 39.20),
    ),
)

_T6 = PaperTable(
    name="T6",
    title="tokens of generated documents",
    corpus="owt",
    budget="500 documents of at most 131K tokens; models of 524B tokens",
    columns={"median": "median length", "max": "longest"},
    places=0,
    rows=(
        _row(
            "data", "OWT, its own documents", {"median": 717, "max": 131_000},
            quoted="a statistic of OpenWebText; ours is that of the training text",
        ),
        _row("ar", "AR", {"median": 4008, "max": 131_000}),
        _row("sedd", "SEDD", {"median": 1021, "max": 1024}),
        _row("mdlm", "MDLM", {}, also=("median", "max")),
        _row("s16", "BD3-LM S = 16", {"median": 798, "max": 9982}),
    ),
)  # fmt: skip

_SSD_LM = "SSD-LM is quoted: its network and noise are not rebuilt"
_T7 = PaperTable(
    name="T7",
    title="generative perplexity (in the paper of 300 samples, L = 1024, under GPT-2 Large)",
    corpus="owt",
    budget="524B tokens",
    columns={"L": "L tokens", "2L": "2L tokens"},
    places=1,
    rows=(
        _row("ar", "AR", {"L": 14.1, "2L": 13.2}),
        _row("d3pm", "D3PM", {}, also=("L",)),
        _row("sedd", "SEDD", {"L": 52.0}),
        _row("mdlm", "MDLM", {"L": 46.8, "2L": 41.3}),
        _row(
            "ssd-lm-slow", "SSD-LM, 40K / 80K network calls", {"L": 37.2, "2L": 35.3},
            quoted=_SSD_LM,
        ),
        _row(
            "ssd-lm-fast", "SSD-LM, 1K / 2K network calls", {"L": 281.3, "2L": 281.9},
            quoted=_SSD_LM,
        ),
        _row("s16", "BD3-LM S = 16", {"L": 33.4, "2L": 31.5}),
        _row("s8", "BD3-LM S = 8", {"L": 30.4, "2L": 28.2}),
        _row("s4", "BD3-LM S = 4", {"L": 25.7, "2L": 23.6}),
    ),
)  # fmt: skip

_T8_ROWS = (
    _noise_rows(
        "t8", "4",
        ("0.45-0.95", "clipped U[0.45, 0.95]", 29.21, 6.24),
        ("0.3-0.8", "clipped U[0.3, 0.8]", 29.38, 10.33),
        ("linear", "linear U[0, 1]", 30.18, 23.45),
        ("log", "logarithmic", 30.36, 23.53),
        ("sqrt", "square root", 31.41, 26.43),
    ),
    _noise_rows(
        "t8", "16",
        ("0.45-0.95", "clipped U[0.45, 0.95]", 31.42, 3.60),
        ("0.3-0.8", "clipped U[0.3, 0.8]", 31.12, 3.58),
        ("linear", "linear U[0, 1]", 31.72, 7.62),
        ("square", "square", 31.43, 13.03),
        ("cosine", "cosine", 31.41, 13.00),
    ),
)  # fmt: skip
_T8 = PaperTable(
    name="T8",
    title="LM1B: perplexity and variance of the bound by noise schedule",
    corpus="lm1b",
    budget="65B tokens at S = L, then 3B with every schedule",
    columns=_WITH_VARIANCE,
    rows=tuple(chain.from_iterable(_T8_ROWS)),
    chains=_systems(*_T8_ROWS),
)

TABLES = {table.name: table for table in (_T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8)}
