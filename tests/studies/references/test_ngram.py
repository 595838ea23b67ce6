"""The n-gram model: by hand, against a slow recursion, and as a law that sums to one."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from blockdiffusion.studies.references.ngram import FALLBACK, count_ngrams, discounts

MASK = 4  # of the random rows: the last of five ids


def fit(rows, order, vocab_size=MASK + 1, counted=None, valid=None):
    ids_RL = np.array(rows)
    everywhere = np.ones(ids_RL.shape, dtype=bool)
    return count_ngrams(
        ids_RL,
        everywhere if counted is None else counted,
        everywhere if valid is None else valid,
        order=order,
        vocab_size=vocab_size,
        num_symbols=vocab_size - 1,
    )


def probability(model, context, symbol):
    """Under every order, of one symbol after a context that begins a row."""
    return np.exp(-model.nats(np.array([[*context, symbol]]))[:, 0, -1])


def random_rows(num_rows=40, length=12, seed=0):
    """Rows of four symbols that repeat themselves, the end of some of them padding, a BOS first."""
    draw = np.random.default_rng(seed)
    ids_RL = draw.choice(MASK, (num_rows, length), p=[0.5, 0.3, 0.15, 0.05])
    ids_RL[:, 0] = 0
    valid_RL = np.arange(length) < draw.integers(4, length + 1, (num_rows, 1))
    counted_RL = valid_RL.copy()
    counted_RL[:, 0] = False
    return ids_RL, counted_RL, valid_RL


# --- an oracle ---------------------------------------------------------------------------------


class SlowKneserNey:
    """The formulas of the module's docstring in exact fractions, from dictionaries of counts."""

    def __init__(self, ids_RL, counted_RL, valid_RL, num_symbols):
        self.num_symbols = num_symbols
        self.counts = Counter()
        before = {}
        for ids, counted, valid in zip(ids_RL.tolist(), counted_RL, valid_RL, strict=True):
            for end in range(1, len(ids) + 1):
                for start in range(end):
                    if valid[end - 1]:
                        gram = tuple(ids[start:end])
                        self.counts[gram] += int(counted[end - 1])
                        before.setdefault(gram[1:], set()).add(gram[0])
        self.continuations = Counter({gram: len(symbols) for gram, symbols in before.items()})

    def of_order(self, k, context, symbol, highest=True):
        if k == 0:
            return Fraction(1, self.num_symbols)
        context = tuple(context[len(context) - k + 1 :])
        source = self.counts if highest else self.continuations
        # Every k-gram that occurs, though its count may be 0.
        table = {gram: source[gram] for gram in self.counts if len(gram) == k}
        taken = [Fraction(0), *map(Fraction, discounts(np.array(list(table.values()))))]
        following = {gram: count for gram, count in table.items() if gram[:-1] == context}
        total = sum(following.values())
        shorter = self.of_order(k - 1, context, symbol, highest=False)
        if total == 0:
            return shorter
        left = sum(taken[min(count, 3)] for count in following.values()) / total
        count = following.get((*context, symbol), 0)
        return (count - taken[min(count, 3)]) / total + left * shorter


# --- tests -------------------------------------------------------------------------------------


def test_a_small_text_by_hand():
    """a b a b c; no count is 3, so the discounts are 1/2 for 1 and 1 for 2."""
    a, b, c = 0, 1, 2
    model = fit([[a, b, a, b, c]], order=2, vocab_size=4)
    # Order 1: a and b twice, c once, (1 + 1 + 1/2) / 5 left to the uniform third.
    for symbol, own in ((a, 1 / 5), (b, 1 / 5), (c, 0.5 / 5)):
        assert probability(model, [], symbol)[0] == pytest.approx(own + 0.5 / 3)
    # Beneath order 2 each symbol has one symbol that stands before it: a third each.
    after_a = {a: 0.5 / 3, b: (2 - 1) / 2 + 0.5 / 3, c: 0.5 / 3}
    after_b = {a: 0.5 / 2 + 0.5 / 3, b: 0.5 / 3, c: 0.5 / 2 + 0.5 / 3}
    after_c = {a: 1 / 3, b: 1 / 3, c: 1 / 3}  # never seen before a symbol
    for context, law in ((a, after_a), (b, after_b), (c, after_c)):
        for symbol, expected in law.items():
            assert probability(model, [context], symbol)[1] == pytest.approx(expected)
    # The beginning of a row is scored by the order that it has symbols for.
    assert probability(model, [], a)[1] == probability(model, [], a)[0]


def test_discounts_by_hand_and_where_they_cannot_be_estimated():
    counts = np.array([1, 1, 1, 1, 2, 2, 3, 4, 9])  # Y = 4 / 8
    assert discounts(counts) == (1 - 2 * 0.5 * 2 / 4, 2 - 3 * 0.5 * 1 / 2, 3 - 4 * 0.5 * 1 / 1)
    assert discounts(np.array([1, 1, 2, 5, 5])) == FALLBACK  # no count of 3
    assert discounts(np.array([1, 1, 2, 2, 3, 4, 4, 4])) == FALLBACK  # D3 would be below 0


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_slow_recursion(seed):
    ids_RL, counted_RL, valid_RL = random_rows(seed=seed)
    model = fit(ids_RL, 4, counted=counted_RL, valid=valid_RL)
    slow = SlowKneserNey(ids_RL, counted_RL, valid_RL, MASK)
    rows = np.random.default_rng(seed + 10).integers(0, MASK, (6, 7))
    nats_KRL = model.nats(rows)
    unseen = 0
    for r, row in enumerate(rows.tolist()):
        for i, symbol in enumerate(row):
            for k in range(1, 5):
                expected = slow.of_order(min(k, i + 1), row[:i], symbol)
                assert np.exp(-nats_KRL[k - 1, r, i]) == pytest.approx(float(expected), rel=1e-12)
                unseen += tuple(row[max(0, i - k + 1) : i + 1]) not in slow.counts
    assert unseen > 10  # the shorter orders were needed


def test_every_symbol_has_a_probability_and_they_sum_to_one():
    ids_RL, counted_RL, valid_RL = random_rows()
    model = fit(ids_RL, 5, counted=counted_RL, valid=valid_RL)
    draw = np.random.default_rng(1)
    for length in (0, 1, 2, 4, 7):
        for context in draw.integers(0, MASK, (20, length)).tolist():
            law_KV = np.stack([probability(model, context, v) for v in range(MASK)], axis=1)
            assert (law_KV > 0).all()
            assert law_KV.sum(1) == pytest.approx(np.ones(5), abs=1e-12)


def test_orders_that_no_row_is_long_enough_for_are_left_out():
    model = fit([[0, 1, 0], [1, 1, 2]], order=5)
    nats_KRL = model.nats(np.array([[0, 1, 2, 3, 0, 1]]))
    assert nats_KRL.shape == (3, 1, 6) and np.isfinite(nats_KRL).all()


def test_longer_contexts_help_on_real_text(data_folder):
    text = (data_folder / "tinyshakespeare" / "input.txt").read_bytes()
    ids_RL = np.frombuffer(text[:600_000], dtype=np.uint8).astype(np.int64).reshape(-1, 100)
    model = fit(ids_RL[:-1000], 5, vocab_size=258)
    bits_K = model.nats(ids_RL[-1000:]).mean((1, 2)) / np.log(2)
    assert (np.diff(bits_K) < 0).all()
    assert 4.6 < bits_K[0] < 5.0 and 2.0 < bits_K[4] < 2.6
