"""An n-gram model of any symbols: what counting reaches on the rows that a network is scored on.

Interpolated Kneser-Ney with three discounts (Kneser & Ney 1995; "modified" in Chen & Goodman 1999,
section 3). With c the count of a k-gram (context h, symbol w), c(h) the sum over the context's
symbols, D(c) the discount of a count of 1, 2, 3 or more, h' the context without its first symbol:

    p(w | h) = (c - D(c)) / c(h) + b(h) p(w | h'),        b(h) = sum over w of D(c) / c(h)

and a uniform distribution below the shortest context. Every symbol has a probability above 0, and
they sum to 1. The highest order counts occurrences, a lower one how many different symbols stand
before a gram (continuations): it is asked where the higher one has seen nothing.

Shapes: R rows of L symbols, G different k-grams of one length, C their different contexts, which
are the (k - 1)-grams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FALLBACK = (0.5, 1.0, 1.5)  # discounts where too few counts are small to estimate them


@dataclass(frozen=True)
class _Estimate:
    """Probabilities of one order, and how much each context leaves to the next shorter one."""

    probability_G: np.ndarray
    backoff_C: np.ndarray

    def probabilities(
        self, gram_RL: np.ndarray, context_RL: np.ndarray, shorter_RL: np.ndarray
    ) -> np.ndarray:
        """Of each symbol, whose gram and context have these numbers (-1: not seen in training)."""
        left_RL = np.where(context_RL < 0, 1.0, self.backoff_C[context_RL]) * shorter_RL
        return np.where(gram_RL < 0, left_RL, self.probability_G[gram_RL])


@dataclass(frozen=True)
class _Order:
    """All different k-grams of the training rows.

    Attributes:
        keys_G: context * V + symbol, sorted; a gram's place here is its number, and the context is
            the number of a (k - 1)-gram.
        highest: from occurrences, where k is the order of the model.
        lower: from continuations, beneath a higher order; None at the highest order counted.
    """

    keys_G: np.ndarray
    highest: _Estimate
    lower: _Estimate | None

    def find(self, context_RL: np.ndarray, ids_RL: np.ndarray, vocab_size: int) -> np.ndarray:
        """The numbers of the grams, -1 for those that are not here."""
        key_RL = np.where(context_RL < 0, -1, context_RL * vocab_size + ids_RL)
        gram_RL = np.minimum(np.searchsorted(self.keys_G, key_RL), len(self.keys_G) - 1)
        return np.where(self.keys_G[gram_RL] == key_RL, gram_RL, -1)


@dataclass(frozen=True)
class NGramModel:
    """Kneser-Ney models of the orders 1 to `len(orders)` over the same counts.

    Attributes:
        vocab_size: V, every id is below it.
        num_symbols: how many of the ids may occur at all: V without the mask.
    """

    orders: tuple[_Order, ...]
    vocab_size: int
    num_symbols: int

    def nats(self, ids_RL: np.ndarray) -> np.ndarray:
        """-log p of each symbol given those before it in its row: float64 (orders, R, L).

        A symbol near the beginning of a row has fewer before it: position i (from 0) is scored by
        the model of order min(k, i + 1).
        """
        positions = np.arange(ids_RL.shape[1])
        shorter_RL = np.full(ids_RL.shape, 1 / self.num_symbols)
        ended_RL = np.zeros(ids_RL.shape, dtype=np.int64)
        best_RL = shorter_RL
        found = []
        for k, order in enumerate(self.orders, 1):
            context_RL = _contexts(ended_RL, k)
            ended_RL = order.find(context_RL, ids_RL, self.vocab_size)
            longest_RL = order.highest.probabilities(ended_RL, context_RL, shorter_RL)
            best_RL = np.where(positions >= k - 1, longest_RL, best_RL)
            found.append(-np.log(best_RL))
            if order.lower is not None:
                shorter_RL = order.lower.probabilities(ended_RL, context_RL, shorter_RL)
        return np.stack(found)


def count_ngrams(
    ids_RL: np.ndarray,
    counted_RL: np.ndarray,
    valid_RL: np.ndarray,
    *,
    order: int,
    vocab_size: int,
    num_symbols: int,
    progress: Callable[[int, int], None] | None = None,
) -> NGramModel:
    """The models of the orders 1 to `order`, from grams that lie within a row.

    Orders that no row is long enough for are left out.

    Args:
        ids_RL: the training rows.
        counted_RL: False where a symbol is given (a BOS): it stands in contexts but is no event.
        valid_RL: False at padding.
        vocab_size, num_symbols: see `NGramModel`.
        progress: called with (orders counted, all orders).
    """
    grams: list[_Grams] = []
    ended_RL = np.zeros(ids_RL.shape, dtype=np.int64)  # the empty gram ends everywhere
    for k in range(1, order + 1):
        context_RL = _contexts(ended_RL, k)
        here_RL = valid_RL & (context_RL >= 0)
        if not here_RL.any():  # no row is so long
            break
        keys_P = context_RL[here_RL] * vocab_size + ids_RL[here_RL]
        keys_G, first_G, gram_P = np.unique(keys_P, return_index=True, return_inverse=True)
        counts_G = np.bincount(gram_P, counted_RL[here_RL], len(keys_G)).astype(np.int64)
        grams.append(_Grams(keys_G, ended_RL[here_RL][first_G], counts_G))
        ended_RL = np.full(ids_RL.shape, -1, dtype=np.int64)
        ended_RL[here_RL] = gram_P
        if progress is not None:
            progress(k, order)
    return NGramModel(_estimated(grams, vocab_size, num_symbols), vocab_size, num_symbols)


def discounts(counts_G: np.ndarray) -> tuple[float, float, float]:
    """What is taken off a count of 1, 2, and 3 or more (Chen & Goodman 1999, section 3)."""
    n1, n2, n3, n4 = (int((counts_G == count).sum()) for count in (1, 2, 3, 4))
    if min(n1, n2, n3) > 0:
        y = n1 / (n1 + 2 * n2)
        found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 < discount <= count for count, discount in enumerate(found, 1)):
            return found
    return FALLBACK


@dataclass(frozen=True)
class _Grams:
    """The different k-grams: their keys, the numbers of their last k - 1 symbols, their counts."""

    keys_G: np.ndarray
    suffix_G: np.ndarray
    counts_G: np.ndarray


def _contexts(ended_RL: np.ndarray, k: int) -> np.ndarray:
    """The number of the (k - 1)-gram before each symbol, -1 where there is none."""
    if k == 1:
        return np.zeros_like(ended_RL)
    context_RL = np.full_like(ended_RL, -1)
    context_RL[:, 1:] = ended_RL[:, :-1]
    return context_RL


def _estimated(grams: list[_Grams], vocab_size: int, num_symbols: int) -> tuple[_Order, ...]:
    orders: list[_Order] = []
    num_contexts, shorter = 1, np.array([1 / num_symbols])
    for here, longer in zip(grams, [*grams[1:], None], strict=True):
        context_G, shorter_G = here.keys_G // vocab_size, shorter[here.suffix_G]
        highest = _estimate(here.counts_G, context_G, num_contexts, shorter_G)
        lower = None
        if longer is not None:
            continuations_G = np.bincount(longer.suffix_G, minlength=len(here.keys_G))
            lower = _estimate(continuations_G, context_G, num_contexts, shorter_G)
            num_contexts, shorter = len(here.keys_G), lower.probability_G
        orders.append(_Order(here.keys_G, highest, lower))
    return tuple(orders)


def _estimate(
    counts_G: np.ndarray, context_G: np.ndarray, num_contexts: int, shorter_G: np.ndarray
) -> _Estimate:
    """`shorter_G`: each gram's probability without the first symbol of its context."""
    taken_G = np.array([0.0, *discounts(counts_G)])[np.minimum(counts_G, 3)]
    total_C = np.bincount(context_G, counts_G, num_contexts)
    taken_C = np.bincount(context_G, taken_G, num_contexts)
    # A context without a counted symbol (it ended its row) leaves all to the shorter one.
    backoff_C = np.divide(taken_C, total_C, out=np.ones(num_contexts), where=total_C > 0)
    own_G = (counts_G - taken_G) / np.maximum(total_C[context_G], 1)
    return _Estimate(own_G + backoff_C[context_G] * shorter_G, backoff_C)
