import itertools

import pytest
import torch

from blockdiffusion.models.masks import Streams, decode_predicate, dense_mask
from tests.oracles import mask_by_loops

LAYOUTS = [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3), (15, 5)]


@pytest.mark.parametrize("clean_attention", ["block", "causal"])
@pytest.mark.parametrize("num_noisy", [1, 3])
@pytest.mark.parametrize(("length", "size"), LAYOUTS)
def test_predicate_equals_the_definition(length, size, num_noisy, clean_attention):
    streams = Streams(length, size, num_noisy, True, clean_attention)
    expected = mask_by_loops(length, size, num_noisy, clean_attention)
    assert torch.equal(dense_mask(streams), expected)


def test_without_a_clean_stream_only_the_block_diagonal_is_left():
    mask = dense_mask(Streams(6, 3, num_noisy=2, has_clean=False))
    expected = mask_by_loops(6, 3, 2)[:12, :12]
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("clean_attention", ["block", "causal"])
def test_flex_mask_equals_the_definition(clean_attention):
    from torch.nn.attention.flex_attention import create_mask

    from blockdiffusion.models.attention import _mask_mod

    streams = Streams(12, 3, 2, True, clean_attention)

    def mod(b, h, q, k):
        return _mask_mod(streams, b, h, q, k)

    made = create_mask(mod, 1, 1, streams.num_tokens, streams.num_tokens, device="cpu")
    assert torch.equal(made[0, 0], mask_by_loops(12, 3, 2, clean_attention))


@pytest.mark.parametrize("window", [None, 4, 6, 8])
def test_decoding_sees_the_last_tokens_of_earlier_blocks_and_its_own(window):
    size, total = 2, 12
    position = torch.arange(total)
    clean = torch.ones(total, 1, dtype=torch.bool)
    seen = decode_predicate(
        position[:, None], position[None], clean, block_size=size, window=window
    )
    for q, k in itertools.product(range(total), range(total)):
        end = (q // size + 1) * size
        expected = k < end and (window is None or k >= end - window)
        assert seen[q, k] == expected


def test_decoding_never_sees_an_empty_slot():
    clean = torch.zeros(1, 1, dtype=torch.bool)
    seen = decode_predicate(torch.tensor([[4]]), torch.tensor([[-1, 0, 4]]), clean, block_size=4)
    assert seen.tolist() == [[False, True, True]]
