"""Passes whose kernels are recorded once and then started together (CUDA graphs).

A pass over a few tokens is hundreds of kernels of a few microseconds each: starting them one by one
takes a GPU's host ten times as long as the GPU needs for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

Tensors = tuple[torch.Tensor, ...]
Pass = Callable[..., Tensors]


class CudaRecording:
    """The kernels of `function` for inputs of the shapes of `inputs`, as a CUDA graph.

    It reads and writes the memory of everything else that `function` uses (weights, the cache),
    which has to stay where it is. `function` has run before: what it prepares the first time must
    not be recorded.
    """

    def __init__(self, function: Pass, inputs: Tensors):
        self.inputs = tuple(x.clone() for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


class Recorder:
    """Runs passes, and records those of a kind that comes a second time.

    Args:
        record: makes a recording from a function and its inputs; it is called with inputs of the
            same shapes.
        most: kinds that are remembered, at most, since recordings hold memory; others just run.
    """

    def __init__(
        self,
        record: Callable[[Pass, Tensors], Pass] = CudaRecording,
        most: int = 64,
    ):
        self.record, self.most = record, most
        self._made: dict[Hashable, Pass | None] = {}

    def run(self, kind: Hashable, function: Pass, inputs: Tensors) -> Tensors:
        """What `function` returns for `inputs`: passes of one `kind` differ in their values."""
        if kind not in self._made:
            if len(self._made) < self.most:
                self._made[kind] = None
            return function(*inputs)
        recording = self._made[kind]
        if recording is None:
            recording = self._made[kind] = self.record(function, inputs)
        return recording(*inputs)

    def forget(self) -> None:
        """Drops all recordings: the memory that they use is no longer there."""
        self._made.clear()
