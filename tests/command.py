"""Runs a `blockdiff` command line in this process: importing the libraries anew takes seconds."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import unittest.mock

from blockdiffusion.cli import main


def blockdiff(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command as its own process would end: exit code and the two outputs."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        unittest.mock.patch.object(sys, "argv", ["blockdiff", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(arguments, int(str(code)), out.getvalue(), err.getvalue())
