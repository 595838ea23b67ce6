"""The built-in corpora, from the standard library of the running Python, which is always there.

* `python-docs`: the docstrings of its modules, classes and functions, and the language reference
  that `help()` shows; real English, about 2 MB.
* `python-source`: its source code, about 10 MB in 600 files: a sequence with words, nesting, and
  names that return after thousands of symbols.

The texts depend on the Python version.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

# Installed packages; tests, nearly twice as large as the rest, with fixtures that are broken on
# purpose; tables of character sets, each nearly a copy of the next; the texts of `help()` in one
# string.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    | {"encodings", "pydoc_data", "__pycache__"}
)
# Programs within the library, which document themselves.
EXCLUDED_PROGRAMS = frozenset({"idlelib", "lib2to3", "turtledemo", "ensurepip"})
MIN_CHARACTERS = 200  # a module with less documents nothing but its name


@functools.cache
def python_source() -> tuple[str, ...]:
    """Return one document per module, by path, in UTF-8; files with the same text count once."""
    return tuple(dict.fromkeys(_utf8(text) for _, text in library_modules()))


@functools.cache
def python_docs() -> tuple[str, ...]:
    """Return one document per module (by name), then one per topic of the language reference."""
    documents = (*_module_documents(), *_topic_documents())
    return tuple(dict.fromkeys(documents))  # some topics have two names


def library_modules(excluded: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, source code) of each module, by path; all line ends are LF.

    Files that are not in the encoding they declare are left out.

    Args:
        excluded: names of folders to leave out besides `EXCLUDED_FOLDERS`.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        folders = relative.parts[:-1]
        if not (EXCLUDED_FOLDERS | excluded).isdisjoint(folders):
            continue
        # The settings and paths of the machine that built this Python.
        if relative.name.startswith("_sysconfig") or relative.parts[0].startswith("config-"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # some distributions ship templates as .py
            continue
        parts = relative.with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), text


def _module_documents() -> Iterator[str]:
    for name, source in library_modules(EXCLUDED_PROGRAMS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except SyntaxError:  # a template
            continue
        text = "\n\n".join(_docstrings(tree, name))
        if len(text) >= MIN_CHARACTERS:
            yield text + "\n"


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """Yield `name` with its docstring, then the same for classes and functions, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            yield f"{name}\n{_clean(docstring)}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _topic_documents() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # left out by some minimal installations
        return
    for name in sorted(topics):
        yield _clean(topics[name]) + "\n"


def _clean(text: str) -> str:
    """Remove the common indentation, trailing spaces and outer blank lines."""
    return _utf8("\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines()))


def _utf8(text: str) -> str:
    return text.encode(errors="replace").decode()
