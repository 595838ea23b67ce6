"""The built-in corpus: the documentation inside the running Python's own standard library.

Real English that every machine has: the docstrings of the standard library's modules, classes
and functions, and the language reference that `help()` shows. About 2 MB; the text depends on the
Python version.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import warnings
from collections.abc import Iterator

from blockdiffusion.data.python_library import library_modules

# Programs within the library: what they document is themselves.
EXCLUDED_PROGRAMS = frozenset({"idlelib", "lib2to3", "turtledemo", "ensurepip"})
MIN_CHARACTERS = 200  # a module with less says nothing but its name


@functools.cache
def python_docs() -> tuple[str, ...]:
    """One document per module (by name), then one per topic of the language reference."""
    documents = (*_module_documents(), *_topic_documents())
    return tuple(dict.fromkeys(documents))  # some topics have two names


def _module_documents() -> Iterator[str]:
    for name, source in library_modules(EXCLUDED_PROGRAMS):
        text = "\n\n".join(_docstrings(source, name))
        if len(text) >= MIN_CHARACTERS:
            yield text + "\n"


def _docstrings(source: str, name: str) -> Iterator[str]:
    """`name` with its docstring, then the same for every class and function, in source order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:  # a template
        return
    yield from _node_docstrings(tree, name)


def _node_docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            yield f"{name}\n{_clean(docstring)}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _node_docstrings(child, f"{name}.{child.name}")


def _topic_documents() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # left out by some minimal installations
        return
    for name in sorted(topics):
        yield _clean(topics[name]) + "\n"


def _clean(text: str) -> str:
    """Without the common indentation, trailing spaces and outer blank lines; always UTF-8."""
    lines = inspect.cleandoc(text).splitlines()
    return "\n".join(line.rstrip() for line in lines).encode(errors="replace").decode()
