import pytest
import torch

from tests.oracles import network


def pattern(size, total, window=None):
    """Block-causal mask cut to the last `window` tokens of each block."""
    block = torch.arange(total) // size
    mask = block[None] <= block[:, None]
    if window is not None:
        mask &= torch.arange(total)[None] >= (block[:, None] + 1) * size - window
    return mask


@pytest.mark.parametrize("window", [None, 4, 8, 6])
def test_block_by_block_equals_one_dense_pass(make_model, random_ids, window):
    """Decoding step by step against the cache, commits fused, equals a pass over the sequence."""
    model, size, total = make_model(), 4, 24
    ids = random_ids(1, total)
    expected = network(model, ids[0], torch.arange(total), pattern(size, total, window))
    capacity = total if window is None else window + size
    cache = model.make_cache(1, capacity)
    with torch.no_grad():
        model.decode(ids[:, :4], 4, cache, window)
        cache.commit(4)
        for start in range(4, total - size, size):
            both = model.decode(ids[:, start : start + 2 * size], size, cache, window)
            logits = model.head(both)[0]
            assert torch.allclose(logits, expected[start : start + 2 * size], atol=1e-10)
            cache.commit(size)
    assert cache.keys[0].shape[2] == capacity


def test_ragged_rows_equal_single_rows(make_model, random_ids):
    model, ids = make_model(), random_ids(3, 12)
    lengths = torch.tensor([0, 4, 8])
    cache = model.make_cache(3, 16)
    with torch.no_grad():
        model.decode(ids[:, :8], 8, cache)
        cache.commit(lengths)
        block = torch.stack([ids[r, n : n + 4] for r, n in enumerate(lengths)])
        ragged = model.head(model.decode(block, 0, cache))
        for row, length in enumerate(lengths.tolist()):
            total = length + 4
            expected = network(model, ids[row, :total], torch.arange(total), pattern(4, total))
            assert torch.allclose(ragged[row], expected[length:], atol=1e-10)


def test_only_commit_changes_what_later_passes_see(make_model, random_ids):
    model, ids = make_model(), random_ids(1, 8)
    cache = model.make_cache(1, 8)
    with torch.no_grad():
        model.decode(ids[:, :4], 4, cache)
        cache.commit(4)
        before = model.head(model.decode(ids[:, 4:], 0, cache))
        model.decode(torch.full((1, 4), model.config.mask_id), 0, cache)
        after = model.head(model.decode(ids[:, 4:], 0, cache))
    assert torch.equal(before, after) and cache.lengths_B.tolist() == [4]


def test_keep_drops_rows(make_model, random_ids):
    model, ids = make_model(), random_ids(3, 8)
    cache = model.make_cache(3, 8)
    with torch.no_grad():
        model.decode(ids[:, :4], 4, cache)
        cache.commit(4)
        whole = model.head(model.decode(ids[:, 4:], 0, cache))
        cache.keep(torch.tensor([0, 2]))
        part = model.head(model.decode(ids[[0, 2], 4:], 0, cache))
    assert torch.allclose(whole[[0, 2]], part, atol=1e-12)


def test_positions_of_a_ring():
    from blockdiffusion.models.cache import BlockCache

    cache = BlockCache(1, 1, 1, 2, 6, dtype=torch.float32, device=torch.device("cpu"))
    cache.commit(4)
    assert cache.positions(2)[0].tolist() == [0, 1, 2, 3, 4, 5]
    cache.commit(4)
    assert cache.place(2).slots_BT.tolist() == [[2, 3]]
    assert cache.positions(2)[0].tolist() == [6, 7, 8, 9, 4, 5]


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("clean_attention", ["block", "causal"])
def test_a_ragged_pass_equals_single_rows(make_model, random_ids, window, clean_attention):
    """A prompt of three blocks, a block with the one before it, and a block alone, in one pass."""
    model, ids = make_model(clean_attention=clean_attention), random_ids(3, 16)
    capacity = 16 if window is None else window + 4
    lengths, tokens, clean = [0, 4, 8], [16, 8, 4], [12, 4, 0]
    together = model.make_cache(3, capacity)
    expected, flat = [], []
    with torch.no_grad():
        for row, start in enumerate(lengths):
            new = ids[row : row + 1, start : start + tokens[row]]
            alone = model.make_cache(1, capacity)
            if start:
                model.decode(ids[row : row + 1, :start], start, alone, window)
                alone.commit(start)
            for stored, found in ((together.keys, alone.keys), (together.values, alone.values)):
                for layer in range(len(stored)):
                    stored[layer][row] = found[layer][0]
            expected.append(model.decode(new, clean[row], alone, window)[0])
            flat.append(new[0])
        together.commit(torch.tensor(lengths))
        found = model.decode_ragged(
            torch.cat(flat), torch.tensor(tokens), torch.tensor(clean), together, window
        )
    assert torch.allclose(found, torch.cat(expected), atol=1e-10)


def test_the_last_row_takes_the_place_of_one_that_leaves(make_model, random_ids):
    model, ids = make_model(), random_ids(3, 12)
    cache = model.make_cache(3, 16)
    with torch.no_grad():
        model.decode(ids[:, :8], 8, cache)
        cache.commit(torch.tensor([8, 4, 8]))
        block = ids[2:, 8:]
        expected = model.decode_ragged(
            torch.cat([ids[0, 8:], ids[1, 8:], block[0]]),
            torch.tensor([4, 4, 4]), torch.zeros(3, dtype=torch.long), cache,
        )[8:]  # fmt: skip
        cache.close_row(0)
        assert cache.lengths_B.tolist() == [8, 4]
        four, none = torch.tensor([4, 4]), torch.tensor([0, 0])
        found = model.decode_ragged(torch.cat([block[0], ids[1, 8:]]), four, none, cache)[:4]
        assert torch.allclose(found, expected, atol=1e-12)
        cache.close_row(1)
        assert cache.open_row() == 1 and cache.lengths_B.tolist() == [8, 0]
