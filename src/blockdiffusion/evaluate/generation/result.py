"""The evaluation of generated text: samples and a scorer in, numbers with error bars out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.mauve_score import mauve_score, require_mauve
from blockdiffusion.evaluate.generation.metrics import (
    distinct,
    histogram,
    longest_repeat,
    pooled_entropy,
    repetition,
    self_bleu,
    token_entropy,
)
from blockdiffusion.evaluate.generation.perplexity import score_texts, scorer_features, window_sizes
from blockdiffusion.evaluate.generation.samples import Drawn, Sample
from blockdiffusion.evaluate.likelihood import Z95
from blockdiffusion.evaluate.measured import Measured, mean_of, perplexity_of, ratio_of
from blockdiffusion.evaluate.scorer import Scorer, ScorerFacts, ScorerTokens, scorer_facts
from blockdiffusion.runtime.versions import versions

FORMAT = "blockdiffusion-generation-1"
DISTINCT = (1, 2, 3, 4)
REPETITION = (2, 3, 4)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TextNumbers:
    """Numbers of some texts, in tokens of the scorer; None if nothing can be computed.

    Attributes:
        num_samples: texts, empty ones included.
        num_empty: texts without a token that could be scored; no number below includes them.
        num_tokens: scored tokens.
        nats_per_token: of the scorer, over all scored tokens; its error is that of a ratio over
            samples (delta method).
        mean_perplexity: mean over samples of exp(nats per token of the sample), as in the paper's
            table 7.
        entropy: mean over samples of the entropy of a sample's tokens, nats.
        pooled_entropy: entropy of the tokens of all samples together, nats.
        distinct: n -> different n-grams over all n-grams, of all samples together.
        repetition: n -> mean over samples of the share of n-grams that occurred before.
        longest_repeat: mean over samples of the length of the longest span that occurs twice, over
            the sample's length.
        self_bleu: mean BLEU-4 of a sample with the others as references.
    """

    num_samples: int
    num_empty: int
    num_tokens: int
    nats_per_token: Measured | None
    mean_perplexity: Measured | None
    entropy: Measured | None
    pooled_entropy: float | None
    distinct: dict[int, float | None]
    repetition: dict[int, Measured | None]
    longest_repeat: Measured | None
    self_bleu: float | None

    @property
    def perplexity(self) -> float | None:
        """exp(nats_per_token): the perplexity of all scored tokens together."""
        return None if self.nats_per_token is None else perplexity_of(self.nats_per_token.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `perplexity`; None from a single sample."""
        nats = self.nats_per_token
        if nats is None or nats.stderr is None:
            return None
        reach = Z95 * nats.stderr
        return perplexity_of(nats.value - reach), perplexity_of(nats.value + reach)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"perplexity": self.perplexity, "interval": self.interval}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of samples, in tokens of the model, without BOS and the EOS that ends them."""

    median: float
    mean: Measured
    maximum: int
    ended: float | None  # share of the samples that a sampled EOS ended, if known
    edges: list[int]
    counts: list[int]  # a histogram; bin i holds edges[i] <= length < edges[i + 1]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of drawing the samples."""

    nfe: Measured  # mean over samples of the network passes that a sample took part in
    tokens_per_forward: float  # new tokens over passes, EOS included
    tokens_per_second: float | None  # new tokens over the time of all batches, if known


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The origin of samples.

    Attributes:
        label: name of the result in tables and pictures.
        model: directory or id; None if only samples were given.
        sampling: how the samples were drawn, as plain values; None if they were given.
        guard: minimum entropy and window of the guard; None without one.
        seed: of the random choices of metrics: samples for self-BLEU, clusters of MAUVE.
    """

    label: str
    model: str | None = None
    sampling: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    reference_source: str | None = None
    warnings: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerationResult(Conditions):
    """Generated text under a scorer.

    Attributes:
        judge: the scorer.
        drawn, rejected: samples drawn, and how many of them the guard rejected.
        reference: the same numbers of real text, if given.
        mauve: None unless asked for.
        per_sample: nats, scored tokens, entropy and length of every sample.
    """

    judge: ScorerFacts
    drawn: int
    rejected: int
    text: TextNumbers
    reference: TextNumbers | None
    mauve: float | None
    lengths: Lengths | None
    cost: Cost | None
    per_sample: list[dict[str, Any]]
    device: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the versions that they were measured with."""
        return {
            "format": FORMAT,
            **asdict(self),
            "text": self.text.to_dict(),
            "reference": None if self.reference is None else self.reference.to_dict(),
            "versions": versions(),
        }


def evaluate_samples(
    drawn: Drawn,
    scorer: Scorer,
    conditions: Conditions,
    *,
    context: int | None = None,
    stride: int | None = None,
    reference: Sequence[Sample] | None = None,
    mauve: bool = False,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> GenerationResult:
    """Compute all numbers of `drawn`, and those of `reference`.

    Args:
        drawn: the samples; at least one must have a token.
        context, stride: of the scorer's windows, see `perplexity.window_sizes`.
        reference: real texts, about as many and as long.
        mauve: whether to compute MAUVE against the reference, from the scorer's hidden states.
        progress: called with (stage, done, total).
        journal: file that keeps finished passes of the scorer; the caller removes it.

    Raises:
        UserError: nothing to score; MAUVE without its package, a reference or hidden states.
    """
    begin = time.perf_counter()
    if mauve:
        require_mauve()
        if reference is None:
            raise UserError("MAUVE compares with real text; give --reference, or leave it out")
    used, step = window_sizes(scorer, context, stride)
    samples, count = drawn.samples, len(drawn.samples)
    tokens = [scorer.read(sample.documents) for sample in [*samples, *(reference or ())]]
    if not any(any(found.scored) for found in tokens[:count]):
        raise UserError(
            f"there is nothing to score: all {count} samples are empty or a single token; draw "
            "longer ones, or others"
        )
    nats = score_texts(
        scorer,
        tokens,
        context=used,
        stride=step,
        progress=None if progress is None else partial(progress, "scorer"),
        journal=journal,
    )
    score = None
    if mauve:
        features = [
            scorer_features(scorer, [found for found in part if any(found.scored)], used)
            for part in (tokens[count:], tokens[:count])
        ]
        score = mauve_score(features[0], features[1], conditions.seed)
    real = None
    if reference is not None:
        real = text_numbers(tokens[count:], nats[count:], conditions.seed)
    return GenerationResult(
        **vars(conditions),
        judge=scorer_facts(scorer, used, step),
        drawn=drawn.drawn,
        rejected=drawn.rejected,
        text=text_numbers(tokens[:count], nats[:count], conditions.seed),
        reference=real,
        mauve=score,
        lengths=_lengths(samples),
        cost=_cost(samples),
        per_sample=[
            {
                "nats": value,
                "tokens": sum(found.scored),
                "entropy": token_entropy(found.text) if found.text else None,
                "length": sample.length,
                "nfe": sample.nfe,
            }
            for sample, found, value in zip(samples, tokens, nats, strict=False)
        ],
        device=str(scorer.model.device),
        seconds=time.perf_counter() - begin,
    )


def text_numbers(
    tokens: Sequence[ScorerTokens], nats: Sequence[float], seed: int = 0
) -> TextNumbers:
    """Compute the numbers of some texts from their tokens and the scorer's nats of each."""
    scored = [pair for pair in zip(tokens, nats, strict=True) if any(pair[0].scored)]
    counts = [sum(found.scored) for found, _ in scored]
    values = [value for _, value in scored]
    ids = [found.text for found, _ in scored]
    return TextNumbers(
        num_samples=len(tokens),
        num_empty=len(tokens) - len(scored),
        num_tokens=sum(counts),
        nats_per_token=ratio_of(values, counts),
        mean_perplexity=_mean([perplexity_of(v / n) for v, n in zip(values, counts, strict=True)]),
        entropy=_mean([token_entropy(text) for text in ids]),
        pooled_entropy=pooled_entropy(ids) if ids else None,
        distinct={n: distinct(ids, n) for n in DISTINCT},
        repetition={n: _mean([repetition(text, n) for text in ids]) for n in REPETITION},
        longest_repeat=_mean([longest_repeat(text) / len(text) for text in ids]),
        self_bleu=self_bleu(ids, seed=seed),
    )


def _mean(values: Sequence[float | None]) -> Measured | None:
    known = [value for value in values if value is not None]
    return mean_of(known) if known else None


def _lengths(samples: Sequence[Sample]) -> Lengths | None:
    lengths = [sample.length for sample in samples if sample.length is not None]
    if not lengths:
        return None
    ended = [sample.ended for sample in samples if sample.ended is not None]
    edges, counts = histogram(lengths)
    return Lengths(
        median=statistics.median(lengths),
        mean=mean_of(lengths),
        maximum=max(lengths),
        ended=sum(ended) / len(ended) if ended else None,
        edges=edges,
        counts=counts,
    )


def _cost(samples: Sequence[Sample]) -> Cost | None:
    known = [s for s in samples if s.nfe is not None and s.length is not None]
    nfe = [float(s.nfe or 0) for s in known]
    if not any(nfe):
        return None
    tokens = sum((s.length or 0) + bool(s.ended) for s in known)
    seconds = math.fsum(s.seconds or 0.0 for s in known)
    return Cost(
        nfe=mean_of(nfe),
        tokens_per_forward=tokens / sum(nfe),
        tokens_per_second=tokens / seconds if seconds else None,
    )
