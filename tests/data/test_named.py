"""Named sets from small local files of the shape that each set has."""

import dataclasses
import json

import pytest

from blockdiffusion.data.named import NamedSet, articles, paragraphs, parse_named, pieces
from blockdiffusion.data.registry import CharacterRanges, LastDocuments, find_set
from blockdiffusion.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def read(text):
    named = parse_named(text)
    assert named is not None
    return list(named.training().documents())


def with_cut(name, cut, path):
    """The set with another cut than the real one's 100,000 documents or 90 M characters."""
    return NamedSet(data_set=dataclasses.replace(find_set(name), cut=cut), path=path)


# What a name stands for


def test_a_name_a_split_and_a_path(tmp_path):
    assert parse_named("notes.txt") is None and parse_named("owner/set") is None
    plain = parse_named("ptb")
    assert (plain.data_set.name, plain.split, plain.path) == ("ptb", None, None)
    assert plain.training().split == "train" and plain.held_out().split == "validation"
    write(tmp_path / "ptb.test.txt", "a\n")
    local = parse_named(f"ptb:test={tmp_path}")
    assert (local.split, local.path) == ("test", tmp_path)
    assert local.training().split == local.validation().split == "test"
    assert local.held_out() is None


def test_a_path_that_exists_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "text8", "mine")
    assert parse_named("text8") is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ptb:tset", "ptb has no split 'tset': it has train and validation and test"),
        ("lambada", "lambada has no split 'train': it has test; name one, as lambada:test"),
        ("wikitext=.", "no data set named 'wikitext': did you mean wikitext2 or wikitext103"),
        ("ptb=/no/such/place", "no file or folder '/no/such/place' to read ptb from"),
    ],
)
def test_what_does_not_exist_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_named(text).training()


def test_a_set_that_holds_nothing_out_says_so():
    assert parse_named("fineweb-edu").held_out() is None
    with pytest.raises(UserError, match="has no held-out split"):
        parse_named("fineweb-edu").validation()


# The shape of each set


def test_ptb_lines(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / f"ptb.{split}.txt", f" {split} <unk> N \n second \n")
    write(tmp_path / "README", "no data")
    write(tmp_path / "SOURCE.md", "no data of train either")
    assert read(f"ptb={tmp_path}") == [" train <unk> N ", " second "]
    assert read(f"ptb:validation={tmp_path}") == [" valid <unk> N ", " second "]


def test_lm1b_as_it_is_distributed(tmp_path):
    shuffled = "monolingual.tokenized.shuffled"
    for number in (2, 1):
        name = f"training-{shuffled}/news.en-0000{number}-of-00100"
        write(tmp_path / name, f"Train {number} .\n")
    write(tmp_path / f"heldout-{shuffled}/news.en.heldout-00000-of-00050", "Held out .\n")
    assert read(f"lm1b={tmp_path}") == ["Train 1 .", "Train 2 ."]
    assert list(parse_named(f"lm1b={tmp_path}").held_out().documents()) == ["Held out ."]


def test_ag_news_csv_with_and_without_a_header(tmp_path):
    rows = '"3","Oil up","Prices, again, ""rose"".\nMuch."\n"1","B","C"\n'
    expected = ['Oil up Prices, again, "rose".\nMuch.', "B C"]
    assert read(f"ag_news={write(tmp_path / 'train.csv', rows)}") == expected
    header = 'label,text\n2,"one, two"\n'
    assert read(f"ag_news={write(tmp_path / 'b.csv', header)}") == ["one, two"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n", "row 1 of .* has no string 'text'"),
        ('label,text\n1,"half', "cannot be read as CSV"),
        ("label,text\n1,a,b\n", "row 2 of .* has no string 'text'"),
    ],
)
def test_broken_csv_is_one_sentence(tmp_path, content, sentence):
    file = write(tmp_path / "train.csv", content)
    with pytest.raises(UserError, match=sentence):
        read(f"ag_news={file}")


def test_scientific_papers_have_their_own_field(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"article": ["one", "two"], "abstract": ["x", "y"]})
    (tmp_path / "train").mkdir()
    parquet.write_table(table, tmp_path / "train" / "0000.parquet")
    assert read(f"scientific_papers_arxiv={tmp_path}") == ["one", "two"]
    file = write(tmp_path / "a.jsonl", '{"article": "three"}\n')
    assert read(f"scientific_papers_pubmed={file}") == ["three"]


def test_wikitext_lines_become_articles(tmp_path):
    text = " \n = One = \n \n First . \n = = Part = = \n More . \n \n = Two = \n \n Second . \n"
    expected = [" = One = \n First . \n = = Part = = \n More . \n", " = Two = \n Second . \n"]
    assert read(f"wikitext2={write(tmp_path / 'wiki.train.tokens', text)}") == expected
    rows = ["", " = One = \n", "", " First . \n", " = = Part = = \n", " More . \n", ""]
    assert list(articles([*rows, " = Two = \n", " Second . \n"])) == expected  # the hub's rows


def test_wikitext_paragraphs_take_their_titles_with_them():
    rows = ["", " = One = \n", "", " First . \n", " Second . ", " = = Part = = \n",
            " = = = A = = = \n", " Third . \n", " = Two = \n"]  # fmt: skip
    assert list(paragraphs(rows)) == [
        " = One = \n First . \n", " Second . \n", " = = Part = = \n = = = A = = = \n Third . \n",
        " = Two = \n",
    ]  # fmt: skip


def test_real_wikitext_in_short_documents_is_the_same_text(data_folder):
    short = read(f"wikitext2-paragraphs:validation={data_folder / 'wikitext-2'}")
    assert len(short) > 1800
    assert short[0].startswith(" = Homarus gammarus = \n Homarus gammarus ,")
    assert "".join(short) == "".join(read(f"wikitext2:validation={data_folder / 'wikitext-2'}"))


def test_real_wikitext_has_its_60_articles(data_folder):
    documents = read(f"wikitext2:validation={data_folder / 'wikitext-2'}")
    assert len(documents) == 60
    assert documents[0].startswith(" = Homarus gammarus = \n Homarus gammarus ,")
    assert len(read(f"wikitext103:test={data_folder / 'wikitext-103-valid-test'}")) > 55


def test_real_lambada(data_folder):
    folder = data_folder / "lambada"
    assert len(read(f"lambada:test={folder}")) == 5153
    assert len(read(f"lambada:test={folder / 'lambada_test.jsonl'}")) == 5153


# Sets that are cut


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_the_last_documents_are_held_out(tmp_path, kind):
    texts = [f"document {number}" for number in range(10)]
    for number, part in enumerate((texts[:4], texts[4:7], texts[7:])):
        name = f"train-0000{number}-of-00003.{kind}"
        if kind == "parquet":
            arrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(arrow.table({"text": part}), tmp_path / name)
        else:
            lines = part if kind == "txt" else [json.dumps({"text": text}) for text in part]
            write(tmp_path / name, "\n".join(lines) + "\n")
    for held_out in (1, 3, 5, 9):
        named = with_cut("openwebtext", LastDocuments(number=held_out), tmp_path)
        assert list(named.training().documents()) == texts[:-held_out]
        assert list(named.held_out().documents()) == texts[-held_out:]
    everything = with_cut("openwebtext", LastDocuments(number=10), tmp_path)
    with pytest.raises(UserError, match="has 10 documents of openwebtext, whose last 10 are held"):
        list(everything.training().documents())


def test_text8_is_cut_at_characters_or_by_name(tmp_path):
    text = "anarchism originated as a term of abuse first used"
    ranges = {"train": (0, 20), "validation": (20, 30), "test": (30, None)}
    file = write(tmp_path / "text8", text)
    for path in (file, tmp_path):
        named = with_cut("text8", CharacterRanges(ranges=ranges), path)
        found = ["".join(named.source(split).documents()) for split in ranges]
        assert found == [text[:20], text[20:30], text[30:]]
    file.unlink()
    for split in ranges:
        write(tmp_path / f"text8.{split}.txt", f"only {split}")
    assert read(f"text8:test={tmp_path}") == ["only test"]


def test_pieces_lose_nothing_and_end_at_spaces():
    text = "one two three  four five " * 20
    for length in (1, 7, 50, 10_000):
        cut = list(pieces(text, length))
        assert "".join(cut) == text
        assert all(length <= len(piece) < length + 6 and piece[-1] == " " for piece in cut[:-1])
    assert list(pieces("x" * 30, 10)) == ["x" * 30]


# Mistakes in folders


def test_a_folder_without_the_split_is_refused_before_any_work(tmp_path):
    write(tmp_path / "ptb.train.txt", "a\n")
    with pytest.raises(UserError, match="has no file of the split validation of ptb"):
        parse_named(f"ptb={tmp_path}").held_out()


def test_a_file_named_as_another_split_is_refused(tmp_path):
    file = write(tmp_path / "ptb.test.txt", "a\n")
    with pytest.raises(UserError, match=r"the split test.*give ptb:test="):
        parse_named(f"ptb={file}").training()


def test_several_formats_of_one_split_are_refused(tmp_path):
    write(tmp_path / "lambada_test.jsonl", '{"text": "a"}\n')
    write(tmp_path / "lambada_test_plain_text.txt", "a\n")
    with pytest.raises(UserError, match=r"several formats .*\(JSON lines, text\)"):
        parse_named(f"lambada:test={tmp_path}").training()


def test_an_empty_file_is_no_whole_one(tmp_path):
    file = write(tmp_path / "ptb.train.txt", "")
    with pytest.raises(UserError, match="is empty: get it again"):
        parse_named(f"ptb={file}").training()


def test_signatures_see_a_changed_file(tmp_path):
    file = write(tmp_path / "ptb.train.txt", "a\n")
    before = parse_named(f"ptb={file}").training().signature()
    assert before == json.loads(json.dumps(before))
    write(file, "ab\n")
    assert parse_named(f"ptb={file}").training().signature() != before
    assert parse_named("ptb").training().signature() == {
        "name": "ptb:train",
        "repository": "ptb-text-only/ptb_text_only",
    }
