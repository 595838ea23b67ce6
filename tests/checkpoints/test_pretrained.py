"""The model that comes with the project: what its card says is what it is."""

from pathlib import Path

import pytest
import torch

import blockdiffusion
from blockdiffusion.checkpoints.card import read_card, render

FOLDER = Path(__file__).parents[2] / "pretrained" / "books"


@pytest.fixture(scope="module")
def books():
    return blockdiffusion.load(FOLDER, dtype=torch.float32)


def test_its_card_is_written_from_its_facts(books):
    card = read_card(FOLDER)
    assert card is not None and card.notes is not None
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == render(books.config, card)
    assert (FOLDER / "model.safetensors").stat().st_size < 40e6


def test_it_has_learnt_to_read_and_write(books):
    """Exactly, 3.93 nats per token of its test text; of shuffled words it expects much less."""
    text = "He looked at her for a long time, and then he said that he did not know what to do."
    words = text.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = " ".join(words[i] for i in order)
    nats = [
        blockdiffusion.likelihood(books, [x], estimator="exact").exact_nats_per_token
        for x in (text, shuffled)
    ]
    assert nats[0] < 3.6 and nats[1] > nats[0] + 1
    written = blockdiffusion.generate(
        books, "It was a ", max_new_tokens=24, top_p=0.9, generator=torch.Generator().manual_seed(5)
    )
    assert written.texts is not None and written.texts[0].startswith("It was a ")
