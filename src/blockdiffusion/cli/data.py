"""Commands about data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiffusion.cli.options import choice, one_of
from blockdiffusion.errors import counted
from blockdiffusion.escape import say


def _set_names(incomplete: str) -> list[str]:
    """Completes names of data sets; without a first letter the shell offers files."""
    from blockdiffusion.data.registry import DATA_SETS

    names = (*DATA_SETS, "python-docs", "python-source")
    return one_of(*names)(incomplete) if incomplete else []


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
    tokenizer: Annotated[
        str,
        choice("bpe:SIZE (trained here), byte, or a Hugging Face name or path.", "bpe: byte"),
    ] = "bpe:2048",
    seq_len: Annotated[int, typer.Option(help="L, tokens of a row.")] = 128,
    packing: Annotated[
        str,
        choice("wrap (documents one after another) or document (one a row).", "wrap document"),
    ] = "wrap",
    row_bos: Annotated[
        bool, typer.Option(help="Begin every row with a BOS, which is given.")
    ] = False,
    row_eos: Annotated[bool, typer.Option(help="End every row with an EOS.")] = False,
    document_eos: Annotated[bool, typer.Option(help="Put an EOS after every document.")] = True,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            help="Source of the validation split; may be repeated.", autocompletion=_set_names
        ),
    ] = None,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of documents held out where no --valid is given.")
    ] = 0.05,
    field: Annotated[
        str, typer.Option(help="Field of the text in JSON lines and tables; a.b is b inside a.")
    ] = "text",
    skip_invalid: Annotated[
        int, typer.Option(help="Documents that may be left out because they cannot be read.")
    ] = 0,
    documents: Annotated[
        str,
        choice(
            "Documents of a text file: auto, file, line or blank-line.", "auto file line blank-line"
        ),
    ] = "auto",
    document_bytes: Annotated[
        int, typer.Option(help="Size above which auto cuts a text file at a blank line.")
    ] = 65536,
    detokenize: Annotated[
        str,
        choice(
            "none (a set by name brings its own), wikitext, wikitext-paper, ptb, lm1b, "
            "lambada or scientific-papers.",
            "none wikitext wikitext-paper ptb lm1b lambada scientific-papers",
        ),
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the train/validation split.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes; 0 for one per core.")] = 0,
) -> None:
    """Tokenise text and pack it into rows for training; goes on where it was stopped."""
    from blockdiffusion.data.options import PrepareOptions
    from blockdiffusion.data.packing import prepare as run
    from blockdiffusion.reports.terminal import progress_bar

    options = PrepareOptions(
        seq_len=seq_len,
        tokenizer=tokenizer,
        packing=packing,  # type: ignore[arg-type]  # checked there
        row_bos=row_bos,
        row_eos=row_eos,
        document_eos=document_eos,
        valid_fraction=valid_fraction,
        valid=tuple(valid or ()),
        field=field,
        documents=documents,  # type: ignore[arg-type]
        document_bytes=document_bytes,
        detokenize=detokenize,  # type: ignore[arg-type]
        skip_invalid=skip_invalid,
        seed=seed,
        num_workers=workers,
    )
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
    for line in account:
        say(f"  {line}")


def datasets() -> None:
    """List the data sets that are known by name: splits, sources, licences."""
    from blockdiffusion.data.registry import set_lines

    say("\n".join(set_lines()))
