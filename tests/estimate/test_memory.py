"""The model of memory against the tensors that really exist at a time, for several networks.

Sizes are such that tensors outweigh what is left out. The bounds are those that
docs/results/estimate.md states.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.estimate import recipe_of, updates
from blockdiffusion.estimate.flops import Pass
from blockdiffusion.estimate.memory import Execution, pass_bytes
from blockdiffusion.estimate.run import estimate_recipe, manifest_of
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.models.transformer import Layer
from blockdiffusion.runtime.hardware import find_hardware

CPU = replace(find_hardware("h100"), cuda=False)
MODEL = {"num_layers": 4, "width": 128, "num_heads": 4, "cond_dim": 32, "block_size": 16}
ROW = {"block_size": 256}
# What differs from training MODEL by AdamW in float32, all four rows at once.
CASES = {
    "usual": {},
    "one noisy copy": {"objective": {"estimator": "bernoulli"}},
    "S = L": {"model": MODEL | ROW, "objective": {"estimator": "bernoulli"}},
    "micro-batches": {"micro": 1},
    "checkpointing": {"train": {"activation_checkpointing": True}},
    "bf16": {"train": {"dtype": "bf16"}},
    "Muon": {"optim": {"name": "muon"}},
    "next token": {"objective": {"name": "ar"},
                   "model": {k: v for k, v in MODEL.items() if k not in ("block_size", "cond_dim")}},
    "time": {"objective": {"name": "sedd"}},
    "uniform": {"objective": {"name": "d3pm", "transition": "uniform", "timesteps": 9}},
    "layers by autograd": {"train": {"compile": True}},
}  # fmt: skip


class Held(TorchDispatchMode):
    """The most bytes that tensors made within the context hold at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_that_of_the_tensors(name, tmp_path, monkeypatch):
    case = {"model": MODEL, "batch": 4, **CASES[name]}
    recipe = recipe_of(case, str(tmp_path))
    found = estimate_recipe(recipe, CPU, seq_len=256, vocab_size=1024).training
    if recipe.train.compile:  # the same layers before they are
        monkeypatch.setattr(Layer, "_is_plain", lambda self: False)
    with Held() as held:
        for _ in updates(recipe, manifest_of(recipe, 256, 1024), 2):
            pass
    print(name, found.memory.peak / held.most)
    assert found.memory.peak == pytest.approx(held.most, rel=0.2)
