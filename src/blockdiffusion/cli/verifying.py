"""The command that compares files with their checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiffusion.errors import UserError, few
from blockdiffusion.escape import say


def verify(
    directory: Annotated[Path, typer.Argument(help="Prepared data, run, checkpoint or model.")],
    update: Annotated[
        bool,
        typer.Option("--update", help="Accept models and checkpoints as they are now."),
    ] = False,
) -> None:
    """Compare all files with the checksums that were written with them."""
    from blockdiffusion.checkpoints.verify import verify as run
    from blockdiffusion.reports.terminal import progress_bar

    with progress_bar("verify") as report:
        found = run(directory, update=update, report=report)
    damaged = []
    for one in found:
        bad = [str(one.folder / name) for name in one.bad]
        damaged += bad
        said = f"{one.num_files - len(bad)} of {one.num_files} files intact"
        if one.without:
            said = f"no checksums ({', '.join(one.without)}): an older version or another program"
        say(f"{one.folder}: {said}")
        for path in bad:
            say(f"  damaged, changed or missing: {path}")
    if damaged:
        raise UserError(
            f"not what was written: {few(damaged)}; copy again from where it is "
            "intact, or, if you changed a model yourself, accept it with --update"
        )
