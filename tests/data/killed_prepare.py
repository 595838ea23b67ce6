"""Runs `prepare` and kills itself with SIGKILL at a given moment; run by test_packing.

usage: killed_prepare.py SOURCE OUT OPTIONS_JSON STAGE CALL

The process dies in the CALL-th (from 1) report of progress of STAGE, and leaves the process ids of
its workers in OUT.pids.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import psutil

from blockdiffusion.data import packing
from blockdiffusion.data.packing import PrepareOptions, prepare


def main() -> None:
    source, out, options, kill_stage, kill_call = sys.argv[1:]
    packing.UNIT_BYTES = 20_000
    calls = 0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal calls
        calls += stage == kill_stage
        if calls == int(kill_call):
            pids = [child.pid for child in psutil.Process().children()]
            Path(f"{out}.pids").write_text(json.dumps(pids))
            os.kill(os.getpid(), signal.SIGKILL)

    prepare([source], out, PrepareOptions(**json.loads(options)), progress)


if __name__ == "__main__":
    main()
