"""How a network in training is spread over the processes of its job.

* `Parallelism`: one process has all of it,
* `DDP`: every process has all of it, and the gradients are added up (DDP),
* `FSDP`: every process has a part of every tensor, of its gradient, its average and its moments,
  and layers are put together while they are needed (FSDP2).

The loop asks one of these and has no case for the number of processes. Each of the processes passes
its rows of the global batch through the network; the sum of the gradients is that of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blockdiffusion.runtime.distributed import ProcessGroup, whole
from blockdiffusion.train.loss import BatchLoss
from blockdiffusion.train.optim import MovingAverage
from blockdiffusion.train.options import Parallel

if TYPE_CHECKING:
    from blockdiffusion.models.transformer import BlockDiffusionModel


class Parallelism:
    """A network on one process.

    Attributes:
        model: its parameters are what is optimized, averaged and saved; of `FSDP` they are
            shards, and only `nats` and `ema_weights` can run it.
        processes: the processes.
    """

    def __init__(self, model: BlockDiffusionModel, processes: ProcessGroup):
        self.model, self.processes = model, processes

    def nats(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        """The loss of some rows of the global batch, see `BatchLoss`."""
        return batch_loss.nats(self.model, rows)

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around a forward and a backward pass: after the last one gradients are added up."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this process's part of the loss."""
        loss.backward()

    @contextmanager
    def ema_weights(self, average: MovingAverage) -> Iterator[BlockDiffusionModel]:
        """Within the context a network with the averaged weights, which this process has whole."""
        with average.swapped():
            yield self.model


class DDP(Parallelism):
    """Distributed data parallel training."""

    def __init__(self, model: BlockDiffusionModel, processes: ProcessGroup):
        super().__init__(model, processes)
        self._loss = nn.parallel.DistributedDataParallel(_Loss(model), gradient_as_bucket_view=True)

    def nats(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        """See `Parallelism`."""
        return self._loss(batch_loss, rows)

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        """See `Parallelism`."""
        return nullcontext() if is_last else self._loss.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """DDP takes the mean over the processes; the sum of their parts is needed."""
        (loss * self.processes.size).backward()


class FSDP(Parallelism):
    """Fully sharded data parallel training, FSDP2: layers are the units that are put together."""

    def __init__(self, model: BlockDiffusionModel, processes: ProcessGroup):
        super().__init__(model, processes)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (processes.size,))
        for unit in model.backbone.units():
            fully_shard(unit, mesh=mesh)
        self._loss: Any = fully_shard(_Loss(model), mesh=mesh)

    def nats(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        """See `Parallelism`."""
        return self._loss(batch_loss, rows)

    @contextmanager
    def last_pass(self, is_last: bool) -> Iterator[None]:
        """See `Parallelism`."""
        self._loss.set_requires_gradient_sync(is_last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """FSDP takes the mean over the processes; the sum of their parts is needed."""
        (loss * self.processes.size).backward()

    @contextmanager
    def ema_weights(self, average: MovingAverage) -> Iterator[BlockDiffusionModel]:
        """A copy of the network, gathered once: every process can run it as often as it likes."""
        model = self.model
        backbone = model.backbone.empty_copy()
        tensors = model.backbone.state_dict() | average.average
        backbone.load_state_dict({name: whole(t) for name, t in tensors.items()}, assign=True)
        yield model.with_backbone(backbone)


class _Loss(nn.Module):
    """The loss as a module's forward pass, which is what DDP and FSDP wrap."""

    def __init__(self, model: BlockDiffusionModel):
        super().__init__()
        self.model = model

    def forward(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        return batch_loss.nats(self.model, rows)


def parallelize(
    model: BlockDiffusionModel, processes: ProcessGroup, parallel: Parallel
) -> Parallelism:
    """The network, spread over the processes as `parallel` says; on one process as it is.

    FSDP are made in place: `model` has them as its parameters from here on.
    """
    if processes.size == 1:
        return Parallelism(model, processes)
    return (DDP if parallel == "ddp" else FSDP)(model, processes)
