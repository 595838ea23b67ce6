"""`blockdiff generate-eval` from its options to its result: loads, checks, draws, scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.evaluate.generation.independence import check_scorer
from blockdiffusion.evaluate.generation.mauve_score import require_mauve
from blockdiffusion.evaluate.generation.options import GenerateEval
from blockdiffusion.evaluate.generation.perplexity import window_sizes
from blockdiffusion.evaluate.generation.reference import reference_samples
from blockdiffusion.evaluate.generation.result import (
    Conditions,
    GenerationResult,
    Progress,
    evaluate_samples,
)
from blockdiffusion.evaluate.generation.samples import (
    Drawn,
    EntropyGuard,
    Sample,
    draw_samples,
    read_samples,
)
from blockdiffusion.evaluate.journal import journal_beside
from blockdiffusion.evaluate.scorer import Scorer, load_scorer
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup


def generate_and_score(
    options: GenerateEval,
    *,
    load_model: Callable[[str], Any],
    device: torch.device | str | None = None,
    beside: Path | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE,
) -> GenerationResult | None:
    """Draw the samples (or read them) and evaluate them.

    Args:
        load_model: loads the model under test by its name.
        device: of the scorer.
        beside: path of the result to be written. Finished samples are kept beside it in
            `NAME.samples.jsonl`, and finished passes of the scorer in `NAME.journal`, from which
            the same call resumes after a kill; the caller removes the journal. None keeps nothing.
        processes: those that make this call together and share the drawing; the first one scores.

    Returns:
        The result; None in all processes but the first.

    Raises:
        UserError: options that do not fit, as far as possible before samples are drawn.
    """
    if options.mauve:
        require_mauve()
    model = None if options.model is None else load_model(options.model)
    if not processes.is_first:
        if options.samples_from is None:
            _samples(options, model, beside, None, processes)
        return None
    scorer = load_scorer(options.scorer, device=device)
    window_sizes(scorer, options.context, options.stride)
    warnings = check_scorer(options.model, model, scorer)
    drawn = _samples(options, model, beside, progress, processes)
    guard = None
    if options.min_entropy is not None:
        guard = {"min_entropy": options.min_entropy, "window": options.entropy_window}
    conditions = Conditions(
        label=options.label or options.model or str(options.samples_from),
        model=options.model,
        sampling=asdict(options.draw) if options.samples_from is None else None,
        guard=guard,
        reference_source=", ".join(options.reference) or None,
        warnings=tuple(warnings),
        seed=options.draw.seed,
    )
    return evaluate_samples(
        drawn,
        scorer,
        conditions,
        context=options.context,
        stride=options.stride,
        reference=_reference(options, drawn, model, scorer) if options.reference else None,
        mauve=options.mauve,
        progress=progress,
        journal=journal_beside(beside),
    )


def _samples(
    options: GenerateEval,
    model: Any,
    beside: Path | None,
    progress: Progress | None,
    processes: ProcessGroup,
) -> Drawn:
    guard = None
    if options.min_entropy is not None:
        step = 1 if model is None else model.config.block_size
        window = options.entropy_window
        guard = EntropyGuard(min_entropy=options.min_entropy, window=window, step=step)
    if options.samples_from is not None:
        samples = read_samples(options.samples_from)
        accepted = [sample for sample in samples if guard is None or guard.accepts(sample)]
        return Drawn(accepted, len(samples), len(samples) - len(accepted))
    return draw_samples(
        model,
        options.draw,
        file=beside and samples_file(beside),
        guard=guard,
        progress=None if progress is None else partial(progress, "sample"),
        processes=processes,
    )


def samples_file(result: Path) -> Path:
    """Return the file that keeps the samples of a result: a.json -> a.samples.jsonl."""
    return result.with_name(f"{result.stem}.samples.jsonl")


def _reference(options: GenerateEval, drawn: Drawn, model: Any, scorer: Scorer) -> list[Sample]:
    """Return as many pieces of real text as samples, as long as samples may be."""
    most = options.draw.max_new_tokens
    lengths = [s.length for s in drawn.samples if s.length is not None]
    if options.samples_from is not None and lengths:
        most = max(lengths)
    tokenizer = scorer.tokenizer if model is None or model.tokenizer is None else model.tokenizer
    return reference_samples(
        options.reference, len(drawn.samples), max(most, 1), tokenizer, options.split
    )
