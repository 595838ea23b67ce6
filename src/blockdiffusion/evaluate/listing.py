"""Likelihoods and lengths of documents as lines for the terminal."""

from __future__ import annotations

import math

from blockdiffusion.errors import counted
from blockdiffusion.evaluate.compare import PARENT, Comparison
from blockdiffusion.evaluate.generation.lengths import DocumentLengths
from blockdiffusion.evaluate.likelihood import CUT, Likelihood
from blockdiffusion.reports.numbers import with_errors
from blockdiffusion.reports.tables import Column, Table, described


def likelihood_lines(result: Likelihood, what: str) -> list[str]:
    """Return a likelihood as lines, one fact each; bounds have their sign."""
    sign = "<= " if result.is_bound else ""
    facts = {
        f"{'bound on ' if sign else ''}nats/token": with_errors(
            result.nats_per_token, ".4f", noise=result.stderr_noise, data=result.stderr_data
        )
    }
    interval = ""
    if result.interval is not None:
        low, high = result.interval
        facts["95 % interval"] = f"{low:.4f} .. {high:.4f}"
        interval = f"  (95 %: {math.exp(low):.2f} .. {math.exp(high):.2f})"
    facts["perplexity"] = f"{sign}{result.perplexity:.2f}{interval}"
    if result.bits_per_byte is not None:
        facts["bits/byte"] = f"{sign}{result.bits_per_byte:.4f}"
    notes = [
        f"{counted(result.num_tokens, 'token')} in {counted(result.num_rows, 'row')} counted; "
        f"{'BOS given, not counted' if result.bos else 'no BOS given'}; {_how(result)}; "
        f"{result.seconds:.1f} s",
        *result.remarks,
    ]
    return described(what, facts | (_tighter(result) if sign else {}), notes)


def _tighter(result: Likelihood) -> dict[str, str]:
    """Return the values that are tighter than the bound."""
    facts = {}
    if (nats := result.exact_nats_per_token) is not None:
        facts["exact nats/token"] = with_errors(nats, ".4f", data=result.exact_stderr_data)
        facts["exact perplexity"] = f"{result.exact_perplexity:.2f}"
        if result.exact_bits_per_byte is not None:
            facts["exact bits/byte"] = f"{result.exact_bits_per_byte:.4f}"
    if (nats := result.orders_nats_per_token) is not None:
        name = f"{max(result.order_bounds or {})}-order bound"
        facts[name] = with_errors(nats, ".4f", noise=result.orders_stderr_noise)
        facts["its perplexity"] = f"<= {result.orders_perplexity:.2f}"
    return facts


def _how(result: Likelihood) -> str:
    if result.estimator == "exact":
        if result.block_size == 1:
            return "exact in one pass"
        return "all mask sets of every block enumerated"
    cut = "" if result.t_min is None else f", {CUT.format(result.t_min)}"
    return f"{result.estimator}: {result.samples} draws, {result.copies} noisy copies a row{cut}"


def length_lines(result: DocumentLengths, what: str) -> list[str]:
    """Return the lengths of documents as lines, with their histogram."""
    bins = result.histogram()
    most = max(documents for _, _, documents in bins)
    facts = {
        "tokens until EOS": f"median {result.median:,.6g}, max {result.maximum:,}, "
        f"mean {result.mean:,.1f}",
        "measured": f"{counted(len(result.lengths), 'document')}, "
        f"{100 * result.share_cut:.1f} % cut at {counted(result.max_new_tokens, 'token')}",
        "cost": f"{result.tokens_per_forward:.2f} tokens per pass; {result.seconds:.1f} s",
    }
    for low, high, documents in bins:
        bar = "█" * math.ceil(50 * documents / most)
        facts[f"{f'{low:,} to {high - 1:,}':>20}"] = f"{bar} {documents:,}"
    return described(what, facts)


def comparison_table(found: Comparison) -> Table:
    """Return a comparison as a table: nats per token, perplexity, and what the parent lost."""
    columns = [
        Column("reading", "name", name="name"),
        Column("nats/token", "nats_per_token", bound="is_bound"),
        Column("perplexity", "perplexity", ".2f", bound="is_bound"),
        Column("lost", lambda row: None if row["name"] == PARENT else row["lost"]),
    ]
    rows = found.to_dict()["readings"]
    text = f"{counted(found.num_tokens, 'token')} in {counted(found.num_rows, 'row')}"
    note = (
        "context, for both: a window's first token, or a conversation up to its response; errors "
        "over rows, of differences in pairs"
    )
    return Table(columns, rows, title=text, notes=[note])
