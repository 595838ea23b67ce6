"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from blockdiffusion.cli.shared import warn
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.limits import check_limit


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Returns the function that completes an option's value in the shell."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def choice(help: str, values: str) -> Any:
    """Declares an option with a few values, given as words."""
    return typer.Option(help=help, autocompletion=one_of(*values.split()))


SCHEDULES = "linear cosine square sqrt log"
WEIGHTS = "auto float32 float64 bf16"
POLICIES = "first-hitting ancestral random confidence margin entropy remask analytic"

MODEL = Annotated[str, typer.Argument(help="Model or run directory, or a Hugging Face id.")]
DEVICE = Annotated[str, choice("auto, cpu, cuda or mps.", "auto cpu cuda mps")]
DTYPE = Annotated[str, choice("Weights: auto (as saved), float32, float64 or bf16.", WEIGHTS)]
SAMPLING_DTYPE = Annotated[
    str,
    choice(
        "Weights: auto (as saved), float32, float64, bf16 or int8 (approximate).", f"{WEIGHTS} int8"
    ),
]
LAWS = "complement count bernoulli resampled"
BOS = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Position 0 is a given BOS; by default as in training."),
]
SCORER = Annotated[
    str,
    typer.Option(
        help="Evaluator: a Hugging Face causal language model, or one of ours; not MODEL."
    ),
]
# Of measurements.
JSON_FILE = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result here; once stopped, it goes on from there."),
]
MASK_SEED = Annotated[int, typer.Option(help="Of the masks.")]

SEED = Annotated[int | None, typer.Option(help="For a draw that can be repeated.")]
JSON_LINES = Annotated[bool, typer.Option("--json", help="One JSON object a sample.")]
STRIDE = Annotated[
    int | None,
    typer.Option(help="Models of one block: new tokens of each slide beyond L; L/2 by default."),
]
WINDOW = Annotated[
    int | None, typer.Option(help="A token sees the last WINDOW tokens; constant memory.")
]
EOS = Annotated[bool, typer.Option(help="End at a sampled EOS.")]
CACHE = Annotated[bool, typer.Option(help="Keep keys and values of finished blocks.")]


# --- options that go together: fields are named as what takes them names its arguments -----------


@dataclass(frozen=True)
class PolicyOptions:
    """Which tokens a pass reveals; the arguments of `sampling.stream`."""

    policy: Annotated[
        str | None,
        choice(
            "first-hitting, ancestral, random, confidence, margin, entropy or remask; SEDD: "
            "analytic; by default the model's.",
            POLICIES,
        ),
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Steps per block, for ancestral, remask and analytic.")
    ] = None
    schedule: Annotated[
        str | None,
        choice("Noise schedule of the steps: linear, cosine, square, sqrt or log.", SCHEDULES),
    ] = None
    tokens_per_step: Annotated[
        int | None,
        typer.Option(help="Tokens of a pass, for random, confidence, margin and entropy."),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(help="Instead: of confidence or margin in [0, 1], or of entropy in nats."),
    ] = None
    remask: Annotated[
        float | None,
        typer.Option(help="Share of the largest rate of remask, in [0, 1]; 1 by default."),
    ] = None


@dataclass(frozen=True)
class FilterOptions:
    """What a token is drawn from; the arguments of `sampling.logits.Filters`."""

    top_p: Annotated[float, typer.Option(help="Nucleus, in (0, 1]; 1 keeps all.")] = 1.0
    top_p_rule: Annotated[
        str,
        choice(
            "transformers (keeps the token that crosses) or authors (drops it).",
            "transformers authors",
        ),
    ] = "transformers"
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None
    temperature: Annotated[float, typer.Option(help="In [0.001, 1000].")] = 1.0


@dataclass(frozen=True)
class ScorerOptions:
    """What samples are compared with, and how the scorer reads them."""

    reference: Annotated[
        list[str] | None,
        typer.Option(help="Real text beside it: prepared data, or text files; may be repeated."),
    ] = None
    split: Annotated[str, typer.Option(help="Split of a prepared --reference.")] = "valid"
    context: Annotated[
        int | None, typer.Option(help="Tokens of the scorer's windows; all it can read by default.")
    ] = None
    stride: Annotated[
        int | None, typer.Option(help="Tokens between two windows; half the context by default.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Those of what is measured."""
        return vars(self) | {"reference": tuple(self.reference or ())}


POLICY, FILTERS, READING = PolicyOptions(), FilterOptions(), ScorerOptions()
LIKELIHOOD = LikelihoodOptions()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of a dataclass above are its fields, each an option."""
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(
                parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
            )
            continue
        kind = groups[name] = hints[name]
        options = get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, parameter.KEYWORD_ONLY, default=field.default,
                annotation=_annotated(options[field.name], field.metadata),
            )
            for field in fields(kind)
        ]  # fmt: skip

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call


def _annotated(hint: Any, about: Mapping[str, Any]) -> Any:
    """The type of an option that `options.option` describes; of others, which say it themselves."""
    return Annotated[hint, choice(about["help"], about["choices"])] if about else hint


# What options were called in the version before.
OLD_NAMES = {
    "--samples": "--mc-samples",
    "--rows": "--limit",
    "--only": "--tasks",
    "--judge": "--scorer",
}


def new_names(arguments: list[str], commands: Mapping[str, Callable[..., None]]) -> list[str]:
    """`arguments` with the names that the options of their command have now, and a warning."""
    command = commands.get(arguments[0]) if arguments else None
    known = inspect.signature(command).parameters if command else ()
    names = {o: new for o, new in OLD_NAMES.items() if new[2:].replace("-", "_") in known}
    given = [argument.partition("=") for argument in arguments]
    for old in dict.fromkeys(name for name, *_ in given if name in names):
        warn(f"{old} is now {names[old]}; the next version will not read it")
    return [names.get(name, name) + equals + value for name, equals, value in given]


def within_limits(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command so that it first checks all numbers against `limits.LIMITS`."""

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_limit(name, value, "--" + name.replace("_", "-"))
        command(**values)

    return call
