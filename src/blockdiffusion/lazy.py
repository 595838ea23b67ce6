"""Names of a package that are imported on first use."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def attributes(
    package: str, homes: Mapping[str, str], renamed: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose names live in the modules `homes`.

    Args:
        renamed: old names, which are read for one version -> new names.
    """

    def find(name: str) -> Any:
        if new := (renamed or {}).get(name):
            warnings.warn(f"{package}.{name} is now {new}", DeprecationWarning, stacklevel=2)
            name = new
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
