"""What several commands do: load the network, check places, write files."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError, shown
from blockdiffusion.escape import say, terminal
from blockdiffusion.files.disk import refuse_no_file, storage_error, write_whole
from blockdiffusion.options import current_word

INT8 = "int8"  # besides the types of tensors


def warn(sentence: str) -> None:
    """Prints a warning; the command continues."""
    say(f"blockdiff: warning: {sentence}", err=True)


def renamed(command: Callable[..., None], old: str, new: str) -> Callable[..., None]:
    """The command under its old name, which warns."""

    @functools.wraps(command)
    def call(**values: Any) -> None:
        warn(f"{old} is now called {new}; the next version will not know the old name")
        command(**values)

    return call


def device_of(name: str) -> Any:
    from blockdiffusion.runtime.devices import select_device
    from blockdiffusion.runtime.distributed import current_group

    return current_group().set_device(select_device(name, "--device"))


def load_model(model: str, device: str, dtype: str) -> Any:
    with _told_to_wait(f"loading {model}"):
        return _load(model, device, dtype)


@contextmanager
def _told_to_wait(line: str) -> Iterator[None]:
    """Shows a line on standard error during the block, if that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.text import Text

    from blockdiffusion.reports.terminal import error_console

    with error_console().status(Text(terminal(line)), spinner="line"):
        yield


def _load(model: str, device: str, dtype: str) -> Any:
    import torch

    from blockdiffusion.checkpoints.formats import load

    dtypes = {
        "auto": None,
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
    }
    dtype = current_word(dtype, dtypes, "--dtype")
    if dtype not in dtypes:
        raise UserError(f"--dtype is {shown(dtype)}; choose one of {', '.join(dtypes)}")
    return load(model, device=device_of(device), dtype=dtypes[dtype])


def check_plot(plot: Path | None) -> None:
    """Refuses before the work to draw a picture that nothing here can draw."""
    if plot is not None:
        from blockdiffusion.reports.plots import require

        require()


def check_places(*paths: Path | None) -> None:
    """Fails now, not after the measurement, where one of the files cannot be written."""
    import tempfile

    for path in filter(None, paths):
        refuse_no_file(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise storage_error(error, path) from error


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    import json

    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path | None, text: str) -> None:
    """Writes a file where one was asked for."""
    if path is not None:
        write_whole(path, text.encode())
