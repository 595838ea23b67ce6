"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from blockdiffusion.cli.shared import warn
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.limits import check_limit
from blockdiffusion.sampling.params import FIELDS


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Returns the function that completes an option's value in the shell."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def choice(help: str, values: str) -> Any:
    """Declares an option with a few values, given as words."""
    return typer.Option(help=help, autocompletion=one_of(*values.split()))


WEIGHTS = "auto float32 float64 bfloat16"

MODEL = Annotated[str, typer.Argument(help="Model or run directory, or a Hugging Face id.")]
DEVICE = Annotated[str, choice("auto, cpu, cuda or mps.", "auto cpu cuda mps")]
DTYPE = Annotated[str, choice("Weights: auto (as saved), float32, float64 or bfloat16.", WEIGHTS)]
SAMPLING_DTYPE = Annotated[
    str,
    choice(
        "Weights: auto (as saved), float32, float64, bfloat16 or int8 (approximate).",
        f"{WEIGHTS} int8",
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

JSON_LINES = Annotated[bool, typer.Option("--json", help="One JSON object a sample.")]

# --- options that go together: the fields of a dataclass ------------------------------------------


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


READING, LIKELIHOOD = ScorerOptions(), LikelihoodOptions()
FILTERS = ("top_p", "top_p_rule", "top_k", "temperature")


@dataclass(frozen=True)
class Only:
    """Annotates a parameter of a dataclass: these of its fields are options."""

    names: tuple[str, ...]


def all_but(*names: str) -> Only:
    """All options of sampling but these."""
    return Only(tuple(name for name in FIELDS if name not in names))


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of a dataclass are its fields, each an option; the parameter's
    default has the defaults of them all."""
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *notes = get_args(hints[name]) or (hints[name],)
        if not is_dataclass(kind):
            parameters.append(
                parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
            )
            continue
        only = next((note.names for note in notes if isinstance(note, Only)), None)
        types = get_type_hints(kind, include_extras=True)
        chosen = [field for field in fields(kind) if only is None or field.name in only]
        groups[name] = parameter.default, [field.name for field in chosen]
        parameters += [
            inspect.Parameter(
                field.name, parameter.KEYWORD_ONLY, default=getattr(parameter.default, field.name),
                annotation=_annotated(types[field.name], field.metadata),
            )
            for field in chosen
        ]  # fmt: skip

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, (defaults, chosen) in groups.items():
            values[name] = replace(defaults, **{field: values.pop(field) for field in chosen})
        command(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call


def _annotated(hint: Any, about: Mapping[str, str]) -> Any:
    """The type of an option that `options.option` describes; of others, which say it themselves."""
    if not about:
        return hint
    words = about["choices"].split()
    hint = str | None if hint is Any else str if get_origin(hint) is Literal else hint
    flags = (about["flags"],) if about["flags"] else ()
    completion = one_of(*words) if words else None
    return Annotated[hint, typer.Option(*flags, help=about["help"], autocompletion=completion)]


# What options were called in the version before.
OLD_NAMES = {
    "--samples": "--mc-samples",
    "--rows": "--limit",
    "--only": "--tasks",
    "--judge": "--scorer",
    "--policy": "--sampler",
    "--num-heads": "--num-attention-heads",
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
