"""Orders are told with error bars, in pairs where the rows are the same."""

import math

import pytest
import torch

from blockdiffusion.studies.reproduce.cells import Cell
from blockdiffusion.studies.reproduce.order import check_orders, length_sentences, order_sentence
from blockdiffusion.studies.reproduce.paper import Figure, PaperRow, PaperTable, find_table

TABLE = PaperTable(
    name="T3",
    title="",
    corpus="lm1b",
    budget="",
    columns={"perplexity": "perplexity"},
    rows=tuple(
        PaperRow(system=name, label=name.upper(), figures={"perplexity": Figure(value)})
        for name, value in {"a": 10.0, "b": 20.0, "c": 20.0, "d": 30.0}.items()
    ),
)


def cell(nats, error=0.01, noise=0.0, rows=None):
    return Cell(
        value=math.exp(nats),
        nats=nats,
        nats_stderr=error,
        per_row=None if rows is None else (tuple(rows), (2,) * len(rows)),
        beside={"stderr_noise": noise},
    )


def told(**cells):
    found = check_orders(TABLE, {(name, "perplexity"): value for name, value in cells.items()})
    return found[0], order_sentence(TABLE, found[0])


def test_an_order_that_holds():
    order, sentence = told(a=cell(1.0), b=cell(2.0), c=cell(2.0), d=cell(3.0))
    assert sentence == "A < B = C < D: holds."
    assert order.holds and [one.is_equal for one in order.comparisons] == [False, True, False]


def test_what_is_broken_and_what_the_error_bars_leave_open():
    order, sentence = told(a=cell(2.0), b=cell(1.0), c=cell(1.01), d=cell(1.02))
    assert not order.holds
    assert sentence == (
        "A < B = C < D: is broken between A and B by more than the error bars (-1 ± 0.014 nats "
        "per token); it holds between C and D by less than the error bars (+0.01 ± 0.014 nats "
        "per token)."
    )
    order, sentence = told(a=cell(1.01), b=cell(1.0))
    assert (
        order.holds and "A < B: is broken between A and B by less than the error bars" in sentence
    )
    order, sentence = told(b=cell(1.0), c=cell(1.1))
    assert not order.holds and "B = C: is broken between B and C by more" in sentence


def test_pairs_of_rows_have_the_error_of_their_difference():
    generator = torch.Generator().manual_seed(0)
    hard_B = 10 + torch.randn(400, generator=generator, dtype=torch.float64)
    away_B = 0.2 + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    low = cell(float(hard_B.mean()) / 2, 0.025, rows=hard_B.tolist())
    high = cell(float((hard_B + away_B).mean()) / 2, 0.025, rows=(hard_B + away_B).tolist())
    order, _ = told(a=low, b=high)
    (one,) = order.comparisons
    assert one.is_paired and one.verdict == "holds"
    # The mean of 400 differences of deviation 0.1, over 2 tokens: the ratio's error.
    assert one.stderr == pytest.approx(float(away_B.std()) / 20 / 2, rel=1e-6)
    noisy = [cell(c.nats, 0.025, noise=0.3, rows=c.per_row[0]) for c in (low, high)]
    assert told(a=noisy[0], b=noisy[1])[0].comparisons[0].stderr == pytest.approx(0.3 * 2**0.5)


def test_other_rows_are_not_paired():
    order, _ = told(a=cell(1.0, rows=[2.0, 2.0]), b=cell(2.0, rows=[4.0, 4.0, 4.0]))
    assert not order.comparisons[0].is_paired
    assert order.comparisons[0].stderr == pytest.approx(0.01 * 2**0.5)


def test_lengths_are_beyond_the_row_only_where_the_paper_says_so():
    lengths = {"ar": 300, "sedd": 127, "mdlm": 127, "s16": 100}
    cells = {(name, "max"): Cell(value=length) for name, length in lengths.items()}
    said = length_sentences(find_table("T6"), cells, 128)
    assert [sentence.rpartition(", ")[2] for sentence in said] == [
        "as in the paper.", "as in the paper.", "as in the paper.", "other than in the paper.",
    ]  # fmt: skip
