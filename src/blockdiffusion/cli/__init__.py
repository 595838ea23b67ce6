"""The command `blockdiff`: its commands by what they are about, put together here.

Only light modules are imported at the top; each command imports what it needs, so that `--help`
answers at once.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from blockdiffusion.cli.data import datasets, prepare
from blockdiffusion.cli.generating import chat, generate, infill, lengths, sample
from blockdiffusion.cli.judging import generate_compare, generate_eval, pareto
from blockdiffusion.cli.measuring import (
    compare,
    decide,
    evaluate,
    references,
    variance,
    zero_shot,
)
from blockdiffusion.cli.options import new_names, within_limits
from blockdiffusion.cli.releasing import convert, push
from blockdiffusion.cli.shared import renamed, warn
from blockdiffusion.cli.training import adapt, estimate, recipe_key, report, reproduce, train
from blockdiffusion.cli.verifying import verify
from blockdiffusion.errors import PeerFailure, UserError, reason
from blockdiffusion.escape import mend_standard_streams, say
from blockdiffusion.files.checksums import Changed
from blockdiffusion.files.disk import storage_error
from blockdiffusion.options import Renamed
from blockdiffusion.runtime.devices import spin_briefly_if_busy
from blockdiffusion.runtime.distributed import (
    SHARED,
    end_with_input,
    process_group,
    several_processes,
)

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
    "estimate": estimate,
    "train": train,
    "adapt": adapt,
    "report": report,
    "eval": evaluate,
    "compare": compare,
    "decide": decide,
    "zero-shot": zero_shot,
    "references": references,
    "variance": variance,
    "sample": sample,
    "chat": chat,
    "generate": generate,
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
    app.command(_name)(within_limits(_command))
# Old names, for one version.
app.command("plan", hidden=True)(renamed(within_limits(estimate), "plan", "estimate"))


# An unknown option or a missing argument; newer typer versions carry their own click.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
MOST_CHARACTERS = 1200  # of a sentence
NO_PATH = re.compile("null (byte|character)|surrogates not allowed|Symlink loop")
_show_usual_warning = warnings.showwarning


def _version(wanted: bool) -> None:
    if wanted:
        from blockdiffusion import __version__

        say(f"blockdiff {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if several_processes() and context.invoked_subcommand not in SHARED:
        with process_group():
            raise UserError(
                f"torchrun started several processes, but {context.invoked_subcommand} is the work "
                f"of one; leave torchrun out (it is for {', '.join(SHARED)})"
            )


def main() -> None:
    """Runs the command line; a user's mistake is one sentence and exit code 2.

    So is an error of the system. Library code explains the errors that it expects; this function
    reports all others.
    """
    mend_standard_streams()
    spin_briefly_if_busy()
    warnings.simplefilter("always", Changed)
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # it takes more
    end_with_input()
    try:
        sys.exit(app(new_names(sys.argv[1:], COMMANDS) or ["--help"], standalone_mode=False))
    except UserError as error:
        _fail(str(error))
    except USAGE_ERROR as error:
        _fail(_as_recipe_key(error) or error.format_message())
    except PeerFailure as end:
        if str(end):
            say(f"blockdiff: error: {end}", err=True)
        sys.exit(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        say("blockdiff: stopped", err=True)
        sys.exit(130)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # which click makes exit code 1
            _end_without_reader()
        raise
    except BrokenPipeError:
        _end_without_reader()
    except OSError as error:
        _fail(str(storage_error(error)))
    except (MemoryError, ValueError, RuntimeError) as error:
        if _is_out_of_memory(error):
            _fail("there is not enough memory for this: ask for fewer rows, samples or tokens")
        if not NO_PATH.search(str(error)):
            raise
        _fail(f"a path cannot be used ({reason(error)}); give another one")


def _as_recipe_key(error: Any) -> str | None:
    """Return how to write a recipe's key that was given as an option; None for other options."""
    option, command = getattr(error, "option_name", None), getattr(error.ctx, "info_name", None)
    if option is None or command not in ("adapt", "estimate", "plan", "train"):
        return None
    key = recipe_key(option, sys.argv)
    if key is None:
        return None
    return f"there is no option {option}; write {key}, without dashes, behind the recipe"


def _is_out_of_memory(error: Exception) -> bool:
    """Recognizes the messages of Python, NumPy and PyTorch for a failed allocation."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _end_without_reader() -> NoReturn:
    """End as SIGPIPE ends a program whose output nobody reads any more, as behind `head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
    sys.exit(141)  # 128 + SIGPIPE


def _fail(message: str) -> None:
    if len(message) > MOST_CHARACTERS:  # what was given may be of any length
        message = f"{message[:MOST_CHARACTERS]} ... {message[-MOST_CHARACTERS // 4 :]}"
    say(f"blockdiff: error: {message}", err=True)
    sys.exit(2)


def _show_warning(
    message: Any, category: type[Warning], filename: str, lineno: int, *more: Any
) -> None:
    """Prints a warning for the user as one sentence, and any other in Python's usual form."""
    if issubclass(category, Changed | Renamed):
        warn(str(message))
    else:
        _show_usual_warning(message, category, filename, lineno, *more)
