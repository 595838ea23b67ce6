"""Commands that score samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import (
    DEVICE,
    MODEL,
    READING,
    SAMPLING_DTYPE,
    SCORER,
    ScorerOptions,
    all_but,
    grouped,
)
from blockdiffusion.cli.shared import (
    INT8,
    check_places,
    check_plot,
    device_of,
    load_unquantised,
    write_json,
    write_text,
)
from blockdiffusion.errors import UserError
from blockdiffusion.escape import say
from blockdiffusion.sampling.params import SETTINGS, SamplingParams

GENERATE_EVAL = SamplingParams(num_samples=64, max_new_tokens=256, seed=0)
PARETO = SamplingParams(num_samples=64, seed=0)


@grouped
def generate_eval(
    scorer: SCORER,
    model: Annotated[
        str | None, typer.Argument(help="Model under test; may be left out with --samples-from.")
    ] = None,
    sampling: Annotated[SamplingParams, all_but("stride")] = GENERATE_EVAL,
    batch_size: Annotated[
        int, typer.Option(help="Samples drawn together; a sample depends on it.")
    ] = 16,
    min_entropy: Annotated[
        float | None,
        typer.Option(help="Guard: reject samples whose tokens have less entropy; the authors: 4."),
    ] = None,
    entropy_window: Annotated[
        int, typer.Option(help="Last tokens that --min-entropy looks at, after every block.")
    ] = 256,
    samples_from: Annotated[
        Path | None, typer.Option(help="Score the samples of this JSON lines file; draw none.")
    ] = None,
    mauve: Annotated[
        bool, typer.Option("--mauve", help="MAUVE against --reference; needs mauve-text.")
    ] = False,
    reading: ScorerOptions = READING,
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
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """Generated text under a scorer: perplexity, entropy, diversity, repetition, length, cost."""
    from blockdiffusion.evaluate.generation.run import GenerateEval, generate_and_score
    from blockdiffusion.evaluate.generation.samples import DrawOptions
    from blockdiffusion.evaluate.generation.table import generation_lines
    from blockdiffusion.evaluate.journal import remove_journal
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.runtime.distributed import process_group

    check_places(json_file, csv_file, markdown, plot)
    check_plot(plot)
    options = GenerateEval(
        model=model,
        scorer=scorer,
        draw=DrawOptions(**vars(sampling), batch_size=batch_size, int8=dtype == INT8),
        min_entropy=min_entropy,
        entropy_window=entropy_window,
        samples_from=samples_from,
        mauve=mauve,
        **reading.arguments(),
        label=label,
    )
    with (
        process_group() as processes,
        progress_bar("generate-eval", quiet=not processes.is_first) as report,
    ):
        result = generate_and_score(
            options,
            load_model=lambda name: load_unquantised(name, device, dtype),
            device=device_of(device),
            beside=json_file,
            progress=report,
            processes=processes,
        )
    if result is None:
        return
    values = result.to_dict()
    write_json(json_file, values)
    _write_generation_tables([values], [], csv_file, markdown, plot)
    remove_journal(json_file)
    say("\n".join(generation_lines(values)))


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
    """Results of generate-eval side by side; all under the same scorer."""
    from blockdiffusion.evaluate.generation.table import (
        check_comparable,
        markdown_text,
        read_result,
    )

    check_plot(plot)
    read = [read_result(path) for path in results]
    notes = check_comparable(read, [str(path) for path in results])
    _write_generation_tables(read, notes, csv_file, markdown, plot)
    say(markdown_text(read, notes), end="")


@grouped
def pareto(
    model: MODEL,
    scorer: SCORER,
    out: Annotated[Path, typer.Option(help="Folder for all results; once stopped, goes on there.")],
    point: Annotated[
        list[str] | None,
        typer.Option(help="As confidence:threshold=0.9; may be repeated; usual ones by default."),
    ] = None,
    sampling: Annotated[
        SamplingParams, all_but("sampler", *SETTINGS, "stride", "use_cache")
    ] = PARETO,
    batch_size: Annotated[int, typer.Option(help="Samples drawn together.")] = 16,
    reading: ScorerOptions = READING,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """Quality against cost: one model sampled in many ways, to pick an operating point."""
    from blockdiffusion.evaluate.generation.samples import DrawOptions
    from blockdiffusion.reports import plots
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.studies.pareto.points import parse_point
    from blockdiffusion.studies.pareto.run import Pareto, measure_pareto
    from blockdiffusion.studies.pareto.table import csv_text, markdown_text
    from blockdiffusion.studies.pareto.table import filters as shared_filters

    check_places(out / "pareto.json")
    options = Pareto(
        model=model,
        scorer=scorer,
        out=out,
        points=tuple(parse_point(text) for text in point or ()),
        draw=DrawOptions(**vars(sampling), batch_size=batch_size, int8=dtype == INT8),
        **reading.arguments(),
    )
    with progress_bar("pareto") as report:
        result = measure_pareto(
            options,
            load_model=lambda name: load_unquantised(name, device, dtype),
            device=device_of(device),
            progress=report,
        )
    write_json(out / "pareto.json", result)
    table = markdown_text(result)
    write_text(out / "pareto.md", table)
    write_text(out / "pareto.csv", csv_text(result))
    drawn = result["sampling"]
    what = (
        f"{result['model']}: {drawn['num_samples']} samples of at most "
        f"{drawn['max_new_tokens']} tokens, {shared_filters(drawn)}"
    )
    try:
        picture = plots.svg(plots.pareto_figure(result, what))
        write_text(out / "pareto.svg", picture)
    except UserError as error:  # the measurement is there, and its tables
        say(f"no pareto.svg: {error}", err=True)
    say(table, end="")


def _write_generation_tables(
    results: list[Any],
    notes: list[str],
    csv_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
) -> None:
    from blockdiffusion.evaluate.generation.table import csv_text, markdown_text
    from blockdiffusion.reports import plots

    write_text(csv_file, csv_text(results))
    write_text(markdown, markdown_text(results, notes))
    if plot is not None:
        write_text(plot, plots.svg(plots.generation_figure(results)))
