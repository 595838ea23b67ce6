"""Commands that score samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import Outputs, SamplerOptions, grouped
from blockdiffusion.cli.shared import check_places, device_of, write_json, write_text
from blockdiffusion.errors import UserError
from blockdiffusion.escape import say
from blockdiffusion.evaluate.generation.options import GenerateEval
from blockdiffusion.options import all_but, only
from blockdiffusion.studies.options import Pareto


@grouped
def generate_eval(
    options: GenerateEval,
    files: Annotated[
        Outputs,
        only(
            json_file="Write the result here, and the samples beside it; a stopped run resumes "
            "there.",
            csv_file="One line of a table.",
            markdown="The same for a page.",
            plot="Draw it here, as SVG.",
        ),
    ],
    network: SamplerOptions,
) -> None:
    """Generated text under a scorer: perplexity, entropy, diversity, repetition, length, cost."""
    from blockdiffusion.evaluate.generation.run import generate_and_score
    from blockdiffusion.evaluate.generation.table import generation_lines
    from blockdiffusion.evaluate.journal import remove_journal
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.runtime.distributed import process_group

    files.check()
    with (
        process_group() as processes,
        progress_bar("generate-eval", quiet=not processes.is_first) as report,
    ):
        result = generate_and_score(
            replace(options, draw=replace(options.draw, int8=network.int8)),
            load_model=network.load,
            device=device_of(network.device),
            beside=files.json_file,
            progress=report,
            processes=processes,
        )
    if result is None:
        return
    values = result.to_dict()
    write_json(files.json_file, values)
    _write_generation_tables([values], [], files)
    remove_journal(files.json_file)
    say("\n".join(generation_lines(values)))


@grouped
def generate_compare(
    results: Annotated[
        list[Path], typer.Argument(help="What `blockdiff generate-eval --json` wrote.")
    ],
    files: Annotated[
        Outputs,
        only(
            csv_file="A line for each.",
            markdown="The table for a page.",
            plot="Perplexity against entropy, and lengths, as SVG.",
        ),
    ],
) -> None:
    """Results of generate-eval side by side; all under the same scorer."""
    from blockdiffusion.evaluate.generation.table import (
        check_comparable,
        markdown_text,
        read_result,
    )

    files.check()
    read = [read_result(path) for path in results]
    notes = check_comparable(read, [str(path) for path in results])
    _write_generation_tables(read, notes, files)
    say(markdown_text(read, notes), end="")


@grouped
def pareto(
    options: Annotated[Pareto, all_but(Pareto, "points")],
    network: SamplerOptions,
    point: Annotated[
        list[str] | None,
        typer.Option(help="As confidence:threshold=0.9; may be repeated; usual ones by default."),
    ] = None,
) -> None:
    """Quality against cost: one model sampled in many ways, to pick an operating point."""
    from blockdiffusion.reports import plots
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.studies.pareto.points import parse_point
    from blockdiffusion.studies.pareto.run import measure_pareto
    from blockdiffusion.studies.pareto.table import csv_text, filters, markdown_text

    out = options.out
    check_places(out / "pareto.json")
    options = replace(
        options,
        points=tuple(parse_point(text) for text in point or ()),
        draw=replace(options.draw, int8=network.int8),
    )
    with progress_bar("pareto") as report:
        result = measure_pareto(
            options,
            load_model=network.load,
            device=device_of(network.device),
            progress=report,
        )
    write_json(out / "pareto.json", result)
    table = markdown_text(result)
    write_text(out / "pareto.md", table)
    write_text(out / "pareto.csv", csv_text(result))
    drawn = result["sampling"]
    what = (
        f"{result['model']}: {drawn['num_samples']} samples of at most "
        f"{drawn['max_new_tokens']} tokens, {filters(drawn)}"
    )
    say(table, end="")
    try:
        picture = plots.svg(plots.pareto_figure(result, what))
    except UserError as error:  # the measurement is there, and its tables
        say(f"no pareto.svg: {error}", err=True)
    else:
        write_text(out / "pareto.svg", picture)


def _write_generation_tables(results: list[Any], notes: list[str], files: Outputs) -> None:
    from blockdiffusion.evaluate.generation.table import csv_text, markdown_text
    from blockdiffusion.reports import plots

    write_text(files.csv_file, csv_text(results))
    write_text(files.markdown, markdown_text(results, notes))
    files.write_plot(plots.generation_figure, results)
