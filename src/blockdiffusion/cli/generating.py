"""Commands that sample, and that judge samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import (
    BOS,
    CACHE,
    DEVICE,
    DTYPE,
    EOS,
    JSON_FILE,
    JSON_LINES,
    MODEL,
    POLICY,
    REMASK,
    SAMPLING_DTYPE,
    SCHEDULE,
    SEED,
    STEPS,
    STRIDE,
    TEMPERATURE,
    THRESHOLD,
    TOKENS_PER_STEP,
    TOP_K,
    TOP_P,
    TOP_P_RULE,
    WINDOW,
)
from blockdiffusion.cli.shared import check_places, device_of, load_model, load_sampler, write_json
from blockdiffusion.data.files import write_whole
from blockdiffusion.errors import UserError


def sample(
    model: MODEL,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to draw.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after the prompt.")] = 256,
    policy: POLICY = None,
    steps: STEPS = None,
    schedule: SCHEDULE = None,
    tokens_per_step: TOKENS_PER_STEP = None,
    threshold: THRESHOLD = None,
    remask: REMASK = None,
    stride: STRIDE = None,
    top_p: TOP_P = 1.0,
    top_p_rule: TOP_P_RULE = "transformers",
    top_k: TOP_K = None,
    temperature: TEMPERATURE = 1.0,
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
    from blockdiffusion.sampling import DoneEvent, collect, prepare_prompts
    from blockdiffusion.sampling import stream as events_of
    from blockdiffusion.terminal import show_stream

    if stream and (json_lines or num_samples != 1):
        raise UserError("--stream shows one sample as text; leave out --json and --num-samples")
    text = _text("prompt", prompt, prompt_file)
    network = load_sampler(model, device, dtype)
    generator, used_seed = _generator(seed)
    prompts = prepare_prompts(network, text, num_samples, bos)
    events = events_of(
        network,
        prompts,
        max_new_tokens=max_new_tokens,
        bos=False,  # already put before the prompts
        eos=eos,
        policy=policy,
        steps=steps,
        schedule=schedule,
        tokens_per_step=tokens_per_step,
        threshold=threshold,
        remask=remask,
        stride=stride,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        top_p_rule=top_p_rule,  # type: ignore[arg-type]  # checked there
        use_cache=cache,
        window=window,
        generator=generator,
    )
    if stream:
        show_stream(events, network.tokenizer, prompts[0])
        return
    done = next(event for event in events if isinstance(event, DoneEvent))
    _print_samples(collect(network, done), used_seed, json_lines)


def _text(name: str, given: str | None, file: Path | None) -> str | None:
    """What was given on the command line, or in a file."""
    if given is not None and file is not None:
        raise UserError(f"a {name} and --{name}-file are both given; give one of them")
    if file is None:
        return given
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"the {name} file {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the {name} file {file} is not UTF-8 text (byte {error.start})") from None


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
    policy: POLICY = None,
    steps: STEPS = None,
    schedule: SCHEDULE = None,
    tokens_per_step: TOKENS_PER_STEP = None,
    threshold: THRESHOLD = None,
    remask: REMASK = None,
    top_p: TOP_P = 1.0,
    top_p_rule: TOP_P_RULE = "transformers",
    top_k: TOP_K = None,
    temperature: TEMPERATURE = 1.0,
    bos: BOS = None,
    seed: SEED = None,
    json_lines: JSON_LINES = False,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """Fill what is missing in a text; a gap sees its own block and all that is before."""
    from blockdiffusion.sampling import infill as fill

    text = _text("template", template, template_file)
    if text is None:
        raise UserError("there is no template; give a text with [MASK] in it, or --template-file")
    network = load_sampler(model, device, dtype)
    generator, used_seed = _generator(seed)
    filled = fill(
        network,
        text,
        num_samples,
        bos=bos,
        generator=generator,
        policy=policy,
        steps=steps,
        schedule=schedule,
        tokens_per_step=tokens_per_step,
        threshold=threshold,
        remask=remask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        top_p_rule=top_p_rule,  # type: ignore[arg-type]  # checked there
    )
    _print_samples(filled, used_seed, json_lines)


def _generator(seed: int | None) -> tuple[Any, int]:
    """A source of randomness, and its seed: the given one, or any."""
    import torch

    generator = torch.Generator()
    used = generator.seed() if seed is None else seed
    return generator.manual_seed(used), used


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
            typer.echo(json.dumps(values, ensure_ascii=False))
        else:
            if len(result.sequences) > 1:
                typer.echo(f"--- sample {row + 1} of {len(result.sequences)}")
            typer.echo(" ".join(map(str, ids)) if text is None else text)


def lengths(
    model: MODEL,
    num_samples: Annotated[int, typer.Option(help="Documents to sample.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a document, at most.")] = 131_072,
    batch_size: Annotated[
        int, typer.Option(help="Documents drawn together; a document depends on it.")
    ] = 16,
    top_p: TOP_P = 1.0,
    top_p_rule: TOP_P_RULE = "transformers",
    top_k: TOP_K = None,
    temperature: TEMPERATURE = 1.0,
    window: WINDOW = None,
    bos: BOS = None,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
    json_file: JSON_FILE = None,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """How long documents become: tokens until a sampled EOS."""
    from blockdiffusion.evaluate.generation.lengths import document_lengths
    from blockdiffusion.evaluate.journal import journal_beside
    from blockdiffusion.terminal import length_lines, progress_bar

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
            top_p=top_p,
            top_p_rule=top_p_rule,
            top_k=top_k,
            temperature=temperature,
            window=window,
        )
    if json_file is not None:
        write_json(json_file, found.to_dict() | {"model": model})
    typer.echo("\n".join(length_lines(found, model)))


def generate_eval(
    judge: Annotated[
        str, typer.Option(help="Hugging Face causal language model, or one of ours; not MODEL.")
    ],
    model: Annotated[
        str | None, typer.Argument(help="Model under test; may be left out with --samples-from.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to judge.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a sample, at most.")] = 256,
    batch_size: Annotated[
        int, typer.Option(help="Samples drawn together; a sample depends on it.")
    ] = 16,
    policy: POLICY = None,
    steps: STEPS = None,
    schedule: SCHEDULE = None,
    tokens_per_step: TOKENS_PER_STEP = None,
    threshold: THRESHOLD = None,
    remask: REMASK = None,
    top_p: TOP_P = 1.0,
    top_p_rule: TOP_P_RULE = "transformers",
    top_k: TOP_K = None,
    temperature: TEMPERATURE = 1.0,
    window: WINDOW = None,
    bos: BOS = None,
    eos: EOS = True,
    cache: CACHE = True,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    min_entropy: Annotated[
        float | None,
        typer.Option(help="Guard: reject samples whose tokens have less entropy; the authors: 4."),
    ] = None,
    entropy_window: Annotated[
        int, typer.Option(help="Last tokens that --min-entropy looks at, after every block.")
    ] = 256,
    samples_from: Annotated[
        Path | None, typer.Option(help="Judge the samples of this JSON lines file; draw none.")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Real text beside it: prepared data, or text files; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a prepared --reference.")] = "valid",
    mauve: Annotated[
        bool, typer.Option("--mauve", help="MAUVE against --reference; needs mauve-text.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the judge's windows; all it can read by default.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between two windows; half the context by default.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name in tables and pictures.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write the result here, and the samples beside it; once stopped, goes on there.",
        ),
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="One line of a table.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The same for a page.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it here, as SVG.")] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Generated text under a judge: perplexity, entropy, diversity, repetition, length, cost."""
    from blockdiffusion.evaluate.generation.run import GenerateEval, generate_and_judge
    from blockdiffusion.evaluate.generation.samples import DrawOptions
    from blockdiffusion.ranks import joined
    from blockdiffusion.terminal import generation_lines, progress_bar

    check_places(json_file, csv_file, markdown, plot)
    options = GenerateEval(
        model=model,
        judge=judge,
        draw=DrawOptions(
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            bos=bos,
            eos=eos,
            policy=policy,
            steps=steps,
            schedule=schedule,
            tokens_per_step=tokens_per_step,
            threshold=threshold,
            remask=remask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            top_p_rule=top_p_rule,  # type: ignore[arg-type]  # checked there
            use_cache=cache,
            window=window,
        ),
        min_entropy=min_entropy,
        entropy_window=entropy_window,
        samples_from=samples_from,
        reference=tuple(reference or ()),
        split=split,
        mauve=mauve,
        context=context,
        stride=stride,
        label=label,
    )
    with joined() as team, progress_bar("generate-eval", quiet=not team.is_first) as report:
        result = generate_and_judge(
            options,
            load_model=lambda name: load_model(name, device, dtype),
            device=device_of(device),
            beside=json_file,
            progress=report,
            team=team,
        )
    if result is None:
        return
    values = result.to_dict()
    if json_file is not None:
        write_json(json_file, values)
    _write_generation_tables([values], [], csv_file, markdown, plot)
    typer.echo("\n".join(generation_lines(values)))


def generate_compare(
    results: Annotated[
        list[Path], typer.Argument(help="What `blockdiff generate-eval --json` wrote.")
    ],
    csv_file: Annotated[Path | None, typer.Option("--csv", help="A line for each.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The table for a page.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Perplexity against entropy, and lengths, as SVG.")
    ] = None,
) -> None:
    """Results of generate-eval side by side; all under the same judge."""
    from blockdiffusion.evaluate.generation.table import (
        check_comparable,
        markdown_text,
        read_result,
    )

    read = [read_result(path) for path in results]
    notes = check_comparable(read, [str(path) for path in results])
    _write_generation_tables(read, notes, csv_file, markdown, plot)
    typer.echo(markdown_text(read, notes), nl=False)


def _write_generation_tables(
    results: list[Any],
    notes: list[str],
    csv_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
) -> None:
    from blockdiffusion.evaluate.generation.picture import generation_picture
    from blockdiffusion.evaluate.generation.table import csv_text, markdown_text

    if csv_file is not None:
        write_whole(csv_file, csv_text(results).encode())
    if markdown is not None:
        write_whole(markdown, markdown_text(results, notes).encode())
    if plot is not None:
        write_whole(plot, generation_picture(results).encode())
