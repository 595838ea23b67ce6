"""Commands that measure likelihood and its noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiffusion.cli.options import (
    BOS,
    DEVICE,
    DTYPE,
    JSON_FILE,
    LAWS,
    LIKELIHOOD,
    MASK_SEED,
    MODEL,
    choice,
    grouped,
)
from blockdiffusion.cli.shared import check_places, check_plot, load_model, write_json, write_text
from blockdiffusion.errors import UserError, shown
from blockdiffusion.escape import say
from blockdiffusion.evaluate.options import LikelihoodOptions


@grouped
def evaluate(
    model: MODEL,
    data: Annotated[Path, typer.Option(help="Directory that `blockdiff prepare` made.")],
    split: Annotated[str, typer.Option(help="Split of the data.")] = "valid",
    how: LikelihoodOptions = LIKELIHOOD,
    limit: Annotated[int | None, typer.Option(help="Score only the first rows.")] = None,
    bos: BOS = None,
    seed: MASK_SEED = 0,
    json_file: JSON_FILE = None,
    per_row: Annotated[
        bool, typer.Option("--per-row", help="Each row's value in --json, to compare in pairs.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="Put it into the model's card.")] = False,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
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

    if per_row and json_file is None:
        raise UserError("--per-row says what --json holds; give --json FILE, too")
    check_places(json_file)
    if card:
        check_card(model)
    journal = journal_beside(json_file)
    with process_group() as processes, progress_bar("eval", quiet=not processes.is_first) as report:
        network = load_model(model, device, dtype)
        text = read_rows(data, split, network, limit, bos, report)
        result = likelihood(
            network,
            text.batch.ids_BL,
            how,
            bos=text.bos,
            valid=text.batch.valid_BL,
            num_bytes=text.num_bytes,
            generator=generator(seed, "likelihood"),
            progress=lambda done, total: report(how.estimator, done, total),
            processes=processes,
            journal=journal,
        )
    if not processes.is_first:
        return
    if json_file is not None:
        values = result.to_dict(rows=per_row)
        if per_row:
            values["tokens_per_row"] = text.free_tokens().tolist()
        write_json(json_file, values | {"model": model, "data": str(data), "split": split})
    if card:
        facts = evaluation_facts(result, Manifest.load(data), data, split, seed=seed)
        record_evaluation(model, facts)
    remove_journal(json_file)
    say("\n".join(likelihood_lines(result, f"{model} on {data} ({split})")))


@grouped
def zero_shot(
    model: MODEL,
    suite: Annotated[str, choice("Which sets: paper (its table 5).", "paper")] = "paper",
    tasks: Annotated[
        list[str] | None,
        choice(
            "Sets of the suite (ptb, wikitext, lm1b, lambada, ag_news, pubmed or arxiv), with "
            "commas between; may be repeated.",
            "ptb wikitext lm1b lambada ag_news pubmed arxiv",
        ),
    ] = None,
    local: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH (or NAME:split=PATH), a set's local files; may be repeated."),
    ] = None,
    packing: Annotated[
        str,
        choice("wrap (rows, as the paper) or document (windows with a stride).", "wrap document"),
    ] = "wrap",
    context: Annotated[
        int | None, typer.Option(help="Tokens of a row or window; by default the model's.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window; half of them by default.")
    ] = None,
    frame: Annotated[
        str,
        choice(
            "Ends of a row: auto (as in training), none, bos or bos-eos.", "auto none bos bos-eos"
        ),
    ] = "auto",
    document_eos: Annotated[bool, typer.Option(help="Put an EOS after every document.")] = False,
    max_documents: Annotated[
        int | None, typer.Option(help="Read only the first documents of each set.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Score only the first rows of each set.")
    ] = None,
    how: LikelihoodOptions = LIKELIHOOD,
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
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.evaluate.zero_shot.suite import ZeroShotOptions, measure_zero_shot
    from blockdiffusion.evaluate.zero_shot.table import (
        zero_shot_csv,
        zero_shot_lines,
        zero_shot_markdown,
    )
    from blockdiffusion.reports.terminal import progress_bar

    options = ZeroShotOptions(
        suite=suite,
        tasks=tuple(tasks or ()),
        local=tuple(local or ()),
        packing=packing,
        context=context,
        stride=stride,
        frame=frame,
        document_eos=document_eos,
        max_documents=max_documents,
        limit=limit,
        score=how,
        seed=seed,
    )
    check_places(json_file, csv_file, markdown)
    journal = journal_beside(json_file)
    network = load_model(model, device, dtype)
    if tokenizer is not None:
        from blockdiffusion.data.tokenizers import load_tokenizer

        network.tokenizer = load_tokenizer(tokenizer)
    with progress_bar("zero-shot") as report:
        table = measure_zero_shot(network, options, report, journal)
    write_json(json_file, table.to_dict() | {"model": model})
    write_text(csv_file, zero_shot_csv(table))
    write_text(markdown, zero_shot_markdown(table, model))
    if all(row.result is not None for row in table.rows):  # else others may be measured later
        remove_journal(json_file)
    say("\n".join(zero_shot_lines(table, model)))


@grouped
def references(
    data: Annotated[Path, typer.Argument(help="Directory that `blockdiff prepare` made.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Model or run to put beside them; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split whose rows are coded.")] = "valid",
    limit: Annotated[int | None, typer.Option(help="Code only the first rows.")] = None,
    order: Annotated[int, typer.Option(help="Longest n-gram; shorter ones are listed too.")] = 6,
    train_rows: Annotated[
        int | None, typer.Option(help="Learn from the first training rows only.")
    ] = None,
    bos: BOS = None,
    how: LikelihoodOptions = LIKELIHOOD,
    seed: MASK_SEED = 0,
    json_file: JSON_FILE = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Bits per byte of n-gram models and compressors on held-out rows, beside a model's."""
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.studies.references.coders import CoderOptions, compare_coders
    from blockdiffusion.studies.references.table import coders_markdown

    options = CoderOptions(
        split=split,
        limit=limit,
        order=order,
        train_rows=train_rows,
        bos=bos,
        score=how,
        seed=seed,
    )
    check_places(json_file, markdown)
    journal = journal_beside(json_file)
    networks = {name: load_model(name, device, dtype) for name in models or ()}
    with progress_bar("references") as report:
        table = compare_coders(data, options, networks, report, journal)
    page = coders_markdown(table, f"{data} ({split})")
    write_json(json_file, table.to_dict() | {"data": str(data)})
    write_text(markdown, page)
    remove_journal(json_file)
    say(page, end="")


def variance(
    model: MODEL,
    data: Annotated[Path, typer.Option(help="Directory that `blockdiff prepare` made.")],
    split: Annotated[str, typer.Option(help="Split of the data.")] = "valid",
    estimators: Annotated[
        list[str] | None,
        choice(
            "A law of masks: complement, count, bernoulli or resampled, as in "
            "bernoulli[0.3,0.8]; may be repeated.",
            LAWS,
        ),
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
    from blockdiffusion.evaluate.journal import journal_beside, remove_journal
    from blockdiffusion.evaluate.prepared import read_rows
    from blockdiffusion.reports import plots
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.studies.variance.listing import variance_lines
    from blockdiffusion.studies.variance.table import (
        DEFAULT_ESTIMATORS,
        VarianceOptions,
        measure_variance,
    )

    options = VarianceOptions(
        estimators=tuple(estimators or DEFAULT_ESTIMATORS),
        block_sizes=_sizes(block_sizes),
        batch_size=batch_size,
        batches=batches,
        replicates=replicates,
        gradients=gradients,
        seed=seed,
    )
    check_places(json_file, plot)
    check_plot(plot)
    journal = journal_beside(json_file)
    network = load_model(model, device, dtype)
    with progress_bar("variance") as report:
        text = read_rows(data, split, network, options.rows, bos, report)
        table = measure_variance(network, text, options, report, journal)
    what = f"{model} on {data} ({split})"
    write_json(json_file, table.to_dict() | {"model": model, "data": str(data), "split": split})
    if plot is not None:
        write_text(plot, plots.svg(plots.variance_figure(table, what)))
    remove_journal(json_file)
    say("\n".join(variance_lines(table, what)))


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--block-sizes is {shown(text)}; give whole numbers with commas between, as in 1,4,16"
        ) from None
