from __future__ import annotations

import hashlib

import numpy as np
import pytest

from blockdiffusion.data.shards import DocumentPacker, RowRules, ShardWriter, WrapPacker

BOS, EOS, PAD = 90, 91, 99
U16 = np.dtype("<u2")


def rules(seq_len=5, **ids) -> RowRules:
    return RowRules(seq_len=seq_len, dtype=U16, pad_id=PAD, **ids)


def flat(documents) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([token for document in documents for token in document], dtype=U16),
        np.array([len(document) for document in documents]),
    )


def test_wrap_cuts_one_long_stream():
    packer = WrapPacker(rules(document_eos_id=EOS))
    rows, lengths = packer.add(*flat([[1, 2, 3], [4, 5, 6, 7]]))
    assert rows.tolist() == [[1, 2, 3, EOS, 4]]
    assert lengths is None
    assert packer.left_over == 4
    rows, _ = packer.add(*flat([[8]]))
    assert rows.tolist() == [[5, 6, 7, EOS, 8]]
    assert packer.left_over == 1


def test_wrap_with_bos_and_eos_in_every_row():
    packer = WrapPacker(rules(row_bos_id=BOS, row_eos_id=EOS))
    rows, _ = packer.add(*flat([[1, 2], [3, 4, 5, 6, 7]]))
    assert rows.tolist() == [[BOS, 1, 2, 3, EOS], [BOS, 4, 5, 6, EOS]]
    assert packer.left_over == 1


@pytest.mark.parametrize("row_bos_id", [None, BOS])
@pytest.mark.parametrize("document_eos_id", [None, EOS])
def test_wrap_does_not_depend_on_how_the_documents_arrive(row_bos_id, document_eos_id):
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 80, size).tolist() for size in draw.integers(0, 20, 50)]
    stream = []
    for document in documents:
        stream += document + ([EOS] if document_eos_id else [])
    payload = 5 - (row_bos_id is not None)
    expected = [
        ([BOS] if row_bos_id else []) + stream[start : start + payload]
        for start in range(0, len(stream) - payload + 1, payload)
    ]
    for step in (1, 7, 50):
        packer = WrapPacker(rules(row_bos_id=row_bos_id, document_eos_id=document_eos_id))
        rows = [
            row
            for start in range(0, 50, step)
            for row in packer.add(*flat(documents[start : start + step]))[0].tolist()
        ]
        assert rows == expected
        assert packer.left_over == len(stream) - payload * len(expected)


def test_documents_are_padded_and_longer_ones_go_on():
    packer = DocumentPacker(rules(row_bos_id=BOS, document_eos_id=EOS))
    rows, lengths = packer.add(*flat([[1, 2], [3, 4, 5, 6, 7, 8], [9, 10, 11], []]))
    assert rows.tolist() == [
        [BOS, 1, 2, EOS, PAD],
        [BOS, 3, 4, 5, 6],
        [BOS, 7, 8, EOS, PAD],
        [BOS, 9, 10, 11, EOS],
        [BOS, EOS, PAD, PAD, PAD],
    ]
    assert lengths.tolist() == [4, 5, 4, 5, 2]
    assert packer.left_over == 0


def test_row_eos_in_document_packing_follows_the_tokens():
    packer = DocumentPacker(rules(row_eos_id=EOS))
    rows, lengths = packer.add(*flat([[1, 2, 3, 4, 5], []]))
    assert rows.tolist() == [[1, 2, 3, 4, EOS], [5, EOS, PAD, PAD, PAD]]
    assert lengths.tolist() == [5, 2]


def test_shards_are_full_and_hidden_until_they_are_whole(tmp_path):
    writer = ShardWriter(tmp_path, "train", rows_per_shard=3, packing="document")
    rows = np.arange(16, dtype=U16).reshape(8, 2)
    lengths = np.array([2, 1] * 4, dtype="<u4")
    writer.write(rows[:5], lengths[:5])
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {"train-00000.bin", "train-00000.len"}
    writer.write(rows[5:], lengths[5:])
    assert writer.num_rows == 8
    writer.finish()
    writer.close()
    assert [shard.rows for shard in writer.shards] == [3, 3, 2]
    assert writer.tokens == 12
    content = [(tmp_path / shard.file).read_bytes() for shard in writer.shards]
    assert b"".join(content) == rows.tobytes()
    hashes = [hashlib.sha256(data).hexdigest() for data in content]
    assert hashes == [shard.sha256 for shard in writer.shards]
    assert len(list(tmp_path.iterdir())) == 6
    last = np.fromfile(tmp_path / "train-00002.len", dtype="<u4")
    assert last.tolist() == [2, 1]


def test_an_unfinished_shard_leaves_nothing_behind(tmp_path):
    writer = ShardWriter(tmp_path, "train", rows_per_shard=3, packing="document")
    writer.write(np.zeros((2, 2), dtype=U16), np.array([1, 1]))
    writer.close()
    assert list(tmp_path.iterdir()) == []
