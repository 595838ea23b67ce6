"""Several documents in a row: each is computed as if it were alone."""

import pytest
import torch

from blockdiffusion.models.attention import attend
from blockdiffusion.models.masks import Streams, dense_mask
from tests.models.hugging_face import make_hugging_face
from tests.models.test_attention import tensors

SIZE, LENGTH, VOCAB = 4, 24, 12
# Lengths of the documents of two rows; padding follows.
DOCUMENTS = [[8, 4, 8], [4, 16]]


def numbered(documents=DOCUMENTS, length=LENGTH):
    found = torch.zeros(len(documents), length, dtype=torch.int64)
    for row, sizes in enumerate(documents):
        start = 0
        for number, size in enumerate(sizes, start=1):
            found[row, start : start + size] = number
            start += size
    return found


@pytest.mark.parametrize("backend", ["dense", "chunked", "flex"])
@pytest.mark.parametrize(
    "streams",
    [
        Streams(LENGTH, SIZE),
        Streams(LENGTH, 1),
        Streams(LENGTH, SIZE, num_noisy=2, clean_attention="causal", block_attention="causal"),
        Streams(LENGTH, SIZE, num_noisy=2, window=3),
    ],
    ids=str,
)
def test_attention_stays_inside_a_document(streams, backend):
    q, k, v = tensors(streams)
    document_BL = numbered()
    found = attend(q, k, v, streams, backend, document_BL)
    copies = streams.num_noisy + 1
    for row in range(2):
        document_T = document_BL[row].repeat(copies)
        allowed = (document_T[:, None] == document_T) & (document_T != 0)
        mask = dense_mask(streams) & (allowed | torch.eye(len(allowed), dtype=torch.bool))
        scores = (q[row] @ k[row].mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        expected = scores.softmax(-1) @ v[row]
        assert (found[row] - expected).abs().max() < 1e-12


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean_BL = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
    masked_BNL = torch.rand(2, 2, LENGTH, generator=generator) < 0.5
    return clean_BL, clean_BL[:, None].expand_as(masked_BNL).masked_fill(masked_BNL, VOCAB)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("reading", ["next", "same", "shifted"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_a_document_in_a_row_is_computed_as_if_alone(family, reading, backend):
    model = make_hugging_face(
        family, seq_len=LENGTH, block_size=SIZE, reading=reading, clean_attention="causal"
    )
    model.attention_backend = backend
    clean_BL, noisy_BNL = drawn()
    model.requires_grad_(True)
    together = model.encode(noisy_BNL, clean_BL, valid_BL=numbered())
    parts, alone = [], []
    for row, sizes in enumerate(DOCUMENTS):
        start = 0
        for size in sizes:
            own = slice(start, start + size)
            alone.append(model.encode(noisy_BNL[row, None, :, own], clean_BL[row, None, own])[0])
            parts.append(together[row, :, own])
            start += size
    found, expected = (torch.cat([x.flatten() for x in found]) for found in (parts, alone))
    assert (found - expected).abs().max() < 2e-6
    # So are the gradients.
    weight = torch.randn(len(found), generator=torch.Generator().manual_seed(3)).double()
    names, tensors = zip(*model.backbone.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad(weight @ value, tensors, allow_unused=True)
        for value in (found, expected)
    ]
    for name, own, other in zip(names, *grads, strict=True):
        assert (own is None) == (other is None), name
        assert own is None or (own - other).abs().max() < 1e-5 * (1 + other.abs().max()), name


@pytest.mark.parametrize("reading", ["next", "shifted"])
def test_another_document_changes_nothing(reading):
    model = make_hugging_face("llama", seq_len=LENGTH, block_size=SIZE, reading=reading)
    clean_BL, noisy_BNL = drawn()
    before = model.encode(noisy_BNL, clean_BL, valid_BL=numbered())
    document_BL = numbered()
    other = document_BL != 2
    noisy_BNL = torch.where(other[:, None], (noisy_BNL + 1) % VOCAB, noisy_BNL)
    clean_BL = torch.where(other, (clean_BL + 1) % VOCAB, clean_BL)
    after = model.encode(noisy_BNL, clean_BL, valid_BL=document_BL)
    for row in range(2):
        own = document_BL[row] == 2
        assert torch.equal(before[row][:, own], after[row][:, own])
        assert not torch.equal(before[row][:, ~own], after[row][:, ~own])
