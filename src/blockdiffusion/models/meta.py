"""A network without storage: names and shapes of its tensors, with nothing allocated."""

from __future__ import annotations

import copy
from typing import Any

import torch

from blockdiffusion.models.transformer import BlockDiffusionModel


def meta_model(config: Any) -> BlockDiffusionModel:
    """Return the network of a configuration on PyTorch's device `meta`."""
    with torch.device("meta"):
        return BlockDiffusionModel(config)


def count_parameters(config: Any) -> int:
    """Parameters of the network of a configuration, which may claim any number of layers."""
    few = copy.deepcopy(config)
    counts = []
    for few.num_hidden_layers in (1, 2):
        counts.append(sum(parameter.numel() for parameter in meta_model(few).parameters()))
    return counts[0] + (config.num_hidden_layers - 1) * (counts[1] - counts[0])
