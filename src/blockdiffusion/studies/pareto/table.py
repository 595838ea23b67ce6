"""Points as tables: Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockdiffusion.escape import csv_table, markdown, markdown_table
from blockdiffusion.evaluate.generation.table import conventions, number, with_error

AUTHORS_MARK = "the authors' setting"


def markdown_text(result: Mapping[str, Any]) -> str:
    """The table for a page, the cheapest points last, with the conventions under it."""
    sign = "bound on " if result["judge"]["is_bound"] else ""
    head = [
        "point", "calls per token", "ms per token", f"{sign}gen. perplexity (95 %)", "entropy",
        "model's bound, nats per token", "dominated by",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for point in result["points"]:
        seconds = point["seconds_per_token"]
        lines.append([
            point["label"] + (f" ({AUTHORS_MARK})" if point["is_authors"] else ""),
            number(point["calls_per_token"]),
            number(None if seconds is None else 1000 * seconds),
            *_quality(point["text"]),
            with_error(point["bound"]),
            str(len(point["dominated_by"])) if point["dominated_by"] else "",
        ])  # fmt: skip
    if result["reference"] is not None:
        real = f"real text ({result['reference_source']})"
        lines.append([real, "", "", *_quality(result["reference"]), "", ""])
    sampling = result["sampling"]
    remarks = [
        conventions(result),
        f"{sampling['num_samples']} samples of at most {sampling['max_new_tokens']} tokens, "
        f"{sampling['batch_size']} at a time, {filters(sampling)} unless a point says otherwise",
        "dominated: so many points cost no more calls and are no worse in perplexity and entropy",
        *result["warnings"],
    ]
    return "\n".join([*markdown_table(lines), "", *(f"* {markdown(r)}" for r in remarks), ""])


def filters(sampling: Mapping[str, Any]) -> str:
    """What all points share, in words."""
    words = [f"top-p {sampling['top_p']:g} ({sampling['top_p_rule']})"]
    if sampling["top_k"] is not None:
        words.append(f"top-k {sampling['top_k']}")
    if sampling["temperature"] != 1:
        words.append(f"temperature {sampling['temperature']:g}")
    return ", ".join(words)


def _quality(text: Mapping[str, Any]) -> list[str]:
    low, high = text["interval"] or (None, None)
    spread = "" if low is None else f" ({number(low)} .. {number(high)})"
    return [f"{number(text['perplexity'])}{spread}", with_error(text["entropy"])]


def csv_text(result: Mapping[str, Any]) -> str:
    """A line for every point."""
    rows = []
    for point in result["points"]:
        text, bound = point["text"], point["bound"] or {}
        low, high = text["interval"] or (None, None)
        rows.append({
            "point": point["label"],
            "policy": point["policy"],
            "is_authors": int(point["is_authors"]),
            "calls_per_token": point["calls_per_token"],
            "seconds_per_token": point["seconds_per_token"],
            "perplexity": text["perplexity"],
            "perplexity_low": low,
            "perplexity_high": high,
            "entropy": text["entropy"]["value"],
            "entropy_stderr": text["entropy"]["stderr"],
            "bound": bound.get("value"),
            "bound_stderr": bound.get("stderr"),
            "dominated_by": "; ".join(point["dominated_by"]),
        })  # fmt: skip
    return csv_table(rows)
