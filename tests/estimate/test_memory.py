"""The model of memory against the tensors that really exist at a time, for several networks.

Sizes are such that tensors outweigh what is left out. The bounds are those that
docs/results/estimate.md states.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from benchmarks.estimate import recipe_of, updates
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaModel

from blockdiffusion.estimate.flops import Pass
from blockdiffusion.estimate.memory import Execution, pass_bytes
from blockdiffusion.estimate.run import estimate_recipe, manifest_of
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.models.transformer import BlockDiffusionConfig, Layer
from blockdiffusion.runtime.hardware import find_hardware

CPU = replace(find_hardware("h100"), cuda=False)
MODEL = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "cond_dim": 32,
    "block_size": 16,
}
PLAIN = {key: MODEL[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
ROW = {"block_size": 256}
# What differs from training MODEL by AdamW in float32, all four rows at once.
CASES = {
    "usual": {},
    "one noisy copy": {"objective": {"estimator": "bernoulli"}},
    "S = L": {"model": MODEL | ROW, "objective": {"estimator": "bernoulli"}},
    "micro-batches": {"micro": 1},
    "checkpointing": {"train": {"activation_checkpointing": True}},
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    "Muon": {"optim": {"name": "muon"}},
    "next token": {"objective": {"name": "ar"}, "model": PLAIN},
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("uniform", "time") else n for n in CASES],
)
def test_the_peak_is_that_of_the_tensors(name, tmp_path, monkeypatch):
    case = {"model": MODEL, "batch": 4, **CASES[name]}
    recipe = recipe_of(case, str(tmp_path))
    found = estimate_recipe(recipe, CPU, seq_len=256, vocab_size=1024).training
    if recipe.train.compile:  # the same layers before they are
        monkeypatch.setattr(Layer, "_is_plain", lambda self: False)
    with Held() as held:
        for _ in updates(recipe, manifest_of(recipe, 256, 1024), 2):
            pass
    assert found.memory.peak == pytest.approx(held.most, rel=0.2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_a_network_of_another_kind(dtype):
    """A Llama: shared key-value heads, RMSNorm, a gated MLP; all gradients are autograd's."""
    layers, rows, length = 4, 2, 128
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = LlamaModel(config)
    shapes = [tuple(p.shape) for p in model.layers[0].parameters() if p.ndim == 2]
    ours = BlockDiffusionConfig(
        vocab_size=64, seq_len=length, hidden_size=128, num_hidden_layers=layers,
        num_attention_heads=4, adaln=False,
        objective="autoregressive", block_size=1,
    )  # fmt: skip
    sizes = replace(
        NetworkSizes.of_config(ours), layer_matrices=tuple(shapes), num_key_value_heads=2,
        fused_layers=False,
    )  # fmt: skip
    ids = torch.zeros(rows, length, dtype=torch.long)
    with Held() as held, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = model(ids, use_cache=False).last_hidden_state.sum()
        kept = held.now - (2 * layers * sizes.layer_numbers if dtype == "bfloat16" else 0)  # copies
    assert out.requires_grad
    estimated, _ = pass_bytes(sizes, Pass(rows=rows, scored=0), Execution(dtype=dtype))
    assert estimated == pytest.approx(kept, rel=0.2)
