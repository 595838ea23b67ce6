"""The command `blockdiff`.

Only light modules are imported here; each command imports what it needs, so that `--help` answers
at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.data.files import storage_error, write_whole
from blockdiffusion.errors import UserError

app = typer.Typer(
    name="blockdiff",
    help="Train, measure and sample block diffusion language models.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# An unknown option or a missing argument; newer typer versions carry their own click.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]

MODEL = Annotated[str, typer.Argument(help="Model or run directory, or a Hugging Face id.")]
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
DTYPE = Annotated[str, typer.Option(help="Weights: auto (as saved), float32, float64 or bf16.")]
BOS = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Position 0 is a given BOS; by default as in training."),
]
# Of measurements.
JSON_FILE = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result here; once stopped, it goes on from there."),
]
SAMPLES = Annotated[int, typer.Option(help="Independent draws of the masks.")]
ORDERS = Annotated[int, typer.Option(help="K of the K-order bound, for orders.")]
MASK_SEED = Annotated[int, typer.Option(help="Of the masks.")]

# How to sample: of `sample` and `generate-eval`.
POLICY = Annotated[
    str | None,
    typer.Option(help="first-hitting or ancestral; SEDD: analytic; by default the model's."),
]
STEPS = Annotated[int | None, typer.Option(help="Steps per block, for ancestral and analytic.")]
SCHEDULE = Annotated[
    str | None, typer.Option(help="Noise schedule of the steps: linear, cosine, square, ...")
]
STRIDE = Annotated[
    int | None,
    typer.Option(help="Models of one block: new tokens of each slide beyond L; L/2 by default."),
]
TOP_P = Annotated[float, typer.Option(help="Nucleus, in (0, 1]; 1 keeps all.")]
TOP_P_RULE = Annotated[
    str, typer.Option(help="transformers (keeps the token that crosses) or authors (drops it).")
]
TOP_K = Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")]
TEMPERATURE = Annotated[float, typer.Option(help="Above 0.")]
WINDOW = Annotated[
    int | None, typer.Option(help="A token sees the last WINDOW tokens; constant memory.")
]
EOS = Annotated[bool, typer.Option(help="End at a sampled EOS.")]
CACHE = Annotated[bool, typer.Option(help="Keep keys and values of finished blocks.")]


def _version(wanted: bool) -> None:
    if wanted:
        from blockdiffusion import __version__

        typer.echo(f"blockdiff {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text files, folders, .jsonl, .parquet, a set by name (blockdiff datasets) or "
            "NAME=PATH, Hugging Face data sets, python-docs or python-source."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the prepared data.")],
    tokenizer: Annotated[
        str, typer.Option(help="bpe:SIZE (trained here), byte, or a Hugging Face name or path.")
    ] = "bpe:2048",
    seq_len: Annotated[int, typer.Option(help="L, tokens of a row.")] = 128,
    packing: Annotated[
        str, typer.Option(help="wrap (documents one after another) or document (one a row).")
    ] = "wrap",
    row_bos: Annotated[
        bool, typer.Option(help="Begin every row with a BOS, which is given.")
    ] = False,
    row_eos: Annotated[bool, typer.Option(help="End every row with an EOS.")] = False,
    document_eos: Annotated[bool, typer.Option(help="Put an EOS after every document.")] = True,
    valid: Annotated[
        list[str] | None, typer.Option(help="Source of the validation split; may be repeated.")
    ] = None,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of documents held out where no --valid is given.")
    ] = 0.05,
    field: Annotated[
        str, typer.Option(help="Field of the text in JSON lines and tables.")
    ] = "text",
    documents: Annotated[
        str, typer.Option(help="Documents of a text file: auto, file, line or blank-line.")
    ] = "auto",
    document_bytes: Annotated[
        int, typer.Option(help="Size above which auto cuts a text file at a blank line.")
    ] = 65536,
    detokenize: Annotated[
        str,
        typer.Option(
            help="none (a set by name brings its own), wikitext, wikitext-paper, ptb, lm1b, "
            "lambada or scientific-papers."
        ),
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the train/validation split.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes; 0 for one per core.")] = 0,
) -> None:
    """Tokenise text and pack it into rows for training; goes on where it was stopped."""
    from blockdiffusion.data.options import PrepareOptions
    from blockdiffusion.data.packing import prepare as run
    from blockdiffusion.terminal import progress_bar

    options = PrepareOptions(
        seq_len=seq_len,
        tokenizer=tokenizer,
        packing=packing,
        row_bos=row_bos,
        row_eos=row_eos,
        document_eos=document_eos,
        valid_fraction=valid_fraction,
        valid=tuple(valid or ()),
        field=field,
        documents=documents,
        document_bytes=document_bytes,
        detokenize=detokenize,
        seed=seed,
        num_workers=workers,
    )
    with progress_bar("prepare") as report:
        manifest = run(sources, out, options, report)
    typer.echo(f"{out}: V = {manifest.vocab_size}, L = {manifest.seq_len}")
    for name, split in manifest.splits.items():
        typer.echo(
            f"  {name:<6}{split.documents:>10,} documents  {split.tokens:>13,} tokens  "
            f"{split.bytes:>14,} bytes  {split.rows:>9,} rows"
        )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or a run's config.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as often as you like.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the recipe's out.")] = False,
) -> None:
    """Train a model as a recipe says; goes on where it was stopped with --resume."""
    from blockdiffusion.config import load_recipe, run_training
    from blockdiffusion.train.loop import Interrupted

    parsed = load_recipe(recipe, overrides or [])
    try:
        state = run_training(parsed, resume=resume)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(stop.exit_code) from None
    typer.echo(
        f"{parsed.out}: {state.step} steps in {state.seconds:.0f} s; model in {parsed.out}/model"
    )


@app.command("eval")
def evaluate(
    model: MODEL,
    data: Annotated[Path, typer.Option(help="Directory that `blockdiff prepare` made.")],
    split: Annotated[str, typer.Option(help="Split of the data.")] = "valid",
    estimator: Annotated[
        str,
        typer.Option(
            help="auto (the least noise), exact (enumerates; S <= 8), orders (a tighter bound), or "
            "a law of masks: complement, count, bernoulli, bernoulli:cosine, ..."
        ),
    ] = "auto",
    samples: SAMPLES = 8,
    orders: ORDERS = 8,
    target_stderr: Annotated[
        float | None, typer.Option(help="Draw on until the noise error is at most this.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Score only the first rows.")] = None,
    bos: BOS = None,
    seed: MASK_SEED = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    per_row: Annotated[
        bool, typer.Option("--per-row", help="Each row's value in --json, to compare in pairs.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="Put it into the model's card.")] = False,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Likelihood of held-out text: nats per token, perplexity, bits per byte, with error bars."""
    from blockdiffusion.data.manifest import Manifest
    from blockdiffusion.evaluate.likelihood import likelihood
    from blockdiffusion.evaluate.prepared import evaluation_facts, read_rows
    from blockdiffusion.release import check_card, record_evaluation
    from blockdiffusion.seeding import generator
    from blockdiffusion.terminal import likelihood_lines, progress_bar

    if per_row and json_file is None:
        raise UserError("--per-row says what --json holds; give --json FILE, too")
    if card:
        check_card(model)
    network = _load(model, device, dtype)
    text = read_rows(data, split, network, rows, bos)
    with progress_bar("eval") as report:
        result = likelihood(
            network,
            text.batch.ids_BL,
            estimator=estimator,
            samples=samples,
            orders=orders,
            target_stderr=target_stderr,
            bos=text.bos,
            valid=text.batch.valid_BL,
            num_bytes=text.num_bytes,
            generator=generator(seed, "likelihood"),
            progress=lambda done, total: report(estimator, done, total),
        )
    if json_file is not None:
        values = result.to_dict(rows=per_row)
        if per_row:
            values["tokens_per_row"] = text.free_tokens().tolist()
        _write_json(json_file, values | {"model": model, "data": str(data), "split": split})
    if card:
        facts = evaluation_facts(result, Manifest.load(data), data, split, seed=seed)
        record_evaluation(model, facts)
    typer.echo("\n".join(likelihood_lines(result, f"{model} on {data} ({split})")))


@app.command("zero-shot")
def zero_shot(
    model: MODEL,
    suite: Annotated[str, typer.Option(help="Which sets: paper (its table 5).")] = "paper",
    only: Annotated[
        list[str] | None, typer.Option(help="A set of the suite; may be repeated.")
    ] = None,
    local: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH (or NAME:split=PATH), a set's local files; may be repeated."),
    ] = None,
    packing: Annotated[
        str, typer.Option(help="wrap (rows, as the paper) or document (windows with a stride).")
    ] = "wrap",
    context: Annotated[
        int | None, typer.Option(help="Tokens of a row or window; by default the model's.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window; half of them by default.")
    ] = None,
    frame: Annotated[
        str, typer.Option(help="Ends of a row: auto (as in training), none, bos or bos-eos.")
    ] = "auto",
    document_eos: Annotated[bool, typer.Option(help="Put an EOS after every document.")] = False,
    max_documents: Annotated[
        int | None, typer.Option(help="Read only the first documents of each set.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Score only the first rows of each set.")] = None,
    estimator: Annotated[
        str, typer.Option(help="auto, exact, orders or a law of masks, as for eval.")
    ] = "auto",
    samples: SAMPLES = 8,
    orders: ORDERS = 8,
    target_stderr: Annotated[
        float | None, typer.Option(help="Draw on until a set's noise error is at most this.")
    ] = None,
    seed: MASK_SEED = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="For a model without one: a Hugging Face name or path.")
    ] = None,
    json_file: JSON_FILE = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a table here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Zero-shot perplexity on the paper's sets, with error bars and conventions."""
    from blockdiffusion.evaluate.journal import journal_beside
    from blockdiffusion.evaluate.scoring import ScoreOptions
    from blockdiffusion.evaluate.zero_shot.suite import ZeroShotOptions, measure_zero_shot
    from blockdiffusion.evaluate.zero_shot.table import (
        zero_shot_csv,
        zero_shot_lines,
        zero_shot_markdown,
    )
    from blockdiffusion.terminal import progress_bar

    options = ZeroShotOptions(
        suite=suite,
        only=tuple(only or ()),
        local=tuple(local or ()),
        packing=packing,
        context=context,
        stride=stride,
        frame=frame,
        document_eos=document_eos,
        max_documents=max_documents,
        rows=rows,
        score=ScoreOptions(
            estimator=estimator,
            samples=samples,
            orders=orders,
            target_stderr=target_stderr,
            seed=seed,
        ),
    )
    _check_places(json_file, csv_file, markdown)
    journal = journal_beside(json_file)
    network = _load(model, device, dtype)
    if tokenizer is not None:
        from blockdiffusion.data.tokenizers import load_tokenizer

        network.tokenizer = load_tokenizer(tokenizer)
    with progress_bar("zero-shot") as report:
        table = measure_zero_shot(network, options, report, journal)
    if json_file is not None:
        _write_json(json_file, table.to_dict() | {"model": model})
    if csv_file is not None:
        write_whole(csv_file, zero_shot_csv(table).encode())
    if markdown is not None:
        write_whole(markdown, zero_shot_markdown(table, model).encode())
    typer.echo("\n".join(zero_shot_lines(table, model)))


@app.command()
def references(
    data: Annotated[Path, typer.Argument(help="Directory that `blockdiff prepare` made.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Model or run to put beside them; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split whose rows are coded.")] = "valid",
    rows: Annotated[int | None, typer.Option(help="Code only the first rows.")] = None,
    order: Annotated[int, typer.Option(help="Longest n-gram; shorter ones are listed too.")] = 6,
    train_rows: Annotated[
        int | None, typer.Option(help="Learn from the first training rows only.")
    ] = None,
    bos: BOS = None,
    estimator: Annotated[
        str, typer.Option(help="Of models: auto, exact, orders or a law of masks, as for eval.")
    ] = "auto",
    samples: SAMPLES = 8,
    orders: ORDERS = 8,
    seed: MASK_SEED = 0,
    json_file: JSON_FILE = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Bits per byte of n-gram models and compressors on held-out rows, beside a model's."""
    from blockdiffusion.evaluate.journal import journal_beside
    from blockdiffusion.evaluate.references.coders import CoderOptions, compare_coders
    from blockdiffusion.evaluate.references.table import coders_markdown
    from blockdiffusion.evaluate.scoring import ScoreOptions
    from blockdiffusion.terminal import progress_bar

    options = CoderOptions(
        split=split,
        rows=rows,
        order=order,
        train_rows=train_rows,
        bos=bos,
        score=ScoreOptions(estimator=estimator, samples=samples, orders=orders, seed=seed),
    )
    _check_places(json_file, markdown)
    journal = journal_beside(json_file)
    networks = {name: _load(name, device, dtype) for name in models or ()}
    with progress_bar("references") as report:
        table = compare_coders(data, options, networks, report, journal)
    page = coders_markdown(table, f"{data} ({split})")
    if json_file is not None:
        _write_json(json_file, table.to_dict() | {"data": str(data)})
    if markdown is not None:
        write_whole(markdown, page.encode())
    typer.echo(page, nl=False)


@app.command()
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
    dtype: DTYPE = "auto",
) -> None:
    """How long documents become: tokens until a sampled EOS."""
    from blockdiffusion.evaluate.generation.lengths import document_lengths
    from blockdiffusion.evaluate.journal import journal_beside
    from blockdiffusion.terminal import length_lines, progress_bar

    _check_places(json_file)
    network = _load(model, device, dtype)
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
        _write_json(json_file, found.to_dict() | {"model": model})
    typer.echo("\n".join(length_lines(found, model)))


@app.command()
def datasets() -> None:
    """List the data sets that are known by name: splits, sources, licences."""
    from blockdiffusion.data.registry import set_lines

    typer.echo("\n".join(set_lines()))


@app.command()
def variance(
    model: MODEL,
    data: Annotated[Path, typer.Option(help="Directory that `blockdiff prepare` made.")],
    split: Annotated[str, typer.Option(help="Split of the data.")] = "valid",
    estimators: Annotated[
        list[str] | None,
        typer.Option(help="A law of masks, such as count or bernoulli[0.3,0.8]; may be repeated."),
    ] = None,
    block_sizes: Annotated[str, typer.Option(help="Every S to measure at.")] = "1,4,8,16",
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 16,
    batches: Annotated[int, typer.Option(help="Batches of different rows.")] = 4,
    replicates: Annotated[int, typer.Option(help="Draws of the masks of every batch.")] = 16,
    gradients: Annotated[bool, typer.Option(help="Measure the gradient, too.")] = True,
    seed: MASK_SEED = 0,
    bos: BOS = None,
    json_file: JSON_FILE = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table here, as SVG.")] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Variance of the bound and of its gradient, for many estimators and block sizes."""
    from blockdiffusion.evaluate.journal import journal_beside
    from blockdiffusion.evaluate.prepared import read_rows
    from blockdiffusion.evaluate.variance.picture import variance_picture
    from blockdiffusion.evaluate.variance.table import (
        DEFAULT_ESTIMATORS,
        VarianceOptions,
        measure_variance,
    )
    from blockdiffusion.terminal import progress_bar, variance_lines

    options = VarianceOptions(
        estimators=tuple(estimators or DEFAULT_ESTIMATORS),
        block_sizes=_sizes(block_sizes),
        batch_size=batch_size,
        batches=batches,
        replicates=replicates,
        gradients=gradients,
        seed=seed,
    )
    _check_places(json_file, plot)
    journal = journal_beside(json_file)
    network = _load(model, device, dtype)
    text = read_rows(data, split, network, options.rows, bos)
    with progress_bar("variance") as report:
        table = measure_variance(network, text, options, report, journal)
    what = f"{model} on {data} ({split})"
    if json_file is not None:
        _write_json(
            json_file, table.to_dict() | {"model": model, "data": str(data), "split": split}
        )
    if plot is not None:
        write_whole(plot, variance_picture(table, what).encode())
    typer.echo("\n".join(variance_lines(table, what)))


@app.command()
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
    stride: STRIDE = None,
    top_p: TOP_P = 1.0,
    top_p_rule: TOP_P_RULE = "transformers",
    top_k: TOP_K = None,
    temperature: TEMPERATURE = 1.0,
    window: WINDOW = None,
    bos: BOS = None,
    eos: EOS = True,
    cache: CACHE = True,
    seed: Annotated[int | None, typer.Option(help="For a draw that can be repeated.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show blocks as they fill in.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a sample.")] = False,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Generate text, from nothing or after a prompt."""
    import torch

    from blockdiffusion.sampling import DoneEvent, collect, prepare_prompts
    from blockdiffusion.sampling import stream as events_of
    from blockdiffusion.terminal import show_stream

    if stream and (json_lines or num_samples != 1):
        raise UserError("--stream shows one sample as text; leave out --json and --num-samples")
    text = _prompt(prompt, prompt_file)
    network = _load(model, device, dtype)
    generator = torch.Generator()
    used_seed = generator.seed() if seed is None else seed
    generator.manual_seed(used_seed)
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


@app.command("generate-eval")
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
    from blockdiffusion.terminal import generation_lines, progress_bar

    _check_places(json_file, csv_file, markdown, plot)
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
    with progress_bar("generate-eval") as report:
        result = generate_and_judge(
            options,
            load_model=lambda name: _load(name, device, dtype),
            device=_device(device),
            beside=json_file,
            progress=report,
        )
    values = result.to_dict()
    if json_file is not None:
        _write_json(json_file, values)
    _write_generation_tables([values], [], csv_file, markdown, plot)
    typer.echo("\n".join(generation_lines(values)))


@app.command("generate-compare")
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


@app.command()
def reproduce(
    tables: Annotated[list[str], typer.Argument(metavar="TABLE...", help="T1 to T8.")],
    scale: Annotated[
        str, typer.Option(help="tiny (two CPU cores), small (one GPU for hours) or paper.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH, a set's local files; may be repeated.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="For T7: a causal language model instead of the scale's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for everything; runs/reproduce-SCALE by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the steps, their sizes and what is there.")
    ] = False,
) -> None:
    """Rebuild tables of the paper: train, measure and compare; goes on where it was stopped."""
    from blockdiffusion.reproduce import plan_tables
    from blockdiffusion.reproduce import reproduce as run
    from blockdiffusion.reproduce.listing import plan_lines

    place = Path("runs") / f"reproduce-{scale}" if out is None else out
    plan = plan_tables(tables, scale, place, data or (), judge)
    if dry_run:
        typer.echo("\n".join(plan_lines(plan)))
        return
    for made in run(plan, lambda line: typer.echo(line, err=True)):
        typer.echo(made.markdown.read_text())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a training run.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What `blockdiff eval --json` wrote; RUN/eval.json if there."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html by default.")] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to draw for the page.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each sample.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Write one self-contained page about a run: curves, mask, trace, samples, numbers."""
    from blockdiffusion.evaluate.report.run import report_run

    page = report_run(
        run,
        evaluation=evaluation,
        out=out,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    typer.echo(f"{page}")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Lightning .ckpt, model or run directory, or a Hugging Face id.")
    ],
    out: Annotated[Path, typer.Option(help="New directory for the model.")],
    to: Annotated[str, typer.Option(help="blockdiffusion, or bd3lm (published).")] = (
        "blockdiffusion"
    ),
    weights: Annotated[
        str, typer.Option(help="Of a .ckpt: ema (the moving average) or raw (as trained).")
    ] = "ema",
    kind: Annotated[
        str | None, typer.Option(help="Of a .ckpt that does not say: mdlm, sedd, ar or bd3lm.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="S, of a bd3lm .ckpt that does not say.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="L, of a .ckpt that does not say.")] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Heads, of a .ckpt that does not say.")
    ] = None,
    mask_id: Annotated[
        int | None, typer.Option(help="Mask token of a .ckpt, where it is not the last id.")
    ] = None,
    noise_eps: Annotated[
        float | None, typer.Option(help="Of a sedd .ckpt: 0.001 for the published weights.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Name or path; by default what the source holds.")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Position 0 is a given BOS; by default as it says."),
    ] = None,
) -> None:
    """Turn a checkpoint into a model directory with tokenizer and model card."""
    from blockdiffusion.models.lightning import LightningOptions
    from blockdiffusion.release import convert as run

    options = LightningOptions(
        weights=weights,  # type: ignore[arg-type]  # checked there
        kind=kind,
        block_size=block_size,
        seq_len=seq_len,
        num_heads=num_heads,
        mask_id=mask_id,
        noise_eps=noise_eps,
    )
    made = run(
        source,
        out,
        to=to,  # type: ignore[arg-type]  # checked there
        lightning=options,
        tokenizer=tokenizer,
        bos=bos,
    )
    config = made.model.config
    typer.echo(
        f"{out}: {config.objective}, S = {config.block_size}, L = {config.seq_len}, "
        f"V = {config.vocab_size}, mask {config.mask_id}"
    )
    for note in made.notes:
        typer.echo(f"  {note}")


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="Model or run directory.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
) -> None:
    """Upload a model with its card and tokenizer to the Hugging Face hub."""
    from blockdiffusion.release import push as run

    typer.echo(run(directory, repo_id, private=private))


# --- shared by the commands --------------------------------------------------------------------


def _device(name: str) -> Any:
    from blockdiffusion.devices import select_device

    return select_device(name, "--device")


def _load(model: str, device: str, dtype: str) -> Any:
    import torch

    from blockdiffusion.models.formats import load

    dtypes = {
        "auto": None,
        "float32": torch.float32,
        "float64": torch.float64,
        "bf16": torch.bfloat16,
    }
    if dtype not in dtypes:
        raise UserError(f"--dtype is {dtype!r}; choose one of {', '.join(dtypes)}")
    return load(model, device=_device(device), dtype=dtypes[dtype])


def _prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    if prompt is not None and prompt_file is not None:
        raise UserError("--prompt and --prompt-file are both given; give one of them")
    if prompt_file is None:
        return prompt
    try:
        return prompt_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"the prompt file {prompt_file} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt file {prompt_file} is not UTF-8 text (byte {error.start})"
        ) from None


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


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--block-sizes is {text!r}; give whole numbers with commas between, as in 1,4,16"
        ) from None


def _check_places(*paths: Path | None) -> None:
    """Fails now, not after the measurement, where one of the files cannot be written."""
    import tempfile

    for path in filter(None, paths):
        if path.is_dir():
            raise UserError(f"{path} is a directory; give the name of a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise storage_error(error, path) from error


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


def _write_json(path: Path, values: dict[str, Any]) -> None:
    import json

    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def main() -> None:
    """Runs the command line; a user's mistake is one sentence and exit code 2."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UserError as error:
        _fail(str(error))
    except USAGE_ERROR as error:
        _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("blockdiff: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except PermissionError as error:
        _fail(f"no permission for {error.filename}: choose another place or change its rights")


def _fail(message: str) -> None:
    typer.echo(f"blockdiff: error: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
