"""Commands that sample."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import (
    BOS,
    CACHE,
    DEVICE,
    EOS,
    FILTERS,
    JSON_FILE,
    JSON_LINES,
    MODEL,
    POLICY,
    SAMPLING_DTYPE,
    SEED,
    STRIDE,
    WINDOW,
    FilterOptions,
    PolicyOptions,
    grouped,
)
from blockdiffusion.cli.shared import check_places, load_sampler, warn, write_json
from blockdiffusion.errors import UserError
from blockdiffusion.escape import say


@grouped
def sample(
    model: MODEL,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to draw.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after the prompt.")] = 256,
    policy: PolicyOptions = POLICY,
    stride: STRIDE = None,
    filters: FilterOptions = FILTERS,
    window: WINDOW = None,
    bos: BOS = None,
    eos: EOS = True,
    cache: CACHE = True,
    seed: SEED = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show blocks as they fill in.")] = False,
    json_lines: JSON_LINES = False,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """Generate text, from nothing or after a prompt."""
    if stream and (json_lines or num_samples != 1):
        raise UserError("--stream shows one sample as text; leave out --json and --num-samples")
    text = _text("prompt", _typed(prompt), prompt_file)
    network = load_sampler(model, device, dtype)
    from blockdiffusion.sampling import finish, prepare_prompts
    from blockdiffusion.sampling import stream as events_of

    used_seed = _used(seed)
    prompts = prepare_prompts(network, text, num_samples, bos)
    _warn_of_a_last_space(network, text)
    events = events_of(
        network,
        prompts,
        max_new_tokens=max_new_tokens,
        bos=False,  # already put before the prompts
        eos=eos,
        **vars(policy),
        stride=stride,
        **vars(filters),
        use_cache=cache,
        window=window,
        seed=used_seed,
    )
    if stream:
        from blockdiffusion.reports.terminal import show_stream

        show_stream(events, network.tokenizer, prompts[0], text)
        return
    _print_samples(finish(network, events, [text]), used_seed, json_lines)


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
    return read_text(file, f"the {name} file {file}")


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
    num_samples: Annotated[int, typer.Option(help="Fillings to draw.")] = 1,
    policy: PolicyOptions = POLICY,
    filters: FilterOptions = FILTERS,
    bos: BOS = None,
    seed: SEED = None,
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

    used_seed = _used(seed)
    filled = fill(
        network,
        text,
        num_samples,
        bos=bos,
        seed=used_seed,
        **vars(policy),
        **vars(filters),
    )
    _print_samples(filled, used_seed, json_lines)


def _used(seed: int | None) -> int:
    """Returns the given seed, or a fresh one."""
    from blockdiffusion.runtime.seeding import fresh_seed

    return fresh_seed() if seed is None else seed


def _warn_of_a_last_space(network: Any, prompt: str | None) -> None:
    from blockdiffusion.text import goes_on_inside_a_word

    if prompt is not None and goes_on_inside_a_word(network.tokenizer, prompt):
        warn(
            "the prompt ends in a space, which this model's tokenizer keeps "
            "together with the word behind it, so the text goes on inside a word; leave the last "
            "space out"
        )


def _print_samples(result: Any, seed: int, json_lines: bool) -> None:
    import json

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
    num_samples: Annotated[int, typer.Option(help="Documents to sample.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a document, at most.")] = 131_072,
    batch_size: Annotated[
        int, typer.Option(help="Documents drawn together; a document depends on it.")
    ] = 16,
    filters: FilterOptions = FILTERS,
    window: WINDOW = None,
    bos: BOS = None,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
    json_file: JSON_FILE = None,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """How long documents become: tokens until a sampled EOS."""
    from blockdiffusion.evaluate.generation.lengths import document_lengths
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.reports.terminal import length_lines, progress_bar

    check_places(json_file)
    network = load_sampler(model, device, dtype)
    with progress_bar("lengths") as report:
        found = document_lengths(
            network,
            num_samples,
            max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            journal=journal_beside(json_file),
            progress=report,
            bos=bos,
            **vars(filters),
            window=window,
        )
    if json_file is not None:
        write_json(json_file, found.to_dict() | {"model": model})
        remove_journal(json_file)
    say("\n".join(length_lines(found, model)))
