"""Commands that measure likelihood and its noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import (
    BOS,
    MASK_SEED,
    MODEL,
    PREPARED,
    NetworkOptions,
    Outputs,
    grouped,
)
from blockdiffusion.cli.shared import check_places, write_json, write_text
from blockdiffusion.errors import UserError
from blockdiffusion.escape import say
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.zero_shot.options import ZeroShotOptions
from blockdiffusion.options import REQUIRED, only, option
from blockdiffusion.studies.options import CoderOptions, VarianceOptions


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `eval` scores, and what it does with the result."""

    data: Path = option(REQUIRED, PREPARED)
    split: str = option("valid", "Split of the data.")
    how: LikelihoodOptions = field(default=LikelihoodOptions())
    limit: int | None = option(None, "Score only the first rows.", was="rows")
    bos: bool | None = option(None, BOS, flags="--bos/--no-bos")
    seed: int = option(0, MASK_SEED)
    files: Annotated[Outputs, only("json_file")] = field(default=Outputs())
    per_row: bool = option(
        False, "Each row's value in --json, to compare in pairs.", flags="--per-row"
    )
    card: bool = option(False, "Put it into the model's card.", flags="--card")
    network: NetworkOptions = field(default=NetworkOptions())

    def __post_init__(self) -> None:
        if self.per_row and self.files.json_file is None:
            raise UserError("--per-row says what --json holds; give --json FILE, too")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Which rows a parent and its child are compared on, and how the child is measured."""

    data: Path = option(REQUIRED, PREPARED)
    split: str = option("valid", "Split of the data.")
    limit: int | None = option(64, "Score only the first rows.")
    how: LikelihoodOptions = field(default=LikelihoodOptions())
    seed: int = option(0, MASK_SEED)
    files: Annotated[Outputs, only("json_file")] = field(default=Outputs())


@grouped
def compare(
    parent: Annotated[str, typer.Argument(help="The causal model, as it was or tuned.")],
    child: Annotated[str, typer.Argument(help="The model that was adapted from it.")],
    options: CompareOptions,
) -> None:
    """What an adaptation cost: nats per token of parent and child on the same tokens."""
    from blockdiffusion.checkpoints.formats import load, load_parent
    from blockdiffusion.evaluate.compare import compare as measure
    from blockdiffusion.evaluate.listing import comparison_table
    from blockdiffusion.evaluate.prepared import read_rows
    from blockdiffusion.models.causal_lm import AdaptedModel
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.runtime.seeding import generator

    options.files.check()
    model = load(child)
    if not isinstance(model, AdaptedModel):
        raise UserError(f"{child} was not adapted from a causal model; give one that was")
    with progress_bar("compare") as report:
        text = read_rows(options.data, options.split, model, options.limit, None, report)
        if text.batch.valid_BL is not None and text.batch.target_BL is None:
            raise UserError(
                f"{options.data} has one document a row, with padding; compare reads windows of "
                "one length: prepare the data with --packing wrap"
            )
        found = measure(
            load_parent(parent),
            model,
            text.batch,
            options.how,
            generator=generator(options.seed, "likelihood"),
            progress=lambda done, total: report("compare", done, total),
        )
    say("\n".join(comparison_table(found).lines()))
    write_json(options.files.json_file, found.to_dict())


@dataclass(frozen=True, kw_only=True)
class DecideOptions:
    """How `decide` finds the probabilities, and what it does with them."""

    out: Path | None = option(None, "The results, as JSON lines.")
    calibrate: Path | None = option(
        None, "Cases with answers, on which a temperature of the probabilities is found."
    )
    how: LikelihoodOptions = field(default=LikelihoodOptions())
    seed: int = option(0, MASK_SEED)
    network: NetworkOptions = field(default=NetworkOptions())


@grouped
def decide(
    model: MODEL,
    cases: Annotated[
        Path, typer.Argument(help='JSON lines: {"prompt": ..., "choices": [...], "answer": ...}.')
    ],
    options: DecideOptions,
) -> None:
    """Choose among given texts by their exact probabilities; with answers, say how well."""
    import json

    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.serving import decisions

    check_places(options.out)
    network, temperature = options.network.load(model), 1.0
    with progress_bar("decide") as report:

        def measured(path: Path) -> Any:
            read = decisions.read_cases(network, path)
            nats, is_exact = decisions.choice_nats(
                network, read, options.how, seed=options.seed,
                progress=lambda done, total: report(path.name, round(done), round(total)),
            )  # fmt: skip
            return read, nats, is_exact

        held = None if options.calibrate is None else measured(options.calibrate)
        read, nats, is_exact = measured(cases)
    if held is not None:
        pairs = [(n, c.answer) for c, n in zip(held[0], held[1], strict=True)]
        if any(answer is None for _, answer in pairs):
            raise UserError(f"{options.calibrate} has a case without answer; give all answers")
        temperature = decisions.fit_temperature(*zip(*pairs, strict=True))
    made = [decisions.decided(c, n, temperature) for c, n in zip(read, nats, strict=True)]
    lines = [json.dumps(one.to_dict()) for one in made]
    write_text(options.out, "".join(f"{line}\n" for line in lines))
    if options.out is None:
        say("\n".join(lines))
    found = decisions.quality(made)
    about = decisions.quality_lines(len(made), found, temperature, is_exact)
    say("\n".join(about), err=options.out is None)


@grouped
def evaluate(model: MODEL, options: EvalOptions) -> None:
    """Likelihood of held-out text: nats per token, perplexity, bits per byte, with error bars."""
    from blockdiffusion.checkpoints.release import check_card, record_evaluation
    from blockdiffusion.data.manifest import Manifest
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.evaluate.likelihood import likelihood
    from blockdiffusion.evaluate.listing import likelihood_lines
    from blockdiffusion.evaluate.prepared import evaluation_facts, read_rows
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.runtime.distributed import process_group
    from blockdiffusion.runtime.seeding import generator

    data, split, file = options.data, options.split, options.files.json_file
    options.files.check()
    if options.card:
        check_card(model)
    journal = journal_beside(file)
    with process_group() as processes, progress_bar("eval", quiet=not processes.is_first) as report:
        network = options.network.load(model)
        text = read_rows(data, split, network, options.limit, options.bos, report)
        result = likelihood(
            network,
            text.batch.ids_BL,
            options.how,
            bos=text.bos,
            valid=text.batch.valid_BL,
            given=text.given_BL,
            num_bytes=text.num_bytes,
            generator=generator(options.seed, "likelihood"),
            progress=lambda done, total: report(options.how.estimator, done, total),
            processes=processes,
            journal=journal,
        )
    if not processes.is_first:
        return
    if file is not None:
        values = result.to_dict(rows=options.per_row)
        if options.per_row:
            values["tokens_per_row"] = text.free_tokens().tolist()
        write_json(file, values | {"model": model, "data": str(data), "split": split})
    if options.card:
        facts = evaluation_facts(result, Manifest.load(data), data, split, seed=options.seed)
        record_evaluation(model, facts)
    remove_journal(file)
    say("\n".join(likelihood_lines(result, f"{model} on {data} ({split})")))


@dataclass(frozen=True, kw_only=True)
class TokenizerAndNetwork(NetworkOptions):
    """How a network is loaded that may have no tokenizer."""

    tokenizer: str | None = option(None, "For a model without one: a Hugging Face name or path.")

    def load(self, model: str) -> Any:
        network = super().load(model)
        if self.tokenizer is not None:
            from blockdiffusion.data.tokenizers import load_tokenizer

            network.tokenizer = load_tokenizer(self.tokenizer)
        return network


@grouped
def zero_shot(
    model: MODEL,
    options: ZeroShotOptions,
    files: Annotated[Outputs, only("json_file", "csv_file", "markdown")],
    network: TokenizerAndNetwork,
) -> None:
    """Zero-shot perplexity on the paper's sets, with error bars and conventions."""
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.evaluate.zero_shot.suite import measure_zero_shot
    from blockdiffusion.evaluate.zero_shot.table import (
        zero_shot_csv,
        zero_shot_lines,
        zero_shot_markdown,
    )
    from blockdiffusion.reports.terminal import progress_bar

    files.check()
    journal = journal_beside(files.json_file)
    loaded = network.load(model)
    with progress_bar("zero-shot") as report:
        table = measure_zero_shot(loaded, options, report, journal)
    write_json(files.json_file, table.to_dict() | {"model": model})
    write_text(files.csv_file, zero_shot_csv(table))
    write_text(files.markdown, zero_shot_markdown(table, model))
    if all(row.result is not None for row in table.rows):  # else others may be measured later
        remove_journal(files.json_file)
    say("\n".join(zero_shot_lines(table, model)))


@grouped
def references(
    data: Annotated[Path, typer.Argument(help=PREPARED)],
    options: CoderOptions,
    files: Annotated[Outputs, only("json_file", markdown="Write the table here, too.")],
    network: NetworkOptions,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Model or run to put beside them; may be repeated."),
    ] = None,
) -> None:
    """Bits per byte of n-gram models and compressors on held-out rows, beside a model's."""
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.studies.references.coders import compare_coders
    from blockdiffusion.studies.references.table import coders_markdown

    files.check()
    journal = journal_beside(files.json_file)
    networks = {name: network.load(name) for name in models or ()}
    with progress_bar("references") as report:
        table = compare_coders(data, options, networks, report, journal)
    page = coders_markdown(table, f"{data} ({options.split})")
    write_json(files.json_file, table.to_dict() | {"data": str(data)})
    write_text(files.markdown, page)
    remove_journal(files.json_file)
    say(page, end="")


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """Which rows are read."""

    data: Path = option(REQUIRED, PREPARED)
    split: str = option("valid", "Split of the data.")
    bos: bool | None = option(None, BOS, flags="--bos/--no-bos")


@grouped
def variance(
    model: MODEL,
    held_out: HeldOutOptions,
    options: VarianceOptions,
    files: Annotated[Outputs, only("json_file", plot="Draw the table here, as SVG.")],
    network: NetworkOptions,
) -> None:
    """Variance of the bound and of its gradient, for many estimators and block sizes."""
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.evaluate.prepared import read_rows
    from blockdiffusion.reports import plots
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.studies.variance.listing import variance_lines
    from blockdiffusion.studies.variance.table import measure_variance

    files.check()
    journal = journal_beside(files.json_file)
    data, split = held_out.data, held_out.split
    loaded = network.load(model)
    with progress_bar("variance") as report:
        text = read_rows(data, split, loaded, options.rows, held_out.bos, report)
        table = measure_variance(loaded, text, options, report, journal)
    what = f"{model} on {data} ({split})"
    write_json(
        files.json_file, table.to_dict() | {"model": model, "data": str(data), "split": split}
    )
    files.write_plot(plots.variance_figure, table, what)
    remove_journal(files.json_file)
    say("\n".join(variance_lines(table, what)))
