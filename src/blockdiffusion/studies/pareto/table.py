"""Points as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockdiffusion.evaluate.generation.table import conventions, perplexity, real_label
from blockdiffusion.reports.tables import Column, Table

AUTHORS_MARK = "the authors' setting"


def markdown_text(result: Mapping[str, Any]) -> str:
    """The table for a page, the cheapest points last, with the conventions under it."""
    sampling = result["sampling"]
    rows = list(result["points"])
    if result["reference"] is not None:
        rows.append({"label": real_label(result), "text": result["reference"]})
    notes = [
        conventions(result),
        f"{sampling['num_samples']} samples of at most {sampling['max_new_tokens']} tokens, "
        f"{sampling['batch_size']} at a time, {filters(sampling)} unless a point says otherwise",
        "dominated: so many points cost no more calls and are no worse in perplexity and entropy",
        *result["warnings"],
    ]
    return Table(_columns("bound on " * result["judge"]["is_bound"]), rows, notes=notes).markdown()


def csv_text(result: Mapping[str, Any]) -> str:
    """A line for every point."""
    return Table(_columns(""), result["points"]).csv()


def filters(sampling: Mapping[str, Any]) -> str:
    """What all points share, in words."""
    words = [f"top-p {sampling['top_p']:g} ({sampling['top_p_rule']})"]
    if sampling["top_k"] is not None:
        words.append(f"top-k {sampling['top_k']}")
    if sampling["temperature"] != 1:
        words.append(f"temperature {sampling['temperature']:g}")
    return ", ".join(words)


def _columns(bound: str) -> list[Column]:
    return [
        Column("point", lambda point: _marked(point["label"], point)),
        Column("", "label", name="point"),
        Column("", "policy", name="policy"),
        Column("", lambda point: int(point["is_authors"]), name="is_authors"),
        Column("calls per token", "calls_per_token", name="calls_per_token"),
        Column("ms per token", _milliseconds),
        Column("", "seconds_per_token", name="seconds_per_token"),
        Column(f"{bound}gen. perplexity (95%)", perplexity, name="perplexity"),
        Column("entropy", "text.entropy", name="entropy"),
        Column("model's bound, nats per token", "bound", name="bound"),
        Column("dominated by", lambda point: len(point.get("dominated_by", ())) or None),
        Column("", lambda point: "; ".join(point["dominated_by"]), name="dominated_by"),
    ]


def _marked(label: str, point: Mapping[str, Any]) -> str:
    return f"{label} ({AUTHORS_MARK})" if point.get("is_authors") else label


def _milliseconds(point: Mapping[str, Any]) -> float | None:
    seconds = point.get("seconds_per_token")
    return None if seconds is None else 1000 * seconds
