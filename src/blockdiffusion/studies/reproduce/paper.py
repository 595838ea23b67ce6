"""The paper's tables as data (Arriola et al., arXiv 2503.09573v3, tables 1 to 8).

Nothing is computed here. A table has rows (systems) and columns; a figure that is an upper bound is
marked, and so are rows that are only quoted: systems that are not rebuilt.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

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


def _perplexities(**figures: float) -> dict[str, Figure]:
    return {name: Figure(value) for name, value in figures.items()}


def _exact(value: float) -> dict[str, Figure]:
    return {"perplexity": Figure(value)}


def _bound(value: float) -> dict[str, Figure]:
    return {"perplexity": Figure(value, is_bound=True)}


def _noise(perplexity: float, variance: float) -> dict[str, Figure]:
    return {"perplexity": Figure(perplexity, is_bound=True), "variance": Figure(variance)}


def _noise_rows(
    table: str, block: str, figures: Iterable[tuple[str, str, float, float]]
) -> list[PaperRow]:
    """(clip or schedule, label, perplexity, variance) of the fine-tunes of tables 2 and 8."""
    return [
        PaperRow(
            system=f"{table}-s{block}-{key}",
            label=f"S = {block}, {label}",
            figures=_noise(perplexity, variance),
        )
        for key, label, perplexity, variance in figures
    ]


def _groups(rows: Iterable[PaperRow]) -> tuple[tuple[str, ...], ...]:
    """Systems of one block size."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.system.split("-")[1], []).append(row.system)
    return tuple(map(tuple, groups.values()))


_PERPLEXITY = {"perplexity": "test perplexity"}
_WITH_VARIANCE = {"perplexity": "test perplexity", "variance": "variance of the bound, by blocks"}

_T1_VARIANCE = "variance of the training loss, by blocks"
_T1 = PaperTable(
    name="T1",
    title="LM1B at S = 1: the noise of the loss is what separates diffusion from autoregression",
    corpus="lm1b",
    budget="16B tokens",
    columns={"perplexity": "test perplexity", "variance": _T1_VARIANCE},
    rows=(
        PaperRow(system="t1-ar", label="AR", figures=_exact(22.88)),
        PaperRow(
            system="t1-ar-random",
            label="AR, random batch size",
            figures=_exact(24.37),
            quoted="training has no random batch size",
        ),
        PaperRow(
            system="t1-linear",
            label="BD3-LM S = 1, linear U[0, 1]",
            figures=_noise(25.56, 1.52),
        ),
        PaperRow(
            system="t1-tuned",
            label="BD3-LM S = 1, tuned (everything masked)",
            figures=_exact(22.88) | {"variance": Figure(0.11)},
        ),
    ),
)

_T2_ROWS = (
    *_noise_rows(
        "t2",
        "L",
        [
            ("0-0.5", "U[0, 0.5]", 31.72, 1.03),
            ("0.3-0.8", "U[0.3, 0.8]", 31.78, 1.35),
            ("0.5-1", "U[0.5, 1]", 31.92, 1.83),
            ("0-1", "U[0, 1]", 31.78, 3.80),
        ],
    ),
    *_noise_rows(
        "t2",
        "16",
        [
            ("0-0.5", "U[0, 0.5]", 31.27, 7.90),
            ("0.3-0.8", "U[0.3, 0.8]", 31.19, 3.62),
            ("0.5-1", "U[0.5, 1]", 31.29, 3.63),
            ("0-1", "U[0, 1]", 31.33, 7.39),
        ],
    ),
    *_noise_rows(
        "t2",
        "4",
        [
            ("0-0.5", "U[0, 0.5]", 29.23, 32.68),
            ("0.3-0.8", "U[0.3, 0.8]", 29.37, 10.39),
            ("0.5-1", "U[0.5, 1]", 29.16, 8.28),
            ("0-1", "U[0, 1]", 29.23, 23.65),
        ],
    ),
)
_T2 = PaperTable(
    name="T2",
    title="LM1B: perplexity and variance of the bound by clip and block size",
    corpus="lm1b",
    budget="65B tokens at S = L, then 10B with every clip and block size",
    columns=_WITH_VARIANCE,
    rows=_T2_ROWS,
    chains=_groups(_T2_ROWS),
)

_T3 = PaperTable(
    name="T3",
    title="LM1B test perplexity",
    corpus="lm1b",
    budget="65B tokens",
    columns=_PERPLEXITY,
    rows=(
        PaperRow(system="ar", label="Transformer (AR)", figures=_exact(22.83)),
        PaperRow(system="d3pm", label="D3PM", figures=_bound(82.34)),
        PaperRow(system="sedd", label="SEDD", figures=_bound(32.68)),
        PaperRow(system="mdlm", label="MDLM", figures=_bound(31.78)),
        PaperRow(system="s16", label="BD3-LM S = 16", figures=_bound(30.60)),
        PaperRow(system="s8", label="BD3-LM S = 8", figures=_bound(29.83)),
        PaperRow(system="s4", label="BD3-LM S = 4", figures=_bound(28.23)),
    ),
)

_T4 = PaperTable(
    name="T4",
    title="OpenWebText test perplexity",
    corpus="owt",
    budget="524B tokens",
    columns=_PERPLEXITY,
    rows=(
        PaperRow(system="ar", label="AR", figures=_exact(17.54)),
        PaperRow(system="sedd", label="SEDD", figures=_bound(24.10)),
        PaperRow(system="mdlm", label="MDLM", figures=_bound(22.98)),
        PaperRow(system="s16", label="BD3-LM S = 16", figures=_bound(22.27)),
        PaperRow(system="s8", label="BD3-LM S = 8", figures=_bound(21.68)),
        PaperRow(system="s4", label="BD3-LM S = 4", figures=_bound(20.73)),
    ),
)

# Columns are the tasks of the suite `paper` (evaluate.zero_shot).
_T5_COLUMNS = {
    "ptb": "PTB", "wikitext": "Wikitext", "lm1b": "LM1B", "lambada": "Lambada",
    "ag_news": "AG News", "pubmed": "PubMed", "arxiv": "arXiv",
}  # fmt: skip


def _zero_shot(*values: float, is_bound: bool = True) -> dict[str, Figure]:
    columns = zip(_T5_COLUMNS, values, strict=True)
    return {column: Figure(value, is_bound) for column, value in columns}


_T5 = PaperTable(
    name="T5",
    title="zero-shot perplexity of the OpenWebText models",
    corpus="owt",
    budget="524B tokens",
    columns=_T5_COLUMNS,
    rows=(
        PaperRow(
            system="ar",
            label="AR",
            figures=_zero_shot(81.07, 25.32, 51.14, 52.13, 52.11, 48.59, 41.22, is_bound=False),
        ),
        PaperRow(
            system="sedd",
            label="SEDD",
            figures=_zero_shot(96.33, 35.98, 68.14, 48.93, 67.82, 45.39, 40.03),
        ),
        PaperRow(
            system="mdlm",
            label="MDLM",
            figures=_zero_shot(90.96, 33.22, 64.94, 48.29, 62.78, 43.13, 37.89),
        ),
        PaperRow(
            system="s4",
            label="BD3-LM S = 4",
            figures=_zero_shot(96.81, 31.31, 60.88, 50.03, 61.67, 42.52, 39.20),
        ),
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
        PaperRow(
            system="data",
            label="OWT, its own documents",
            figures=_perplexities(median=717, max=131_000),
            quoted="a statistic of OpenWebText; ours is that of the training text",
        ),
        PaperRow(system="ar", label="AR", figures=_perplexities(median=4008, max=131_000)),
        PaperRow(system="sedd", label="SEDD", figures=_perplexities(median=1021, max=1024)),
        PaperRow(system="mdlm", label="MDLM", figures={}, also=("median", "max")),
        PaperRow(system="s16", label="BD3-LM S = 16", figures=_perplexities(median=798, max=9982)),
    ),
)

SSD_LM = "SSD-LM is quoted: its network and noise are not rebuilt"
_T7 = PaperTable(
    name="T7",
    title="generative perplexity (in the paper of 300 samples, L = 1024, under GPT-2 Large)",
    corpus="owt",
    budget="524B tokens",
    columns={"L": "L tokens", "2L": "2L tokens"},
    places=1,
    rows=(
        PaperRow(system="ar", label="AR", figures={"L": Figure(14.1), "2L": Figure(13.2)}),
        PaperRow(system="d3pm", label="D3PM", figures={}, also=("L",)),
        PaperRow(system="sedd", label="SEDD", figures={"L": Figure(52.0)}),
        PaperRow(system="mdlm", label="MDLM", figures={"L": Figure(46.8), "2L": Figure(41.3)}),
        PaperRow(
            system="ssd-lm-slow",
            label="SSD-LM, 40K / 80K network calls",
            figures={"L": Figure(37.2), "2L": Figure(35.3)},
            quoted=SSD_LM,
        ),
        PaperRow(
            system="ssd-lm-fast",
            label="SSD-LM, 1K / 2K network calls",
            figures={"L": Figure(281.3), "2L": Figure(281.9)},
            quoted=SSD_LM,
        ),
        PaperRow(
            system="s16", label="BD3-LM S = 16", figures={"L": Figure(33.4), "2L": Figure(31.5)}
        ),
        PaperRow(
            system="s8", label="BD3-LM S = 8", figures={"L": Figure(30.4), "2L": Figure(28.2)}
        ),
        PaperRow(
            system="s4", label="BD3-LM S = 4", figures={"L": Figure(25.7), "2L": Figure(23.6)}
        ),
    ),
)

_T8_ROWS = (
    *_noise_rows(
        "t8",
        "4",
        [
            ("0.45-0.95", "clipped U[0.45, 0.95]", 29.21, 6.24),
            ("0.3-0.8", "clipped U[0.3, 0.8]", 29.38, 10.33),
            ("linear", "linear U[0, 1]", 30.18, 23.45),
            ("log", "logarithmic", 30.36, 23.53),
            ("sqrt", "square root", 31.41, 26.43),
        ],
    ),
    *_noise_rows(
        "t8",
        "16",
        [
            ("0.45-0.95", "clipped U[0.45, 0.95]", 31.42, 3.60),
            ("0.3-0.8", "clipped U[0.3, 0.8]", 31.12, 3.58),
            ("linear", "linear U[0, 1]", 31.72, 7.62),
            ("square", "square", 31.43, 13.03),
            ("cosine", "cosine", 31.41, 13.00),
        ],
    ),
)
_T8 = PaperTable(
    name="T8",
    title="LM1B: perplexity and variance of the bound by noise schedule",
    corpus="lm1b",
    budget="65B tokens at S = L, then 3B with every schedule",
    columns=_WITH_VARIANCE,
    rows=_T8_ROWS,
    chains=_groups(_T8_ROWS),
)

TABLES = {table.name: table for table in (_T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8)}
