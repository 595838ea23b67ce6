"""Commands that estimate, train, look at a run, and rebuild the paper's tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockdiffusion.cli.options import Outputs, grouped, one_of
from blockdiffusion.cli.shared import write_json
from blockdiffusion.errors import UserError
from blockdiffusion.escape import say
from blockdiffusion.estimate.options import EstimateOptions
from blockdiffusion.limits import check_limits
from blockdiffusion.options import REQUIRED, only, option

if TYPE_CHECKING:
    from blockdiffusion.train.recipe import Recipe

RECIPE = Annotated[Path, typer.Argument(help="A YAML recipe, or a run's config.yaml.")]
OVERRIDES = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, as often as you like.")
]


@grouped
def estimate(
    recipe: RECIPE,
    options: EstimateOptions,
    files: Annotated[Outputs, only(json_file="Write the estimate here, too.")],
    overrides: OVERRIDES = None,
) -> None:
    """Estimate what a recipe costs: memory, operations, time, price, of training and sampling."""
    from blockdiffusion.estimate.listing import estimate_lines
    from blockdiffusion.estimate.run import estimate_recipe
    from blockdiffusion.runtime.hardware import choose_hardware
    from blockdiffusion.train.recipe import load_recipe

    files.check()
    device = choose_hardware(
        options.device, tflops=options.tflops, bandwidth=options.bandwidth, memory=options.memory
    )
    found = estimate_recipe(
        load_recipe(recipe, overrides or []),
        device,
        name=str(recipe),
        seq_len=options.seq_len,
        vocab_size=options.vocab_size,
        devices=options.devices,
        price_per_hour=options.price_per_hour,
        sampling=options.sampling,
    )
    say("\n".join(estimate_lines(found)))
    write_json(files.json_file, found.to_dict())


@dataclass(frozen=True, kw_only=True)
class AdaptCommand:
    """What is adapted, to which data and blocks; the rest is `section.key=value`."""

    data: Path | None = option(None, "Directory of prepared data, with the parent's tokenizer.")
    chat: Path | None = option(
        None,
        "Instead: conversations to learn to answer (.jsonl or .parquet with messages), prepared "
        "into OUT/data.",
    )
    seq_len: int = option(512, "With --chat: L, tokens of a row; longer conversations are cut.")
    block_size: int = option(REQUIRED, "S, tokens of a diffusion block; divides the data's L.")
    out: Path = option(REQUIRED, "Directory of the run.")
    steps: int = option(1000, "Updates of the weights.")
    resume: bool = option(False, "Resume the run in --out.", flags="--resume")

    def __post_init__(self) -> None:
        check_limits(self)
        if (self.data is None) == (self.chat is None):
            given = "none of them is" if self.data is None else "both are"
            raise UserError(f"--data or --chat is needed, and {given} given; give one")
        if self.chat is not None and self.seq_len % self.block_size:
            raise UserError(
                f"--seq-len is {self.seq_len}, which --block-size {self.block_size} does not "
                "divide; give a multiple of it"
            )


# What suits the adaptation of a trained network, unless overridden.
ADAPT_DEFAULTS = ("train.batch_size=16", "optim.lr=3e-4", "optim.warmup_steps=20",
                  "optim.ema_decay=0", "eval.every=null", "sample.every=null")  # fmt: skip


@grouped
def adapt(
    parent: Annotated[
        str, typer.Argument(help="A causal language model: directory, GGUF file or hub id.")
    ],
    options: AdaptCommand,
    overrides: OVERRIDES = None,
) -> None:
    """Make a block diffusion model of a causal language model and train it on prepared data."""
    from blockdiffusion.train.recipe import recipe_of

    keys = {
        "adapt.parent": parent,
        "data.path": options.data or options.out / "data",
        "model.block_size": options.block_size,
        "out": options.out,
        "train.steps": options.steps,
    }
    given = [*ADAPT_DEFAULTS, *(f"{key}={value}" for key, value in keys.items())]

    def read() -> Recipe:
        recipe = recipe_of([*given, *(overrides or [])])
        if options.chat is not None:
            _prepare_chat(parent, options)
        return recipe

    _train(read, options.resume)


def _prepare_chat(parent: str, options: AdaptCommand) -> None:
    """Prepare the conversations with the parent's tokenizer, in the first of the processes."""
    from blockdiffusion.checkpoints.formats import find_causal_lm
    from blockdiffusion.data.options import PrepareOptions
    from blockdiffusion.data.packing import prepare
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.runtime.distributed import current_group

    path, _ = find_causal_lm(parent)
    chosen = PrepareOptions(
        tokenizer=str(path), packing="chat", seq_len=options.seq_len, align=options.block_size
    )

    def run() -> None:
        with progress_bar("prepare") as report:
            prepare([str(options.chat)], options.out / "data", chosen, report)

    current_group().broadcast(run)


def train(
    recipe: RECIPE,
    overrides: OVERRIDES = None,
    resume: Annotated[bool, typer.Option(help="Resume the run in the recipe's out.")] = False,
) -> None:
    """Train a model as a recipe says; --resume resumes a stopped run."""
    from blockdiffusion.train.recipe import load_recipe

    _train(lambda: load_recipe(recipe, overrides or []), resume)


def _train(read: Callable[[], Recipe], resume: bool) -> None:
    from blockdiffusion.runtime.distributed import process_group
    from blockdiffusion.train.run import run_training
    from blockdiffusion.train.session import Interrupted

    with process_group() as processes:
        parsed = read()
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
    """Return how to give a recipe's key that was written as an `option`; None for other options."""
    from blockdiffusion.files.records import dotted_keys
    from blockdiffusion.train.recipe import Recipe

    wanted = option.lstrip("-").replace("-", "_")
    known = [key for key in dotted_keys(Recipe) if key == wanted or key.endswith(f".{wanted}")]
    given = " ".join(arguments).partition(f"{option}")[2].lstrip(" =").split(" ")[0] or "VALUE"
    return " or ".join(f"{key}={given}" for key in known) or None


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the page of a run shows, and where it is written."""

    evaluation: Path | None = option(
        None, "What `blockdiff eval --json` wrote; RUN/eval.json if there."
    )
    out: Path | None = option(None, "The page; RUN/report.html by default.")
    num_samples: int = option(3, "Samples to draw for the page.")
    max_new_tokens: int = option(128, "Tokens of each sample.")
    seed: int = option(0, "Of the samples.")


@grouped
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a training run.")],
    options: ReportOptions,
) -> None:
    """Write one self-contained page about a run: curves, mask, trace, samples, numbers."""
    from blockdiffusion.reports.run import report_run

    say(str(report_run(run, **vars(options))))


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """At which scale tables are rebuilt, from what, and where."""

    scale: str = option(
        REQUIRED,
        "tiny (two CPU cores), small (one GPU for hours) or paper.",
        "tiny small paper",
    )
    data: tuple[str, ...] = option((), "NAME=PATH, a set's local files; may be repeated.")
    scorer: str | None = option(
        None, "For T7: a causal language model instead of the scale's.", was="judge"
    )
    out: Path | None = option(None, "Directory for everything; runs/reproduce-SCALE by default.")
    dry_run: bool = option(
        False, "Show the steps, their sizes and what is there.", flags="--dry-run"
    )


@grouped
def reproduce(
    tables: Annotated[
        list[str],
        typer.Argument(
            metavar="TABLE...",
            help="T1 to T8.",
            autocompletion=one_of(*(f"T{number}" for number in range(1, 9))),
        ),
    ],
    options: ReproduceOptions,
) -> None:
    """Rebuild tables of the paper: train, measure and compare; resumes where it was stopped."""
    from blockdiffusion.studies.reproduce import plan_tables
    from blockdiffusion.studies.reproduce import reproduce as run
    from blockdiffusion.studies.reproduce.listing import plan_lines

    out = options.out or Path("runs") / f"reproduce-{options.scale}"
    plan = plan_tables(tables, options.scale, out, options.data, options.scorer)
    if options.dry_run:
        say("\n".join(plan_lines(plan)))
        return
    for made in run(plan, lambda line: say(line, err=True)):
        say(made.markdown.read_text(encoding="utf-8"))
