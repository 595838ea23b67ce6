"""Commands that estimate, train, look at a run, and rebuild the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiffusion.cli.options import choice, one_of
from blockdiffusion.cli.shared import check_places, write_json
from blockdiffusion.escape import say
from blockdiffusion.runtime.hardware import NAMES


def estimate(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or a run's config.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as often as you like.")
    ] = None,
    device: Annotated[
        str,
        choice(
            f"cpu (this machine, measured), {', '.join(NAMES[:-1])}; or any name, with "
            "--tflops, --bandwidth and --memory.",
            " ".join(NAMES),
        ),
    ] = "cpu",
    devices: Annotated[int, typer.Option(help="How many share the rows of an update.")] = 1,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of one device, in any currency.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Another device: its peak in the recipe's precision.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Another device: of its memory, GB/s.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Another device: GB.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="L, where the data are not prepared yet.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="V with the mask, where the data are not prepared yet.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sampling: rows at a time.")] = 1,
    tokens_per_step: Annotated[
        int, typer.Option(help="Sampling: tokens that a call decides; 1 is first hitting.")
    ] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(help="Sampling: by default L.")] = None,
    window: Annotated[int | None, typer.Option(help="Sampling: tokens that a token sees.")] = None,
    sample_dtype: Annotated[
        str,
        choice("Sampling: float32, bfloat16 or int8.", "float32 bfloat16 int8"),
    ] = "float32",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the estimate here, too.")
    ] = None,
) -> None:
    """Estimate what a recipe costs: memory, operations, time, price, of training and sampling."""
    from blockdiffusion.estimate.listing import estimate_lines
    from blockdiffusion.estimate.run import estimate_recipe
    from blockdiffusion.estimate.sampling import SamplingRequest
    from blockdiffusion.runtime.hardware import choose_hardware
    from blockdiffusion.train.recipe import load_recipe

    check_places(json)
    found = estimate_recipe(
        load_recipe(recipe, overrides or []),
        choose_hardware(device, tflops=tflops, bandwidth=bandwidth, memory=memory),
        name=str(recipe),
        seq_len=seq_len,
        vocab_size=vocab_size,
        devices=devices,
        price_per_hour=price_per_hour,
        sampling=SamplingRequest(
            batch=batch,
            tokens_per_step=tokens_per_step,
            max_new_tokens=max_new_tokens,
            window=window,
            dtype=sample_dtype,  # type: ignore[arg-type]  # it is checked there
        ),
    )
    say("\n".join(estimate_lines(found)))
    write_json(json, found.to_dict())


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or a run's config.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as often as you like.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the recipe's out.")] = False,
) -> None:
    """Train a model as a recipe says; goes on where it was stopped with --resume."""
    from blockdiffusion.runtime.distributed import process_group
    from blockdiffusion.train.recipe import load_recipe
    from blockdiffusion.train.run import run_training
    from blockdiffusion.train.session import Interrupted

    with process_group() as processes:
        parsed = load_recipe(recipe, overrides or [])
        try:
            state = run_training(parsed, resume=resume)
        except Interrupted as stop:
            if processes.is_first:
                say(str(stop), err=True)
            raise typer.Exit(stop.exit_code) from None
    if processes.is_first:
        say(
            f"{parsed.out}: {state.step} steps in {state.seconds:.0f} s; model in "
            f"{parsed.out}/model"
        )


def recipe_key(option: str, arguments: list[str]) -> str | None:
    """Tells how to give a recipe's key that was written as an `option`; None for other options."""
    from blockdiffusion.files.records import dotted_keys
    from blockdiffusion.train.recipe import Recipe

    wanted = option.lstrip("-").replace("-", "_")
    known = [key for key in dotted_keys(Recipe) if key == wanted or key.endswith(f".{wanted}")]
    given = " ".join(arguments).partition(f"{option}")[2].lstrip(" =").split(" ")[0] or "VALUE"
    return " or ".join(f"{key}={given}" for key in known) or None


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
    from blockdiffusion.reports.run import report_run

    page = report_run(
        run,
        evaluation=evaluation,
        out=out,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    say(f"{page}")


def reproduce(
    tables: Annotated[
        list[str],
        typer.Argument(
            metavar="TABLE...",
            help="T1 to T8.",
            autocompletion=one_of(*(f"T{number}" for number in range(1, 9))),
        ),
    ],
    scale: Annotated[
        str,
        choice("tiny (two CPU cores), small (one GPU for hours) or paper.", "tiny small paper"),
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH, a set's local files; may be repeated.")
    ] = None,
    scorer: Annotated[
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
    from blockdiffusion.studies.reproduce import plan_tables
    from blockdiffusion.studies.reproduce import reproduce as run
    from blockdiffusion.studies.reproduce.listing import plan_lines

    place = Path("runs") / f"reproduce-{scale}" if out is None else out
    plan = plan_tables(tables, scale, place, data or (), scorer)
    if dry_run:
        say("\n".join(plan_lines(plan)))
        return
    for made in run(plan, lambda line: say(line, err=True)):
        say(made.markdown.read_text(encoding="utf-8"))
