"""`blockdiff pareto`: samples of every point under one scorer, what they cost, and their bound."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.independence import check_scorer
from blockdiffusion.evaluate.generation.perplexity import window_sizes
from blockdiffusion.evaluate.generation.reference import reference_samples
from blockdiffusion.evaluate.generation.result import (
    Conditions,
    Progress,
    evaluate_samples,
    scorer_facts,
)
from blockdiffusion.evaluate.generation.samples import (
    DrawOptions,
    Sample,
    draw_samples,
    identity,
)
from blockdiffusion.evaluate.journal import journal_beside, remove_journal
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.evaluate.scorer import Scorer, ScorerFacts, load_scorer
from blockdiffusion.files.disk import write_whole
from blockdiffusion.files.records import Damaged, read_json, sealed, unsealed
from blockdiffusion.sampling.sliding import has_one_block
from blockdiffusion.studies.options import Pareto
from blockdiffusion.studies.pareto.points import AUTHORS, Point, usual_points

FORMAT = "blockdiffusion-pareto-1"
BOUND_SAMPLES = 4  # complement pairs that every sample's bound may cost


def measure_pareto(
    options: Pareto,
    *,
    load_model: Callable[[str], Any],
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures every point; plain values for JSON, in the order of the points.

    The bound is the model's own, of the samples that its sampler wrote: low where they are what the
    model finds likely, which is not the same as good.

    Raises:
        UserError: a point that the model does not have, a scorer that may not scorer, or a folder
            with points that were measured in another way.
    """
    model = load_model(options.model)
    points = options.points or usual_points(model.config)
    drawn = {point: _draw(options, point) for point in points}
    if not options.points and drawn.get(Point("first-hitting")) == drawn.get(AUTHORS):
        points = tuple(point for point in points if point != AUTHORS)  # it is there already
    for point in points:
        point.check(model.config)
    scorer = load_scorer(options.scorer, device=device)
    facts = scorer_facts(scorer, *window_sizes(scorer, options.context, options.stride))
    warnings = check_scorer(options.model, model, scorer)
    (options.out / "points").mkdir(parents=True, exist_ok=True)
    measured = []
    for number, point in enumerate(points, 1):
        stage = f"{number}/{len(points)} {point.label}"
        measured.append(
            _measured(
                options,
                point,
                model,
                scorer,
                facts,
                with_reference=number == 1,
                progress=None if progress is None else _at_stage(progress, stage),
            )
        )
    authors = _draw(options, AUTHORS)
    for point, value in zip(points, measured, strict=True):
        value["is_authors"] = drawn[point] == authors
        value["dominated_by"] = [other["label"] for other in measured if dominates(other, value)]
    return {
        "format": FORMAT,
        "model": options.model,
        "judge": asdict(facts),
        "sampling": asdict(options.draw),
        "reference": measured[0].get("reference"),
        "reference_source": ", ".join(options.reference) or None,
        "warnings": warnings,
        "points": measured,
    }


def _draw(options: Pareto, point: Point) -> DrawOptions:
    """How a point is drawn: as all are, but for its sampler and what that reads."""
    return replace(options.draw, sampler=point.sampler, **dict(point.settings))


def _at_stage(progress: Progress, point: str) -> Progress:
    return lambda stage, done, total: progress(f"{point} {stage}", done, total)


def _measured(
    options: Pareto,
    point: Point,
    model: Any,
    scorer: Scorer,
    facts: ScorerFacts,
    *,
    with_reference: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """One point: read where it was measured before, or measured and written."""
    draw = _draw(options, point)
    file = options.out / "points" / f"{re.sub(r'[^a-z0-9.-]+', '-', point.label)}.json"
    reference = options.reference if with_reference else ()
    key = json.loads(json.dumps({
        "samples": identity(model, draw),
        "num_samples": draw.num_samples,
        "judge": asdict(facts),
        "reference": [*reference, options.split] if reference else None,
    }))  # fmt: skip
    if file.exists():
        values = _read(file, key)
        remove_journal(file)  # an error may have left it
        return values
    drawn = draw_samples(
        model,
        draw,
        file=file.with_suffix(".samples.jsonl"),
        progress=None if progress is None else lambda done, total: progress("sample", done, total),
    )
    real = None
    if reference:
        real = reference_samples(
            reference, len(drawn.samples), draw.max_new_tokens, model.tokenizer, options.split
        )
    scored = evaluate_samples(
        drawn,
        scorer,
        Conditions(label=point.label, model=options.model, seed=draw.seed),
        context=facts.context,
        stride=facts.stride,
        reference=real,
        progress=progress,
        journal=journal_beside(file),
    )
    cost = scored.cost
    assert cost is not None
    values = {
        "key": key,
        "label": point.label,
        "policy": point.sampler,
        "calls_per_token": 1 / cost.tokens_per_forward,
        "seconds_per_token": 1 / cost.tokens_per_second if cost.tokens_per_second else None,
        "text": scored.text.to_dict(),
        "bound": _bound(model, drawn.samples, draw),
        "reference": None if scored.reference is None else scored.reference.to_dict(),
    }
    text = json.dumps(sealed(values), indent=2) + "\n"
    write_whole(file, text.encode())
    remove_journal(file)
    return unsealed(json.loads(text))  # as it is read the next time


def _read(file: Path, key: dict[str, Any]) -> dict[str, Any]:
    with suppress(UserError, Damaged):
        values = unsealed(read_json(file, "", finite=False))
        if values.get("key") == key:
            return values
    raise UserError(
        f"{file} holds a point that was measured with another model, scorer or options; choose "
        "another --out, or remove that folder"
    )


def _bound(model: Any, samples: Sequence[Sample], draw: DrawOptions) -> dict[str, Any] | None:
    """The model's bound on its samples, nats per token; None where they are longer than the row of
    a model of one block."""
    rows = [list(sample.ids or ()) for sample in samples]
    if has_one_block(model) and max(map(len, rows)) > model.config.seq_len:
        return None
    bos = model.config.bos if draw.bos is None else draw.bos
    found = likelihood(model, rows, mc_samples=BOUND_SAMPLES, bos=bool(bos))
    return {"value": found.nats_per_token, "stderr": found.stderr_data}


def dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `one` costs no more calls than `other` and is no worse in perplexity *and* entropy,
    and is better in one of them: by the values alone, whatever their errors."""

    def ranks(point: dict[str, Any]) -> tuple[float, float, float]:
        return point["calls_per_token"], point["text"]["perplexity"], -_entropy(point["text"])

    mine, theirs = ranks(one), ranks(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _entropy(text: dict[str, Any]) -> float:
    return text["entropy"]["value"]
