"""The loss of one update as a sum over the rows of its global batch.

`DiffusionLoss` is that of all objectives with noise; what they differ in is in `objectives`.

Shape suffixes: B rows, N noisy copies, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from blockdiffusion.data.loader import Batch
from blockdiffusion.diffusion.denoiser import causal_loss
from blockdiffusion.diffusion.estimators import Corrupted
from blockdiffusion.diffusion.objectives import diffusion_of

if TYPE_CHECKING:
    from blockdiffusion.models.transformer import BlockDiffusionModel


class BatchLoss(Protocol):
    """What a global batch is trained on; everything random in it has been drawn already."""

    @property
    def batch(self) -> Batch:
        """The rows."""
        ...

    @property
    def num_noisy(self) -> int:
        """N, noisy copies of a row; 1 where there is no noise."""
        ...

    @property
    def num_scored(self) -> int:
        """Positions that have logits, over all rows and copies."""
        ...

    def nats(self, model: BlockDiffusionModel, rows: slice) -> torch.Tensor:
        """The loss of some of the rows, a sum in nats: a scalar on the model's device.

        Divided by the free tokens of the whole batch and added up over all rows it is the loss.
        """
        ...


@dataclass(frozen=True)
class DiffusionLoss:
    """The loss of a diffusion: weighted terms of its bound, averaged over the noisy copies."""

    batch: Batch
    corrupted: Corrupted

    @property
    def num_noisy(self) -> int:
        """See `BatchLoss`."""
        return self.corrupted.noisy_BNL.shape[1]

    @property
    def num_scored(self) -> int:
        """See `BatchLoss`."""
        return int(self.corrupted.scored_BNL.sum())

    def nats(self, model: BlockDiffusionModel, rows: slice) -> torch.Tensor:
        """See `BatchLoss`."""
        drawn = self.corrupted.rows(rows.start, rows.stop).to(model.device)
        clean_BL, valid_BL = _on_device(self.batch, rows, model.device)
        nats = diffusion_of(model.config).loss(model, drawn, clean_BL, valid_BL)
        return nats / drawn.noisy_BNL.shape[1]


@dataclass(frozen=True)
class NextTokenLoss:
    """The autoregressive loss: every free token, given those before it."""

    batch: Batch
    free_BL: torch.Tensor

    num_noisy = 1

    @property
    def num_scored(self) -> int:
        """See `BatchLoss`."""
        return int(self.free_BL.sum())

    def nats(self, model: BlockDiffusionModel, rows: slice) -> torch.Tensor:
        """See `BatchLoss`."""
        clean_BL, valid_BL = _on_device(self.batch, rows, model.device)
        return causal_loss(model, clean_BL, self.free_BL[rows].to(model.device), valid_BL)


def _on_device(
    batch: Batch, rows: slice, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids and validity of some rows."""
    valid_BL = None if batch.valid_BL is None else batch.valid_BL[rows].to(device)
    return batch.ids_BL[rows].to(device), valid_BL
