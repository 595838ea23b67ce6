"""The configuration and the tokenizer in a Lightning file, extracted from inert placeholders.

The authors' runs pickle an omegaconf configuration: containers hold their items as `_content`,
leaves their value as `_val`, and `${model.length}` stands for the value of another key.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

from blockdiffusion.checkpoints.unpickling import Placeholder
from blockdiffusion.files.records import Damaged, parse_json

T = TypeVar("T")
DEEPEST = 32  # nested sections; a damaged file may have a section inside itself
HOPS = 8  # `${...}` that lead to a `${...}`
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
MASKS = ("[MASK]", "<mask>", "[mask]", "<|mask|>")


class Settings:
    """The readable part of a file's `hyper_parameters`; empty if they are of another kind.

    Attributes:
        tokenizer: the JSON of the run's fast tokenizer, or None.
    """

    def __init__(self, hyper_parameters: Any):
        plain = _plain(hyper_parameters)
        plain = plain if isinstance(plain, dict) else {}
        self._tree = plain.get("config", plain)
        held = hyper_parameters.get("tokenizer") if isinstance(hyper_parameters, dict) else None
        self.tokenizer = _tokenizer_json(held)

    def value(self, key: str, kind: type[T]) -> T | None:
        """Return the value of a dotted key, such as `model.length`, if it is of this type."""
        for _ in range(HOPS):
            place = self._tree
            for name in key.split("."):
                place = place.get(name) if isinstance(place, dict) else None
            reference = REFERENCE.fullmatch(place) if isinstance(place, str) else None
            if reference is None:
                return place if type(place) is kind else None
            key = reference.group(1)
        return None

    def mask_id(self) -> int | None:
        """Return the id of the tokenizer's mask token; None = the mask is appended to it."""
        if self.tokenizer is None:
            return None
        try:
            added = parse_json(self.tokenizer.encode())["added_tokens"]
            found = next((t["id"] for t in added if t["content"] in MASKS), None)
        except (KeyError, TypeError, Damaged):  # not a tokenizer's JSON
            return None
        return found if type(found) is int else None


def _plain(value: Any, depth: int = 0, seen: dict[int, Any] | None = None) -> Any:
    """Dictionaries, lists and values, and None for all else. Shared objects stay shared."""
    seen = {} if seen is None else seen
    if depth > DEEPEST:
        return None
    if isinstance(value, str | int | float | bool):
        return value
    if id(value) not in seen:
        seen[id(value)] = None  # for a value inside itself
        seen[id(value)] = _plain_container(value, depth + 1, seen)
    return seen[id(value)]


def _plain_container(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    if isinstance(value, Placeholder):
        held = value.state if isinstance(value.state, dict) else value.entries
        inner = next((held[key] for key in ("_content", "_val") if key in held), held)
        return _plain(inner, depth, seen)
    if isinstance(value, dict):
        return {key: _plain(v, depth, seen) for key, v in value.items() if key != "_parent"}
    if isinstance(value, list | tuple):
        return [_plain(item, depth, seen) for item in value]
    return None


def _tokenizer_json(held: Any) -> str | None:
    """A fast tokenizer's attributes hold a `tokenizers.Tokenizer`, whose state is its JSON."""
    attributes = held.state if isinstance(held, Placeholder) else None
    backend = attributes.get("_tokenizer") if isinstance(attributes, dict) else None
    content = backend.state if isinstance(backend, Placeholder) else None
    if not isinstance(content, bytes):
        return None
    try:
        text = content.decode("utf-8")
        return text if isinstance(parse_json(content)["model"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None
