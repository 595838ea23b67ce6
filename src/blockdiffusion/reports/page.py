"""One self-contained HTML page about one training run: numbers, curves, mask, trace, samples.

`write_report(path, contents)` needs nothing but the values in `ReportContents`; whatever is missing
there becomes a sentence that says so. The page uses no network, no external font or script, and
every part of it can be read without JavaScript (which adds values under the pointer, and replay).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockdiffusion.escape import html as escape
from blockdiffusion.files.disk import storage_error, written_aside
from blockdiffusion.files.records import build, not_negative
from blockdiffusion.reports import pictures
from blockdiffusion.reports.curves import (
    ClipSearch,
    Curves,
    ValidationPoint,
    curves_section,
    read_metrics,
    search_section,
)
from blockdiffusion.reports.markup import (
    count,
    duration,
    missing,
    perplexity_of,
    two_digits,
)
from blockdiffusion.reports.trace import Trace, TraceStep, trace_section

if TYPE_CHECKING:
    from blockdiffusion.models.masks import CleanAttention

__all__ = [
    "ClipSearch",
    "Command",
    "Curves",
    "LikelihoodNumbers",
    "ReportContents",
    "RunFacts",
    "Sample",
    "Trace",
    "TraceStep",
    "ValidationPoint",
    "read_metrics",
    "render_report",
    "write_report",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodNumbers:
    """A held-out likelihood, in the names of `evaluate.likelihood.Likelihood` (see there).

    `nats_per_token` is a bound unless `is_bound` is False; its standard errors are None where they
    were not estimated. `text` names what was measured, in words that fit after "N tokens of".
    """

    nats_per_token: float
    num_tokens: int
    bos: bool
    is_bound: bool = True
    exact_nats_per_token: float | None = None
    bits_per_byte: float | None = None
    exact_bits_per_byte: float | None = None
    stderr_noise: float | None = None
    stderr_data: float | None = None
    exact_stderr_data: float | None = None
    orders_nats_per_token: float | None = None
    orders_stderr_noise: float | None = None
    interval: tuple[float, float] | None = None
    estimator: str = ""
    t_min: float | None = None
    seconds: float | None = None
    text: str = "held-out text"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], text: str = "held-out text") -> LikelihoodNumbers:
        """From `Likelihood.to_dict()`, or from what `blockdiff eval --json` wrote."""
        numbers = build(cls, {**values, "text": text}, strict=False)
        not_negative(asdict(numbers))
        return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What was trained, on what, how fast. None or empty means unknown and is left out."""

    block_size: int
    seq_len: int
    vocab_size: int | None = None
    parameters: int | None = None
    clean_attention: CleanAttention = "block"
    autoregressive: bool = False
    diffusion: str = "masked diffusion"
    steps: int | None = None
    batch_size: int | None = None
    training_seconds: float | None = None
    tokens_per_second: float | None = None
    data: str = ""
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    finished_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A generated text and how it was drawn. `prompt` is the part of the text that was given."""

    text: str
    prompt: str = ""
    seed: int | None = None
    policy: str = ""
    nfe: int | None = None
    tokens_per_forward: float | None = None
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A shell command and, in a few words, what it does."""

    purpose: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContents:
    """All that a report shows. `summary` is one plain sentence saying what this run is."""

    name: str
    facts: RunFacts
    summary: str = ""
    likelihood: LikelihoodNumbers | None = None
    curves: Curves = field(default_factory=Curves)
    trace: Trace | None = None
    samples: Sequence[Sample] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[Command] = ()


def write_report(path: str | os.PathLike[str], contents: ReportContents) -> None:
    """Write the page under `path`, aside and renamed: it is there whole or not at all.

    Raises UserError where the file cannot be written.
    """
    target = Path(path)
    page = render_report(contents)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(target) as file:
            # A token may hold half a character; it must not cost the report.
            file.write(page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise storage_error(error, target.parent) from error


def render_report(contents: ReportContents) -> str:
    """The page as a string."""
    sections = [
        ("curves", "Learning", curves_section(contents.curves)),
        *_search(contents),
        *_denoising(contents),
        ("samples", "Samples", _samples_section(contents.samples, contents.curves.samples)),
        ("mask", "Attention mask", _mask_section(contents.facts)),
        ("run", "The run", _run_section(contents.facts)),
        ("configuration", "Configuration", _config_section(contents.config)),
        ("commands", "Commands", _commands_section(contents.commands)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>{html}</section>' for name, title, html in sections
    )
    title = escape(contents.name)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{title} · blockdiffusion</title><style>{_asset('page.css')}</style></head>"
        f'<body><header><p class="kicker">blockdiffusion · training report</p><h1>{title}</h1>'
        f'<p class="summary">{escape(contents.summary) or _summary(contents.facts)}</p>'
        f"{_likelihood_cards(contents.likelihood)}{_key_facts(contents.facts)}</header>"
        f"<nav>{links}</nav><main>{body}</main>"
        f'<div id="tip" role="status" hidden></div><script>{_asset("page.js")}</script>'
        "</body></html>\n"
    )


def _denoising(contents: ReportContents) -> list[tuple[str, str, str]]:
    """The section about how a sample came to be, where that is not from left to right."""
    if contents.facts.autoregressive:
        return []
    return [("trace", "Denoising", trace_section(contents.trace, contents.facts.block_size))]


def _search(contents: ReportContents) -> list[tuple[str, str, str]]:
    """The section about the search of the schedule, in a run that made one."""
    if not contents.curves.searches:
        return []
    by = (contents.config.get("search") or {}).get("by", "loss")
    return [("search", "Schedule search", search_section(contents.curves.searches, by))]


def _asset(name: str) -> str:
    return files("blockdiffusion.reports").joinpath(name).read_text(encoding="utf-8")


# --- the header


def _summary(facts: RunFacts) -> str:
    where = f" trained on {escape(facts.data)}" if facts.data else ""
    if facts.autoregressive:
        return f"An autoregressive language model{where}: each token from all those before it."
    return (
        f"A block diffusion language model{where}: autoregressive over blocks of "
        f"{facts.block_size} token{'s' * (facts.block_size > 1)}, {facts.diffusion} inside a block."
    )


def _likelihood_cards(likelihood: LikelihoodNumbers | None) -> str:
    if likelihood is None:
        return missing("This run has no held-out likelihood yet: no evaluation was given.")
    nats, exact_nats = likelihood.nats_per_token, likelihood.exact_nats_per_token
    errors = (likelihood.stderr_noise, likelihood.stderr_data)
    perplexity = perplexity_of(nats)
    scaled = [None if error is None else perplexity * error for error in errors]
    if likelihood.is_bound:
        cards = [_card("Perplexity, bound", "≤ ", perplexity, scaled, 2, css="main")]
    else:
        cards = [_card("Perplexity, exact", "", perplexity, scaled, 2, css="main")]
    if likelihood.is_bound and exact_nats is not None:
        exact, data = perplexity_of(exact_nats), likelihood.exact_stderr_data
        scaled = () if data is None else (0.0, exact * data)
        gap = f"the bound lies {nats - exact_nats:.3f} nats per token above it"
        cards.append(_card("Perplexity, exact", "", exact, scaled, 2, css="main", note=gap))
    if likelihood.orders_nats_per_token is not None:
        tighter, noise = (
            perplexity_of(likelihood.orders_nats_per_token),
            likelihood.orders_stderr_noise,
        )
        gap = f"{nats - likelihood.orders_nats_per_token:.3f} nats per token below the NELBO"
        scaled = () if noise is None else (tighter * noise, None)
        cards.append(_card("Perplexity, tighter bound", "≤ ", tighter, scaled, 2, note=gap))
    sign = "≤ " if likelihood.is_bound else ""
    beside = "" if not likelihood.is_bound or exact_nats is None else f"exact: {exact_nats:.4f}"
    cards.append(_card("Nats per token", sign, nats, errors, 4, note=beside))
    if likelihood.bits_per_byte is not None:
        bits, exact_bits = likelihood.bits_per_byte, likelihood.exact_bits_per_byte
        scaled = [None if error is None else bits * error / nats for error in errors]
        beside = f"exact: {exact_bits:.4f}" if beside and exact_bits is not None else ""
        cards.append(_card("Bits per byte", sign, bits, scaled, 4, note=beside))
    return f'<div class="cards">{"".join(cards)}</div>{_likelihood_note(likelihood)}'


def _likelihood_note(likelihood: LikelihoodNumbers) -> str:
    bos = "BOS is given and not counted" if likelihood.bos else "nothing is given (no BOS)"
    notes = [f"{likelihood.num_tokens:,} tokens of {escape(likelihood.text)}; {bos}"]
    if likelihood.estimator:
        cut = f" (mask probabilities from {likelihood.t_min:g})" if likelihood.t_min else ""
        notes.append(f"estimator {escape(likelihood.estimator)}{cut}")
    if likelihood.seconds is not None:
        notes.append(f"done in {duration(likelihood.seconds)}")
    interval = ""
    if likelihood.interval is not None:
        low, high = (perplexity_of(end) for end in likelihood.interval)
        what = "the bound's perplexity" if likelihood.is_bound else "the perplexity"
        interval = f" The 95 % interval of {what} is {low:,.2f} to {high:,.2f}."
    return (
        f'<p class="note">Measured on {"; ".join(notes)}. ± is one standard error: <i>noise</i> '
        "if the masks were drawn again for the same text, <i>data</i> for other text of the kind."
        f"{interval}</p>"
    )


def _card(
    name: str,
    sign: str,
    value: float,
    errors: Sequence[float | None],
    decimals: int,
    *,
    css: str = "",
    note: str = "",
) -> str:
    """A number and its standard errors (noise, data); `<data>` holds the value unrounded."""
    lines = []
    for kind, error in zip(("noise", "data"), errors, strict=False):
        if error is None:
            lines.append(f"<li><span>± unknown {kind}</span></li>")
        elif error == 0.0:
            lines.append(f"<li>± 0 <span>{kind}, no draws</span></li>")
        else:
            lines.append(f"<li>± {two_digits(error)} <span>{kind}</span></li>")
    if note:
        lines.append(f"<li><span>{note}</span></li>")
    errors_list = f"<ul>{''.join(lines)}</ul>" if lines else ""
    return (
        f'<div class="card {css}"><h3>{name}</h3><p>{sign and f"<span>{sign}</span>"}'
        f'<data value="{value!r}">{value:,.{decimals}f}</data></p>{errors_list}</div>'
    )


def _key_facts(facts: RunFacts) -> str:
    return _fact_list(
        [
            ("Parameters", facts.parameters and count(facts.parameters)),
            ("Block size S", not facts.autoregressive and f"{facts.block_size:,}"),
            ("Length L", f"{facts.seq_len:,}"),
            ("Vocabulary V", facts.vocab_size and f"{facts.vocab_size:,}"),
            ("Steps", facts.steps is not None and f"{facts.steps:,}"),
            ("Training time", facts.training_seconds and duration(facts.training_seconds)),
            ("Tokens/s", facts.tokens_per_second and f"{facts.tokens_per_second:,.0f}"),
        ],
        "key-facts",
    )


def _fact_list(facts: Sequence[tuple[str, object]], css: str) -> str:
    entries = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts
        if value
    ]
    return f'<dl class="{css}">{"".join(entries)}</dl>'


# --- samples, mask, the run


def _samples_section(
    samples: Sequence[Sample], training_samples: Sequence[tuple[int, Sequence[str]]]
) -> str:
    html = "".join(_sample(number, sample) for number, sample in enumerate(samples, start=1))
    if not samples:
        html = missing("No sample was drawn from the finished model.")
    drawn = [(step, texts) for step, texts in training_samples if texts]
    if drawn:
        entries = "".join(
            f'<h3>after {step:,} steps</h3><pre class="sample">{escape(texts[0])}</pre>'
            for step, texts in drawn
        )
        html += f"<details><summary>Samples while it learnt</summary>{entries}</details>"
    return html


def _sample(number: int, sample: Sample) -> str:
    rate = sample.tokens_per_forward
    facts = [
        "" if sample.seed is None else f"seed {sample.seed}",
        escape(sample.policy),
        "" if sample.num_tokens is None else f"{sample.num_tokens:,} tokens",
        "" if sample.nfe is None else f"{sample.nfe:,} network passes",
        "" if rate is None else f"{rate:.2f} tokens per pass",
    ]
    text = sample.text
    prompt = ""
    if sample.prompt and text.startswith(sample.prompt):
        prompt = f"<b>{escape(sample.prompt)}</b>"
        text = text[len(sample.prompt) :]
    shown = prompt + escape(text) if sample.text else "<i>(empty)</i>"
    caption = " · ".join(filter(None, facts))
    return (
        f'<figure class="sample"><figcaption><b>{number}</b> {caption}</figcaption>'
        f'<pre class="sample">{shown}</pre></figure>'
    )


def _mask_section(facts: RunFacts) -> str:
    if facts.autoregressive:
        length = min(facts.seq_len, 16)
        return (
            '<p class="lead">A pass reads every sequence once; a token sees itself and the tokens '
            "before it, and the network predicts the next one.</p>"
            f'<div class="mask-figure">{pictures.causal_picture(length)}<p class="note">Drawn for '
            f"{length} tokens; the run's L is {facts.seq_len:,}.</p></div>"
        )
    size, num_blocks = pictures.drawn_blocks(facts.block_size, facts.seq_len)
    length = size * num_blocks
    scale = (
        f"Drawn for L = {length} and S = {size}; the run's are L = {facts.seq_len:,} and "
        f"S = {facts.block_size:,}."
    )
    legend = "".join(
        f'<li><i class="{css}"></i><span><b>{name}</b> {words}</span></li>'
        for css, name, words in pictures.mask_legend(facts.clean_attention)
    )
    picture = pictures.mask_picture(size, num_blocks, facts.clean_attention)
    return (
        '<p class="lead">A training pass reads two copies of every sequence side by side: a noisy '
        "one, whose masked tokens it learns to fill in, and the clean one, from which a noisy "
        "block learns what came before it.</p>"
        f'<div class="mask-figure">{picture}<div><ul class="mask-legend">{legend}'
        '<li><i class="unseen"></i><span>everything else is not seen</span></li></ul>'
        f'<p class="note">{scale}</p></div></div>'
    )


def _run_section(facts: RunFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    tokens = facts.steps and facts.batch_size and facts.steps * facts.batch_size * facts.seq_len
    return _fact_list(
        [
            ("Data", facts.data),
            ("Sequences per batch", facts.batch_size and f"{facts.batch_size:,}"),
            ("Token positions seen", tokens and f"{tokens:,}"),
            ("Parameters", facts.parameters and f"{facts.parameters:,}"),
            (
                "Clean tokens attend",
                not facts.autoregressive
                and {"block": "block by block", "causal": "token by token"}[facts.clean_attention],
            ),
            ("Finished", facts.finished_at),
            ("Machine", facts.machine),
            ("Versions", versions),
        ],
        "run-facts",
    )


# --- configuration and commands


def _config_section(config: Mapping[str, Any]) -> str:
    if not config:
        return missing("The resolved configuration was not given.")
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    groups = [("", plain)] if plain else []
    groups += [(key, value) for key, value in config.items() if isinstance(value, Mapping)]
    html = []
    for name, group in groups:
        rows = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
            for key, value in _flatten(group)
        )
        title = f"<caption>{escape(str(name))}</caption>" if name else ""
        html.append(f"<table>{title}<tbody>{rows}</tbody></table>")
    return f'<div class="config">{"".join(html)}</div>'


def _flatten(group: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as YAML would show it) of all leaves."""
    entries = []
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            entries += _flatten(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            entries.append((f"{prefix}{key}", shown))
    return entries


def _commands_section(commands: Sequence[Command]) -> str:
    if not commands:
        return missing("The commands that made this run were not given.")
    return "".join(
        f'<div class="command"><h3>{escape(command.purpose)}</h3>'
        f"<pre><code>{escape(command.command)}</code></pre></div>"
        for command in commands
    )
