"""Options as fields of dataclasses: each with its help, its values, and its old name, if any.

The command line is made from them (`cli.options.grouped`). This module imports no PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from blockdiffusion.errors import UserError, shown

T = TypeVar("T")
REQUIRED = MISSING  # the default of an option that must be given
OLD_WORDS = {"bf16": "bfloat16"}  # values of options, as the version before named them


class Renamed(FutureWarning):
    """An old name was used, which the next version will not read."""


def option(
    default: Any,
    help: str,
    choices: str = "",
    flags: str = "",
    was: str = "",
    positional: bool = False,
) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: its default; `REQUIRED` if it has none.
        choices: the values that the shell completes, separated by spaces.
        flags: its name on the command line, unless that is the field's.
        was: its name in the version before, which is still read.
        positional: whether the command line gives it without a name.
    """
    about = dict(help=help, choices=choices, flags=flags, was=was, positional=positional)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Only:
    """Annotates a group of options, a field whose type is a dataclass: these of its fields are
    options of the command line, with another help text if one is given."""

    helps: Mapping[str, str | None]


def only(*names: str, **helps: str) -> Only:
    """Select the options `names`, and those in `helps` with the help texts given there."""
    return Only(dict.fromkeys(names) | helps)


def all_but(kind: Any, *names: str) -> Only:
    """Select all options of the dataclass `kind` except `names`."""
    return only(*(item.name for item in fields(kind) if item.name not in names))


def with_new_names(kind: Any, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `values` of the dataclass `kind` by the current names of its fields.

    Args:
        prefix: of the names in messages.

    Raises:
        UserError: a value is given by both of its names.
    """
    now = {item.metadata["was"]: item.name for item in fields(kind) if item.metadata.get("was")}
    return renamed(values, now, prefix)


def renamed(values: Mapping[str, Any], now: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Return `values` with old names replaced as in `now`.

    Raises:
        UserError: a value is given by both of its names.
    """
    for old in (name for name in now if name in values):
        if now[old] in values:
            raise UserError(f"{prefix}{old} is {prefix}{now[old]} by its old name; give one")
        message = f"{prefix}{old} is now {prefix}{now[old]}; the next version will not read it"
        warnings.warn(message, Renamed, stacklevel=4)
    return {now.get(name, name): value for name, value in values.items()}


def current_word(value: str, allowed: Iterable[str], name: str) -> str:
    """Return `value`, or the current word for it if that is `allowed`."""
    now = OLD_WORDS.get(value, value)
    if now == value or now not in allowed or value in allowed:
        return value
    message = f"{name} {value} is now {now}; the next version will not read it"
    warnings.warn(message, Renamed, stacklevel=3)
    return now


def check_words(options: Any, prefix: str = "") -> None:
    """Refuse a value of a `Literal` field that is not one of its words.

    Raises:
        UserError: there is one.
    """
    for name, hint in get_type_hints(type(options)).items():
        if get_origin(hint) is Literal and getattr(options, name) not in get_args(hint):
            value, allowed = shown(getattr(options, name)), ", ".join(get_args(hint))
            raise UserError(f"{prefix}{name} is {value}: it must be one of {allowed}")


def changed(options: T, changes: Mapping[str, Any]) -> T:
    """Return `options` with some fields changed; old names are read, too.

    Raises:
        UserError: there is no such option, or its value is not allowed.
    """
    changes = with_new_names(options, changes)
    known = [item.name for item in fields(options)]  # type: ignore[arg-type]
    if unknown := [name for name in changes if name not in known]:
        raise UserError(f"{shown(unknown[0])} is no option; there are {', '.join(known)}")
    return replace(options, **changes)  # type: ignore[type-var]
