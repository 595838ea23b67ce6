"""Commands that turn a model into files for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiffusion.cli.options import choice
from blockdiffusion.escape import say


def convert(
    source: Annotated[
        str, typer.Argument(help="Lightning .ckpt, model or run directory, or a Hugging Face id.")
    ],
    out: Annotated[Path, typer.Option(help="New directory for the model.")],
    to: Annotated[
        str,
        choice("blockdiffusion, or bd3lm (published).", "blockdiffusion bd3lm"),
    ] = "blockdiffusion",
    weights: Annotated[
        str,
        choice("Of a .ckpt: ema (the moving average) or raw (as trained).", "ema raw"),
    ] = "ema",
    kind: Annotated[
        str | None,
        choice("Of a .ckpt that does not say: mdlm, sedd, ar or bd3lm.", "mdlm sedd ar bd3lm"),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="S, of a bd3lm .ckpt that does not say.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="L, of a .ckpt that does not say.")] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Heads, of a .ckpt that does not say.")
    ] = None,
    mask_id: Annotated[
        int | None, typer.Option(help="Mask token of a .ckpt, where it is not the last id.")
    ] = None,
    noise_eps: Annotated[
        float | None, typer.Option(help="Of a sedd .ckpt: 0.001 for the published weights.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Name or path; by default what the source holds.")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Position 0 is a given BOS; by default as it says."),
    ] = None,
) -> None:
    """Turn a checkpoint into a model directory with tokenizer and model card."""
    from blockdiffusion.checkpoints.lightning import LightningOptions
    from blockdiffusion.checkpoints.release import convert as run

    options = LightningOptions(
        weights=weights,  # type: ignore[arg-type]  # checked there
        kind=kind,
        block_size=block_size,
        seq_len=seq_len,
        num_attention_heads=num_attention_heads,
        mask_id=mask_id,
        noise_eps=noise_eps,
    )
    made = run(
        source,
        out,
        to=to,  # type: ignore[arg-type]  # checked there
        lightning=options,
        tokenizer=tokenizer,
        bos=bos,
    )
    config = made.model.config
    say(
        f"{out}: {config.objective}, S = {config.block_size}, L = {config.seq_len}, "
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
