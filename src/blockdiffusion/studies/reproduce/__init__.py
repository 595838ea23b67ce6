"""The paper's tables, rebuilt: `blockdiff reproduce T3 --scale tiny`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError, reason
from blockdiffusion.files.disk import locked, storage_error, write_whole
from blockdiffusion.studies.reproduce.page import table_result
from blockdiffusion.studies.reproduce.paper import PaperTable, find_table
from blockdiffusion.studies.reproduce.plan import Plan, make_plan
from blockdiffusion.studies.reproduce.runner import Launch, Log, launch, run_steps
from blockdiffusion.studies.reproduce.scales import Scale, find_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduced:
    """A finished table: its values, and the files that hold them."""

    name: str
    values: dict[str, Any]
    markdown: Path
    json: Path


def plan_tables(
    tables: Sequence[str],
    scale: str | Scale,
    out: Path,
    data: Sequence[str] = (),
    scorer: str | None = None,
) -> Plan:
    """Return the plan of some tables; write nothing.

    Args:
        tables: "T1" to "T8".
        scale: "tiny", "small", "paper", or one of your own.
        out: directory for all files.
        data: `NAME=PATH` of local text; see docs/how-to/reproduce.md.
        scorer: model that replaces the scale's scorer in table 7.

    Raises:
        UserError: see `find_table`, `find_scale` and `make_plan`.
    """
    sizes = find_scale(scale) if isinstance(scale, str) else scale
    found = {table.name: table for table in map(find_table, tables)}
    return make_plan(list(found.values()), sizes, out, data, scorer)


def reproduce(plan: Plan, log: Log, launch: Launch = launch) -> list[Reproduced]:
    """Train and measure what is missing, and write every table beside the paper's.

    Args:
        log: called with each line about progress.
        launch: starts a `blockdiff` command; by default in a process of its own.

    Raises:
        UserError: a step failed.
        KeyboardInterrupt: it was interrupted; the same call resumes.
    """
    with _claimed(plan.out):
        run_steps(plan, log, launch)
        return [_write_table(plan, table) for table in plan.tables]


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Lock the directory against a second process."""
    taken = f"another process is at work in {out}; wait for it, or choose another --out"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / "lock", taken):
            yield
    except OSError as error:
        raise storage_error(error, out) from error


# The errors that values of other types, or missing ones, cause.
DAMAGE = (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration, ValueError)


def _write_table(plan: Plan, table: PaperTable) -> Reproduced:
    try:
        values, page = table_result(plan, table)
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(
            f"a result of {table.name} in {plan.out} is damaged ({type(error).__name__}: "
            f"{reason(error)}); remove it and run the same command, which measures it again"
        ) from error
    markdown, plain = plan.out / f"{table.name}.md", plan.out / f"{table.name}.json"
    write_whole(markdown, page.encode())
    write_whole(plain, (json.dumps(values, indent=2) + "\n").encode())
    return Reproduced(name=table.name, values=values, markdown=markdown, json=plain)
