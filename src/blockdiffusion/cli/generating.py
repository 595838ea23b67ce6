"""Commands that sample."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import (
    DEVICE,
    FILTERS,
    JSON_FILE,
    JSON_LINES,
    MODEL,
    SAMPLING_DTYPE,
    Only,
    all_but,
    grouped,
)
from blockdiffusion.cli.shared import check_places, load_sampler, warn, write_json
from blockdiffusion.errors import UserError
from blockdiffusion.escape import say
from blockdiffusion.sampling.params import SamplingParams

SAMPLE = SamplingParams(max_new_tokens=256)
INFILL = SamplingParams()
LENGTHS = SamplingParams(num_samples=500, max_new_tokens=131_072, seed=0)


@grouped
def sample(
    model: MODEL,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue.")
    ] = None,
    sampling: SamplingParams = SAMPLE,
    stream: Annotated[bool, typer.Option("--stream", help="Show blocks as they fill in.")] = False,
    json_lines: JSON_LINES = False,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """Generate text, from nothing or after a prompt."""
    if stream and (json_lines or sampling.num_samples != 1):
        raise UserError("--stream shows one sample as text; leave out --json and --num-samples")
    text = _text("prompt", _typed(prompt), prompt_file)
    network = load_sampler(model, device, dtype)
    from blockdiffusion.sampling import collect, prepare_prompts
    from blockdiffusion.sampling import stream as events_of

    sampling = _seeded(sampling)
    _warn_of_a_last_space(network, text)
    events = events_of(network, text, sampling)
    if stream:
        from blockdiffusion.reports.terminal import show_stream

        (ids,) = prepare_prompts(network, text, 1, sampling.bos)
        show_stream(events, network.tokenizer, ids, text)
        return
    _print_samples(collect(network, events), sampling.seed, json_lines)


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


@grouped
def infill(
    model: MODEL,
    template: Annotated[
        str | None,
        typer.Argument(
            help="Text with [MASK], or [MASK:5] for five tokens, where some is missing."
        ),
    ] = None,
    template_file: Annotated[Path | None, typer.Option(help="File with such a text.")] = None,
    sampling: Annotated[
        SamplingParams, all_but("max_new_tokens", "stride", "window", "eos", "use_cache")
    ] = INFILL,
    json_lines: JSON_LINES = False,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """Fill what is missing in a text; a gap sees its own block and all that is before."""
    text = _text("template", _typed(template), template_file)
    if text is None:
        raise UserError("there is no template; give a text with [MASK] in it, or --template-file")
    network = load_sampler(model, device, dtype)
    from blockdiffusion.sampling import infill as fill

    sampling = _seeded(sampling)
    _print_samples(fill(network, text, sampling), sampling.seed, json_lines)


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


@grouped
def lengths(
    model: MODEL,
    sampling: Annotated[
        SamplingParams, Only(("num_samples", "max_new_tokens", *FILTERS, "window", "bos", "seed"))
    ] = LENGTHS,
    batch_size: Annotated[
        int, typer.Option(help="Documents drawn together; a document depends on it.")
    ] = 16,
    json_file: JSON_FILE = None,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """How long documents become: tokens until a sampled EOS."""
    from blockdiffusion.evaluate.generation.lengths import document_lengths
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.evaluate.listing import length_lines
    from blockdiffusion.reports.terminal import progress_bar

    check_places(json_file)
    network = load_sampler(model, device, dtype)
    with progress_bar("lengths") as report:
        found = document_lengths(
            network,
            sampling.num_samples,
            sampling.max_new_tokens,
            batch_size=batch_size,
            seed=sampling.seed or 0,
            journal=journal_beside(json_file),
            progress=report,
            **{name: getattr(sampling, name) for name in ("bos", *FILTERS, "window")},
        )
    write_json(json_file, found.to_dict() | {"model": model})
    remove_journal(json_file)
    say("\n".join(length_lines(found, model)))
