"""Options that several commands have, and commands made from dataclasses of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import typer

from blockdiffusion.cli.shared import INT8, check_places, check_plot, load_model, warn, write_text
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limit
from blockdiffusion.options import Only, option

WEIGHTS = "auto float32 float64 bfloat16"

MODEL = Annotated[str, typer.Argument(help="Model or run directory, or a Hugging Face id.")]

# Help texts that several commands have.
BOS = "Position 0 is a given BOS; by default as in training."
MASK_SEED = "Of the masks."
PREPARED = "Directory that `blockdiff prepare` made."


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Where and in which type a network computes."""

    device: str = option("auto", "auto, cpu, cuda or mps.", "auto cpu cuda mps")
    dtype: str = option("auto", "Weights: auto (as saved), float32, float64 or bfloat16.", WEIGHTS)

    def load(self, model: str) -> Any:
        return load_model(model, self.device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(NetworkOptions):
    """The same for a network that samples, which may have 8-bit products."""

    dtype: str = option(
        "auto",
        "Weights: auto (as saved), float32, float64, bfloat16 or int8 (approximate).",
        f"{WEIGHTS} {INT8}",
    )

    @property
    def int8(self) -> bool:
        return self.dtype == INT8

    def load(self, model: str) -> Any:
        """Load the network, for int8 in float32: the 8-bit copy is made of that."""
        return load_model(model, self.device, "float32" if self.int8 else self.dtype)

    def load_optimized(self, model: str) -> Any:
        network = self.load(model)
        from blockdiffusion.models.inference import optimize_for_inference

        return optimize_for_inference(network, int8=self.int8)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files that a measurement writes."""

    json_file: Path | None = option(
        None, "Write the result here; a stopped run resumes from there.", flags="--json"
    )
    csv_file: Path | None = option(None, "Write a table here.", flags="--csv")
    markdown: Path | None = option(None, "Write a page here.")
    plot: Path | None = option(None, "Draw it here, as SVG.")

    def check(self) -> None:
        """Fail before the measurement if a file cannot be written or a plot not be drawn."""
        check_places(self.json_file, self.csv_file, self.markdown, self.plot)
        check_plot(self.plot)

    def write_plot(self, draw: Callable[..., Any], *facts: Any) -> None:
        """Write what `reports.plots.NAME(*facts)` draws, if a plot was asked for."""
        if self.plot is not None:
            from blockdiffusion.reports import plots

            write_text(self.plot, plots.svg(draw(*facts)))


# --- commands from dataclasses --------------------------------------------------------------------


class Group(NamedTuple):
    """A dataclass whose fields are options of a command."""

    kind: Any
    only: Only | None

    @classmethod
    def of(cls, hint: Any) -> Group | None:
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not is_dataclass(kind):
            return None
        return cls(kind, next((note for note in notes if isinstance(note, Only)), None))

    def members(self) -> Iterator[tuple[Any, Any]]:
        """The fields that are options or groups, with their types."""
        hints = get_type_hints(self.kind, include_extras=True)
        for item in _own_first(self.kind):
            if self.only is None or item.name in self.only.helps:
                yield item, hints[item.name]

    def parameters(self, default: Any) -> Iterator[inspect.Parameter]:
        """The options; `default`: the group whose values are their defaults, if there is one."""
        for item, hint in self.members():
            value = item.default if default is MISSING else getattr(default, item.name)
            if group := Group.of(hint):
                yield from group.parameters(value)
            else:
                other = self.only.helps[item.name] if self.only else None
                about = {**item.metadata, "help": other} if other else item.metadata
                yield _parameter(item.name, hint, value, about)

    def collect(self, default: Any, values: dict[str, Any]) -> Any:
        """Make the group from the options in `values`, which are taken out."""
        given = {}
        for item, hint in self.members():
            value = item.default if default is MISSING else getattr(default, item.name)
            if group := Group.of(hint):
                given[item.name] = group.collect(value, values)
            else:
                given[item.name] = _from_words(item.name, hint, values.pop(item.name), value)
        return self.kind(**given) if default is MISSING else replace(default, **given)


def _own_first(kind: Any) -> list[Any]:
    """The fields of a dataclass, those of its base classes last."""
    classes = [inspect.get_annotations(base) for base in kind.__mro__]

    def owner(item: Any) -> int:
        return max(place for place, names in enumerate(classes) if item.name in names)

    return sorted(fields(kind), key=owner)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with each parameter of a dataclass replaced by options for its fields.

    A field that is a dataclass is such a group, too. The parameter's own default, if it has one,
    gives the defaults of all its options.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if group := Group.of(hints[name]):
            default = MISSING if parameter.default is parameter.empty else parameter.default
            groups[name] = group, default
            parameters += group.parameters(default)
        else:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
            )

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, (group, default) in groups.items():
            values[name] = group.collect(default, values)
        command(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call


def _parameter(name: str, hint: Any, default: Any, about: Mapping[str, Any]) -> inspect.Parameter:
    """The parameter from which typer makes one option."""
    words = about["choices"].split()
    if _is_tuple_of(hint, str):
        hint, default = list[str] | None, None
    elif _is_tuple_of(hint, int):
        hint, default = str, ",".join(map(str, default))
    elif hint is Any:
        hint = str | None
    elif get_origin(hint) is Literal:
        hint, words = str, words or list(get_args(hint))
    flags = (about["flags"],) if about["flags"] else ()
    kind = typer.Argument if about["positional"] else functools.partial(typer.Option, *flags)
    described = kind(help=about["help"], autocompletion=one_of(*words) if words else None)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[hint, described],
    )


def _from_words(name: str, hint: Any, value: Any, default: Any) -> Any:
    """The value of an option from what typer made of it."""
    if _is_tuple_of(hint, str):
        return tuple(value) if value else default
    if _is_tuple_of(hint, int):
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is {shown(value)}; give whole numbers with commas between, as in 1,4,16"
            ) from None
    return value


def _is_tuple_of(hint: Any, kind: type) -> bool:
    return hint == tuple[kind, ...]


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Returns the function that completes an option's value in the shell."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def choice(help: str, values: str) -> Any:
    """Declares an option with a few values, given as words."""
    return typer.Option(help=help, autocompletion=one_of(*values.split()))


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
    parameters = inspect.signature(command).parameters

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                notes = get_args(parameters[name].annotation)[1:]
                flags = [flag for note in notes for flag in note.param_decls or ()]
                check_limit(name, value, [*flags, "--" + name.replace("_", "-")][0])
        command(**values)

    return call
