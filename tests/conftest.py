"""Fixtures shared by all tests: golden directories, small random models, the optional corpora."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockdiffusion.checkpoints.formats import load
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of corpora named by BLOCKDIFFUSION_DATA; skips where there is none."""
    folder = os.environ.get("BLOCKDIFFUSION_DATA")
    if not folder:
        pytest.skip("BLOCKDIFFUSION_DATA is not set: the corpora are not part of the project")
    return Path(folder)


@pytest.fixture(scope="session")
def bd3lm_expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "bd3lm-hf" / "expected.safetensors")


@pytest.fixture
def bd3lm() -> BlockDiffusionModel:
    return load(GOLDEN / "bd3lm-hf")


@pytest.fixture(scope="session")
def tiny_law_expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tiny-law" / "expected.safetensors")


@pytest.fixture
def tiny_law() -> BlockDiffusionModel:
    return load(GOLDEN / "tiny-law")


@pytest.fixture
def make_model() -> Callable[..., BlockDiffusionModel]:
    """Builds a small model with generic (large, random) weights in float64, in eval mode."""

    def make(**overrides) -> BlockDiffusionModel:
        sizes = dict(
            vocab_size=13, seq_len=16, block_size=4, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2,
            cond_dim=8, dropout=0.0,
        )  # fmt: skip
        model = BlockDiffusionModel(BlockDiffusionConfig(**{**sizes, **overrides}))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        return model.double().eval()

    return make


@pytest.fixture
def make_ar(make_model) -> Callable[..., BlockDiffusionModel]:
    """The same for the autoregressive baseline."""
    return partial(make_model, objective="autoregressive", adaln=False, block_size=1)


@pytest.fixture
def random_ids() -> Callable[..., torch.Tensor]:
    """Random clean ids (rows, length) below `vocab_size - 1`, so never the mask."""

    def make(rows: int, length: int, vocab_size: int = 13, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocab_size - 1, (rows, length), generator=generator)

    return make
