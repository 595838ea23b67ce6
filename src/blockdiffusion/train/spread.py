"""How a network in training is spread over the processes of its job.

* `Spread`: one process has all of it,
* `Replicas`: every process has all of it, and the gradients are added up (DDP),
* `Shards`: every process has a part of every tensor, of its gradient, its average and its moments,
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

from blockdiffusion.runtime.distributed import Team, whole
from blockdiffusion.train.loss import BatchLoss
from blockdiffusion.train.optim import MovingAverage
from blockdiffusion.train.options import Parallel

if TYPE_CHECKING:
    from blockdiffusion.models.transformer import BlockDiffusionModel


class Spread:
    """A network on one process.

    Attributes:
        model: its parameters are what is optimized, averaged and saved; of `Shards` they are
            shards, and only `nats` and `averaged` can run it.
        team: the processes.
    """

    def __init__(self, model: BlockDiffusionModel, team: Team):
        self.model, self.team = model, team

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
    def averaged(self, average: MovingAverage) -> Iterator[BlockDiffusionModel]:
        """Within the context a network with the averaged weights, which this process has whole."""
        with average.swapped():
            yield self.model


class Replicas(Spread):
    """Distributed data parallel training."""

    def __init__(self, model: BlockDiffusionModel, team: Team):
        super().__init__(model, team)
        self._loss = nn.parallel.DistributedDataParallel(_Loss(model), gradient_as_bucket_view=True)

    def nats(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        """See `Spread`."""
        return self._loss(batch_loss, rows)

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        """See `Spread`."""
        return nullcontext() if is_last else self._loss.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """See `Spread`. DDP takes the mean over the processes, whose parts are to be added up."""
        (loss * self.team.size).backward()


class Shards(Spread):
    """Fully sharded data parallel training, FSDP2: layers are the units that are put together."""

    def __init__(self, model: BlockDiffusionModel, team: Team):
        super().__init__(model, team)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (team.size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        self._loss: Any = fully_shard(_Loss(model), mesh=mesh)

    def nats(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        """See `Spread`."""
        return self._loss(batch_loss, rows)

    @contextmanager
    def last_pass(self, is_last: bool) -> Iterator[None]:
        """See `Spread`."""
        self._loss.set_requires_gradient_sync(is_last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """See `Spread`. FSDP takes the mean over the processes, whose parts are to be added up."""
        (loss * self.team.size).backward()

    @contextmanager
    def averaged(self, average: MovingAverage) -> Iterator[BlockDiffusionModel]:
        """See `Spread`. A copy of the network for as long as it is needed, put together once: then
        the processes can run it each as often as they like."""
        model = self.model
        with torch.device("meta"):
            copy = type(model)(model.config)  # type: ignore[bad-argument-type]
        tensors = model.state_dict() | average.average
        copy.load_state_dict({name: whole(t) for name, t in tensors.items()}, assign=True)
        copy.tokenizer, copy.attention_backend = model.tokenizer, model.attention_backend
        yield copy


class _Loss(nn.Module):
    """The loss as a module's forward pass, which is what DDP and FSDP wrap."""

    def __init__(self, model: BlockDiffusionModel):
        super().__init__()
        self.model = model

    def forward(self, batch_loss: BatchLoss, rows: slice) -> torch.Tensor:
        return batch_loss.nats(self.model, rows)


def spread_over(model: BlockDiffusionModel, team: Team, parallel: Parallel) -> Spread:
    """The network, spread over the processes as `parallel` says; on one process as it is.

    Shards are made in place: `model` has them as its parameters from here on.
    """
    if team.size == 1:
        return Spread(model, team)
    return (Replicas if parallel == "ddp" else Shards)(model, team)
