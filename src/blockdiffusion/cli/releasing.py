"""Commands that turn a model into files for others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from blockdiffusion.checkpoints.options import LightningOptions, Target
from blockdiffusion.cli.options import grouped
from blockdiffusion.escape import say
from blockdiffusion.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """From what to what `convert` converts."""

    out: Path = option(REQUIRED, "New directory for the model.")
    to: Target = option(
        "blockdiffusion", "blockdiffusion, or bd3lm (published).", "blockdiffusion bd3lm"
    )
    lightning: LightningOptions = field(default=LightningOptions())
    tokenizer: str | None = option(None, "Name or path; by default what the source holds.")
    bos: bool | None = option(
        None, "Position 0 is a given BOS; by default as it says.", flags="--bos/--no-bos"
    )


@grouped
def convert(
    source: Annotated[
        str, typer.Argument(help="Lightning .ckpt, model or run directory, or a Hugging Face id.")
    ],
    options: ConvertOptions,
) -> None:
    """Turn a checkpoint into a model directory with tokenizer and model card."""
    from blockdiffusion.checkpoints.release import convert as run

    made = run(source, **vars(options))
    config = made.model.config
    say(
        f"{options.out}: {config.objective}, S = {config.block_size}, L = {config.seq_len}, "
        f"V = {config.vocab_size}, mask {config.mask_id}"
    )
    for note in made.notes:
        say(f"  {note}")


def push(
    directory: Annotated[Path, typer.Argument(help="Model or run directory.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
) -> None:
    """Upload a model with its card and tokenizer to the Hugging Face hub."""
    from blockdiffusion.checkpoints.release import push as run

    say(run(directory, repo_id, private=private))
