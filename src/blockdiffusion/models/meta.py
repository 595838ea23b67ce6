"""A network without storage: names and shapes of its tensors before anything is allocated."""

from __future__ import annotations

from typing import Any

import torch

from blockdiffusion.models.transformer import BlockDiffusionModel


def meta_model(config: Any) -> BlockDiffusionModel:
    """The network of a configuration on PyTorch's device `meta`."""
    with torch.device("meta"):
        return BlockDiffusionModel(config)
