from __future__ import annotations

import gzip
import io
import json
import sys
import types
from itertools import islice
from pathlib import Path

import pytest

from blockdiffusion.data import reading, sources
from blockdiffusion.data.sources import open_sources
from blockdiffusion.errors import UserError
from tests.data.corpora import sentences


def read(
    *names: object, field: str = "text", documents: str = "auto", document_bytes: int = 65536,
    left_out: list[str] | None = None,
) -> list[str]:  # fmt: skip
    opened = open_sources(
        [str(name) for name in names],
        field=field,
        documents=documents,
        document_bytes=document_bytes,
        left_out=left_out,
    )
    return [text for source in opened for text in source.documents()]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Cutting text files


def test_a_small_file_is_one_document_and_keeps_its_text(tmp_path):
    text = "  Two lines,\r\nand an ünusual one.\n\n\n"
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())
    assert read(file) == [text]
    assert read(file, documents="file") == [text]


@pytest.mark.parametrize("document_bytes", [16, 100, 1000, 4096])
def test_auto_cuts_a_large_file_at_blank_lines_and_loses_nothing(tmp_path, document_bytes):
    text = sentences(20_000)
    pieces = read(write(tmp_path / "a.txt", text), document_bytes=document_bytes)
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(document_bytes <= len(p.encode()) <= 2 * document_bytes for p in pieces[:-1])
    if document_bytes >= 1000:  # paragraphs are shorter than that
        assert all(piece.endswith("\n\n") for piece in pieces[:-1])


@pytest.mark.parametrize(("unit", "end"), [("word wörd\n", "\n"), ("wörd ", " "), ("東", "東")])
def test_auto_falls_back_to_line_ends_then_spaces_then_characters(tmp_path, unit, end):
    text = unit * 500
    pieces = read(write(tmp_path / "a.txt", text), document_bytes=64)
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.endswith(end) for piece in pieces)


def test_auto_reads_no_more_than_two_documents_at_a_time(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt", sentences(100_000))
    asked: list[int] = []

    class Spy(io.FileIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr(reading, "open_regular", Spy)
    pieces = read(file, document_bytes=1024)
    assert len(pieces) > 50
    assert len(asked) >= len(pieces)
    assert 0 <= min(asked) <= max(asked) <= 2048


def test_lines_and_paragraphs(tmp_path):
    file = write(tmp_path / "a.txt", "\none\ntwo\n \t\n\n  three\r\nfour\n")
    assert read(file, documents="line") == ["one", "two", "  three", "four"]
    assert read(file, documents="blank-line") == ["one\ntwo", "  three\r\nfour"]


@pytest.mark.parametrize("documents", ["file", "line", "blank-line"])
def test_a_document_that_would_not_fit_in_memory_is_refused(tmp_path, monkeypatch, documents):
    for module in (reading, sources):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    file = write(tmp_path / "a.txt", "x" * 101)
    with pytest.raises(UserError, match="is one document of more than"):
        read(file, documents=documents)
    assert "".join(read(file, document_bytes=16)) == "x" * 101


# Names and folders


def test_a_folder_is_read_recursively_by_name_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / "c.md", "third")
    write(tmp_path / "b" / "x.jsonl", json.dumps({"text": "second"}))
    write(tmp_path / "a.tokens", "first")
    write(tmp_path / "empty.txt", "")
    assert read(tmp_path) == ["first", "second", "third"]


def test_csv_is_read_by_its_column_alone_packed_and_in_a_folder(tmp_path):
    rows = 'id,text\n1,"one, ""two"""\n\n2,"three\nfour"\n'
    file = write(tmp_path / "a.csv", rows)
    write(tmp_path / "b.csv.gz", gzip.compress(b"text\nfive\n"))
    write(tmp_path / "c.txt", "text\nsix\n")
    assert read(file) == ['one, "two"', "three\nfour"]
    assert read(file, field="id") == ["1", "2"]
    assert read(tmp_path) == ['one, "two"', "three\nfour", "five", "text\nsix\n"]
    with pytest.raises(UserError, match=r"row 1 of .*a\.csv has no string 'body' .*id.*text"):
        read(tmp_path, field="body")


def test_a_file_comes_before_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_sources(["python-docs"], field="text", documents="auto", document_bytes=64) == [
        sources.BuiltIn("python-docs")
    ]
    write(tmp_path / "python-docs", "mine")
    assert read("python-docs") == ["mine"]


@pytest.mark.parametrize("name", ["missing.txt", "data/missing.txt", "./a/b", "/a/b", "wikitext"])
def test_a_missing_path_is_named_and_never_looked_up(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no file or folder '{name}'"):
        read(name)


def test_empty_files_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        read(write(tmp_path / "a.txt", ""))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="holds no text"):
        read(tmp_path / "folder")


# Bytes that are no text


@pytest.mark.parametrize("documents", ["auto", "file", "line", "blank-line"])
def test_binary_and_wrong_encodings_are_named_with_their_offset(tmp_path, documents):
    text = sentences(3000).encode()
    for bad, sentence in ((b"\0", "not a text file"), (b"\xe9t\xe9", "not UTF-8")):
        file = write(tmp_path / "bad.txt", text + bad + text)
        with pytest.raises(UserError, match=sentence) as error:
            read(file, documents=documents, document_bytes=200)
        assert f"byte offset {len(text)}" in str(error.value)
        assert str(file) in str(error.value)


# JSON lines, parquet, Hugging Face


def test_jsonl_reads_a_field_and_skips_blank_lines(tmp_path):
    file = write(tmp_path / "a.jsonl", '\ufeff{"body": "one\\n", "x": 1}\n\n{"body": "zwö"}\n')
    assert read(file, field="body") == ["one\n", "zwö"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{'text': 1}", "line 2 of .* is not JSON"),
        ("[1, 2]", "line 2 of .* is not a JSON object"),
        ('{"body": "x"}', "line 2 of .* has no string 'text' .*'body'"),
        ('{"text": null}', "line 2 of .* has no string 'text': null stands there"),
        ('{"text": ["a"]}', "line 2 of .* has no string 'text': a list stands there"),
        ('{"text": {}}', "an object stands there"),
        ('{"text": 5}', "a number stands there"),
        ('{"text": NaN}', "a number stands there"),
        ('{"text": true}', "a truth value stands there"),
        ('{"text": "a", "text": "b"}', "line 2 of .* is not JSON .'text' is given twice"),
        ('{"text": ' + "9" * 5000 + "}", "line 2 of .* is not JSON"),
        ('{"' + "x" * 10**6 + '": 1}', r"line 2 of .* has no string 'text' .*xxx\.\.\.xxx.*'\)"),
        ('{"text": "\\ud800"}', "line 2 of .* surrogate"),
        ("[" * 100_000, "line 2 of .* is not JSON"),
    ],
)
def test_jsonl_mistakes_name_their_line(tmp_path, line, sentence):
    file = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=sentence) as error:
        read(file)
    assert len(str(error.value)) < 600


def test_a_field_may_lie_in_another_and_its_literal_name_comes_first(tmp_path):
    rows = [{"a": {"b": {"c": "deep"}}}, {"a.b.c": "literal", "a": {"b": {"c": "deep"}}}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read(file, field="a.b.c") == ["deep", "literal"]
    for field, there in (
        ("a.b.x", r" \(its fields: 'a\.b\.c'\)"), ("a.x.c", r" \(its fields: 'a\.b'\)"),
        ("a.b.c.d", r": a string stands at 'a\.b\.c'"), (".", r" \(its fields: 'a'\)"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"line 1 of .* has no string '{field}'{there}"):
            read(file, field=field)
    with pytest.raises(UserError, match=r"has no string 'a\.b': an object stands there"):
        read(file, field="a.b")
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    meta = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]
    parquet.write_table(arrow.table({"meta": meta}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="meta.text") == ["one", "two"]
    table = arrow.table({"meta": meta, "meta.text": ["three", "four"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", field="meta.text") == ["three", "four"]
    for field, sentence in (("meta.n", "row 1 of .*: a number"), ("meta.x", "has no string")):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path / "a.parquet", field=field)


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '\ufeff[\n{"text": "a"}\n]',
                                     "\n \n[]", "[" * 100_000])  # fmt: skip
def test_a_json_array_is_told_by_its_name(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.json is one JSON array: write one object per line"):
        read(write(tmp_path / "a.json", content))
    opened = open_sources(
        [str(tmp_path / "a.json")], field="text", documents="auto", document_bytes=64
    )
    with pytest.raises(UserError, match="is one JSON array"):  # no document that may be left out
        list(opened[0].documents(lambda error: None))


def test_a_json_object_of_several_lines_is_told_how_to_mend(tmp_path):
    file = write(tmp_path / "a.json", json.dumps({"text": "a"}, indent=2))
    with pytest.raises(UserError, match=r"line 1 of .* one whole JSON object, as jq -c \. writes"):
        read(file)


def test_a_line_of_a_json_file_may_not_be_longer_than_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 2**16)
    file = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n{"text": "' + b"x" * 2**20)
    with pytest.raises(UserError, match=r"line 2 of .* is one document of more than"):
        read(file)


def test_documents_that_cannot_be_read_are_left_out_where_that_is_asked_for(tmp_path):
    rows = [b'{"text": "a"}', b'{"text": null}', b"no json", b'{"x": 1}', b'{"text": "\xff"}',
            b'{"text": "b"}']  # fmt: skip
    write(tmp_path / "a.jsonl", b"\n".join(rows))
    write(tmp_path / "b.txt", b"fine\nn\xe9\nfine\n")
    errors: list[str] = []
    opened = open_sources([str(tmp_path)], field="text", documents="line", document_bytes=64)
    texts = [t for source in opened for t in source.documents(lambda e: errors.append(str(e)))]
    assert texts == ["a", "b", "fine", "fine"]
    assert [error.split(" of ")[0] for error in errors[:3]] == ["line 2", "line 3", "line 4"]
    assert "a.jsonl is not UTF-8" in errors[3] and "b.txt is not UTF-8" in errors[4]


def test_parquet_values_that_are_no_text(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    offsets = arrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 6)))
    bad = arrow.Array.from_buffers(
        arrow.string(), 3, [None, offsets, arrow.py_buffer(b"ok\xff!ok")]
    )
    columns = {"text": bad, "n": ["a", None, "c"], "list": [["a"], [], []], "bytes": [b"a"] * 3}
    columns["date"] = arrow.array([1, 2, 3], arrow.timestamp("ns"))  # finer than Python's
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.table(columns), file)
    for field, sentence in (
        ("text", r"row 2 of .* is not UTF-8 text \(at byte 0 of 'text'\)"),
        ("n", "row 2 of .* has no string 'n': null stands there"),
        ("list", "row 1 of .*: a list stands there"),
        ("bytes", "row 1 of .*: a string of bytes stands there"),
        ("date", "row 1 of .*: a value of type .* stands there"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(file, field=field)
    errors: list[UserError] = []
    opened = open_sources([str(file)], field="text", documents="auto", document_bytes=64)
    assert list(opened[0].documents(errors.append)) == ["ok", "ok"] and len(errors) == 1


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {number}" for number in range(1000)]
    parquet.write_table(arrow.table({"text": texts, "n": range(1000)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == texts
    with pytest.raises(UserError, match=r"no string 'body' .*'text', 'n'"):
        read(tmp_path / "a.parquet", field="body")
    with pytest.raises(UserError, match=r"row 1 of .* has no string 'n'"):
        read(tmp_path / "a.parquet", field="n")
    whole = (tmp_path / "a.parquet").read_bytes()
    file = write(tmp_path / "cut.parquet", whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(file)


def test_parquet_rows_are_read_a_few_at_a_time(tmp_path):
    """A file of some 5 kB: 1,000 rows of one text of 4 MiB, which all rows share."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    shared = arrow.DictionaryArray.from_arrays([0] * 1000, ["a" * 2**22])
    parquet.write_table(arrow.table({"text": shared}), tmp_path / "a.parquet", compression="gzip")
    before = arrow.default_memory_pool().max_memory()
    [source] = open_sources(
        [str(tmp_path / "a.parquet")], field="text", documents="auto", document_bytes=64
    )
    assert sum(len(text) for text in islice(source.documents(), 20)) == 20 * 2**22
    assert arrow.default_memory_pool().max_memory() < max(before, 2**28)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"blockdiffusion\[data\]"):
        read(write(tmp_path / "a.parquet", "x"))


def fake_datasets(monkeypatch, load_dataset) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub_names_have_a_configuration_and_a_split(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options))
        return [{"text": "one"}, {"text": "two"}]

    fake_datasets(monkeypatch, load_dataset)
    assert read("owner/set", "owner/set:small:validation") == ["one", "two"] * 2
    assert calls == [
        ("owner/set", None, {"split": "train", "streaming": True}),
        ("owner/set", "small", {"split": "validation", "streaming": True}),
    ]


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (RuntimeError("Dataset scripts are no longer supported"), "refs/convert/parquet"),
        (ConnectionError("cannot reach the hub"), "cannot reach the hub.*the network"),
    ],
)
def test_hub_failures_are_told_in_a_sentence(monkeypatch, failure, sentence):
    def load_dataset(*_, **__):
        raise failure

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=sentence):
        read("owner/set")


def test_a_hub_stream_that_breaks_off_is_told_in_a_sentence(monkeypatch):
    def load_dataset(*_, **__):
        yield {"text": "one"}
        raise TimeoutError("no answer")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError, match="no answer"):
        read("owner/set")


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"no file 'owner/set'.*blockdiffusion\[data\]"):
        read("owner/set")
