from __future__ import annotations

from blockdiffusion.data.python_docs import python_docs


def test_it_is_a_large_english_text_in_clean_documents():
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


def test_tests_and_installed_packages_are_left_out():
    heads = {document.partition("\n")[0].partition(".")[0] for document in python_docs()}
    assert {"json", "asyncio", "argparse"} <= heads
    assert heads.isdisjoint({"test", "idlelib", "lib2to3", "site-packages", "encodings"})
