"""One self-contained HTML page about one training run: numbers, curves, mask, trace, samples.

`write_report(path, contents)` needs only the values in `ReportContents`; a sentence stands for each
one that is missing. The template is `page.html.j2`, and this module computes its values. The page
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
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from blockdiffusion.errors import UserError
from blockdiffusion.escape import seen
from blockdiffusion.evaluate.measured import perplexity_of
from blockdiffusion.files.disk import write_whole
from blockdiffusion.files.records import build, not_negative
from blockdiffusion.reports import curves as drawn
from blockdiffusion.reports import mask, plots
from blockdiffusion.reports.curves import Curves
from blockdiffusion.reports.numbers import count, duration, two_digits
from blockdiffusion.reports.trace import Replay, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from blockdiffusion.models.masks import CleanAttention

MOST_RECORDS = 900  # shown at the pointer: more would only make the file larger
MOST_COLUMNS = {"wide": 80, "narrow": 14}  # of searches


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodNumbers:
    """A held-out likelihood; for the names see `evaluate.likelihood.Likelihood`.

    `text` names the text that was measured, in words that fit after "N tokens of".
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
        """Read `Likelihood.to_dict()`, or what `blockdiff eval --json` wrote."""
        numbers = build(cls, {**values, "text": text}, strict=False)
        not_negative(asdict(numbers))
        return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The model, its data, its speed. None or empty means unknown and is left out."""

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
    """A generated text and how it was drawn. `prompt` is the given part of the text."""

    text: str
    prompt: str = ""
    seed: int | None = None
    sampler: str = ""
    nfe: int | None = None
    tokens_per_forward: float | None = None
    num_tokens: int | None = None

    @property
    def facts(self) -> list[str]:
        """The known facts of how it was drawn, in words."""
        words = {
            "seed {}": self.seed,
            "{}": self.sampler or None,
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
    """All that a report shows. `summary` is one plain sentence about the run."""

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
    """Write the page to `path`, whole or not at all.

    Raises UserError if the file cannot be written.
    """
    # A token may hold half a character; it must not cost the report.
    write_whole(Path(path), render_report(contents).encode("utf-8", errors="replace"))


def render_report(contents: ReportContents) -> str:
    """Return the page as a string."""
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: seen(value) if type(value) is str else value,
    )
    environment.filters.update(
        two_digits=two_digits, count=count, duration=duration, perplexity=perplexity_of,
        commas=lambda value, form="{:,}": None if value is None else form.format(value),
        clip_name=drawn.clip_name, evaluation=drawn.evaluation_words,
    )  # fmt: skip
    curves, plain = contents.curves, contents.config.items()
    tables = {"": {key: value for key, value in plain if not isinstance(value, Mapping)}}
    tables |= {key: value for key, value in plain if isinstance(value, Mapping)}
    return environment.get_template("page.html.j2").render(
        contents=contents,
        facts=contents.facts,
        curves=curves,
        cards=_cards(contents.likelihood) if contents.likelihood else [],
        charts=_charts(curves),
        records=_records(curves),
        outside=_outside(curves) if curves.loss else 0,
        changes=sum(one.clip != next.clip for one, next in pairwise(curves.searches)),
        replay=contents.trace and Replay(contents.trace, contents.facts.block_size),
        mask=_mask(contents.facts),
        config=[(name, list(_flatten(table))) for name, table in tables.items() if table],
        most=MOST_COLUMNS["wide"],
        saturated=drawn.SATURATED,
        asset=lambda name: Markup(_asset(name)),
        palette=Markup(plots.colours(":root")),
    ) + "\n"  # fmt: skip


def _asset(name: str) -> str:
    return files("blockdiffusion.reports").joinpath(name).read_text(encoding="utf-8")


class _Card(NamedTuple):
    """A number and its standard errors, each (kind, error or None if not known)."""

    name: str
    value: float
    errors: Sequence[tuple[str, float | None]]
    bound: bool
    decimals: int = 2
    note: str = ""


def _cards(found: LikelihoodNumbers) -> Iterator[_Card]:
    nats, bound = found.nats_per_token, found.is_bound
    exact, orders = found.exact_nats_per_token, found.orders_nats_per_token

    def scaled(value: float, **errors: float | None) -> list[tuple[str, float | None]]:
        """Return the errors of a function of the nats that has this derivative."""
        return [(kind, None if error is None else value * error) for kind, error in errors.items()]

    def perplexity(name: str, nats: float, bound: bool, note: str = "", **errors) -> _Card:
        value = perplexity_of(nats)
        return _Card(f"Perplexity, {name}", value, scaled(value, **errors), bound, note=note)

    known = {"noise": found.stderr_noise, "data": found.stderr_data}
    yield perplexity("bound" if bound else "exact", nats, bound, **known)
    if bound and exact is not None:
        data, gap = found.exact_stderr_data, f"the bound lies {nats - exact:.3f} nats per token"
        errors = {} if data is None else {"noise": 0.0, "data": data}
        yield perplexity("exact", exact, False, f"{gap} above it", **errors)
    if orders is not None:
        noise, gap = found.orders_stderr_noise, f"{nats - orders:.3f} nats per token"
        errors = {} if noise is None else {"noise": noise, "data": None}
        yield perplexity("tighter bound", orders, True, f"{gap} below the NELBO", **errors)
    for name, value, better in (
        ("Nats per token", nats, exact),
        ("Bits per byte", found.bits_per_byte, found.exact_bits_per_byte),
    ):
        if value is not None:
            note = f"exact: {better:.4f}" if bound and better is not None else ""
            errors = scaled(value / nats if nats else 1, **known)
            yield _Card(name, value, errors, bound, 4, note)


def _flatten(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as YAML would show it) of all leaves."""
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", shown


# --- pictures


def _charts(curves: Curves) -> dict[str, Any]:
    """Draw the curves, wide and narrow, or say why there are no pictures."""
    try:
        plots.require()
    except UserError as error:
        return {"missing": str(error), "loss": {}, "small": [], "search": {}}
    loss, search = {}, {}
    for css, size in {"wide": (880, 420), "narrow": (340, 340)}.items():
        if curves.loss or curves.validation:
            figure = drawn.loss_figure(curves, *size)
            loss[css] = (Markup(plots.svg(figure, f"loss-{css}-")), _plot_area(figure))
        if curves.searches:
            figure = drawn.search_figure(curves.searches, size[0], MOST_COLUMNS[css])
            search[css] = Markup(plots.svg(figure, f"search-{css}-"))
    figures = enumerate(drawn.small_figures(curves))
    small = [Markup(plots.svg(figure, f"small{number}-")) for number, figure in figures]
    return {"missing": "", "loss": loss, "small": small, "search": search}


def _plot_area(figure: Figure) -> str:
    """Return the ends of the x axis, in parts of the picture's width, and their steps."""
    axes = figure.axes[0]
    box = axes.get_position()
    return " ".join(f"{value:.6g}" for value in (box.x0, box.x1, *axes.get_xlim()))


def _records(curves: Curves) -> list[tuple[int, str, bool]]:
    """Return (step, text, whether it is an evaluation) of every record, for the pointer."""
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


def _outside(curves: Curves) -> int:
    """Count the records that the picture of the loss does not show."""
    low, high = drawn.loss_range(curves)
    return sum(not low <= value <= high for _, value in curves.loss)


def _mask(facts: RunFacts) -> dict[str, Any]:
    """Draw the mask; return it with its legend, L and S."""
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
