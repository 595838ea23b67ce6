"""Block diffusion language models: train, measure and sample them.

>>> import blockdiffusion
>>> model = blockdiffusion.load("runs/demo")
>>> print(blockdiffusion.generate(model, max_new_tokens=64).texts[0])
>>> blockdiffusion.likelihood(model, ["Some text to score."], estimator="exact")

Names are imported when first used, so that `import blockdiffusion` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from blockdiffusion.renamed import MovedModules

__version__ = "0.1.0"

sys.meta_path.insert(0, MovedModules())

if TYPE_CHECKING:
    from blockdiffusion.checkpoints.formats import load
    from blockdiffusion.errors import UserError
    from blockdiffusion.evaluate.likelihood import Likelihood, likelihood
    from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
    from blockdiffusion.sampling import Engine, Generation, generate, infill, stream

_HOMES = {
    "BlockDiffusionConfig": "blockdiffusion.models.transformer",
    "BlockDiffusionModel": "blockdiffusion.models.transformer",
    "Engine": "blockdiffusion.sampling",
    "Generation": "blockdiffusion.sampling",
    "Likelihood": "blockdiffusion.evaluate.likelihood",
    "UserError": "blockdiffusion.errors",
    "generate": "blockdiffusion.sampling",
    "infill": "blockdiffusion.sampling",
    "likelihood": "blockdiffusion.evaluate.likelihood",
    "load": "blockdiffusion.checkpoints.formats",
    "stream": "blockdiffusion.sampling",
}

__all__ = [
    "BlockDiffusionConfig",
    "BlockDiffusionModel",
    "Engine",
    "Generation",
    "Likelihood",
    "UserError",
    "__version__",
    "generate",
    "infill",
    "likelihood",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
