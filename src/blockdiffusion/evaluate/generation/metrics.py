"""What generated texts are like: diversity, repetition, length. Pure functions of token ids.

A sample is a sequence of token ids. Which tokens is up to the caller; `blockdiff generate-eval`
passes those of the scorer, so that models with different tokenizers compare.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

Ids = Sequence[int]

SELF_BLEU_SAMPLES = 500  # more are sampled down: the score depends on the number of references
SMOOTHING = 0.1  # of an order without a match: method 1 of Chen and Cherry (2014)


def token_entropy(ids: Ids) -> float:
    """Entropy in nats of the distribution of the ids that occur in `ids`.

    At most the log of their number. The guard against generative perplexity: text that repeats
    itself is likely and has little of it (Zheng et al. 2024; the authors report it besides).
    """
    _, counts = np.unique(np.asarray(ids), return_counts=True)
    share = counts / counts.sum()
    return abs(float((share * np.log(share)).sum()))


def pooled_entropy(samples: Iterable[Ids]) -> float:
    """Entropy in nats of the ids of all samples together: grows with the number of samples."""
    return token_entropy([token for ids in samples for token in ids])


def lowest_window_entropy(ids: Ids, window: int, step: int) -> float | None:
    """The lowest entropy of `window` ids that end at a multiple of `step` or at the end.

    The first window ends behind position `window`, as the authors check it (`_check_stop_conds`);
    None where `ids` has no more than `window` ids.
    """
    if len(ids) <= window:
        return None
    ends = {*range(step * (window // step + 1), len(ids) + 1, step), len(ids)}
    return min(token_entropy(ids[end - window : end]) for end in ends)


def ngrams(ids: Ids, n: int) -> Iterable[tuple[int, ...]]:
    """The n-grams of one sample, in order."""
    return zip(*(ids[start:] for start in range(n)), strict=False)


def distinct(samples: Iterable[Ids], n: int) -> float | None:
    """distinct-n (Li et al. 2016): different n-grams of all samples over all of them.

    Falls with the amount of text: compare equal amounts. None where no sample has n tokens.
    """
    found = [gram for ids in samples for gram in ngrams(ids, n)]
    return len(set(found)) / len(found) if found else None


def repetition(ids: Ids, n: int) -> float | None:
    """rep-n (Welleck et al. 2020, seq-rep-n): share of the n-grams of a sample that were there
    before, 1 - different / all. None where the sample has fewer than n tokens."""
    share = distinct([ids], n)
    return None if share is None else 1 - share


def longest_repeat(ids: Ids) -> int:
    """Length of the longest span that begins twice in `ids`; the two may overlap.

    Exact, by doubling: spans of 2^j tokens are numbered from those of half the length, and two
    such spans that overlap number a span of any length in between.
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

    low, high = 0, len(ids) - 1  # a repeat of length low exists, one longer than high does not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if occurs_twice(middle) else (low, middle - 1)
    return low


def _pair_names(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number for every pair, equal for equal pairs."""
    pairs = first * (second.max(initial=0) + 1) + second
    return np.unique(pairs, return_inverse=True)[1].astype(np.int64)


def self_bleu(samples: Sequence[Ids], order: int = 4, seed: int = 0) -> float | None:
    """Self-BLEU (Zhu et al. 2018): mean BLEU of each sample with all others as references.

    High where samples are alike. BLEU (Papineni et al. 2002) of n-grams up to `order`, uniform
    weights, the closest reference length for the brevity penalty (the shorter of two equally
    close); an order without a match counts as 0.1 matches. It grows with the number of references,
    so at most `SELF_BLEU_SAMPLES` samples, drawn by `seed`, are used.

    Returns:
        A number in [0, 1]; None with fewer than two samples that are not empty.
    """
    samples = [ids for ids in samples if len(ids)]
    if len(samples) > SELF_BLEU_SAMPLES:
        samples = random.Random(seed).sample(samples, SELF_BLEU_SAMPLES)
    if len(samples) < 2:
        return None
    counts = [[Counter(ngrams(ids, n)) for ids in samples] for n in range(1, order + 1)]
    logs = [0.0] * len(samples)
    nothing = set()
    for n, of_order in enumerate(counts, 1):
        clipped = _clipped_matches(of_order)
        for index, matches in enumerate(clipped):
            if n == 1 and matches == 0:
                nothing.add(index)
            total = max(len(samples[index]) - n + 1, 1)
            logs[index] += math.log((matches or SMOOTHING) / total) / order
    lengths = [len(ids) for ids in samples]
    scores = [
        0.0 if index in nothing else math.exp(log + _brevity(index, lengths))
        for index, log in enumerate(logs)
    ]
    return math.fsum(scores) / len(scores)


def _clipped_matches(counts: Sequence[Counter[tuple[int, ...]]]) -> list[int]:
    """Per sample: its n-grams, each at most as often as in that other sample which has it most.

    The largest count among the others is the largest of all, or the second where the sample
    itself has the largest: one pass over everything, not one for every pair.
    """
    largest: dict[tuple[int, ...], tuple[int, int, int]] = {}  # count, whose, second count
    for index, of_sample in enumerate(counts):
        for gram, count in of_sample.items():
            first, owner, second = largest.get(gram, (0, -1, 0))
            if count > first:
                largest[gram] = (count, index, first)
            elif count > second:
                largest[gram] = (first, owner, count)
    matches = []
    for index, of_sample in enumerate(counts):
        found = 0
        for gram, count in of_sample.items():
            first, owner, second = largest[gram]
            found += min(count, second if owner == index else first)
        matches.append(found)
    return matches


def _brevity(index: int, lengths: Sequence[int]) -> float:
    """Log of the brevity penalty of sample `index` against all others."""
    own = lengths[index]
    others = (length for other, length in enumerate(lengths) if other != index)
    closest = min(others, key=lambda length: (abs(length - own), length))
    return min(0.0, 1 - closest / own)


def histogram(lengths: Sequence[int], most_bins: int = 24) -> tuple[list[int], list[int]]:
    """(edges, counts) of whole numbers, in at most `most_bins` bins of equal round width.

    Bin i holds edges[i] <= length < edges[i + 1].
    """
    low, high = min(lengths), max(lengths)
    rough = max((high - low + 1) / most_bins, 1)
    power = 10 ** math.floor(math.log10(rough))
    width = next(
        m * power
        for m in (1, 2, 5, 10, 20)
        if m * power >= rough and _fits(low, high, m * power, most_bins)
    )
    first = low // width * width
    edges = list(range(first, high + width + 1, width))
    while edges[-2] > high:
        edges.pop()
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[(length - first) // width] += 1
    return edges, counts


def _fits(low: int, high: int, width: int, most_bins: int) -> bool:
    return high // width - low // width + 1 <= most_bins
