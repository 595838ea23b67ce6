"""Diversity, repetition and length of generated texts: pure functions of token ids.

`blockdiff generate-eval` passes the ids of the scorer's tokenizer, so that models with different
tokenizers compare.
"""

from __future__ import annotations

import bisect
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

Ids = Sequence[int]

SELF_BLEU_SAMPLES = 500  # at most: the score depends on the number of references
SMOOTHING = 0.1  # of an order without a match: method 1 of Chen and Cherry (2014)


def token_entropy(ids: Ids) -> float:
    """Return the entropy in nats of the distribution of `ids`; at most the log of their number.

    It complements generative perplexity: text that repeats itself is likely, and has low entropy
    (Zheng et al. 2024; the authors report both).
    """
    _, counts = np.unique(np.asarray(ids), return_counts=True)
    share = counts / counts.sum()
    return abs(float((share * np.log(share)).sum()))


def pooled_entropy(samples: Iterable[Ids]) -> float:
    """Return the entropy in nats of all samples together; it grows with their number."""
    return token_entropy([token for ids in samples for token in ids])


def lowest_window_entropy(ids: Ids, window: int, step: int) -> float | None:
    """Return the lowest entropy of `window` ids that end at a multiple of `step` or at the end.

    The first window ends after position `window`, as in the authors' check (`_check_stop_conds`);
    None if `ids` is not longer than `window`.
    """
    if len(ids) <= window:
        return None
    ends = {*range(step * (window // step + 1), len(ids) + 1, step), len(ids)}
    return min(token_entropy(ids[end - window : end]) for end in ends)


def ngrams(ids: Ids, n: int) -> Iterable[tuple[int, ...]]:
    """Return the n-grams of one sample, in order."""
    return zip(*(ids[start:] for start in range(n)), strict=False)


def distinct(samples: Iterable[Ids], n: int) -> float | None:
    """Return distinct-n (Li et al. 2016): different n-grams of all samples over all n-grams.

    It falls with the amount of text: compare equal amounts. None if no sample has n tokens.
    """
    found = [gram for ids in samples for gram in ngrams(ids, n)]
    return len(set(found)) / len(found) if found else None


def repetition(ids: Ids, n: int) -> float | None:
    """Return rep-n (Welleck et al. 2020, seq-rep-n): the share of a sample's n-grams that occurred
    before, 1 - different / all. None if the sample has fewer than n tokens."""
    share = distinct([ids], n)
    return None if share is None else 1 - share


def longest_repeat(ids: Ids) -> int:
    """Return the length of the longest span that occurs twice in `ids`; the two may overlap.

    Exact, by doubling: spans of 2^j tokens are numbered from those of half the length, and two
    overlapping spans number a span of any length in between.
    """
    names = [np.unique(np.asarray(ids), return_inverse=True)[1].astype(np.int64)]
    while 2 ** len(names) < len(ids):
        half = 2 ** (len(names) - 1)
        names.append(_pair_names(names[-1][:-half], names[-1][half:]))

    def occurs_twice(length: int) -> bool:
        level = length.bit_length() - 1
        known = names[level]
        shift = length - 2**level
        pairs = _pair_names(known[: len(known) - shift], known[shift:])
        return len(np.unique(pairs)) < len(pairs)

    # A span that occurs twice contains shorter ones that do.
    return bisect.bisect(range(1, len(ids)), False, key=lambda length: not occurs_twice(length))


def _pair_names(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number the pairs; equal pairs get equal numbers."""
    pairs = first * (second.max(initial=0) + 1) + second
    return np.unique(pairs, return_inverse=True)[1].astype(np.int64)


def self_bleu(samples: Sequence[Ids], order: int = 4, seed: int = 0) -> float | None:
    """Return self-BLEU (Zhu et al. 2018): mean BLEU of each sample with all others as references.

    A number in [0, 1], high if samples are alike; None with fewer than two samples that are not
    empty. BLEU (Papineni et al. 2002) of n-grams up to `order` with uniform weights; the brevity
    penalty takes the closest reference length (the shorter of two equally close), and an order
    without a match counts as 0.1 matches. It grows with the number of references, so at most
    `SELF_BLEU_SAMPLES` samples, drawn by `seed`, are used.
    """
    samples = [ids for ids in samples if len(ids)]
    if len(samples) > SELF_BLEU_SAMPLES:
        samples = random.Random(seed).sample(samples, SELF_BLEU_SAMPLES)
    if len(samples) < 2:
        return None
    lengths = [len(ids) for ids in samples]
    logs = [0.0] * len(samples)
    for n in range(1, order + 1):
        clipped = _clipped_matches([Counter(ngrams(ids, n)) for ids in samples])
        for index, matches in enumerate(clipped):
            if n == 1 and matches == 0:
                logs[index] = -math.inf
            total = max(lengths[index] - n + 1, 1)
            logs[index] += math.log((matches or SMOOTHING) / total) / order
    scores = [math.exp(log + _brevity(index, lengths)) for index, log in enumerate(logs)]
    return math.fsum(scores) / len(scores)


def _clipped_matches(counts: Sequence[Counter[tuple[int, ...]]]) -> list[int]:
    """Count each sample's n-grams, each at most as often as it is in any one other sample.

    The largest count among the others is the largest of all, or the second largest if the sample
    itself has the largest: this takes one pass, not one for every pair.
    """
    largest: dict[tuple[int, ...], tuple[int, int, int]] = {}  # count, whose, second count
    for index, of_sample in enumerate(counts):
        for gram, count in of_sample.items():
            first, owner, second = largest.get(gram, (0, -1, 0))
            if count > first:
                largest[gram] = (count, index, first)
            elif count > second:
                largest[gram] = (first, owner, count)

    def elsewhere(gram: tuple[int, ...], index: int) -> int:
        first, owner, second = largest[gram]
        return second if owner == index else first

    return [
        sum(min(count, elsewhere(gram, index)) for gram, count in of_sample.items())
        for index, of_sample in enumerate(counts)
    ]


def _brevity(index: int, lengths: Sequence[int]) -> float:
    """Return the log of the brevity penalty of sample `index` against all others."""
    own = lengths[index]
    others = (length for other, length in enumerate(lengths) if other != index)
    closest = min(others, key=lambda length: (abs(length - own), length))
    return min(0.0, 1 - closest / own)


def histogram(lengths: Sequence[int], most_bins: int = 24) -> tuple[list[int], list[int]]:
    """Return (edges, counts) of whole numbers, in at most `most_bins` bins of equal round width.

    Bin i holds edges[i] <= length < edges[i + 1].
    """
    low, high = min(lengths), max(lengths)
    power = 10 ** math.floor(math.log10(max((high - low + 1) / most_bins, 1)))
    widths = (m * power for m in (1, 2, 5, 10, 20))
    width = next(w for w in widths if high // w - low // w < most_bins)
    first, last = low // width, high // width
    bins = Counter(length // width for length in lengths)
    edges = [width * index for index in range(first, last + 2)]
    return edges, [bins[index] for index in range(first, last + 1)]
