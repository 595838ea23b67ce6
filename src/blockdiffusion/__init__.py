"""Block diffusion language models: train, measure and sample them.

>>> import blockdiffusion
>>> model = blockdiffusion.load("runs/demo")
>>> print(blockdiffusion.generate(model, max_new_tokens=64).texts[0])
>>> blockdiffusion.likelihood(model, ["Some text to score."], estimator="exact")

Names are imported when first used, so that `import blockdiffusion` costs nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blockdiffusion.lazy import attributes
from blockdiffusion.renamed import MovedModules

__version__ = "0.1.0"

sys.meta_path.insert(0, MovedModules())

if TYPE_CHECKING:
    from blockdiffusion.checkpoints.formats import load
    from blockdiffusion.diffusion.config import DiffusionConfig
    from blockdiffusion.errors import UserError
    from blockdiffusion.evaluate.likelihood import Likelihood, likelihood
    from blockdiffusion.models.block_diffusion import BlockDiffusion
    from blockdiffusion.models.inference import optimize_for_inference
    from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
    from blockdiffusion.sampling import (
        BlockDone,
        Engine,
        Finished,
        Generation,
        SamplingParams,
        TokensRevealed,
        generate,
        infill,
        stream,
    )

_HOMES = {
    "BlockDiffusion": "blockdiffusion.models.block_diffusion",
    "BlockDone": "blockdiffusion.sampling",
    "BlockDiffusionConfig": "blockdiffusion.models.transformer",
    "BlockDiffusionModel": "blockdiffusion.models.transformer",
    "DiffusionConfig": "blockdiffusion.diffusion.config",
    "Engine": "blockdiffusion.sampling",
    "Finished": "blockdiffusion.sampling",
    "Generation": "blockdiffusion.sampling",
    "Likelihood": "blockdiffusion.evaluate.likelihood",
    "SamplingParams": "blockdiffusion.sampling",
    "TokensRevealed": "blockdiffusion.sampling",
    "UserError": "blockdiffusion.errors",
    "generate": "blockdiffusion.sampling",
    "infill": "blockdiffusion.sampling",
    "likelihood": "blockdiffusion.evaluate.likelihood",
    "load": "blockdiffusion.checkpoints.formats",
    "optimize_for_inference": "blockdiffusion.models.inference",
    "stream": "blockdiffusion.sampling",
}

__all__ = [
    "BlockDiffusion",
    "BlockDiffusionConfig",
    "BlockDiffusionModel",
    "BlockDone",
    "DiffusionConfig",
    "Engine",
    "Finished",
    "Generation",
    "Likelihood",
    "SamplingParams",
    "TokensRevealed",
    "UserError",
    "__version__",
    "generate",
    "infill",
    "likelihood",
    "load",
    "optimize_for_inference",
    "stream",
]


__getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
