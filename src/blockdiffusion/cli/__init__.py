"""The command `blockdiff`: its commands by what they are about, put together here.

Only light modules are imported at the top; each command imports what it needs, so that `--help`
answers at once.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from typing import Annotated, Any

import typer

from blockdiffusion.checksums import Changed
from blockdiffusion.cli.data import datasets, prepare
from blockdiffusion.cli.generating import infill, lengths, sample
from blockdiffusion.cli.judging import generate_compare, generate_eval, pareto
from blockdiffusion.cli.measuring import evaluate, references, variance, zero_shot
from blockdiffusion.cli.releasing import convert, push
from blockdiffusion.cli.training import plan, report, reproduce, train
from blockdiffusion.cli.verifying import verify
from blockdiffusion.errors import Elsewhere, UserError
from blockdiffusion.files import storage_error
from blockdiffusion.ranks import SHARED, end_with_input, joined, several_processes

app = typer.Typer(
    name="blockdiff",
    help="Train, measure and sample block diffusion language models.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# In the order of --help.
COMMANDS = {
    "prepare": prepare,
    "datasets": datasets,
    "plan": plan,
    "train": train,
    "report": report,
    "eval": evaluate,
    "zero-shot": zero_shot,
    "references": references,
    "variance": variance,
    "sample": sample,
    "infill": infill,
    "lengths": lengths,
    "generate-eval": generate_eval,
    "generate-compare": generate_compare,
    "pareto": pareto,
    "reproduce": reproduce,
    "verify": verify,
    "convert": convert,
    "push": push,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)

# An unknown option or a missing argument; newer typer versions carry their own click.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
MOST_CHARACTERS = 1200  # of a sentence
_show_usual_warning = warnings.showwarning


def _version(wanted: bool) -> None:
    if wanted:
        from blockdiffusion import __version__

        typer.echo(f"blockdiff {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if several_processes() and context.invoked_subcommand not in SHARED:
        with joined():
            raise UserError(
                f"torchrun started several processes, but {context.invoked_subcommand} is the work "
                f"of one; leave torchrun out (it is for {', '.join(SHARED)})"
            )


def main() -> None:
    """Runs the command line; a user's mistake is one sentence and exit code 2.

    So is what the system refuses: library code says more where it knows more, and whatever file
    nobody thought of is told here.
    """
    warnings.simplefilter("always", Changed)
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # it takes more
    end_with_input()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UserError as error:
        _fail(str(error))
    except USAGE_ERROR as error:
        _fail(error.format_message())
    except Elsewhere as end:
        if str(end):
            typer.echo(f"blockdiff: error: {end}", err=True)
        sys.exit(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("blockdiff: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _fail(str(storage_error(error)))
    except (ValueError, RuntimeError) as error:  # what paths raise that are none
        if not re.search("null (byte|character)|surrogates not allowed|Symlink loop", str(error)):
            raise
        _fail(f"the name of a file is none ({str(error)[:200]}); give another name")


def _fail(message: str) -> None:
    if len(message) > MOST_CHARACTERS:  # what was given may be of any length
        message = f"{message[:MOST_CHARACTERS]} ... {message[-MOST_CHARACTERS // 4 :]}"
    typer.echo(f"blockdiff: error: {message}", err=True)
    sys.exit(2)


def _show_warning(
    message: Any, category: type[Warning], filename: str, lineno: int, *more: Any
) -> None:
    """A warning to the user as a sentence; one to a programmer as usual."""
    if issubclass(category, Changed):
        typer.echo(f"blockdiff: warning: {message}", err=True)
    else:
        _show_usual_warning(message, category, filename, lineno, *more)
