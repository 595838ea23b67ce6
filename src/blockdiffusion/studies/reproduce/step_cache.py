"""Which steps are finished: every step leaves a note of what it was made from.

A note (OUT/steps/STEP.json) is written when its step begins, with a hash of everything that the
result depends on: the command, the recipe, and the content of what it reads. A step whose note has
another hash is out of date. Its measurement is then repeated; a training run is never deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blockdiffusion.data.manifest import MANIFEST_FILE
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import journal_beside
from blockdiffusion.files.checksums import sha256_of
from blockdiffusion.files.disk import write_whole
from blockdiffusion.files.records import Damaged, build, read_json
from blockdiffusion.studies.reproduce.plan import Plan, Step
from blockdiffusion.train import checkpoint as checkpoints

State = Literal["done", "interrupted", "out of date", "to do"]
DECISIVE = ("model", "objective", "search", "train", "optim")  # sections that make the weights


@dataclass(frozen=True, kw_only=True)
class _Note:
    identity: str
    done: bool


class StepCache:
    """The notes of a plan's steps.

    Each file is hashed once: a step's input is finished before the step begins and does not change.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._hashes: dict[tuple[Path, int, int], str] = {}

    def state(self, step: Step) -> State:
        """Return the state of a step."""
        note = self._note(step)
        if note is None:
            return "to do"
        if note.identity != self.identity(step):
            return "out of date"
        return "done" if _is_there(step) and (note.done or _is_whole(step)) else "interrupted"

    def progress(self, step: Step) -> int:
        """Updates of the weights that a training step has saved."""
        newest = checkpoints.latest(step.product) if step.product.is_dir() else None
        return 0 if newest is None else int(newest.name.removeprefix("step-"))

    def begin(self, step: Step) -> None:
        """Prepare for a step that starts or resumes: remove an outdated measurement.

        Raises:
            UserError: there is a training run that was made from something else.
        """
        state = self.state(step)
        if step.kind == "train" and checkpoints.holds_run(step.product):
            if state in ("to do", "out of date"):
                raise UserError(
                    f"the run in {step.product} was trained with other settings, data or starting "
                    "weights than are asked for now; move it away, or choose another --out"
                )
        elif step.kind == "measure" and state in ("to do", "out of date"):
            for leftover in step.product.parent.glob(f"{step.product.stem}.*"):
                leftover.unlink()
        if state != "interrupted":
            self._write(step, done=False)

    def finish(self, step: Step) -> None:
        """Note that a step is done, unless that is noted already."""
        if self._note(step) != _Note(identity=self.identity(step), done=True):
            self._write(step, done=True)

    def identity(self, step: Step) -> str:
        """A hash of everything that the result of a step depends on."""
        parts: list[Any] = [
            self._portable(step.command),
            [_signature(file) for file in step.files],
            [self._content(self.plan.step(name).product) for name in step.needs],
            [self._content(Path(model)) for model in step.models if Path(model).exists()],
        ]
        if step.run is not None:
            parts.append({name: self._portable(step.run.recipe.get(name)) for name in DECISIVE})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _portable(self, value: Any) -> Any:
        """Return values with paths replaced by names, since everything may be moved."""
        if isinstance(value, Mapping):
            return {name: self._portable(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._portable(item) for item in value]
        if not isinstance(value, str):
            return value
        places = {"OUT": self.plan.out} | {f"DATA:{n}": p for n, p in self.plan.data.items()}
        for name, path in places.items():
            value = re.sub(rf"(^|=){re.escape(str(path))}(?=/|$)", rf"\g<1>{name}", value)
        return value

    def _content(self, product: Path) -> str | None:
        """A hash of prepared data (its manifest) or of a model's weights; None: not there yet."""
        for name in (MANIFEST_FILE, "model/model.safetensors", "model.safetensors"):
            if (file := product / name).is_file():
                return self._hash(file)
        return None

    def _hash(self, file: Path) -> str:
        status = file.stat()
        key = (file, status.st_mtime_ns, status.st_size)
        if key not in self._hashes:
            self._hashes[key] = sha256_of(file)
        return self._hashes[key]

    def _file(self, step: Step) -> Path:
        return self.plan.out / "steps" / f"{step.name}.json"

    def _note(self, step: Step) -> _Note | None:
        if not self._file(step).exists():
            return None
        try:
            return build(_Note, read_json(self._file(step), ""), strict=False)
        except (UserError, Damaged):  # it will be rewritten
            return None

    def _write(self, step: Step, *, done: bool) -> None:
        values = {"identity": self.identity(step), "done": done, "command": step.command}
        write_whole(self._file(step), (json.dumps(values, indent=2) + "\n").encode())


def _is_there(step: Step) -> bool:
    match step.kind:
        case "prepare":
            return (step.product / MANIFEST_FILE).is_file()
        case "train":
            return (step.product / "model" / "config.json").is_file()
        case "measure":
            return step.product.is_file()


def _is_whole(step: Step) -> bool:
    """Whether a measurement has ended: its journal is removed after its result is written."""
    journal = journal_beside(step.product)
    return step.kind == "measure" and not (journal and journal.exists())


def _signature(path: Path) -> list[Any]:
    """Return names, sizes and dates of a file, or of the files in a folder."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
