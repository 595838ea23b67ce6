"""Results of `blockdiff generate-eval` as a table, and read from its JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.result import FORMAT, GenerationResult
from blockdiffusion.files.records import Damaged, build, not_negative, of_file, read_json
from blockdiffusion.reports.tables import Column, Table, found

Result = Mapping[str, Any]  # from `GenerationResult.to_dict`
KINDS = ("samples", "real text")


def read_result(path: Path) -> Result:
    """Read a result that `blockdiff generate-eval --json` wrote.

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
    """Refuse results of different scorers; return notes on what else makes numbers differ.

    Raises:
        UserError: two scorers, or one with other windows.
    """
    for result, name in zip(results, names, strict=True):
        for key in ("fingerprint", "context", "stride"):
            if result["judge"][key] != results[0]["judge"][key]:
                what = "another scorer" if key == "fingerprint" else f"another {key} of the scorer"
                raise UserError(
                    f"{name} was scored with {what} than {names[0]}, so their perplexities do not "
                    "compare; score both in the same way"
                )
    notes = []
    if len({result["text"]["num_samples"] for result in results}) > 1:
        notes.append("distinct-n, pooled entropy and self-BLEU depend on the number of samples")
    if len({round(found(result, "lengths.median") or 0) for result in results}) > 1:
        notes.append("perplexity and entropy depend on the length of the samples")
    return notes


def csv_text(results: Sequence[Result]) -> str:
    """Return a line for every result, and one for its real text."""
    return _table(results).csv()


def markdown_text(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """Return the table for a page, with conventions and warnings below it."""
    warnings = dict.fromkeys(warning for result in results for warning in result["warnings"])
    return _table(results, [conventions(results[0]), *notes, *warnings]).markdown()


def generation_lines(result: Result) -> list[str]:
    """Return the numbers of generated text beside those of real text, and the conventions."""
    real = [real_label(result)] if result["reference"] else []
    warnings = [f"warning: {warning}" for warning in result["warnings"]]
    table = _table([result], [conventions(result), *real, *warnings])
    rows = [row | {"label": kind} for row, kind in zip(table.rows, KINDS, strict=False)]
    return Table(_columns(""), rows, result["label"], table.notes).facts()


def real_label(result: Result) -> str:
    """Return the name of a result's reference."""
    return f"{KINDS[1]} ({result['reference_source']})"


def conventions(result: Result) -> str:
    """Describe the scorer and its windows in one line."""
    judge = result["judge"]
    before = judge["first_token"]
    first = f"first token scored after {before}" if before else "first token not scored"
    bound = ", upper bounds" if judge["is_bound"] else ""
    return (
        f"scorer {judge['name']} ({judge['kind']}, {judge['parameters']:,} parameters{bound}): "
        f"context {judge['context']}, stride {judge['stride']}, {first}"
    )


def perplexity(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the perplexity of a row's text with its interval."""
    low, high = row["text"]["interval"] or (None, None)
    return {"value": row["text"]["perplexity"], "low": low, "high": high}


def _table(results: Sequence[Result], notes: Sequence[str] = ()) -> Table:
    rows: list[Mapping[str, Any]] = []
    for result in results:
        rows.append(dict(result))
        if result["reference"] is not None:
            real = {"label": real_label(result), "judge": result["judge"]}
            real["text"] = result["reference"]
            if real not in rows:  # the same text beside every result
                rows.append(real)
    return Table(_columns("bound on " * results[0]["judge"]["is_bound"]), rows, notes=notes)


def _columns(bound: str) -> list[Column]:
    is_bound = "judge.is_bound"
    return [
        Column("text", "label", name="label"),
        Column("", "model", name="model"),
        Column("", "judge.name", name="judge"),
        Column("", is_bound, name="is_bound"),
        Column("", "text.num_samples", name="num_samples"),
        Column("", "text.num_empty", name="num_empty"),
        Column("", "text.num_tokens", name="num_tokens"),
        Column("", "text.nats_per_token", name="nats_per_token"),
        Column(f"{bound}gen. perplexity (95%)", perplexity, name="perplexity", bound=is_bound),
        Column(
            f"{bound}mean perplexity", "text.mean_perplexity", name="mean_perplexity",
            bound=is_bound,
        ),
        Column("entropy (nats)", "text.entropy", name="entropy"),
        Column("pooled entropy", "text.pooled_entropy", name="pooled_entropy"),
        Column("distinct-1 .. 4", "text.distinct", name="distinct"),
        Column("rep-2 .. 4", "text.repetition", name="rep"),
        Column("longest repeat", "text.longest_repeat", name="longest_repeat"),
        Column("self-BLEU", "text.self_bleu", name="self_bleu"),
        Column("MAUVE", "mauve", name="mauve"),
        Column("length, median", "lengths.median", name="length_median"),
        Column("", "lengths.mean", name="length_mean"),
        Column("longest", "lengths.maximum", name="length_max"),
        Column("ended by EOS", "lengths.ended", ".0%", name="ended"),
        Column("NFE a sample", "cost.nfe", name="nfe"),
        Column("tokens per forward", "cost.tokens_per_forward", name="tokens_per_forward"),
        Column("tokens/s", "cost.tokens_per_second", name="tokens_per_second"),
        Column("texts (empty), tokens", _counts),
        Column("", "drawn", name="drawn"),
        Column("rejected", "rejected", name="rejected"),
        Column("", lambda row: "; ".join(row.get("warnings", ())) or None, name="warnings"),
    ]  # fmt: skip


def _counts(row: Mapping[str, Any]) -> str:
    text = row["text"]
    return f"{text['num_samples']:,} ({text['num_empty']}), {text['num_tokens']:,}"
