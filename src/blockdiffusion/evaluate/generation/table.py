"""Results of `blockdiff generate-eval` as tables: JSON files in, CSV and Markdown out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError
from blockdiffusion.escape import csv_table, markdown, markdown_table
from blockdiffusion.evaluate.generation.result import DISTINCT, FORMAT, REPETITION, GenerationResult
from blockdiffusion.files.records import Damaged, build, not_negative, of_file, read_json

Result = Mapping[str, Any]  # what `GenerationResult.to_dict` gives


def read_result(path: Path) -> Result:
    """A result that `blockdiff generate-eval --json` wrote.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    instead = "give what `blockdiff generate-eval --json` wrote"
    values = read_json(path, instead, finite=False)
    with of_file(path, instead):
        if values.get("format") != FORMAT:
            raise Damaged("it is not what `blockdiff generate-eval --json` writes")
        result = build(GenerationResult, values, strict=False)
        for name in ("nats_per_token", "mean_perplexity", "entropy"):
            if getattr(result.text, name) is None:  # there is nothing to compare
                raise Damaged(f"text.{name} is null")
        return not_negative(result.to_dict())


def check_comparable(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """Refuses results of different judges; returns what else makes numbers differ.

    Raises:
        UserError: two judges, or one judge with other windows.
    """
    keys = ("fingerprint", "context", "stride")
    for result, name in zip(results, names, strict=True):
        for key in keys:
            if result["judge"][key] != results[0]["judge"][key]:
                what = "another judge" if key == "fingerprint" else f"another {key} of the judge"
                raise UserError(
                    f"{name} was judged with {what} than {names[0]}, so their perplexities do not "
                    "compare; judge both samples in the same way"
                )
    notes = []
    if len({result["text"]["num_samples"] for result in results}) > 1:
        notes.append("distinct-n, pooled entropy and self-BLEU depend on the number of samples")
    if len({round(_value(result["lengths"], "median") or 0) for result in results}) > 1:
        notes.append("perplexity and entropy depend on the length of the samples")
    return notes


def columns(result: Result) -> dict[str, Any]:
    """One row of the CSV: a flat value for every name; None where not known."""
    text, lengths, cost = result["text"], result["lengths"], result["cost"]
    return {
        "label": result["label"],
        "model": result["model"],
        "judge": result["judge"]["name"],
        **_text_columns(text, result["judge"]["is_bound"]),
        "mauve": result["mauve"],
        "length_median": _value(lengths, "median"),
        "length_mean": _measured(lengths, "mean"),
        "length_max": _value(lengths, "maximum"),
        "ended": _value(lengths, "ended"),
        "nfe": _measured(cost, "nfe"),
        "tokens_per_forward": _value(cost, "tokens_per_forward"),
        "tokens_per_second": _value(cost, "tokens_per_second"),
        "drawn": result["drawn"],
        "rejected": result["rejected"],
        "warnings": "; ".join(result["warnings"]) or None,
    }


def _text_columns(text: Mapping[str, Any], is_bound: bool) -> dict[str, Any]:
    low, high = text["interval"] or (None, None)
    values = {
        "is_bound": is_bound,
        "num_samples": text["num_samples"],
        "num_empty": text["num_empty"],
        "num_tokens": text["num_tokens"],
        "nats_per_token": _measured(text, "nats_per_token"),
        "nats_per_token_stderr": _error(text, "nats_per_token"),
        "perplexity": text["perplexity"],
        "perplexity_low": low,
        "perplexity_high": high,
        "mean_perplexity": _measured(text, "mean_perplexity"),
        "mean_perplexity_stderr": _error(text, "mean_perplexity"),
        "entropy": _measured(text, "entropy"),
        "entropy_stderr": _error(text, "entropy"),
        "pooled_entropy": text["pooled_entropy"],
    }
    for n in DISTINCT:
        values[f"distinct_{n}"] = _by_n(text["distinct"], n)
    for n in REPETITION:
        values[f"rep_{n}"] = _value(_by_n(text["repetition"], n), "value")
        values[f"rep_{n}_stderr"] = _value(_by_n(text["repetition"], n), "stderr")
    values["longest_repeat"] = _measured(text, "longest_repeat")
    values["longest_repeat_stderr"] = _error(text, "longest_repeat")
    return values | {"self_bleu": text["self_bleu"]}


def csv_text(results: Sequence[Result]) -> str:
    """A line for every result, and one for the real text beside each that has some."""
    rows = []
    for result in results:
        rows.append(columns(result))
        if result["reference"] is not None:
            real = _text_columns(result["reference"], result["judge"]["is_bound"])
            rows.append({"label": real_label(result), "judge": result["judge"]["name"]} | real)
    return csv_table(rows)


def real_label(result: Result) -> str:
    """What the reference of a result is called."""
    return f"real text ({result['reference_source']})"


def markdown_text(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """The table for a page, with the conventions and warnings under it."""
    judge = results[0]["judge"]
    sign = "bound on " if judge["is_bound"] else ""
    head = [
        "samples of", f"{sign}gen. perplexity (95 %)", f"{sign}mean perplexity", "entropy",
        "distinct-2", "rep-4", "self-BLEU", "MAUVE", "length median / max", "NFE", "tokens/s",
        "samples", "rejected",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    seen = set()
    for result in results:
        lines.append([result["label"], *_cells(result["text"], sign), *_more_cells(result)])
        if result["reference"] is not None and real_label(result) not in seen:
            seen.add(real_label(result))  # the same text beside every result
            more = ["", "", "", "", str(result["reference"]["num_samples"]), ""]
            lines.append([real_label(result), *_cells(result["reference"], sign), *more])
    remarks = [conventions(results[0]), *notes]
    remarks += dict.fromkeys(warning for result in results for warning in result["warnings"])
    return "\n".join([*markdown_table(lines), "", *(f"* {markdown(r)}" for r in remarks), ""])


def conventions(result: Result) -> str:
    """Under which judge, and how, in one line."""
    judge = result["judge"]
    before = judge["first_token"]
    first = f"first token scored after {before}" if before else "first token not scored"
    bound = ", upper bounds" if judge["is_bound"] else ""
    return (
        f"judge {judge['name']} ({judge['kind']}, {judge['parameters']:,} parameters{bound}): "
        f"context {judge['context']}, stride {judge['stride']}, {first}"
    )


def _cells(text: Mapping[str, Any], sign: str) -> list[str]:
    upper = "≤ " if sign else ""
    interval = text["interval"]
    spread = "" if interval is None else f" ({number(interval[0])} .. {number(interval[1])})"
    return [
        "" if text["perplexity"] is None else f"{upper}{number(text['perplexity'])}{spread}",
        upper + with_error(text["mean_perplexity"]) if text["mean_perplexity"] else "",
        with_error(text["entropy"]),
        number(_by_n(text["distinct"], 2)),
        with_error(_by_n(text["repetition"], 4)),
        number(text["self_bleu"]),
    ]


def _more_cells(result: Result) -> list[str]:
    lengths, cost = result["lengths"], result["cost"]
    return [
        number(result["mauve"]),
        "" if lengths is None else f"{number(lengths['median'])} / {lengths['maximum']:,}",
        number(_measured(cost, "nfe")),
        number(_value(cost, "tokens_per_second")),
        str(result["text"]["num_samples"]),
        str(result["rejected"]),
    ]


def number(value: float | None) -> str:
    """Four significant digits; whole numbers whole; an empty text where not known."""
    if value is None:
        return ""
    if abs(value) >= 1e7 or not math.isfinite(value):
        return f"{value:.3g}".replace("e+", "e")
    if value == int(value):
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def with_error(found: Mapping[str, Any] | None) -> str:
    """12.3 ± 0.4, the value to as many places as two digits of its error."""
    if found is None:
        return ""
    error = found["stderr"]
    if not error or not math.isfinite(error):
        return number(found["value"])
    if abs(found["value"]) >= 1e7:
        return f"{number(found['value'])} ± {number(error)}"
    places = max(1 - math.floor(math.log10(error)), 0)
    return f"{found['value']:,.{places}f} ± {error:,.{places}f}"


def _by_n(values: Mapping[Any, Any], n: int) -> Any:
    """JSON makes texts of the numbers that are keys."""
    return values[n] if n in values else values[str(n)]


def _value(part: Mapping[str, Any] | None, name: str) -> Any:
    return None if part is None else part[name]


def _measured(part: Mapping[str, Any] | None, name: str) -> float | None:
    return _value(_value(part, name), "value")


def _error(part: Mapping[str, Any] | None, name: str) -> float | None:
    return _value(_value(part, name), "stderr")
