"""The versions that a result was computed with."""

from __future__ import annotations

import platform
from importlib.metadata import version

import blockdiffusion

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the packages that affect results."""
    found = {"blockdiffusion": blockdiffusion.__version__, "python": platform.python_version()}
    return found | {package: version(package) for package in PACKAGES}
