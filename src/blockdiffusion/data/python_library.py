"""The modules of the running Python's standard library, which both built-in corpora are made of."""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Installed packages, which are no part of the library; its tests, nearly twice as large as the
# rest, with fixtures that are broken on purpose; tables of character sets, written by a program,
# each nearly a copy of the next; and the texts of `help()` in one string.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    | {"encodings", "pydoc_data", "__pycache__"}
)


def library_modules(excluded: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """(dotted name, source code) of each module, by path; all line ends are LF.

    Files that are not in the encoding they declare are left out.

    Args:
        excluded: names of folders to leave out besides `EXCLUDED_FOLDERS`.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        folders = relative.parts[:-1]
        if not (EXCLUDED_FOLDERS | excluded).isdisjoint(folders) or _is_of_this_build(relative):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # some distributions ship templates as .py
            continue
        parts = relative.with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), text


def _is_of_this_build(relative: Path) -> bool:
    """Whether it holds the settings and paths of the machine that built this Python."""
    return relative.name.startswith("_sysconfig") or relative.parts[0].startswith("config-")
