"""Passes whose kernels are recorded once and then started together (CUDA graphs).

A pass over a few tokens is some 250 kernels of a few microseconds each: starting them one by one
takes a GPU's host six times as long as the GPU needs for them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Pass = Callable[..., Tensors]
MOST_PATIENCE = 16


class CudaRecording:
    """The kernels of `function` for inputs of the shapes of `inputs`, as a CUDA graph.

    It reads and writes the memory of everything else that `function` uses (weights, the cache),
    which has to stay where it is. `function` has run before: what it prepares the first time must
    not be recorded.

    Args:
        pool: the memory that recordings share, which are never replayed at the same time.
    """

    def __init__(self, function: Pass, inputs: Tensors, pool: Any):
        with torch.inference_mode(False):  # so that they can be written to in any mode
            self.inputs = tuple(x.clone() for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.Stream()):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


class CudaRecordings:
    """Makes recordings that share their memory; elsewhere than on a GPU a function stays as it
    is."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Pass, inputs: Tensors) -> Pass:
        if not inputs[0].is_cuda:
            return function
        with torch.cuda.device(inputs[0].device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            return CudaRecording(function, inputs, self._pool)


class Recorder:
    """Runs passes, and records those of a kind that comes again.

    A recording takes about as long as four passes. So it is made when a kind comes a second time;
    but where the storage moves now and then, as when rows leave a batch, only after more.

    Args:
        record: makes a recording from a function and its inputs; it is called with inputs of the
            same shapes.
        most: kinds that are remembered, the last ones that came, since recordings hold memory.
    """

    def __init__(self, record: Callable[[Pass, Tensors], Pass] | None = None, most: int = 32):
        self.record, self.most = record or CudaRecordings(), most
        self._made: OrderedDict[Hashable, Pass] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._patience = 1
        self._lock = threading.Lock()  # inputs are put in place, and then replayed

    def run(self, kind: Hashable, function: Pass, inputs: Tensors) -> Tensors:
        """What `function` returns for `inputs`: passes of one `kind` differ in their values."""
        with self._lock:
            if kind not in self._made and not self._has_come_often(kind):
                return function(*inputs)
            if kind not in self._made:
                self._made[kind] = self.record(function, inputs)
            self._made.move_to_end(kind)
            if len(self._made) > self.most:
                self._made.popitem(last=False)
            return self._made[kind](*inputs)

    def _has_come_often(self, kind: Hashable) -> bool:
        self._seen[kind] = self._seen.pop(kind, 0) + 1
        if len(self._seen) > self.most:
            self._seen.popitem(last=False)
        return self._seen[kind] > self._patience

    def forget(self) -> None:
        """Drops all recordings: the memory that they use is no longer there."""
        with self._lock:
            self._made.clear()
            self._seen.clear()
            self._patience = min(2 * self._patience, MOST_PATIENCE)
