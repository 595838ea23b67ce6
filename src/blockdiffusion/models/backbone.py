"""What `BlockDiffusion` asks of a network: embeddings, layers with attention passed in, a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

# Attention of layer `index` over rotated queries (B, H, Q, E), and keys and values (B, H', T, E) of
# its key-value heads; (B, H, Q, E).
Read = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionSizes:
    """The attention of a network's layers.

    Attributes:
        num_key_value_heads: heads of keys and values, each shared by equally many query heads.
        scale: of the scores; None = 1/sqrt(head width).
        softcap: scores x become softcap * tanh(x / softcap); None = they stay.
        windows: for each layer, how many of the last positions a query sees, its own included;
            None = all.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float | None = None
    softcap: float | None = None
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """That of one layer."""
        return self.windows[layer] if self.windows else None


class Outputs(NamedTuple):
    """The tokens whose hidden states are asked for.

    Attributes:
        first: how many of a row's tokens, from the first, have queries; None = all.
        places: rows and columns (M,) of those among them that are returned; None = all.
    """

    first: int | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Of all tokens those asked for: (B, T', D), or (1, M, D) at their places."""
        x_BTD = x_BTD[:, : self.first]
        return x_BTD if self.places is None else x_BTD[self.places][None]


ALL = Outputs()


class Backbone(Protocol):
    """A network: an `nn.Module` with these.

    Attributes:
        config: of the network; `to_dict` gives all that its function depends on beside weights.
        attention: the sizes of its attention.
        activation_checkpointing: whether gradients keep only what enters the layers, and compute
            these again.
        output: the linear layer behind `head`, for losses that take its logits piece by piece.
    """

    @property
    def activation_checkpointing(self) -> bool: ...

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None: ...

    @property
    def config(self) -> Any: ...

    @property
    def attention(self) -> AttentionSizes: ...

    @property
    def output(self) -> nn.Linear: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        read: Read,
        outputs: Outputs = ALL,
        sigma_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states before the head, as `Outputs.take` shapes them.

        Args:
            ids_BT: the tokens of all streams.
            positions_BT: (T,), or (1 or B, T).
            read: attention; it is called once by each layer.
            sigma_BT: the time of every token, 0 at clean ones, for networks that read it.
        """
        ...

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D), in float32 at least."""
        ...

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """The weights by their names in files."""
        ...

    def units(self) -> Iterable[nn.Module]:
        """The parts that are put together one after another when parameters are in shards."""
        ...

    def hidden_matrices(self) -> Iterable[nn.Parameter]:
        """The matrices that Muon takes: not embedding and output, whose rows are tokens."""
        ...

    def empty_copy(self) -> Any:
        """A network of the same sizes whose parameters hold nothing (on the device `meta`)."""
        ...

    def compile_layers(self) -> None:
        """Lets PyTorch's compiler make few of the layers' small operations."""
        ...
