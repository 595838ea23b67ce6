"""The loss of one update as a sum over the rows of its global batch.

Shape suffixes: B rows, N noisy copies, L tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from blockdiffusion.data.loader import Batch
from blockdiffusion.diffusion.denoiser import causal_loss
from blockdiffusion.diffusion.estimators import Corrupted
from blockdiffusion.diffusion.objectives import diffusion_of

if TYPE_CHECKING:
    from blockdiffusion.models.block_diffusion import BlockDiffusion


@dataclass(frozen=True)
class BatchLoss(ABC):
    """What a global batch is trained on; everything random in it has been drawn already."""

    batch: Batch

    @property
    def num_noisy(self) -> int:
        """N, noisy copies of a row; 1 without noise."""
        return 1

    @property
    @abstractmethod
    def num_scored(self) -> int:
        """The number of positions that have logits, over all rows and copies."""

    @abstractmethod
    def nats(self, model: BlockDiffusion, rows: slice) -> torch.Tensor:
        """Return the loss of some of the rows, a sum in nats: a scalar on the model's device.

        The loss is the sum over all rows divided by the free tokens of the whole batch.
        """

    def _inputs(self, rows: slice, device: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the ids of some rows, and what they attend to, on the device."""
        attended_BL = self.batch.attended_BL
        valid_BL = None if attended_BL is None else attended_BL[rows].to(device)
        return self.batch.ids_BL[rows].to(device), valid_BL


@dataclass(frozen=True)
class DiffusionLoss(BatchLoss):
    """The loss of a diffusion: weighted terms of its bound, averaged over the noisy copies."""

    corrupted: Corrupted
    ar_weight_BL: torch.Tensor | None = None
    """Weights of the next-token loss on the clean stream, 0 at tokens that are not scored."""
    block_size: int | None = None
    """S of this update, in which the noise was drawn; None: the model's."""

    @property
    def num_noisy(self) -> int:
        return self.corrupted.noisy_BNL.shape[1]

    @property
    def num_scored(self) -> int:
        clean = 0 if self.ar_weight_BL is None else int((self.ar_weight_BL > 0).sum())
        return int(self.corrupted.scored_BNL.sum()) + clean

    def nats(self, model: BlockDiffusion, rows: slice) -> torch.Tensor:
        if self.block_size is not None and self.block_size != model.config.block_size:
            model = model.with_block_size(self.block_size)
        drawn = self.corrupted.rows(rows.start, rows.stop).to(model.device)
        if self.ar_weight_BL is not None:
            ar_weight_BL = self.num_noisy * self.ar_weight_BL[rows].to(model.device)
            drawn = drawn.with_clean_stream(ar_weight_BL)
        nats = diffusion_of(model.config).loss(model, drawn, *self._inputs(rows, model.device))
        return nats / self.num_noisy


@dataclass(frozen=True)
class NextTokenLoss(BatchLoss):
    """The autoregressive loss: every free token, given those before it."""

    free_BL: torch.Tensor

    @property
    def num_scored(self) -> int:
        return int(self.free_BL.sum())

    def nats(self, model: BlockDiffusion, rows: slice) -> torch.Tensor:
        clean_BL, valid_BL = self._inputs(rows, model.device)
        return causal_loss(model, clean_BL, self.free_BL[rows].to(model.device), valid_BL)
