"""Score texts window by window: every token once, in passes of many windows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.likelihood import MOST_NATS
from blockdiffusion.evaluate.scorer import Row, Scorer, ScorerTokens
from blockdiffusion.evaluate.windows import spans

LOGIT_BYTES = 2**28  # logits of one pass: bounds memory


def window_sizes(scorer: Scorer, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return the context and stride to use; the defaults are the scorer's context and half of it.

    Raises:
        UserError: they do not fit the scorer or each other.
    """
    used = scorer.context if context is None else context
    if not 2 <= used <= scorer.context:
        raise UserError(
            f"the context is {used} tokens, but the scorer {scorer.name} reads from 2 to "
            f"{scorer.context}; choose a number between them"
        )
    half = max((used + scorer.lead) // 2 // scorer.grain, 1) * scorer.grain
    step = half if stride is None else stride
    # Windows of block diffusion models start by themselves, so that all of one may be scored.
    if not 1 <= step < used and not (step == used and scorer.grain > 1):
        raise UserError(
            f"the stride is {step}; it must be at least 1 and smaller than the context of {used} "
            "tokens, so that no window begins with a token that is scored"
        )
    if (used + scorer.lead) % scorer.grain or step % scorer.grain:
        raise UserError(
            f"the context is {used} and the stride {step} tokens, but the scorer {scorer.name} "
            f"reads whole blocks of {scorer.grain}; choose a multiple of {scorer.grain} as stride, "
            f"and {scorer.context} or a multiple less as context"
        )
    return used, step


def score_texts(
    scorer: Scorer,
    texts: Sequence[ScorerTokens],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    journal: Path | None = None,
) -> list[float]:
    """Return the scorer's nats of every text, summed over its scored tokens.

    Args:
        context, stride: see `window_sizes`.
        progress: called with (done, total) tokens read.
        journal: file that keeps finished passes, from which the same call resumes after a kill.
            The caller removes it.

    Raises:
        UserError: context and stride do not fit.
    """
    used, step = window_sizes(scorer, context, stride)
    rows = [(n, row) for n, tokens in enumerate(texts) for row in _rows(tokens, used, step)]
    passes = list(_passes(scorer, rows))
    kept = Journal.of(journal, scorer.model, [row for group in passes for _, row in group])
    nats = [0.0] * len(texts)
    done, total = 0, sum(len(row.ids) for _, row in rows)
    for number, group in enumerate(passes):
        in_pass = [row for _, row in group]
        found = kept.result(f"pass {number}", partial(_finite, scorer, in_pass, number))
        for (text, _), value in zip(group, found, strict=True):
            nats[text] += value
        done += sum(len(row.ids) for row in in_pass)
        if progress is not None:
            progress(done, total)
    return nats


def _finite(scorer: Scorer, rows: Sequence[Row], number: int) -> list[float]:
    found = scorer.nll(rows, number)
    most = [MOST_NATS * sum(row.scored) for row in rows]
    if not all(map(operator.lt, found, most)):  # nan is not less, either
        raise UserError(
            f"the scorer {scorer.name} gives a text {max(found):.4g} nats: its logits are "
            "not finite or far too large; take another scorer"
        )
    return found


def scorer_features(
    scorer: Scorer, samples: Sequence[ScorerTokens], context: int | None = None
) -> np.ndarray:
    """Return features (number of samples, D) for MAUVE: the scorer's last hidden state at the last
    token of the first window of each sample.

    Raises:
        UserError: the scorer is a block diffusion model, which has no such state.
    """
    used, _ = window_sizes(scorer, context, None)
    rows = [(n, Row(tokens.ids[:used], tokens.scored[:used])) for n, tokens in enumerate(samples)]
    features: list[np.ndarray] = [np.empty(0)] * len(samples)
    for group in _passes(scorer, rows):
        found = scorer.features([row for _, row in group]).cpu().numpy()
        for (sample, _), vector in zip(group, found, strict=True):
            features[sample] = vector
    return np.stack(features)


def _rows(tokens: ScorerTokens, context: int, stride: int) -> Iterator[Row]:
    """Yield the windows in which a token is scored."""
    for start, end, first in spans(len(tokens.ids), context, stride):
        scored = (False,) * (first - start) + tokens.scored[first:end]
        if any(scored):
            yield Row(tokens.ids[start:end], scored)


def _passes(scorer: Scorer, rows: Sequence[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """Yield windows with the numbers of their texts, longest first, in passes whose logits take at
    most `LOGIT_BYTES`."""
    left = sorted(rows, key=lambda row: len(row[1].ids), reverse=True)
    while left:
        bytes_of_one = len(left[0][1].ids) * scorer.model.config.vocab_size * 4
        count = max(1, LOGIT_BYTES // bytes_of_one)
        yield left[:count]
        left = left[count:]
