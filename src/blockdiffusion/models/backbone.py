"""The interface of a network: embeddings, layers with attention passed in, a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

# (layer, q, k, v) -> attention (B, H, Q, E) over rotated queries (B, H, Q, E), and keys and values
# (B, H', T, E) of the key-value heads.
Read = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionSizes:
    """The attention of a network's layers.

    Attributes:
        num_key_value_heads: heads of keys and values; equally many query heads share each.
        scale: factor of the scores; None = 1/sqrt(head width).
        softcap: scores x become softcap * tanh(x / softcap); None = no cap.
        windows: for each layer, how many of the last positions a query sees, including its own;
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
        """Return the window of one layer."""
        return self.windows[layer] if self.windows else None


class Outputs(NamedTuple):
    """The tokens whose hidden states are wanted.

    Attributes:
        first: how many of a row's tokens, from the first, have queries; None = all.
        places: rows and columns (M,) of the tokens among them that are returned; None = all.
    """

    first: int | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the wanted tokens of all: (B, T', D), or (1, M, D) at `places`."""
        x_BTD = x_BTD[:, : self.first]
        return x_BTD if self.places is None else x_BTD[self.places][None]


ALL = Outputs()


class Backbone(Protocol):
    """A network: an `nn.Module` with these members.

    Attributes:
        config: of the network; `to_dict` returns all that its function depends on beside weights.
        attention: the sizes of its attention.
        activation_checkpointing: whether only the inputs of the layers are kept for the backward
            pass, which computes the layers again.
        output: the linear layer of `head`, for losses that make few logits at a time.
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
    def logits_are_linear(self) -> bool:
        """Whether `head` is `output` and nothing else."""
        ...

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
        """Return the hidden states before the head, in the shape of `Outputs.take`.

        Args:
            ids_BT: the tokens of all streams.
            positions_BT: (T,), or (1 or B, T).
            read: attention, which every layer calls once.
            sigma_BT: the time of every token, 0 at clean ones, for networks that read it.
        """
        ...

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) of hidden states (..., D), in float32 at least."""
        ...

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """The weights by their names in files."""
        ...

    def units(self) -> Iterable[nn.Module]:
        """Return the layers, which are gathered one after another if parameters are sharded."""
        ...

    def hidden_matrices(self) -> Iterable[nn.Parameter]:
        """Return the matrices that Muon optimizes: not embedding and output, whose rows are
        tokens."""
        ...

    def empty_copy(self) -> Any:
        """Return a network of the same sizes without storage (on the device `meta`)."""
        ...

    def compile_layers(self) -> None:
        """Compile the small operations of the layers into few."""
        ...
