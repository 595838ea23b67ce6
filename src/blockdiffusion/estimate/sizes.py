"""What estimates know of a network: a few neutral numbers, counted on the network itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from blockdiffusion.diffusion.denoiser import is_autoregressive
from blockdiffusion.models.masks import Streams
from blockdiffusion.models.meta import meta_model
from blockdiffusion.models.transformer import is_hidden_matrix

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class NetworkSizes:
    """Sizes of a network and of the rows that it is trained on.

    Attributes:
        parameters: all; what input embedding and output share (`tied`) counts once.
        embedding_parameters: those of input embedding and output. layer_parameters: of one layer.
        layer_matrices: shapes of the matrices of one layer that every token passes through.
        modulation: shapes of its other matrices (adaLN).
        conditioning: numbers in all matrices but layer matrices, input embedding and output. One
            vector of a pass goes through them, or with `time_conditioning` every token.
        fused_layers: whether layers have gradients of their own (`models.fused`).
        block_size: S; 1 where the network predicts the next token.
    """

    parameters: int
    embedding_parameters: int
    layer_parameters: int
    layer_matrices: Shapes
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
    time_conditioning: bool
    autoregressive: bool
    seq_len: int
    block_size: int
    clean_attention: Any

    @classmethod
    def of_config(cls, config: Any) -> NetworkSizes:
        """Those of the network that a configuration describes; it is not allocated."""
        return cls.of(meta_model(config))

    @classmethod
    def of(cls, model: Any) -> NetworkSizes:
        """Those of a network."""
        network, config, attention = model.backbone, model.full_config(), model.backbone.attention
        first = dict(network.layers[0].named_parameters(prefix="layers.0"))
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        ends = {name: s for name, s in shapes.items() if name.startswith(("embedding.", "output."))}
        layer = {name: shapes[name] for name in first}
        hidden = {name: s for name, s in layer.items() if is_hidden_matrix(name, len(s))}
        matrices = _numbers(s for name, s in shapes.items() if len(s) == 2 and name not in ends)
        return cls(
            parameters=_numbers(shapes.values()),
            embedding_parameters=_numbers(ends.values()),
            layer_parameters=_numbers(layer.values()),
            layer_matrices=tuple(hidden.values()),
            modulation=tuple(s for n, s in layer.items() if len(s) == 2 and n not in hidden),
            conditioning=matrices - config.num_hidden_layers * _numbers(hidden.values()),
            num_hidden_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=attention.num_attention_heads,
            num_key_value_heads=attention.num_key_value_heads,
            head_dim=attention.head_dim,
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
            fused_layers=not config.time_conditioning,
            time_conditioning=config.time_conditioning,
            autoregressive=is_autoregressive(model),
            seq_len=config.seq_len,
            block_size=config.block_size,
            clean_attention=config.clean_attention,
        )

    @property
    def layer_numbers(self) -> int:
        """Numbers in the matrices of a layer."""
        return _numbers(self.layer_matrices)

    @property
    def has_clean(self) -> bool:
        """Whether a training pass reads the clean stream: not where one block is the whole row."""
        return not self.autoregressive and self.block_size < self.seq_len

    @property
    def cache_width(self) -> int:
        """Numbers that a layer keeps of a cached token: its key and its value."""
        return 2 * self.num_key_value_heads * self.head_dim

    def streams(self, num_noisy: int) -> Streams:
        """The layout of a training row with so many noisy copies."""
        return Streams(
            self.seq_len, self.block_size, num_noisy, self.has_clean, self.clean_attention
        )


def _numbers(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes)
