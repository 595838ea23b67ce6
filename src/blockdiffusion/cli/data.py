"""Commands about data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiffusion.cli.options import grouped, one_of
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.registry import BUILT_INS, DATA_SETS
from blockdiffusion.errors import counted
from blockdiffusion.escape import say


def _set_names(incomplete: str) -> list[str]:
    """Complete names of data sets; without a first letter the shell offers files."""
    return one_of(*DATA_SETS, *BUILT_INS)(incomplete) if incomplete else []


@grouped
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text files, folders, .jsonl (these also .gz, .bz2, .xz or .zst), .parquet, a set "
            "by name (blockdiff datasets) or NAME=PATH, Hugging Face data sets, python-docs or "
            "python-source.",
            autocompletion=_set_names,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the prepared data.")],
    options: PrepareOptions,
) -> None:
    """Tokenise text and pack it into rows for training; resumes where it was stopped."""
    from blockdiffusion.data.packing import prepare as run
    from blockdiffusion.reports.terminal import progress_bar

    account: list[str] = []
    with progress_bar("prepare") as report:
        manifest = run(sources, out, options, report, account.append)
    say(f"{out}: V = {manifest.vocab_size}, L = {manifest.seq_len}")
    for name, split in manifest.splits.items():
        say(
            f"  {name:<6}{counted(split.documents, 'document'):>20}  "
            f"{counted(split.tokens, 'token'):>20}  {counted(split.bytes, 'byte'):>20}  "
            f"{counted(split.rows, 'row'):>14}"
        )
    if skipped := sum(source.get("skipped", 0) for source in manifest.sources):
        account.append(
            f"left out {counted(skipped, 'document')} that cannot be read (--skip-invalid)"
        )
    cut = sum(split.dropped_tokens for split in manifest.splits.values())
    if cut and manifest.packing == "chat":
        account.append(f"left out {counted(cut, 'token')} beyond L, of longer conversations")
    for line in account:
        say(f"  {line}")


def datasets() -> None:
    """List the data sets that are known by name: splits, sources, licences."""
    from blockdiffusion.data.registry import set_lines

    say("\n".join(set_lines()))
