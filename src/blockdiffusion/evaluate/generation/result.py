"""The evaluation of generated text: samples and a judge in, numbers with error bars out."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.judge import (
    Judge,
    JudgeFacts,
    JudgeTokens,
    judge_features,
    judge_samples,
    window_sizes,
)
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
from blockdiffusion.evaluate.generation.samples import Drawn, Sample
from blockdiffusion.evaluate.journal import fingerprint
from blockdiffusion.evaluate.likelihood import Z95
from blockdiffusion.evaluate.measured import Measured, mean_of, ratio_of
from blockdiffusion.reports.markup import perplexity_of

FORMAT = "blockdiffusion-generation-1"
DISTINCT = (1, 2, 3, 4)
REPETITION = (2, 3, 4)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TextNumbers:
    """What some texts are like, in tokens of the judge. None: nothing to compute it from.

    Attributes:
        num_samples: texts, the empty ones included.
        num_empty: texts without a token that could be scored; they are in no number below.
        num_tokens: scored tokens.
        nats_per_token: of the judge, all scored tokens pooled; its error is that of a ratio over
            samples (delta method).
        mean_perplexity: mean over samples of exp(nats per token of the sample), which is what the
            paper's table 7 holds.
        entropy: mean over samples of the entropy of a sample's tokens, nats.
        pooled_entropy: entropy of the tokens of all samples together, nats.
        distinct: n -> different n-grams over all n-grams, of all samples together.
        repetition: n -> mean over samples of the share of n-grams that were there before.
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
        """95 % interval of `perplexity`; None from a single sample."""
        nats = self.nats_per_token
        if nats is None or nats.stderr is None:
            return None
        reach = Z95 * nats.stderr
        return perplexity_of(nats.value - reach), perplexity_of(nats.value + reach)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"perplexity": self.perplexity, "interval": self.interval}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long samples are, in tokens of the model, without BOS and the EOS that ends them.

    Attributes:
        ended: share of the samples that a sampled EOS ended; None where not known.
        edges, counts: a histogram; bin i holds edges[i] <= length < edges[i + 1].
    """

    median: float
    mean: Measured
    maximum: int
    ended: float | None
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What drawing the samples cost.

    Attributes:
        nfe: mean over samples of the network passes that a sample took part in.
        tokens_per_forward: new tokens over passes, EOS included.
        tokens_per_second: new tokens over the time of all batches; None where not known.
    """

    nfe: Measured
    tokens_per_forward: float
    tokens_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """Generated text, judged.

    Attributes:
        label: what it is called in tables and pictures.
        model: directory or id; None where only samples were given.
        sampling: how the samples were drawn, plain values; None where they were given.
        guard: minimum entropy and window of the guard; None without one.
        drawn, rejected: samples drawn, and how many of them the guard rejected.
        reference: the same numbers of real text; None without.
        mauve: None unless asked for.
        per_sample: nats, scored tokens, entropy, length of every sample that counts.
    """

    label: str
    model: str | None
    judge: JudgeFacts
    sampling: dict[str, Any] | None
    guard: dict[str, Any] | None
    drawn: int
    rejected: int
    text: TextNumbers
    reference: TextNumbers | None
    reference_source: str | None
    mauve: float | None
    lengths: Lengths | None
    cost: Cost | None
    warnings: tuple[str, ...]
    per_sample: list[dict[str, Any]]
    device: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the versions that they were measured with."""
        return {
            "format": FORMAT,
            **asdict(self),
            "text": self.text.to_dict(),
            "reference": None if self.reference is None else self.reference.to_dict(),
            "versions": {
                "blockdiffusion": blockdiffusion.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a result says about where its samples come from; see `GenerationResult`."""

    label: str
    model: str | None = None
    sampling: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    reference_source: str | None = None
    warnings: tuple[str, ...] = ()
    seed: int = 0
    """Of what a metric draws: the samples for self-BLEU, the clusters of MAUVE."""


def evaluate_samples(
    drawn: Drawn,
    judge: Judge,
    conditions: Conditions,
    *,
    context: int | None = None,
    stride: int | None = None,
    reference: Sequence[Sample] | None = None,
    mauve: bool = False,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> GenerationResult:
    """All numbers of `drawn`, and those of `reference` beside them.

    Args:
        drawn: the samples; there must be one with a token at least.
        context, stride: of the judge's windows, see `judge.window_sizes`.
        reference: real texts, about as many and as long.
        mauve: whether to compute MAUVE against the reference, from the judge's hidden states.
        progress: called with (stage, done, total).
        journal: file that keeps what the judge has finished; the caller removes it.

    Raises:
        UserError: nothing to score; MAUVE without its package, a reference or hidden states.
    """
    begin = time.perf_counter()
    if mauve:
        require_mauve()
        if reference is None:
            raise UserError("MAUVE compares with real text; give --reference, or leave it out")
    used, step = window_sizes(judge, context, stride)
    texts = [sample.documents for sample in drawn.samples]
    count = len(texts)
    texts += [sample.documents for sample in reference or ()]
    tokens = [judge.read(documents) for documents in texts]
    if not any(any(found.scored) for found in tokens[:count]):
        raise UserError(
            f"there is nothing to judge: all {count} samples are empty or a single token; draw "
            "longer ones, or others"
        )
    nats = judge_samples(
        judge,
        tokens,
        context=used,
        stride=step,
        progress=None if progress is None else lambda done, total: progress("judge", done, total),
        journal=journal,
    )
    score = None
    if mauve:
        features = [
            judge_features(judge, [found for found in part if any(found.scored)], used)
            for part in (tokens[count:], tokens[:count])
        ]
        score = mauve_score(features[0], features[1], conditions.seed)
    return GenerationResult(
        label=conditions.label,
        model=conditions.model,
        judge=judge_facts(judge, used, step),
        sampling=conditions.sampling,
        guard=conditions.guard,
        drawn=drawn.drawn,
        rejected=drawn.rejected,
        text=text_numbers(tokens[:count], nats[:count], conditions.seed),
        reference=(
            None
            if reference is None
            else text_numbers(tokens[count:], nats[count:], conditions.seed)
        ),
        reference_source=conditions.reference_source,
        mauve=score,
        lengths=_lengths(drawn.samples),
        cost=_cost(drawn.samples),
        warnings=conditions.warnings,
        per_sample=_per_sample(drawn.samples, tokens[:count], nats[:count]),
        device=str(judge.model.device),
        seconds=time.perf_counter() - begin,
    )


def text_numbers(
    tokens: Sequence[JudgeTokens], nats: Sequence[float], seed: int = 0
) -> TextNumbers:
    """The numbers of some texts, from their tokens and what the judge gives to each."""
    scored = [(found, value) for found, value in zip(tokens, nats, strict=True)
              if any(found.scored)]  # fmt: skip
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


def judge_facts(judge: Judge, context: int, stride: int) -> JudgeFacts:
    """What a result says about its judge."""
    return JudgeFacts(
        name=judge.name,
        kind=judge.kind,
        parameters=sum(parameter.numel() for parameter in judge.model.parameters()),
        is_bound=judge.is_bound,
        context=context,
        stride=stride,
        first_token=judge.first_token,
        fingerprint=fingerprint(judge.model),
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
    passes = sum(s.nfe or 0 for s in known)
    if not passes:
        return None
    tokens = sum((s.length or 0) + bool(s.ended) for s in known)
    seconds = math.fsum(s.seconds or 0.0 for s in known)
    return Cost(
        nfe=mean_of([float(s.nfe or 0) for s in known]),
        tokens_per_forward=tokens / passes,
        tokens_per_second=tokens / seconds if seconds else None,
    )


def _per_sample(
    samples: Sequence[Sample], tokens: Sequence[JudgeTokens], nats: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        {
            "nats": value,
            "tokens": sum(found.scored),
            "entropy": token_entropy(found.text) if found.text else None,
            "length": sample.length,
            "nfe": sample.nfe,
        }
        for sample, found, value in zip(samples, tokens, nats, strict=True)
    ]
