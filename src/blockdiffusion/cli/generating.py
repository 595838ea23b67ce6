"""Commands that sample."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import MODEL, Outputs, SamplerOptions, grouped
from blockdiffusion.cli.shared import check_places, warn, write_json
from blockdiffusion.errors import UserError, counted
from blockdiffusion.escape import say
from blockdiffusion.options import all_but, only, option
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.serving.options import BatchOptions

MOST_BYTES = 2**20  # of a message
JSON_LINES = "One JSON object a sample."
FILTERS = ("top_p", "top_p_rule", "top_k", "temperature")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What `sample` continues, how, and how it is shown."""

    prompt: str | None = option(None, "Text to continue.")
    prompt_file: Path | None = option(None, "File with the text to continue.")
    sampling: SamplingParams = field(default=SamplingParams(max_new_tokens=256))
    chat: bool = option(
        False,
        "The prompt is a user's message: ask by the model's chat template, show the answer alone.",
        flags="--chat",
    )
    stream: bool = option(False, "Show blocks as they fill in.", flags="--stream")
    json_lines: bool = option(False, JSON_LINES, flags="--json")
    network: SamplerOptions = field(default=SamplerOptions())

    def __post_init__(self) -> None:
        if self.stream and (self.json_lines or self.sampling.num_samples != 1):
            raise UserError("--stream shows one sample as text; leave out --json and --num-samples")
        if self.chat and self.prompt is None and self.prompt_file is None:
            raise UserError("--chat needs a message; give --prompt or --prompt-file")


@grouped
def sample(model: MODEL, options: SampleOptions) -> None:
    """Generate text, from nothing or after a prompt."""
    text = _text("prompt", _typed(options.prompt), options.prompt_file)
    network = options.network.load_optimized(model)
    from blockdiffusion.sampling import collect, prepare_prompts, stream

    sampling = _seeded(options.sampling)
    prompt: Any = text
    if options.chat:
        from blockdiffusion.data.chat import prompt_ids

        messages = [{"role": "user", "content": text or ""}]
        prompt, text = prompt_ids(network.tokenizer, messages), ""
    else:
        _warn_of_a_last_space(network, text)
    events = stream(network, prompt, sampling)
    if options.stream:
        from blockdiffusion.reports.terminal import show_stream

        (ids,) = prepare_prompts(network, prompt, 1, sampling.bos)
        show_stream(events, network.tokenizer, ids, text)
        return
    result = collect(network, events)
    if options.chat:
        result = _answers(network, result)
    _print_samples(result, sampling.seed, options.json_lines)


def _answers(network: Any, result: Any) -> Any:
    """Return samples whose texts leave out the prompts."""
    from blockdiffusion.text import whole_text

    rows = zip(result.sequences.tolist(), result.prompt_lengths, result.lengths, strict=True)
    texts = [whole_text(network.tokenizer, ids[int(a) : int(b)]) for ids, a, b in rows]
    return replace(result, texts=texts)


def _typed(text: str | None) -> str | None:
    """Decodes a text of the command line as UTF-8 if the locale (C) could not.

    A text that is not UTF-8 either is refused when it is tokenised.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        with contextlib.suppress(UnicodeDecodeError):
            return os.fsencode(error.object).decode()
    return text


def _text(name: str, given: str | None, file: Path | None) -> str | None:
    """What was given on the command line, or in a file."""
    if given is not None and file is not None:
        raise UserError(f"a {name} and --{name}-file are both given; give one of them")
    if file is None:
        return given
    from blockdiffusion.data.reading import read_text, text_suffix
    from blockdiffusion.data.sources import JSON_SUFFIXES

    if text_suffix(file) in JSON_SUFFIXES:
        raise UserError(
            f"the {name} file {file} is named as JSON, but a {name} file is read as one plain "
            "text: put the text alone into a .txt file"
        )
    text = read_text(file, f"the {name} file {file}")
    if _is_json(text):
        warn(
            f"the {name} file {file} holds JSON, which is read as it stands, as one plain text; if "
            "that is not meant, put the text alone into the file"
        )
    return text


def _is_json(text: str) -> bool:
    """Whether a text, or its first line, is an object or an array of JSON."""
    text = text.strip()
    for part in (text, text.partition("\n")[0]) if text[:1] in ("{", "[") else ():
        with contextlib.suppress(ValueError, RecursionError):
            return isinstance(json.loads(part), dict | list)
    return False


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How `chat` answers."""

    system: str | None = option(None, "What the model is told first; else the template's own.")
    sampling: Annotated[
        SamplingParams, all_but(SamplingParams, "num_samples", "stride", "bos", "use_cache")
    ] = field(default=SamplingParams(max_new_tokens=512))
    network: SamplerOptions = field(default=SamplerOptions())


@grouped
def chat(model: MODEL, options: ChatOptions) -> None:
    """Talk to a model that has a chat template; a line is a message, /reset begins anew."""
    network = options.network.load_optimized(model)
    from blockdiffusion.reports.terminal import show_stream
    from blockdiffusion.serving.conversation import Conversation

    talk = Conversation(network, _seeded(options.sampling), _typed(options.system))
    for message in _messages(f"{model}: /reset begins anew, /exit or Ctrl-D ends"):
        if message == "/reset":
            talk.reset()
            continue
        try:
            prompt, events = talk.ask(message)
            show_stream(events, network.tokenizer, prompt, "")
        except UserError as error:  # the conversation stays as it was
            say(f"blockdiff: {error}", err=True)
        except KeyboardInterrupt:
            say("\nstopped; the message is forgotten", err=True)


def _messages(about: str) -> Iterator[str]:
    """Yield what is typed, a line at a time, or the lines of standard input."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing)
        say(about, err=True)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else _line()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("", err=True)
            continue
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _line() -> str:
    raw = sys.stdin.buffer.readline(MOST_BYTES + 1)
    if not raw:
        raise EOFError
    if len(raw) > MOST_BYTES:
        raise UserError(f"a message is longer than {MOST_BYTES:,} bytes; give shorter ones")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UserError("a message is not UTF-8; give text in UTF-8") from None


@grouped
def generate(
    model: MODEL,
    prompts: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"prompt": ...}, {"messages": ...} or {"template": ...}.'),
    ],
    out: Annotated[Path, typer.Option(help="The results, as JSON lines.")],
    options: BatchOptions,
    network: SamplerOptions,
) -> None:
    """Sample many prompts from a file; resumes where it was stopped."""
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.runtime.distributed import process_group

    check_places(out)
    with process_group() as processes:
        with progress_bar("generate", quiet=not processes.is_first) as report:
            loaded = network.load_optimized(model)
            from blockdiffusion.serving.batch import run_batch

            count = run_batch(loaded, prompts, out, options, progress=report, processes=processes)
        if processes.is_first:
            say(f"{out}: {counted(count, 'sample')}")


@dataclass(frozen=True, kw_only=True)
class InfillOptions:
    """What `infill` fills, and how."""

    template: str | None = option(
        None,
        "Text with [MASK], or [MASK:5] for five tokens, where some is missing.",
        positional=True,
    )
    template_file: Path | None = option(None, "File with such a text.")
    sampling: Annotated[
        SamplingParams,
        all_but(SamplingParams, "max_new_tokens", "stride", "window", "eos", "use_cache"),
    ] = field(default=SamplingParams())
    json_lines: bool = option(False, JSON_LINES, flags="--json")
    network: SamplerOptions = field(default=SamplerOptions())


@grouped
def infill(model: MODEL, options: InfillOptions) -> None:
    """Fill what is missing in a text; a gap sees its own block and all that is before."""
    text = _text("template", _typed(options.template), options.template_file)
    if text is None:
        raise UserError("there is no template; give a text with [MASK] in it, or --template-file")
    network = options.network.load_optimized(model)
    from blockdiffusion.sampling import infill as fill

    sampling = _seeded(options.sampling)
    _print_samples(fill(network, text, sampling), sampling.seed, options.json_lines)


def _seeded(sampling: SamplingParams) -> SamplingParams:
    """With a fresh seed where none is given."""
    from blockdiffusion.runtime.seeding import fresh_seed

    return sampling if sampling.seed is not None else replace(sampling, seed=fresh_seed())


def _warn_of_a_last_space(network: Any, prompt: str | None) -> None:
    from blockdiffusion.text import goes_on_inside_a_word

    if prompt is not None and goes_on_inside_a_word(network.tokenizer, prompt):
        warn(
            "the prompt ends in a space, which this model's tokenizer keeps "
            "together with the word behind it, so the text goes on inside a word; leave the last "
            "space out"
        )


def _print_samples(result: Any, seed: int | None, json_lines: bool) -> None:
    for row in range(len(result.sequences)):
        length = int(result.lengths[row])
        ids = result.sequences[row, :length].tolist()
        text = None if result.texts is None else result.texts[row]
        if json_lines:
            values = {
                "text": text,
                "ids": ids,
                "prompt_tokens": int(result.prompt_lengths[row]),
                "nfe": int(result.nfe[row]),
                "tokens_per_forward": float(result.tokens_per_forward[row]),
                "seed": seed,
            }
            say(json.dumps(values))  # in ASCII: whole JSON on any terminal
        else:
            if len(result.sequences) > 1:
                say(f"--- sample {row + 1} of {len(result.sequences)}")
            say(" ".join(map(str, ids)) if text is None else text)


@dataclass(frozen=True, kw_only=True)
class LengthsOptions:
    """Which documents `lengths` measures."""

    sampling: Annotated[
        SamplingParams, only("num_samples", "max_new_tokens", *FILTERS, "window", "bos", "seed")
    ] = field(default=SamplingParams(num_samples=500, max_new_tokens=131_072, seed=0))
    batch_size: int = option(16, "Documents drawn together; a document depends on it.")
    files: Annotated[Outputs, only("json_file")] = field(default=Outputs())
    network: SamplerOptions = field(default=SamplerOptions())


@grouped
def lengths(model: MODEL, options: LengthsOptions) -> None:
    """How long documents become: tokens until a sampled EOS."""
    from blockdiffusion.evaluate.generation.lengths import document_lengths
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.evaluate.listing import length_lines
    from blockdiffusion.reports.terminal import progress_bar

    sampling, file = options.sampling, options.files.json_file
    options.files.check()
    network = options.network.load_optimized(model)
    with progress_bar("lengths") as report:
        found = document_lengths(
            network,
            sampling.num_samples,
            sampling.max_new_tokens,
            batch_size=options.batch_size,
            seed=sampling.seed or 0,
            journal=journal_beside(file),
            progress=report,
            **{name: getattr(sampling, name) for name in ("bos", *FILTERS, "window")},
        )
    write_json(file, found.to_dict() | {"model": model})
    remove_journal(file)
    say("\n".join(length_lines(found, model)))
