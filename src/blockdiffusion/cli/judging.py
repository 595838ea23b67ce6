"""Commands that judge samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiffusion.cli.options import (
    BOS,
    CACHE,
    DEVICE,
    EOS,
    FILTERS,
    MODEL,
    POLICY,
    READING,
    SAMPLING_DTYPE,
    WINDOW,
    FilterOptions,
    JudgeOptions,
    PolicyOptions,
    grouped,
)
from blockdiffusion.cli.shared import (
    INT8,
    check_places,
    device_of,
    load_unquantised,
    write_json,
)
from blockdiffusion.escape import say
from blockdiffusion.files.disk import write_whole


@grouped
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
    policy: PolicyOptions = POLICY,
    filters: FilterOptions = FILTERS,
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
    mauve: Annotated[
        bool, typer.Option("--mauve", help="MAUVE against --reference; needs mauve-text.")
    ] = False,
    reading: JudgeOptions = READING,
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
    """Generated text under a judge: perplexity, entropy, diversity, repetition, length, cost."""
    from blockdiffusion.evaluate.generation.run import GenerateEval, generate_and_judge
    from blockdiffusion.evaluate.generation.samples import DrawOptions
    from blockdiffusion.evaluate.journal import remove_journal
    from blockdiffusion.reports.terminal import generation_lines, progress_bar
    from blockdiffusion.runtime.distributed import joined

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
            **vars(policy),
            **vars(filters),
            use_cache=cache,
            window=window,
            int8=dtype == INT8,
        ),
        min_entropy=min_entropy,
        entropy_window=entropy_window,
        samples_from=samples_from,
        mauve=mauve,
        **reading.arguments(),
        label=label,
    )
    with joined() as team, progress_bar("generate-eval", quiet=not team.is_first) as report:
        result = generate_and_judge(
            options,
            load_model=lambda name: load_unquantised(name, device, dtype),
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
    """Results of generate-eval side by side; all under the same judge."""
    from blockdiffusion.evaluate.generation.table import (
        check_comparable,
        markdown_text,
        read_result,
    )

    read = [read_result(path) for path in results]
    notes = check_comparable(read, [str(path) for path in results])
    _write_generation_tables(read, notes, csv_file, markdown, plot)
    say(markdown_text(read, notes), end="")


@grouped
def pareto(
    model: MODEL,
    judge: Annotated[
        str, typer.Option(help="Hugging Face causal language model, or one of ours; not MODEL.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for all results; once stopped, goes on there.")],
    point: Annotated[
        list[str] | None,
        typer.Option(help="As confidence:threshold=0.9; may be repeated; usual ones by default."),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples of each point.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a sample, at most.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Samples drawn together.")] = 16,
    filters: FilterOptions = FILTERS,
    window: WINDOW = None,
    bos: BOS = None,
    eos: EOS = True,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    reading: JudgeOptions = READING,
    device: DEVICE = "auto",
    dtype: SAMPLING_DTYPE = "auto",
) -> None:
    """Quality against cost: one model sampled in many ways, to pick an operating point."""
    from blockdiffusion.evaluate.generation.samples import DrawOptions
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.studies.pareto.picture import pareto_picture
    from blockdiffusion.studies.pareto.points import parse_point
    from blockdiffusion.studies.pareto.run import Pareto, measure_pareto
    from blockdiffusion.studies.pareto.table import csv_text, markdown_text

    check_places(out / "pareto.json")
    options = Pareto(
        model=model,
        judge=judge,
        out=out,
        points=tuple(parse_point(text) for text in point or ()),
        draw=DrawOptions(
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            bos=bos,
            eos=eos,
            **vars(filters),
            window=window,
            int8=dtype == INT8,
        ),
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
    write_whole(out / "pareto.md", table.encode())
    write_whole(out / "pareto.csv", csv_text(result).encode())
    write_whole(out / "pareto.svg", pareto_picture(result).encode())
    say(table, end="")


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
