"""What the command line shows: progress bars, a sample as its blocks fill in, results in words."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from blockdiffusion.escape import say, terminal
from blockdiffusion.text import Detokenizer, token_text

if TYPE_CHECKING:
    from blockdiffusion.data.packing import Progress as Stages
    from blockdiffusion.evaluate.generation.lengths import DocumentLengths
    from blockdiffusion.evaluate.generation.table import Result
    from blockdiffusion.evaluate.likelihood import Likelihood
    from blockdiffusion.sampling import Event
    from blockdiffusion.studies.variance.table import Measured, VarianceRow, VarianceTable

HIDDEN = "░"
SECONDS_BETWEEN_LINES = 30.0
LONGEST_WAIT = 30 * 86_400.0  # seconds
LIVE_CHARACTERS = 4000  # of a sample that are drawn anew with every token


def error_console() -> Console:
    """Progress and messages go to standard error; results go to standard output."""
    return Console(stderr=True)


def amount(number: float) -> str:
    """65B, 3.1M: three digits."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:,.0f}"


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[Stages]:
    """Gives a function (stage, done, total) that draws a bar with rate and time left.

    On what is no terminal (a log file) it prints a line every `SECONDS_BETWEEN_LINES`; `quiet`,
    for all processes of a job but the first, nothing.
    """
    if quiet:
        yield lambda stage, done, total: None
        return
    console = error_console()
    if not console.is_terminal:
        yield _ProgressLines(title)
        return
    # Where it is narrow the name gives way, and not the digits behind it.
    elapsed = [TimeElapsedColumn()] if console.width >= 60 else []
    width = min(30, max(console.width - 60, 6))
    name = Column(
        no_wrap=True, overflow="ellipsis", max_width=console.width - width - 24 - 8 * len(elapsed)
    )
    bar = Progress(
        TextColumn("{task.description}", "bold", markup=False, table_column=name),
        BarColumn(bar_width=width),
        TaskProgressColumn(show_speed=True),
        *elapsed,
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=None)

        def report(stage: str, done: int, total: int | None) -> None:
            words = terminal(f"{title} {stage}".strip())
            bar.update(task, description=words, completed=done, total=total)

        yield report


class _ProgressLines:
    """Progress for a log file: seldom a line, and none for what is done soon."""

    def __init__(self, title: str):
        self.title = title
        self.began = self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        line = f"{self.title} {stage}: {done:,}"
        if total:
            left = (now - self.began) * (total - done) / max(done, 1)
            line += f" of {total:,}, {_time_left(left)} left"
        say(line, err=True)


def _time_left(seconds: float) -> str:
    """As h:mm:ss, with days before it, up to what anybody waits for."""
    if seconds > LONGEST_WAIT:
        return f"more than {timedelta(seconds=LONGEST_WAIT).days} days"
    return str(timedelta(seconds=round(seconds)))


def show_stream(
    events: Iterator[Event], tokenizer: Any, prompt: list[int], text: str | None = None
) -> Event:
    """Draws one sample while it is denoised; returns the last event. `text` is its prompt's.

    On a terminal the current block fills in token by token; elsewhere the text of each finished
    block is printed. A long text costs no more per token than a short one.
    """
    from blockdiffusion.sampling import BlockEvent, DoneEvent, StepEvent

    console = Console()
    view = _SampleView(tokenizer, prompt, text)
    if not console.is_terminal:
        return _print_blocks(events, view)
    with Live(
        view.text(), console=console, refresh_per_second=30, vertical_overflow="visible"
    ) as live:
        for event in events:
            settled = None
            if isinstance(event, StepEvent):
                view.decide(event)
            elif isinstance(event, BlockEvent):
                view.finish(event)
                settled = view.settle()
            elif isinstance(event, DoneEvent):
                view.end()
            live.update(view.text(), refresh=settled is not None)
            if settled is not None:
                console.print(settled)  # above what is still drawn anew
            if isinstance(event, DoneEvent):
                return event
    raise AssertionError("the block loop always ends with a DoneEvent")


def _print_blocks(events: Iterator[Event], view: _SampleView) -> Event:
    from blockdiffusion.sampling import BlockEvent, DoneEvent

    for event in events:
        if isinstance(event, BlockEvent):
            view.finish(event)
        elif isinstance(event, DoneEvent):
            view.end()
        done = isinstance(event, DoneEvent)
        say(view.take(), end="\n" * done)  # a console would turn tabs into spaces
        if done:
            return event
    raise AssertionError("the block loop always ends with a DoneEvent")


class _SampleView:
    """The first row's tokens as text: given, finished, just decided, hidden.

    `shown` is the text of the finished tokens but for what was taken or settled before.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], text: str | None):
        self.tokenizer = tokenizer
        self.finished = len(prompt)  # tokens
        self.block: dict[int, int] = {}
        self.stream = Detokenizer(tokenizer)
        self.shown = self.stream.give(prompt, text)
        self.given = len(self.shown)  # characters of the prompt in `shown`

    def decide(self, event: Any) -> None:
        for position, token in zip(event.positions.tolist(), event.ids.tolist(), strict=True):
            self.block[position] = token

    def finish(self, event: Any) -> None:
        """Adds a block, up to where the kept text ends."""
        start, end = int(event.starts[0]), int(event.ends[0])
        self.shown += self.stream.push(event.ids[0].tolist()[self.finished - start : end - start])
        self.finished = end
        self.block = {}

    def end(self) -> None:
        """There is no more: what waited for later tokens is shown as it is."""
        self.shown += self.stream.end()
        self.block = {}

    def take(self) -> str:
        """The shown text, which is shown no more."""
        taken, self.shown = self.shown, ""
        return taken

    def settle(self) -> Text | None:
        """Gives up the lines of a long text that will not change any more."""
        cut = max(self.shown.rfind("\n"), 0) or self.shown.rfind(" ")
        if len(self.shown) <= LIVE_CHARACTERS or cut <= 0:
            return None
        lines = _styled(self.shown[:cut], self.given)
        self.shown, self.given = self.shown[cut + 1 :], max(self.given - cut - 1, 0)
        return lines

    def text(self) -> Text:
        out = _styled(self.shown, self.given)
        if self.block:
            last = max(self.block)
            for position in range(self.finished, last + 1):
                if position in self.block:
                    text = token_text(self.tokenizer, self.block[position])
                    out.append(terminal(text), style="bold green")
                else:
                    out.append(HIDDEN, style="dim")
            out.append(HIDDEN, style="dim")
        return out


def _styled(text: str, given: int) -> Text:
    """Text whose first `given` characters are those of the prompt."""
    return Text().append(terminal(text[:given]), style="bold").append(terminal(text[given:]))


def likelihood_lines(result: Likelihood, what: str) -> list[str]:
    """A likelihood in words, one fact a line, the bound sign where it belongs."""
    sign = "<= " if result.is_bound else ""
    kind = "bound on nats/token" if result.is_bound else "nats/token"
    noise = "" if result.stderr_noise is None else f" ± {result.stderr_noise:.4f} (noise)"
    data = "" if result.stderr_data is None else f" ± {result.stderr_data:.4f} (data)"
    lines = [what, f"  {kind:<22}{result.nats_per_token:.4f}{noise}{data}"]
    spread = ""
    if result.interval is not None:
        low, high = result.interval
        lines.append(f"  {'95 % interval':<22}{low:.4f} .. {high:.4f}")
        spread = f"  (95 %: {math.exp(low):.2f} .. {math.exp(high):.2f})"
    lines.append(f"  {'perplexity':<22}{sign}{result.perplexity:.2f}{spread}")
    if result.bits_per_byte is not None:
        lines.append(f"  {'bits/byte':<22}{sign}{result.bits_per_byte:.4f}")
    if result.is_bound and result.exact_nats_per_token is not None:
        error = result.exact_stderr_data
        data = "" if error is None else f" ± {error:.4f} (data)"
        lines.append(f"  {'exact nats/token':<22}{result.exact_nats_per_token:.4f}{data}")
        lines.append(f"  {'exact perplexity':<22}{result.exact_perplexity:.2f}")
        if result.exact_bits_per_byte is not None:
            lines.append(f"  {'exact bits/byte':<22}{result.exact_bits_per_byte:.4f}")
    if result.is_bound and result.orders_nats_per_token is not None:
        error = result.orders_stderr_noise
        noise = "" if error is None else f" ± {error:.4f} (noise)"
        orders = max(result.order_bounds or {})
        lines.append(f"  {f'{orders}-order bound':<22}{result.orders_nats_per_token:.4f}{noise}")
        lines.append(f"  {'its perplexity':<22}<= {result.orders_perplexity:.2f}")
    given = "BOS given, not counted" if result.bos else "no BOS given"
    lines.append(
        f"  {result.num_tokens:,} tokens in {result.num_rows:,} rows counted; {given}; "
        f"{_how(result)}; {result.seconds:.1f} s"
    )
    for remark in result.remarks:
        lines += textwrap.wrap(remark, 98, initial_indent="  ", subsequent_indent="    ")
    return lines


def _how(result: Likelihood) -> str:
    if result.estimator == "exact":
        if result.block_size == 1:
            return "exact in one pass"
        return "all mask sets of every block enumerated"
    from blockdiffusion.evaluate.likelihood import CUT

    cut = "" if result.t_min is None else f", {CUT.format(result.t_min)}"
    return f"{result.estimator}: {result.samples} draws, {result.copies} noisy copies a row{cut}"


def length_lines(result: DocumentLengths, what: str) -> list[str]:
    """Lengths of documents in words, and their histogram."""
    bins = result.histogram()
    most = max(documents for _, _, documents in bins)
    lines = [
        what,
        f"  tokens until EOS    median {result.median:,.6g}, max {result.maximum:,}, "
        f"mean {result.mean:,.1f}",
        f"  {len(result.lengths):,} documents, {100 * result.share_cut:.1f} % cut at "
        f"{result.max_new_tokens:,} tokens; {result.tokens_per_forward:.2f} tokens per pass; "
        f"{result.seconds:.1f} s",
    ]
    for low, high, documents in bins:
        bar = "█" * math.ceil(50 * documents / most)
        lines.append(f"  {f'{low:,} to {high - 1:,}':>20}  {bar} {documents:,}")
    return lines


def variance_lines(table: VarianceTable, what: str) -> list[str]:
    """The variances of all estimators, a block of lines for every block size; 100 columns."""
    options = table.options
    given = "BOS given, not counted" if table.bos else "no BOS given"
    lines = [
        what,
        f"  {options.batches} batches of {options.batch_size} rows of {table.seq_len} tokens, "
        f"{options.replicates} replicates, seed {options.seed}; {given}; {table.seconds:.1f} s",
    ]
    for size in dict.fromkeys(row.block_size for row in table.rows):
        rows = table.at(size)
        own = " (the model's)" if size == table.model_block_size else ""
        exact = f": exact bound {table.exact[size]:.4f}" if size in table.exact else ""
        lines += ["", f"S = {size}{own}{exact}", *_loss_table(rows)]
        if options.gradients:
            lines += ["", *_gradient_table(rows)]
        notes = [f"{row.label}: {row.note}" for row in rows if row.note]
        notes += [f"left out: {why}" for s, _, why in table.left_out if s == size]
        if any(row.bias is not None for row in rows):
            reference = table.references[size]
            how = "" if size in table.exact else ", with equal seeds"
            notes.append(f"bias: difference from {reference}{how}")
        for note in notes:
            lines += textwrap.wrap(note, 98, initial_indent="  ", subsequent_indent="    ")
    cuts = sorted({row.t_min for row in table.rows if row.t_min is not None})
    lines += ["", *VARIANCE_LEGEND]
    return lines + [
        f"  t_min       {cut:g}: bernoulli and resampled leave mask probabilities below out"
        for cut in cuts
    ]


VARIANCE_LEGEND = (
    "  variance    of a batch's loss (nats/token) or gradient (trace) when masks are drawn again",
    "  = compute   the same times the passes that N noisy copies cost",
    "  gain        how many times less than the paper's that is",
    "  blocks      variance of a block's mean loss over all blocks, noise and data: the paper's",
    "  bound, +1σ  an estimator of the bound, one standard error above the exact one",
    "  ±           standard error: of the masks (nats/token, bias), or over batches",
)
GROUP_WORDS = {
    "embedding": "embed",
    "attention": "attn",
    "norms and modulation": "norms",
    "output": "out",
}


def _label_width(rows: list[VarianceRow]) -> int:
    return max(20, *(len(row.label) for row in rows))


def _loss_table(rows: list[VarianceRow]) -> list[str]:
    width = _label_width(rows)
    lines = [
        f"  {'loss':<{width}}{'nats/token':>15}{'bias':>18}{'blocks':>8}{'variance':>14}"
        f"{'= compute':>10}{'gain':>12}"
    ]
    for row in rows:
        bias = "bound" if row.is_bound else "unknown"
        if row.is_bound and row.difference is not None and row.difference.stderr:
            bias += f", {row.difference.value / row.difference.stderr:+.1f}σ"
        if row.bias is not None:
            bias = f"{row.bias.value:+.4f} ±{row.bias.stderr:.4f}"
        blocks = "" if row.block_variance is None else _four_digits(row.block_variance.value)
        loss = f"{row.loss.value:.4f} ±{row.loss.stderr:.4f}"
        lines.append(
            f"  {row.label:<{width}}{loss:>15}{bias:>18}{blocks:>8}{_variance_columns(row, 'loss')}"
        )
    return lines


def _gradient_table(rows: list[VarianceRow]) -> list[str]:
    """Variance of the gradient; the share of every parameter group in per cent."""
    width, groups = _label_width(rows), list(rows[0].groups)
    heads = "".join(f"{f'{GROUP_WORDS.get(group, group)}%':>6}" for group in groups)
    lines = [
        f"  {'gradient':<{width}}{'sig/noise':>9}{heads}{'variance':>{46 - 6 * len(groups)}}"
        f"{'= compute':>10}{'gain':>12}"
    ]
    for row in rows:
        total = math.fsum(found.value for found in row.groups.values())
        shares = [f"{100 * row.groups[g].value / total:.1f}" if total else "" for g in groups]
        signal = "" if row.signal_to_noise is None else f"{row.signal_to_noise.value:.3g}"
        lines.append(
            f"  {row.label:<{width}}{signal:>9}{''.join(f'{share:>6}' for share in shares)}"
            f"{_variance_columns(row, 'gradient', 46 - 6 * len(groups))}"
        )
    return lines


def _variance_columns(row: VarianceRow, of: str, width: int = 14) -> str:
    variance = getattr(row, f"{of}_variance")
    equal, gain = row.at_equal_compute(f"{of}_variance"), row.at_equal_compute(f"{of}_gain")
    assert equal is not None
    return f"{_scientific(variance):>{width}}{short_exponent(equal.value):>10}{_gain(gain):>12}"


def _gain(gain: Measured | None) -> str:
    if gain is None:
        return "∞"
    if gain.value >= 10_000:
        error = "" if gain.stderr is None else f" ±{100 * gain.stderr / gain.value:.0f}%"
        return short_exponent(gain.value, 1) + error
    digits = max(0, 2 - int(math.log10(gain.value))) if gain.value >= 1 else 2
    value = f"{gain.value:.{digits}f}"
    return value if gain.stderr is None else f"{value} ±{gain.stderr:.{digits}f}"


def _four_digits(value: float) -> str:
    return f"{value:.4g}" if 0.01 <= abs(value) < 10_000 else short_exponent(value, 1)


def _scientific(found: Measured) -> str:
    """1.92e-3 ±5%"""
    value = short_exponent(found.value)
    if found.stderr is None or found.value == 0:
        return value
    return f"{value} ±{100 * found.stderr / found.value:.0f}%"


def short_exponent(value: float, digits: int = 2) -> str:
    """0.00192 -> 1.92e-3; 0 stays 0."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def generation_lines(result: Result) -> list[str]:
    """The numbers of generated text, those of real text beside them, and the conventions."""
    from blockdiffusion.evaluate.generation.table import conventions, real_label

    texts = [result["text"]] + ([result["reference"]] if result["reference"] else [])
    bound = "<= " if result["judge"]["is_bound"] else ""
    heads = ["samples", "real text"][: len(texts)]
    lines = [result["label"], f"  {'':<22}" + "".join(f"{head:<38}" for head in heads).rstrip()]
    for name, of in _generation_rows(bound):
        lines.append(f"  {name:<22}" + "".join(f"{of(text):<38}" for text in texts).rstrip())
    if result["mauve"] is not None:
        lines.append(f"  {'MAUVE':<22}{result['mauve']:.4f}")
    lines += _drawing_lines(result)
    remarks = [conventions(result)]
    if result["reference"]:
        remarks.append(real_label(result))
    for remark in [*remarks, *(f"warning: {warning}" for warning in result["warnings"])]:
        lines += textwrap.wrap(remark, 98, initial_indent="  ", subsequent_indent="    ")
    return lines


def _generation_rows(bound: str) -> list[tuple[str, Callable[[Any], str]]]:
    """(name, what a text's numbers give) for every line."""
    from blockdiffusion.evaluate.generation.table import number, with_error

    def perplexity(text: Any) -> str:
        low, high = text["interval"] or (None, None)
        spread = "" if low is None else f"  (95 %: {number(low)} .. {number(high)})"
        return f"{bound}{number(text['perplexity'])}{spread}" if text["perplexity"] else "-"

    def numbers(values: Any) -> str:
        return "  ".join(number(value) or "-" for value in values)

    return [
        ("gen. perplexity", perplexity),
        ("mean perplexity", lambda text: bound + (with_error(text["mean_perplexity"]) or "-")),
        ("entropy (nats)", lambda text: with_error(text["entropy"])),
        ("pooled entropy", lambda text: number(text["pooled_entropy"])),
        ("distinct-1 .. 4", lambda text: numbers(text["distinct"].values())),
        (
            "rep-2 .. 4",
            lambda text: numbers(found and found["value"] for found in text["repetition"].values()),
        ),
        ("longest repeat", lambda text: with_error(text["longest_repeat"])),
        ("self-BLEU", lambda text: number(text["self_bleu"])),
        (
            "texts (empty), tokens",
            lambda text: f"{text['num_samples']:,} ({text['num_empty']}), {text['num_tokens']:,}",
        ),
    ]


def _drawing_lines(result: Result) -> list[str]:
    """Lengths and cost, where the samples say them."""
    from blockdiffusion.evaluate.generation.table import number

    lines = []
    if (lengths := result["lengths"]) is not None:
        ended = lengths["ended"]
        share = "" if ended is None else f"; {100 * ended:.0f} % ended by EOS"
        lines.append(
            f"  {'length':<22}median {number(lengths['median'])}, longest {lengths['maximum']:,} "
            f"tokens{share}"
        )
    if (cost := result["cost"]) is not None:
        speed = cost["tokens_per_second"]
        rate = "" if speed is None else f"; {number(speed)} tokens/s"
        lines.append(
            f"  {'NFE':<22}{number(cost['nfe']['value'])} a sample, "
            f"{number(cost['tokens_per_forward'])} tokens per forward{rate}"
        )
    if result["guard"] is not None:
        lines.append(f"  {'rejected by the guard':<22}{result['rejected']} of {result['drawn']}")
    return lines
