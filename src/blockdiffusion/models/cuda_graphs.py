"""Passes whose kernels are recorded once and then started together (CUDA graphs).

A pass over a few tokens is some 250 kernels of a few microseconds each. Starting them one by one
takes the host six times as long as running them takes the GPU.
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
    which must stay where it is. `function` must have run before, so that its first
    preparations are not recorded.

    Args:
        pool: the memory that recordings share; they are never replayed at the same time.
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
    """Makes recordings that share their memory; without a GPU, returns the function itself."""

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
    """Runs passes, and records those of a kind that returns.

    A recording takes about as long as four passes. So it is made when a kind comes a second time,
    or later if the storage moves now and then, as when rows leave a batch.

    Args:
        record: makes a recording from a function and its inputs; it is called with inputs of the
            same shapes.
        most: how many kinds are kept, the latest, since recordings hold memory.
    """

    def __init__(self, record: Callable[[Pass, Tensors], Pass] | None = None, most: int = 32):
        self.record, self.most = record or CudaRecordings(), most
        self._made: OrderedDict[Hashable, Pass] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._patience = 1
        self._lock = threading.Lock()  # inputs are put in place, and then replayed

    def run(self, kind: Hashable, function: Pass, inputs: Tensors) -> Tensors:
        """Return `function(*inputs)`. Passes of one `kind` differ in the values of inputs only."""
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
        """Drop all recordings: the memory that they use is gone."""
        with self._lock:
            self._made.clear()
            self._seen.clear()
            self._patience = min(2 * self._patience, MOST_PATIENCE)
