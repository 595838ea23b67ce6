"""The built-in corpus of source code: the running Python's own standard library.

A sequence that is no language, yet has words, nesting and names that return after thousands of
symbols. About 10 MB in 600 files; the text depends on the Python version.
"""

from __future__ import annotations

import functools

from blockdiffusion.data.python_library import library_modules


@functools.cache
def python_source() -> tuple[str, ...]:
    """One document per module, by path; always UTF-8. Files with the same text count once."""
    texts = (text.encode(errors="replace").decode() for _, text in library_modules())
    return tuple(dict.fromkeys(texts))
