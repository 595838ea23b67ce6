"""The sizes of a network that estimates need, counted on the network itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from blockdiffusion.models.masks import Streams
from blockdiffusion.models.transformer import DiT, meta_model

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class NetworkSizes:
    """Sizes of a network, whose layers are alike, and of the rows that it is trained on.

    Attributes:
        parameters: all. Weights that input embedding and output share (`tied`) count once.
        trained_parameters: those that are trained: all, but for LoRA and frozen parts.
        embedding_parameters: those of input embedding and output. layer_parameters: of one layer.
        layer_matrices: shapes of the matrices of one layer that every token passes through.
        trained_share: of the numbers in these, over all layers. trains_output: whether the output
            layer is trained.
        modulation: shapes of its other matrices (adaLN).
        conditioning: numbers in all other matrices, without input embedding and output. One vector
            per pass goes through them, or with `time_conditioning` every token.
        fused_layers: whether layers have gradients of their own (`models.fused`).
        finishes_all: whether the last layer finishes every token, even one without logits.
        block_size: S; 1 if the network predicts the next token.
    """

    parameters: int
    trained_parameters: int
    embedding_parameters: int
    layer_parameters: int
    layer_matrices: Shapes
    trained_share: float
    trains_output: bool
    modulation: Shapes
    conditioning: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    fused_layers: bool
    finishes_all: bool
    time_conditioning: bool
    autoregressive: bool
    seq_len: int
    block_size: int
    clean_attention: Any

    @classmethod
    def of_config(cls, config: Any) -> NetworkSizes:
        """Return those of the network that a configuration describes, without allocating it."""
        return cls.of(meta_model(config))

    @classmethod
    def of(cls, model: Any) -> NetworkSizes:
        """Return those of a `BlockDiffusion` around any `Backbone`."""
        network, config, attention = model.backbone, model.config, model.backbone.attention
        layer = list(next(iter(network.units())).parameters())
        matrices = network.hidden_matrices()
        hidden = {id(p) for p in matrices}
        tables = [m.weight for m in network.modules() if isinstance(m, nn.Embedding)]
        ends = {id(p): p for p in (*tables, *network.output.parameters())}
        known = hidden | ends.keys()
        others = (p for p in network.parameters() if p.ndim == 2 and id(p) not in known)
        is_dit = isinstance(network, DiT)
        return cls(
            parameters=_numbers(network.parameters()),
            trained_parameters=_numbers(p for p in network.parameters() if p.requires_grad),
            embedding_parameters=_numbers(ends.values()),
            layer_parameters=_numbers(layer),
            layer_matrices=tuple(tuple(p.shape) for p in layer if id(p) in hidden),
            trained_share=_numbers(p for p in matrices if p.requires_grad) / _numbers(matrices),
            trains_output=network.output.weight.requires_grad,
            modulation=tuple(tuple(p.shape) for p in layer if p.ndim == 2 and id(p) not in hidden),
            conditioning=_numbers(others),
            num_hidden_layers=attention.num_hidden_layers,
            hidden_size=network.output.in_features,
            num_attention_heads=attention.num_attention_heads,
            num_key_value_heads=attention.num_key_value_heads,
            head_dim=attention.head_dim,
            vocab_size=config.vocab_size,
            tied=any(table is network.output.weight for table in tables),
            fused_layers=is_dit and not config.time_conditioning,
            finishes_all=config.is_autoregressive or not is_dit,
            time_conditioning=config.time_conditioning,
            autoregressive=config.is_autoregressive,
            seq_len=config.seq_len,
            block_size=config.block_size,
            clean_attention=config.clean_attention,
        )

    @property
    def layer_numbers(self) -> int:
        """Numbers in the matrices of a layer."""
        return sum(map(prod, self.layer_matrices))

    @property
    def has_clean(self) -> bool:
        """Whether a training pass reads the clean stream: yes, unless a block is a row."""
        return not self.autoregressive and self.block_size < self.seq_len

    @property
    def cache_width(self) -> int:
        """Numbers that a layer keeps of a cached token: its key and its value."""
        return 2 * self.num_key_value_heads * self.head_dim

    def streams(self, num_noisy: int) -> Streams:
        """Return the layout of a training row with so many noisy copies."""
        return Streams(
            self.seq_len, self.block_size, num_noisy, self.has_clean, self.clean_attention
        )


def has_equal_layers(model: Any) -> bool:
    """Return whether all layers apply matrices of the same shapes to every token, as the sizes say:
    not if some are mixtures of experts, each of which sees a part of the tokens."""
    shapes = [[tuple(p.shape) for p in unit.parameters()] for unit in model.backbone.units()]
    return all(found == shapes[0] for found in shapes) and max(map(len, shapes[0])) <= 2


def _numbers(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)
