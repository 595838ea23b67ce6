from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from blockdiffusion.data import packing
from blockdiffusion.data.loader import BatchOrder, TokenRows
from blockdiffusion.data.packing import PrepareOptions, prepare
from blockdiffusion.errors import UserError
from tests.data.corpora import sentences


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Rows of 16 bytes in shards of 8 rows; with padding if asked."""

    def make(**options):
        monkeypatch.setattr(packing, "SHARD_TOKENS", 128)
        (tmp_path / "text.txt").write_text(sentences(3000), encoding="utf-8")
        base = {"seq_len": 16, "tokenizer": "byte", "num_workers": 1, "document_bytes": 100}
        options = PrepareOptions(**base | options)
        prepare([str(tmp_path / "text.txt")], tmp_path / "out", options)
        return tmp_path / "out"

    return make


def test_rows_come_in_the_order_asked_for_across_shards(prepared):
    out = prepared()
    rows = TokenRows(out, "train")
    split = rows.manifest.splits["train"]
    assert len(split.shards) > 5
    stored = b"".join((out / shard.file).read_bytes() for shard in split.shards)
    expected = np.frombuffer(stored, dtype="<u2").reshape(-1, 16)
    assert rows.num_rows == len(expected) == split.rows
    indices = np.random.default_rng(0).permutation(rows.num_rows)
    batch = rows.rows(indices)
    assert batch.valid_BL is None
    assert batch.ids_BL.dtype == torch.int64
    assert np.array_equal(batch.ids_BL.numpy(), expected[indices])


def test_padding_is_marked(prepared):
    rows = TokenRows(prepared(packing="document", documents="line"), "train")
    batch = rows.rows(np.arange(rows.num_rows))
    lengths = batch.valid_BL.sum(1)
    assert int(lengths.sum()) == rows.manifest.splits["train"].tokens
    assert 0 < int((lengths < 16).sum()) < rows.num_rows
    right_end = torch.arange(16) < lengths[:, None]
    assert torch.equal(batch.valid_BL, right_end)
    # A row ends with EOS, or is full and continues in the next.
    last = batch.ids_BL[torch.arange(rows.num_rows), lengths - 1]
    assert bool(((last == 256) | (lengths == 16)).all())
    assert (
        int((batch.ids_BL[batch.valid_BL] == 256).sum()) == rows.manifest.splits["train"].documents
    )


@pytest.mark.parametrize("index", [-1, 10**6])
def test_rows_that_are_not_there(prepared, index):
    with pytest.raises(IndexError, match="row numbers must be"):
        TokenRows(prepared(), "train").rows(np.array([0, index]))


def test_missing_and_damaged_files_are_named(prepared, tmp_path):
    with pytest.raises(UserError, match="holds no prepared data"):
        TokenRows(tmp_path, "train")
    out = prepared(packing="document")
    with pytest.raises(UserError, match="no split 'test': it has train, valid"):
        TokenRows(out, "test")
    for name in ("train-00001.bin", "train-00001.len"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-2])
        with pytest.raises(UserError, match=f"{name} has {len(whole) - 2} bytes and should have"):
            TokenRows(out, "train")
        (out / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            TokenRows(out, "train")
        (out / name).write_bytes(whole)
    assert TokenRows(out, "train").num_rows > 0


def test_a_damaged_manifest_is_named(prepared):
    out = prepared()
    text = (out / "manifest.json").read_text()
    fields = json.loads(text)
    for bad in (text[:-40], "[]", json.dumps(fields | {"splits": {"train": {}}})):
        (out / "manifest.json").write_text(bad)
        with pytest.raises(UserError, match=r"manifest\.json"):
            TokenRows(out, "train")
    (out / "manifest.json").write_text(json.dumps(fields | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        TokenRows(out, "train")


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (7, 7), (3, 8), (100, 1)])
def test_every_epoch_is_a_permutation_and_batches_leave_no_gap(num_rows, batch_size):
    order = BatchOrder(num_rows, batch_size, seed=5)
    steps = [order.indices(step) for step in range(3 * num_rows)]
    assert all(len(indices) == batch_size for indices in steps)
    stream = np.concatenate(steps)
    epochs = stream[: len(stream) // num_rows * num_rows].reshape(-1, num_rows)
    assert (np.sort(epochs, axis=1) == np.arange(num_rows)).all()
    assert len({tuple(epoch) for epoch in epochs[:3].tolist()}) > 1


def test_the_order_is_a_function_of_seed_and_step():
    forward = BatchOrder(50, 8, seed=1)
    expected = [forward.indices(step).tolist() for step in range(40)]
    for step in np.random.default_rng(0).permutation(40):
        assert BatchOrder(50, 8, seed=1).indices(int(step)).tolist() == expected[step]
        assert forward.indices(int(step)).tolist() == expected[step]
    assert [BatchOrder(50, 8, seed=2).indices(step).tolist() for step in range(40)] != expected


def test_an_order_of_nothing_is_refused():
    with pytest.raises(UserError, match="0 rows out of 5"):
        BatchOrder(5, 0, seed=0)
    with pytest.raises(UserError, match="2 rows out of 0"):
        BatchOrder(0, 2, seed=0)


def test_a_batch_far_larger_than_the_data_is_refused():
    """At once: a billion row numbers alone would be 8 GB."""
    assert len(BatchOrder(3, 3000, seed=0).indices(0)) == 3000
    with pytest.raises(UserError, match=r"a batch of 1000000000 rows out of 3 .* train.batch_size"):
        BatchOrder(3, 10**9, seed=0)
