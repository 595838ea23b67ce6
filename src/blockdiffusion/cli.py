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
            help="Text files, folders, .jsonl, .parquet, Hugging Face data sets, or python-docs."
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
    detokenize: Annotated[str, typer.Option(help="none, or wikitext to undo its marks.")] = "none",
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
    samples: Annotated[int, typer.Option(help="Independent draws of the masks.")] = 8,
    orders: Annotated[int, typer.Option(help="K of the K-order bound, for orders.")] = 8,
    target_stderr: Annotated[
        float | None, typer.Option(help="Draw on until the noise error is at most this.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Score only the first rows.")] = None,
    bos: BOS = None,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Likelihood of held-out text: nats per token, perplexity, bits per byte, with error bars."""
    from blockdiffusion.evaluate.likelihood import likelihood
    from blockdiffusion.evaluate.prepared import read_rows
    from blockdiffusion.seeding import generator
    from blockdiffusion.terminal import likelihood_lines, progress_bar

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
        _write_json(
            json_file, result.to_dict() | {"model": model, "data": str(data), "split": split}
        )
    typer.echo("\n".join(likelihood_lines(result, f"{model} on {data} ({split})")))


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
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    bos: BOS = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result here; once stopped, it goes on from there."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table here, as SVG.")] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Variance of the bound and of its gradient, for many estimators and block sizes."""
    from blockdiffusion.evaluate.prepared import read_rows
    from blockdiffusion.evaluate.variance_picture import variance_picture
    from blockdiffusion.evaluate.variance_table import (
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
    for path in (json_file, plot):
        if path is not None:
            _check_place(path)
    journal = json_file and json_file.with_name(f"{json_file.name}.journal")
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
        _write(plot, variance_picture(table, what).encode())
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
    policy: Annotated[
        str | None, typer.Option(help="first-hitting (the default) or ancestral.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps per block, for ancestral.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Noise schedule of the steps: linear, cosine, square, ...")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Models of one block: new tokens of each slide beyond L; L/2 by default."
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus, in (0, 1]; 1 keeps all.")] = 1.0,
    top_p_rule: Annotated[
        str, typer.Option(help="transformers (keeps the token that crosses) or authors (drops it).")
    ] = "transformers",
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None,
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 1.0,
    window: Annotated[
        int | None, typer.Option(help="A token sees the last WINDOW tokens; constant memory.")
    ] = None,
    bos: BOS = None,
    eos: Annotated[bool, typer.Option(help="End at a sampled EOS.")] = True,
    cache: Annotated[bool, typer.Option(help="Keep keys and values of finished blocks.")] = True,
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
    from blockdiffusion.evaluate.run_report import report_run

    page = report_run(
        run,
        evaluation=evaluation,
        out=out,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    typer.echo(f"{page}")


# --- shared by the commands --------------------------------------------------------------------


def _load(model: str, device: str, dtype: str) -> Any:
    import torch

    from blockdiffusion.devices import select_device
    from blockdiffusion.models.formats import load

    dtypes = {
        "auto": None,
        "float32": torch.float32,
        "float64": torch.float64,
        "bf16": torch.bfloat16,
    }
    if dtype not in dtypes:
        raise UserError(f"--dtype is {dtype!r}; choose one of {', '.join(dtypes)}")
    return load(model, device=select_device(device, "--device"), dtype=dtypes[dtype])


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


def _check_place(path: Path) -> None:
    """Fails now, not after the measurement, where `path` cannot be written."""
    import tempfile

    from blockdiffusion.data.files import storage_error

    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise storage_error(error, path) from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    import json

    _write(path, (json.dumps(values, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    from blockdiffusion.data.files import storage_error, written_aside

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as file:
            file.write(content)
    except OSError as error:
        raise storage_error(error, path) from error


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
