from pathlib import PurePath

import pytest

from blockdiffusion.data.splits import split_of


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("wiki.train.tokens", "train"),
        ("wiki.valid.tokens", "validation"),
        ("ptb.val.txt", "validation"),
        ("lambada_development_plain_text.txt", "validation"),
        ("lambada_test.jsonl", "test"),
        ("training-monolingual.tokenized.shuffled/news.en-00001-of-00100", "train"),
        ("heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050", "test"),
        ("plain_text/test/0000.parquet", "test"),
        ("data/train-00050-of-00093.parquet", "train"),
        ("arxiv/partial/validation/0000.parquet", "validation"),
        ("test/train.txt", "train"),  # the file's own name comes first
        ("000_00000.parquet", None),
        ("latest/values-device.txt", None),
    ],
)
def test_the_name_says_the_split(path, split):
    assert split_of(PurePath(path)) == split
