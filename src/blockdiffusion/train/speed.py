"""How fast a run computes: FLOP/s of its updates, and their share of the device's peak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blockdiffusion.estimate.flops import Pass, training_flops
from blockdiffusion.estimate.sizes import NetworkSizes, has_equal_layers
from blockdiffusion.models.attention import resolve_backend
from blockdiffusion.runtime.hardware import quick_peak, share_of_peak

if TYPE_CHECKING:
    from blockdiffusion.train.loss import BatchLoss
    from blockdiffusion.train.options import TrainOptions


class Speed:
    """Counts the operations of updates and knows the peak of the devices of all processes.

    The peak of a known GPU is in a table; on a CPU it is measured now, if that takes a second or
    so. Otherwise no share is reported, and none after an update that was faster than the peak,
    which other programs then disturbed.
    """

    def __init__(
        self,
        model: Any,
        options: TrainOptions,
        device: torch.device,
        row_bos: bool,
        processes: int = 1,
    ):
        self.sizes = NetworkSizes.of(model) if has_equal_layers(model) else None
        self.options, self.row_bos = options, row_bos
        self.attention: Any = "causal"
        if not model.config.is_autoregressive:
            self.attention = resolve_backend(model.attention_backend, device)
        peak = quick_peak(str(device), options.dtype, torch.get_num_threads())
        self.peak = None if peak is None else peak * processes

    def reached(self, update: BatchLoss, seconds: float) -> dict[str, float]:
        """Return what metrics.jsonl gets about an update that took `seconds`; {} if the operations
        of the network cannot be counted."""
        if self.sizes is None:
            return {}
        whole = Pass(
            rows=len(update.batch.ids_BL),
            scored=update.num_scored,
            num_noisy=update.num_noisy,
            given_bos=self.row_bos,
            attention=self.attention,
        )
        checkpointing = self.options.activation_checkpointing
        flops = training_flops(self.sizes, whole, checkpointing=checkpointing).total / seconds
        values = {"tflops_per_second": float(f"{flops / 1e12:.4g}")}
        share = None if self.peak is None else share_of_peak(flops, self.peak)
        if share is None:
            self.peak = None
        else:
            values["peak_share"] = float(f"{share:.3g}")
        return values
