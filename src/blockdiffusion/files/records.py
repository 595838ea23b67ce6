"""JSON and YAML that anybody may have edited, read strictly: bounded, whole, and of known types.

Nothing is guessed or dropped: a repeated or unknown key, a value of another type and a text of
another encoding are each one sentence. Sizes are bounded before parsing, depth and the number of
values during it: a file takes seconds at most, and memory in proportion to its size.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from blockdiffusion.errors import SHOWN, WIDEST, UserError, reason, shown
from blockdiffusion.files.disk import open_regular
from blockdiffusion.options import current_word, with_new_names

T = TypeVar("T")
MOST_JSON = 2**28  # bytes of a file, or of a line of one
MOST_YAML = 2**17  # characters; about a second for its parser
MOST_VALUES = 2**24
DEEPEST = 100
ROUNDING = 1e-9  # of measured values


class Damaged(ValueError):
    """A text that is not JSON or YAML, or not of the expected type; the message says why.

    Readers of whole files turn it into a `UserError`; readers of lines skip the line.
    """


# --- from bytes to plain values -------------------------------------------------------------------


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """Parse JSON into plain values.

    Args:
        finite: refuse NaN and Infinity, which Python writes and JSON does not know.

    Raises:
        Damaged: it is not JSON, has a key twice, or is too large or deep.
    """
    if len(content) > MOST_JSON:
        raise Damaged(f"it has {len(content):,} bytes, more than the {MOST_JSON:,} that are read")
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise Damaged(f"it holds more than {MOST_VALUES:,} values")
    try:
        value = json.loads(_text(content), object_pairs_hook=unique)
    except RecursionError:
        raise Damaged(f"it is nested more than {DEEPEST} deep") from None
    except Damaged:
        raise
    except ValueError as error:  # also for numbers with thousands of digits
        raise Damaged(f"it is not valid JSON: {reason(error)}") from None
    return _bounded(value, finite)


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values; aliases, which can multiply, are refused.

    Raises:
        Damaged: it is not YAML, has a key twice, or is too large or deep.
    """
    if len(text) > MOST_YAML:
        raise Damaged(f"it has {len(text):,} characters, more than the {MOST_YAML:,} that are read")
    try:
        value = yaml.load(text, _StrictLoader)
    except Damaged:
        raise
    except RecursionError:
        raise Damaged(f"it is nested more than {DEEPEST} deep") from None
    except Exception as error:  # constructors of values raise errors of any class
        why = " ".join(str(error).split())  # the place is in a later line
        raise Damaged(f"it is not valid YAML: {why[:200]}") from None
    return _bounded(value, finite=False)


class _StrictLoader(yaml.SafeLoader):
    """Refuses aliases, depth, and keys that are not texts or given twice: YAML keeps the last."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise Damaged(f"line {mark.line + 1} refers to another value (*); write it out")
        self.depth += 1
        if self.depth > DEEPEST:
            raise Damaged(f"it is nested more than {DEEPEST} deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise Damaged(f"line {line}: {shown(key)} is a key, and keys are texts")
        if key in mapping:
            raise Damaged(f"line {line}: {key} is given twice; remove one")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.Resolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these keys and values, for a JSON decoder.

    Raises:
        Damaged: a key is given twice, of which a decoder would keep the last.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Damaged(f"{shown(twice)} is given twice; remove one")
    return mapping


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # a byte order mark is no content
    except UnicodeDecodeError as error:
        raise Damaged(f"it is not UTF-8 text (byte {error.start})") from None


def _bounded(value: Any, finite: bool) -> Any:
    """Return `value` after checking its depth and numbers, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise Damaged(f"it is nested more than {DEEPEST} deep")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, int) and not -WIDEST < item < WIDEST:
                raise Damaged("it holds a whole number of more than 38 digits")
            elif finite and isinstance(item, float) and not math.isfinite(item):
                raise Damaged(f"it holds {item}, which is not a number")
        level = inner
    return value


# --- files ----------------------------------------------------------------------------------------


def read_json(path: Path, instead: str, *, finite: bool = True) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        instead: what to do if it is damaged, for the message.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    with of_file(path, instead):
        return as_object(parse_json(read_bytes(path, MOST_JSON), finite=finite))


def read_yaml(path: Path, instead: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; see `read_json`."""
    with of_file(path, instead):
        return as_object(parse_yaml(_text(read_bytes(path, 4 * MOST_YAML))))


def byte_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; one that is too long comes in pieces.

    Raises:
        UserError: the file cannot be read.
    """
    with of_file(path, "check its name and its rights"), _opened(path) as file:
        while line := file.readline(MOST_JSON + 1):
            yield line


def json_lines(path: Path, *, finite: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file, without lines that are cut short or foreign.

    Raises:
        UserError: the file cannot be read.
    """
    for line in byte_lines(path):
        try:
            yield as_object(parse_json(line, finite=finite))
        except Damaged:
            continue


def as_object(value: Any) -> dict[str, Any]:
    """Return `value`, which must be a mapping."""
    if not isinstance(value, dict):
        raise Damaged(f"it holds {shown(value)}, and keys with values are needed")
    return value


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        return open_regular(path, may_be_empty=True)
    except UserError:
        raise Damaged("it is a pipe or a device, and a file is needed") from None


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes; a larger one is `Damaged`."""
    with _opened(path) as file:
        content = file.read(most + 1) or b""  # None: nothing now
    if len(content) > most:
        raise Damaged(f"it has more than the {most:,} bytes that are read")
    return content


@contextmanager
def of_file(path: Path, instead: str) -> Iterator[None]:
    """Turn errors in the block into a `UserError` about the file; `instead` says what to do."""
    try:
        yield
    except Damaged as error:
        raise UserError(f"{path}: {error}" + (f"; {instead}" if instead else "")) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); {instead}") from error


def not_negative(values: dict[str, Any]) -> dict[str, Any]:
    """Return measured `values`, whose numbers, however deep, must be finite and not negative."""
    for key, value in values.items():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, dict):
                not_negative(item)
            elif isinstance(item, int | float) and not -ROUNDING <= item < math.inf:
                raise Damaged(f"{shown(key)} is {shown(item)}; it must be at least 0, and finite")
    return values


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with a hash of them, which shows later changes."""
    return values | {"sha256": _hash(values)}


def unsealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that `sealed` got, or raise `Damaged` if they were changed since."""
    inner = {key: value for key, value in values.items() if key != "sha256"}
    if values.get("sha256") != _hash(inner):
        raise Damaged("its content was changed since it was written")
    return inner


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


# --- from plain values to dataclasses -------------------------------------------------------------


class Typed(str):
    """A value typed on the command line, not yet interpreted."""


def build(kind: type[T], tree: Mapping[str, Any], prefix: str = "", *, strict: bool = True) -> T:
    """Build the dataclass `kind` from a mapping, checking every key and type.

    Args:
        prefix: of the keys in messages, with a dot at its end.
        strict: refuse keys that `kind` does not have, instead of leaving them out.

    Raises:
        Damaged: a key is unknown or missing, or its value has another type.
        UserError: `kind` itself refuses a value.
    """
    try:
        return _build(kind, tree, prefix, strict)
    except _UnknownKey as error:
        raise Damaged(_nearest(kind, error.prefix, error.key, error.known)) from None


class _UnknownKey(Exception):
    """A key that the dataclass of its section does not have."""

    def __init__(self, prefix: str, key: str, known: list[str]):
        self.prefix, self.key, self.known = prefix, key, known


def _build(kind: Any, tree: Mapping[str, Any], prefix: str, strict: bool) -> Any:
    known = {item.name: item for item in fields(kind)}
    tree = with_new_names(kind, tree, prefix)
    for key in tree if strict else ():
        if key not in known:
            raise _UnknownKey(prefix, str(key), list(known))
    hints, values = get_type_hints(kind), {}
    for name, item in known.items():
        if name in tree:
            values[name] = _checked(hints[name], tree[name], f"{prefix}{name}", strict)
        elif is_dataclass(hints[name]):  # a section may be left out if its keys may
            values[name] = _build(hints[name], {}, f"{prefix}{name}.", strict)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise Damaged(f"{prefix}{name} is missing; give it {describe(hints[name])}")
    return kind(**values)


def typed(hints: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `tree` that `hints` has a type for, each checked for that type."""
    return {n: _checked(hint, tree[n], n, strict=False) for n, hint in hints.items() if n in tree}


def _checked(kind: Any, value: Any, key: str, strict: bool) -> Any:
    """Return `value` as `kind`, or raise `Damaged` with the key."""
    if is_dataclass(kind):
        if value is not None and not isinstance(value, Mapping):
            raise Damaged(f"{key} is {shown(value)}; it is a section with keys")
        return _build(kind, value or {}, f"{key}.", strict)
    value = _interpreted(kind, value)
    try:
        return convert(kind, value, key, strict)
    except _NotAllowed:
        raise Damaged(f"{key} is {shown(value)}; it must be {describe(kind)}") from None


class _NotAllowed(Exception):
    """A value does not fit its type; the caller knows the key."""


def _interpreted(kind: Any, value: Any) -> Any:
    """Interpret a typed value as YAML, unless `kind` is a text."""
    if not isinstance(value, Typed):
        return value
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if str in options and value != "null":
        return str(value)
    try:
        return parse_yaml(value)
    except Damaged:
        return str(value)


def convert(kind: Any, value: Any, key: str = "", strict: bool = True) -> Any:
    """Return `value` as `kind`; a string becomes a float if one is meant (YAML reads 1e-4 so)."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        for option in arguments:
            with suppress(_NotAllowed):
                return convert(option, value, key, strict)
    elif is_dataclass(kind):
        if isinstance(value, Mapping):
            return _build(kind, value, f"{key}.", strict)
    elif origin is Literal:
        if type(value) is str and (now := current_word(value, arguments, key)) in arguments:
            return now
    elif origin in (tuple, list):
        if isinstance(value, list | tuple):
            several = origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
            kinds = [arguments[0]] * len(value) if several else list(arguments)
            if len(kinds) == len(value):
                return origin(
                    convert(k, v, f"{key}.{number}", strict)
                    for number, (k, v) in enumerate(zip(kinds, value, strict=True))
                )
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {
                _key(arguments[0], name): convert(arguments[1], inner, f"{key}.{name}", strict)
                for name, inner in value.items()
            }
    elif kind is NoneType:
        if value is None:
            return None
    elif kind is float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                return float(value)
    elif type(value) is kind:
        return value
    raise _NotAllowed


def _key(kind: Any, name: Any) -> Any:
    """Return a key of a mapping as `kind`; JSON writes whole numbers as texts."""
    if kind is int and isinstance(name, str) and name.isdecimal() and len(name) < 20:
        return int(name)
    return convert(kind, name)


def describe(kind: Any) -> str:
    """Describe a type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (dict, Mapping) or is_dataclass(kind):
        return "keys with values"
    if origin is list or (origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis):
        return f"a list of: {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(map(describe, arguments))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return "null" if kind is NoneType else words.get(kind, "a value")


def _nearest(root: type, prefix: str, key: str, known: list[str]) -> str:
    """Return the message for an unknown key, with the nearest one of its section, or of any."""
    path, here = f"{prefix}{key}"[:SHOWN], [f"{prefix}{name}" for name in known]
    everywhere = list(dotted_keys(root))
    nearest = difflib.get_close_matches(path, here, n=1, cutoff=0.75) or [
        other for other in everywhere if other.split(".")[-1] == path.split(".")[-1]
    ]
    nearest = nearest or difflib.get_close_matches(path, [*here, *everywhere], n=1, cutoff=0.0)
    return (
        f"unknown key {path}; the nearest known one is {nearest[0]} "
        f"(known here: {', '.join(known)})"
    )


def dotted_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a dataclass and of the dataclasses in it."""
    hints = get_type_hints(kind)
    for item in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(hints[item.name]):
            yield from dotted_keys(hints[item.name], f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{item.name}"
