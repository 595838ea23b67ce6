from pathlib import PurePath

import pytest

from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.registry import SETS, find_set, set_lines, split_of
from blockdiffusion.errors import UserError

NAMES = {
    "lm1b", "openwebtext", "wikitext2", "wikitext2-paragraphs", "wikitext103", "ptb",
    "lambada", "ag_news", "scientific_papers_pubmed", "scientific_papers_arxiv", "text8",
    "fineweb-edu",
}  # fmt: skip


def test_every_set_is_complete():
    assert {data_set.name for data_set in SETS} == NAMES and len(SETS) == len(NAMES)
    for data_set in SETS:
        assert data_set.detokenize in DETOKENIZERS
        assert data_set.held_out is None or data_set.held_out in data_set.splits
        assert data_set.repository.count("/") == 1 and data_set.folders
        assert data_set.licence and data_set.paper and data_set.about
        assert not data_set.is_one_body or data_set.cut.held_out == data_set.held_out
        assert set(data_set.splits) <= {"train", "validation", "test"}  # what a name can say


def test_the_last_100k_documents_of_openwebtext_are_held_out():
    data_set = find_set("openwebtext")
    assert data_set.is_one_body and data_set.cut.number == 100_000
    assert data_set.splits["validation"] == 100_000


def test_the_listing_shows_every_set():
    text = "\n".join(set_lines())
    assert all(f"{name}: " in text for name in NAMES)
    assert "train (36,718 rows)" in text and "the last 100,000 documents" in text
    assert max(map(len, set_lines())) <= 100


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean wikitext2 or wikitext103"):
        find_set("wikitext")
    with pytest.raises(UserError, match=r"known are lm1b, openwebtext"):
        find_set("zzz")


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
