"""Which split a file holds, by the words of its name."""

from __future__ import annotations

import re
from pathlib import PurePath

WORDS = {
    "train": re.compile("train.*"),
    "validation": re.compile("valid.*|val|dev|development"),
    "test": re.compile("test.*|heldout"),
}


def split_of(path: PurePath) -> str | None:
    """train, validation or test; None if no part of the path says so. The file's name is first."""
    for part in reversed(path.parts):
        for word in re.findall("[a-z]+", part.lower()):
            for split, pattern in WORDS.items():
                if pattern.fullmatch(word):
                    return split
    return None
