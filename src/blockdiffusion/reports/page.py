"""One self-contained HTML page about one training run: numbers, curves, mask, trace, samples.

`write_report(path, contents)` needs nothing but the values in `ReportContents`; whatever is missing
there becomes a sentence that says so. The page is `page.html.j2`; what is here is what it shows. It
uses no network, no external font or script, and every part of it can be read without JavaScript
(which adds values under the pointer, and replay).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from blockdiffusion.errors import UserError
from blockdiffusion.escape import seen
from blockdiffusion.evaluate.measured import perplexity_of
from blockdiffusion.files.disk import storage_error, written_aside
from blockdiffusion.files.records import build, not_negative
from blockdiffusion.reports import curves as drawn
from blockdiffusion.reports import mask, plots
from blockdiffusion.reports.curves import ClipSearch, Curves, ValidationPoint, read_metrics
from blockdiffusion.reports.markup import count, duration, two_digits
from blockdiffusion.reports.trace import Replay, Trace, TraceStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
MOST_RECORDS = 900  # under the pointer: more would only make the file larger
MOST_COLUMNS = {"wide": 80, "narrow": 14}  # of searches


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

    @property
    def facts(self) -> list[str]:
        """How it was drawn, in words, as far as that is known."""
        words = {
            "seed {}": self.seed,
            "{}": self.policy or None,
            "{:,} tokens": self.num_tokens,
            "{:,} network passes": self.nfe,
            "{:.2f} tokens per pass": self.tokens_per_forward,
        }
        return [text.format(value) for text, value in words.items() if value is not None]


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
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: seen(value) if type(value) is str else value,
    )
    environment.filters.update(two_digits=two_digits, duration=duration, perplexity=perplexity_of)
    facts, curves = contents.facts, contents.curves
    return environment.get_template("page.html.j2").render(
        contents=contents,
        facts=facts,
        cards=_cards(contents.likelihood),
        key_facts=_key_facts(facts),
        run_facts=_run_facts(facts),
        charts=_charts(curves),
        evaluations=[drawn.evaluation_words(point) for point in curves.validation],
        records=_records(curves),
        notes=_notes(curves),
        search=_search(curves.searches, contents.config),
        replay=contents.trace and Replay(contents.trace, facts.block_size),
        mask=_mask(facts),
        config=[
            (name, list(_flatten(group)))
            for name, group in _groups(contents.config).items()
            if group
        ],
        asset=lambda name: Markup(_asset(name)),
        palette=Markup(plots.colours(":root")),
    ) + "\n"  # fmt: skip


def _asset(name: str) -> str:
    return files("blockdiffusion.reports").joinpath(name).read_text(encoding="utf-8")


# --- numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """A number and its standard errors, as (kind, error); an error is None where not known."""

    name: str
    value: float
    errors: Sequence[tuple[str, float | None]]
    bound: bool
    decimals: int = 2
    note: str = ""


def _cards(found: LikelihoodNumbers | None) -> list[_Card]:
    if found is None:
        return []
    nats, exact, orders = (
        found.nats_per_token, found.exact_nats_per_token, found.orders_nats_per_token,
    )  # fmt: skip

    def errors(scale: float) -> list[tuple[str, float | None]]:
        both = (("noise", found.stderr_noise), ("data", found.stderr_data))
        return [(kind, None if error is None else scale * error) for kind, error in both]

    bound = found.is_bound
    name = "Perplexity, bound" if bound else "Perplexity, exact"
    value = perplexity_of(nats)
    cards = [_Card(name=name, value=value, errors=errors(value), bound=bound)]
    if bound and exact is not None:
        value, data = perplexity_of(exact), found.exact_stderr_data
        known = [] if data is None else [("noise", 0.0), ("data", value * data)]
        gap = f"the bound lies {nats - exact:.3f} nats per token above it"
        cards.append(
            _Card(name="Perplexity, exact", value=value, errors=known, bound=False, note=gap)
        )
    if orders is not None:
        value, noise = perplexity_of(orders), found.orders_stderr_noise
        known = [] if noise is None else [("noise", value * noise), ("data", None)]
        gap = f"{nats - orders:.3f} nats per token below the NELBO"
        cards.append(
            _Card(name="Perplexity, tighter bound", value=value, errors=known, bound=True, note=gap)
        )
    for name, value, better in (
        ("Nats per token", nats, exact),
        ("Bits per byte", found.bits_per_byte, found.exact_bits_per_byte),
    ):
        if value is not None:
            note = f"exact: {better:.4f}" if bound and better is not None else ""
            known = errors(value / nats if nats else 1.0)
            cards.append(
                _Card(name=name, value=value, errors=known, bound=bound, decimals=4, note=note)
            )
    return cards


def _key_facts(facts: RunFacts) -> list[tuple[str, object]]:
    return [
        ("Parameters", facts.parameters and count(facts.parameters)),
        ("Block size S", not facts.autoregressive and f"{facts.block_size:,}"),
        ("Length L", f"{facts.seq_len:,}"),
        ("Vocabulary V", facts.vocab_size and f"{facts.vocab_size:,}"),
        ("Steps", facts.steps is not None and f"{facts.steps:,}"),
        ("Training time", facts.training_seconds and duration(facts.training_seconds)),
        ("Tokens/s", facts.tokens_per_second and f"{facts.tokens_per_second:,.0f}"),
    ]


def _run_facts(facts: RunFacts) -> list[tuple[str, object]]:
    tokens = facts.steps and facts.batch_size and facts.steps * facts.batch_size * facts.seq_len
    attend = {"block": "block by block", "causal": "token by token"}[facts.clean_attention]
    return [
        ("Data", facts.data),
        ("Sequences per batch", facts.batch_size and f"{facts.batch_size:,}"),
        ("Token positions seen", tokens and f"{tokens:,}"),
        ("Parameters", facts.parameters and f"{facts.parameters:,}"),
        ("Clean tokens attend", not facts.autoregressive and attend),
        ("Finished", facts.finished_at),
        ("Machine", facts.machine),
        ("Versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    ]


def _groups(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The configuration's tables by name; what is in none comes first."""
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    return {"": plain, **{k: value for k, value in config.items() if isinstance(value, Mapping)}}


def _flatten(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as YAML would show it) of all leaves."""
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", shown


# --- pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class _Charts:
    """The curves' pictures, or why there are none. `plot` says where the steps are in them."""

    missing: str = ""
    loss: Mapping[str, tuple[Markup, str]] = field(default_factory=dict)
    small: Sequence[Markup] = ()
    search: Mapping[str, Markup] = field(default_factory=dict)


def _charts(curves: Curves) -> _Charts:
    try:
        plots.require()
    except UserError as error:
        return _Charts(missing=str(error))
    sizes, loss = {"wide": (880, 420), "narrow": (340, 340)}, {}
    if curves.loss or curves.validation:
        for css, size in sizes.items():
            figure = drawn.loss_figure(curves, *size)
            loss[css] = (_inline(figure, f"loss-{css}-"), _plot_area(figure))
    search = {
        css: _inline(
            drawn.search_figure(curves.searches, size[0], MOST_COLUMNS[css]), f"search-{css}-"
        )
        for css, size in sizes.items()
        if curves.searches
    }
    small = [
        _inline(figure, f"small{number}-")
        for number, figure in enumerate(drawn.small_figures(curves))
    ]
    return _Charts(loss=loss, search=search, small=small)


def _inline(figure: Figure, name: str) -> Markup:
    return Markup(plots.svg(figure, name))


def _plot_area(figure: Figure) -> str:
    """Where the axes begin and end, in parts of the picture's width, and at which steps."""
    axes = figure.axes[0]
    box = axes.get_position()
    return " ".join(f"{value:.6g}" for value in (box.x0, box.x1, *axes.get_xlim()))


def _records(curves: Curves) -> list[tuple[int, str, bool]]:
    """(step, what was recorded, whether it was an evaluation), for the pointer."""
    means = dict(curves.smooth)
    records = [
        (step, f"step {step:,}\ntraining loss {loss:.3f}"
         + (f", mean {means[step]:.3f}" if step in means else ""), False)
        for step, loss in curves.loss[:: max(len(curves.loss) // MOST_RECORDS, 1)]
    ]  # fmt: skip
    for point in curves.validation:
        errors = {"noise": point.stderr_noise, "data": point.stderr_data}
        words = [f"± {two_digits(e)} {kind}" for kind, e in errors.items() if e is not None]
        text = "\n".join([drawn.evaluation_words(point), *words])
        records.append((point.step, text.replace(": ", "\n", 1).replace("; ", "\n"), True))
    return records


def _notes(curves: Curves) -> list[str]:
    """What the picture of the loss does not show."""
    notes = []
    if curves.loss and not curves.validation:
        notes.append("The run has no evaluation on validation text yet.")
    if curves.loss:
        low, high = drawn.loss_range(curves)
        outside = sum(not low <= value <= high for _, value in curves.loss)
        if outside:
            lie = "lies" if outside == 1 else "lie"
            notes.append(f"{outside:,} of {len(curves.loss):,} records {lie} outside the frame.")
    return notes


def _search(searches: Sequence[ClipSearch], config: Mapping[str, Any]) -> dict[str, Any]:
    """The words about the searches of the schedule; empty in a run that made none."""
    if not searches:
        return {}
    by = (config.get("search") or {}).get("by", "loss")
    changes = sum(a.clip != b.clip for a, b in pairwise(searches))
    return {
        "what": {"loss": "the loss of a batch", "gradient": "the gradient of a batch's loss"}[by],
        "last": drawn.clip_name(searches[-1].clip),
        "count": len(searches),
        "clips": len(searches[-1].variances),
        "seconds": sum(search.seconds for search in searches),
        "changed": {0: "never changed", 1: "changed once"}.get(
            changes, f"changed {changes:,} times"
        ),
        "most": MOST_COLUMNS["wide"],
        "saturated": f"{drawn.SATURATED:g}",
    }


def _mask(facts: RunFacts) -> dict[str, Any]:
    """The picture of the mask, its legend, and the L and S that it is drawn for."""
    if facts.autoregressive:
        length = min(facts.seq_len, 16)
        picture = mask.mask_picture(mask.causal_rows(length), 1, ("",))
        return {"picture": Markup(picture), "length": length}
    size, num_blocks = mask.drawn_blocks(facts.block_size, facts.seq_len)
    rows = mask.mask_rows(size, num_blocks, facts.clean_attention)
    return {
        "picture": Markup(mask.mask_picture(rows, size)),
        "legend": mask.legend(facts.clean_attention),
        "length": size * num_blocks,
        "size": size,
    }
