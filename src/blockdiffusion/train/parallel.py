"""How a network in training is distributed over the processes of its job.

* `Parallelism`: one process holds all of it,
* `DDP`: every process holds all of it, and gradients are summed,
* `FSDP`: every process holds a shard of every tensor, of its gradient, average and moments, and
  layers are gathered while they are needed.

The loop has no case for the number of processes. Each process passes its rows of the global batch
through the network; the sum of the gradients is that of the batch.
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
    from blockdiffusion.models.block_diffusion import BlockDiffusion


class Parallelism:
    """A network on one process.

    Attributes:
        model: its parameters are optimized, averaged and saved; those of `FSDP` are shards, and
            only `nats` and `ema_weights` can run it.
    """

    def __init__(self, model: BlockDiffusion, processes: ProcessGroup):
        self.model, self.processes = model, processes

    def nats(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        """Return the loss of some rows of the global batch."""
        return batch_loss.nats(self.model, rows)

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        """Wrap a forward and a backward pass; gradients are summed after the last one."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this process's part of the loss."""
        loss.backward()

    @contextmanager
    def ema_weights(self, average: MovingAverage) -> Iterator[BlockDiffusion]:
        """Yield a network with the averaged weights, whole on this process."""
        with average.swapped():
            yield self.model


class _Wrapped(Parallelism):
    """A network whose loss is wrapped by PyTorch, which averages gradients over the processes."""

    _loss: Any  # of some rows of a batch, as a module

    def nats(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        return self._loss(batch_loss, rows)

    def backward(self, loss: torch.Tensor) -> None:
        """Add this process's gradient: the sum over the processes is needed, not their mean."""
        (loss * self.processes.size).backward()


class DDP(_Wrapped):
    """Distributed data parallel training."""

    def __init__(self, model: BlockDiffusion, processes: ProcessGroup):
        super().__init__(model, processes)
        self._loss = nn.parallel.DistributedDataParallel(_Loss(model), gradient_as_bucket_view=True)

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self._loss.no_sync()


class FSDP(_Wrapped):
    """Fully sharded data parallel training, FSDP2: layers are the units that are gathered."""

    def __init__(self, model: BlockDiffusion, processes: ProcessGroup):
        super().__init__(model, processes)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (processes.size,))
        for unit in model.backbone.units():
            fully_shard(unit, mesh=mesh)
        self._loss = fully_shard(_Loss(model), mesh=mesh)

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        self._loss.set_requires_gradient_sync(is_last)
        return nullcontext()

    @contextmanager
    def ema_weights(self, average: MovingAverage) -> Iterator[BlockDiffusion]:
        """Yield a gathered copy, which each process can run as often as it likes."""
        model = self.model
        backbone = model.backbone.empty_copy()
        tensors = model.backbone.state_dict() | average.average
        backbone.load_state_dict({name: whole(t) for name, t in tensors.items()}, assign=True)
        yield model.with_backbone(backbone)


class _Loss(nn.Module):
    """The loss as a module's forward pass, which DDP and FSDP wrap."""

    def __init__(self, model: BlockDiffusion):
        super().__init__()
        self.model = model

    def forward(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        return batch_loss.nats(self.model, rows)


def parallelize(model: BlockDiffusion, processes: ProcessGroup, parallel: Parallel) -> Parallelism:
    """Distribute the network as `parallel` says; one process keeps it as it is.

    FSDP works in place: the parameters of `model` are shards from here on.
    """
    if processes.size == 1:
        return Parallelism(model, processes)
    return (DDP if parallel == "ddp" else FSDP)(model, processes)
