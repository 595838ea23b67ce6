"""What every system of the tables is trained as: sections of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blockdiffusion.studies.reproduce.scales import Scale

# Clips of tables 2 and 8 (mask probabilities), and the schedules of table 8.
NOISES: dict[str, dict[str, Any]] = {
    "0-0.5": {"clip": [0.0, 0.5]},
    "0.3-0.8": {"clip": [0.3, 0.8]},
    "0.45-0.95": {"clip": [0.45, 0.95]},
    "0.5-1": {"clip": [0.5, 1.0]},
    "0-1": {},
    "linear": {},
    "log": {"schedule": "log"},
    "sqrt": {"schedule": "sqrt"},
    "square": {"schedule": "square"},
    "cosine": {"schedule": "cosine"},
}
EXACT_BLOCK = 4  # enumerating 2^S - 1 sets costs no more than drawing up to here


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One model to train.

    Attributes:
        block_size: S; None for an autoregressive network.
        objective, model, search: sections of its recipe, besides those of the scale.
        steps: updates of the weights.
        start: the system whose weights it starts from; None: random ones.
    """

    name: str
    objective: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    block_size: int | None
    steps: int
    start: str | None = None

    @property
    def estimator(self) -> str:
        """What its likelihood is measured with: without noise where that costs no more."""
        is_masks = self.objective["name"] in ("bd3lm", "mdlm")
        exact = is_masks and self.block_size is not None and self.block_size <= EXACT_BLOCK
        return "exact" if exact else "auto"

    @property
    def noise(self) -> str:
        """The estimator that it was trained with, as `estimators.make_estimator` reads it."""
        clip, schedule = self.objective.get("clip"), self.objective.get("schedule")
        named = "bernoulli" if schedule is None else f"bernoulli:{schedule}"
        return named if clip is None else f"{named}[{clip[0]:g},{clip[1]:g}]"

    @property
    def noisy_copies(self) -> int:
        """Noisy copies of a row that an update scores; of an autoregressive model the row."""
        pairs = self.objective.get("estimator") == "complement" and self.block_size != 1
        return self.objective.get("num_noisy") or (2 if pairs else 1)

    def streams(self, seq_len: int) -> int:
        """Streams of L tokens that an update reads: a clean one, too, where blocks have a past."""
        has_past = self.block_size is not None and self.block_size < seq_len
        return self.noisy_copies + has_past


def find_system(name: str, scale: Scale, seq_len: int) -> System:
    """The system called `name` in the tables, or `base`, at a scale."""
    steps = scale.steps
    from_scratch = steps.base + steps.fine_tune
    masked = dict(scale.objective)
    match name.split("-", 2):
        case ["base"]:
            return _one_block("base", masked | {"name": "mdlm"}, seq_len, steps.base)
        case ["mdlm"]:
            return _one_block("mdlm", masked | {"name": "mdlm"}, seq_len, steps.fine_tune, "base")
        case ["sedd"]:
            return _one_block("sedd", masked | {"name": "sedd"}, seq_len, from_scratch)
        case ["d3pm"]:
            noise = {"name": "d3pm", "transition": "absorbing", "num_noisy": scale.num_noisy}
            return _one_block("d3pm", noise, seq_len, from_scratch)
        case ["ar"]:
            return _autoregressive("ar", from_scratch)
        case ["t1", "ar"]:
            return _autoregressive("t1-ar", steps.single_token)
        case ["t1", kind]:
            clip = {"clip": [1.0, 1.0]} if kind == "tuned" else {}
            return _blocks(name, {"estimator": "bernoulli", **clip}, 1, steps.single_token, None)
        case [("t2" | "t8") as table, block, noise]:
            size = seq_len if block == "sL" else int(block[1:])
            updates = steps.clips if table == "t2" else steps.schedules
            return _blocks(name, {"estimator": "bernoulli", **NOISES[noise]}, size, updates, "mdlm")
        case [block]:
            found = _blocks(name, masked, int(block[1:]), steps.fine_tune, "base")
            return replace(found, search=scale.search)
    raise AssertionError(name)


def _one_block(
    name: str, objective: Mapping[str, Any], seq_len: int, steps: int, start: str | None = None
) -> System:
    """S = L."""
    return System(
        name=name,
        objective=objective,
        model={"block_size": seq_len},
        block_size=seq_len,
        steps=steps,
        start=start,
    )


def _blocks(
    name: str, objective: Mapping[str, Any], size: int, steps: int, start: str | None
) -> System:
    return System(
        name=name,
        objective={"name": "bd3lm", **objective},
        model={"block_size": size},
        block_size=size,
        steps=steps,
        start=start,
    )


def _autoregressive(name: str, steps: int) -> System:
    return System(name=name, objective={"name": "ar"}, block_size=None, steps=steps)
