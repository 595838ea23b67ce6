from __future__ import annotations

import ast
import tokenize
from pathlib import Path

from blockdiffusion.data import python_library
from blockdiffusion.data.python_library import library_modules, python_docs, python_source


def test_it_is_the_library_file_by_file():
    documents = python_source()
    assert 400 < len(documents) == len(set(documents))
    assert 5_000_000 < sum(len(text.encode()) for text in documents) < 20_000_000
    with tokenize.open(ast.__file__) as file:
        assert file.read() in documents
    assert not any("\r" in text for text in documents)
    names = [name for name, _ in library_modules()]
    assert len(names) == len(set(names))
    assert {"ast", "json", "json.decoder", "idlelib.run", "asyncio.tasks"} <= set(names)


def test_tests_tables_and_what_belongs_to_this_machine_are_left_out():
    names = [name.split(".") for name, _ in library_modules()]
    folders = {part for name in names for part in name}
    assert folders.isdisjoint({"test", "tests", "site-packages", "encodings", "pydoc_data"})
    assert not any(name[0].startswith(("_sysconfig", "config-")) for name in names)
    programs = {name[0] for name in names} & {"idlelib", "turtledemo"}
    assert programs.isdisjoint(n for n, _ in library_modules(frozenset(programs)))


def test_files_in_other_encodings_are_read_and_broken_ones_left_out(tmp_path, monkeypatch):
    (tmp_path / "package" / "test").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_bytes(b"one = 1\r\n")
    (tmp_path / "package" / "latin.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    (tmp_path / "package" / "broken.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "package" / "test" / "more.py").write_text("test = 1\n")
    (tmp_path / "copy.py").write_bytes(b"one = 1\n")
    (tmp_path / "_sysconfigdata_here.py").write_text("prefix = 1\n")
    monkeypatch.setattr(python_library.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(library_modules()) == [
        ("copy", "one = 1\n"),
        ("package", "one = 1\n"),
        ("package.latin", "# coding: latin-1\nname = 'é'\n"),
    ]
    python_source.cache_clear()
    try:
        assert python_source() == ("one = 1\n", "# coding: latin-1\nname = 'é'\n")
    finally:
        python_source.cache_clear()


def test_nothing_is_read_twice(monkeypatch):
    python_source()
    monkeypatch.setattr(Path, "rglob", lambda *_: 1 / 0)
    assert python_source()


def test_the_docs_are_a_large_english_text_in_clean_documents():
    documents = python_docs()
    text = "\n".join(documents)
    assert len(documents) > 300
    assert 1_500_000 < len(text.encode()) < 4_000_000
    assert len(set(documents)) == len(documents)
    assert all(document.strip() for document in documents)
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert text.count(" the ") > 10_000
    for known in (
        "json.dumps\nSerialize ``obj`` to a JSON formatted",
        'The "while" statement\n***',
    ):
        assert known in text


def test_the_docs_of_tests_and_installed_packages_are_left_out():
    heads = {document.partition("\n")[0].partition(".")[0] for document in python_docs()}
    assert {"json", "asyncio", "argparse"} <= heads
    assert heads.isdisjoint({"test", "idlelib", "lib2to3", "site-packages", "encodings"})
