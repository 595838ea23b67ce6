"""What `zero-shot` can be asked for. This module imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from blockdiffusion.data.named import NamedSet
from blockdiffusion.data.registry import find_set
from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.limits import check_limits
from blockdiffusion.options import option

PACKINGS = ("wrap", "document")
FRAMES = ("auto", "none", "bos", "bos-eos")


class Task(NamedTuple):
    """One task of a suite: a split of a named set."""

    name: str
    data_set: str
    split: str


SUITES = {
    "paper": (
        Task("ptb", "ptb", "validation"),
        Task("wikitext", "wikitext2", "validation"),
        Task("lm1b", "lm1b", "test"),
        Task("lambada", "lambada", "test"),
        Task("ag_news", "ag_news", "test"),
        Task("pubmed", "scientific_papers_pubmed", "validation"),
        Task("arxiv", "scientific_papers_arxiv", "validation"),
    )
}


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions:
    """What to measure, and by which conventions.

    Packing `wrap` joins the documents of a set to one stream and cuts it to rows of `context`
    tokens; the last partial row is dropped (the paper). `document` scores each document by itself,
    in windows (see `windows.document_windows`). `local` holds `NAME=PATH` or `NAME:split=PATH`.
    The frame `bos` is given and not counted; `bos-eos` (the paper's) has a counted EOS at the end
    of a wrapped row, too; `auto` is as the model was trained, and `bos-eos` if it does not say.

    Raises:
        UserError: something does not exist, or options contradict each other.
    """

    suite: str = option("paper", "Which sets: paper (its table 5).", "paper")
    tasks: tuple[str, ...] = option(
        (),
        "Sets of the suite (ptb, wikitext, lm1b, lambada, ag_news, pubmed or arxiv), with "
        "commas between; may be repeated.",
        "ptb wikitext lm1b lambada ag_news pubmed arxiv",
        was="only",
    )
    local: tuple[str, ...] = option(
        (), "NAME=PATH (or NAME:split=PATH), a set's local files; may be repeated."
    )
    packing: str = option(
        "wrap", "wrap (rows, as the paper) or document (windows with a stride).", "wrap document"
    )
    context: int | None = option(None, "Tokens of a row or window; by default the model's.")
    stride: int | None = option(None, "Tokens from window to window; half of them by default.")
    frame: str = option(
        "auto",
        "Ends of a row: auto (as in training), none, bos or bos-eos.",
        "auto none bos bos-eos",
    )
    document_eos: bool = option(False, "Put an EOS after every document.")
    max_documents: int | None = option(None, "Read only the first documents of each set.")
    limit: int | None = option(None, "Score only the first rows of each set.", was="rows")
    score: LikelihoodOptions = field(default=LikelihoodOptions())
    seed: int = option(0, "Of the masks.")

    def __post_init__(self) -> None:
        for name, allowed in (("suite", SUITES), ("packing", PACKINGS), ("frame", FRAMES)):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} is {shown(value)}: it must be one of {', '.join(allowed)}")
        tasks = tuple(name for names in self.tasks for name in names.split(","))
        object.__setattr__(self, "tasks", tasks)
        known = [task.name for task in SUITES[self.suite]]
        if unknown := [name for name in self.tasks if name not in known]:
            raise UserError(
                f"the suite {self.suite} has no {unknown[0]!r}: it has {', '.join(known)}"
            )
        check_limits(self)
        if self.stride is not None and self.packing == "wrap":
            raise UserError("stride goes with packing document: wrapped rows do not overlap")
        if self.limit is not None and self.packing == "document":
            raise UserError("limit goes with packing wrap: give max_documents instead")
        self.sources()  # checks local

    def sources(self) -> list[tuple[Task, NamedSet]]:
        """Return every task with the set that it reads."""
        suite, local = SUITES[self.suite], {}
        tasks = {alias: task for task in suite for alias in (task.name, task.data_set)}
        for entry in self.local:
            head, equals, path = entry.partition("=")
            name, _, split = head.partition(":")
            if not equals or name not in tasks:
                raise UserError(
                    f"local is {shown(entry)}: it must be NAME=PATH, with a name of the suite "
                    f"({', '.join(task.name for task in suite)})"
                )
            if not Path(path).expanduser().exists():
                raise UserError(f"there is no file or folder {path!r} to read {name} from")
            local[tasks[name]] = (split or tasks[name].split, Path(path).expanduser())
        chosen = []
        for task in suite:
            if not self.tasks or task.name in self.tasks:
                split, path = local.get(task, (task.split, None))
                named = NamedSet(data_set=find_set(task.data_set), split=split, path=path)
                chosen.append((task, named))
        return chosen
