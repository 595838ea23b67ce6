"""Fetching from the hub, with a hub of files in a folder in place of the real one."""

import types

import huggingface_hub
import pytest
from huggingface_hub.errors import RevisionNotFoundError

from blockdiffusion.data.hub import expected_rows, fetch_split, files_of_split
from blockdiffusion.data.named import parse_named
from blockdiffusion.data.registry import SETS, find_set
from blockdiffusion.errors import UserError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


class Hub:
    """Branches of one repository: name of a file -> its rows."""

    def __init__(self, folder, branches):
        self.folder, self.branches, self.fetched = folder, branches, []

    def dataset_info(self, repository, revision):
        if revision not in self.branches:
            raise RevisionNotFoundError("no such branch", response=types.SimpleNamespace(
                headers={}, request=None))  # fmt: skip
        siblings = [types.SimpleNamespace(rfilename=name) for name in self.branches[revision]]
        return types.SimpleNamespace(sha=f"commit of {revision}", siblings=siblings)

    def download(self, repository, name, repo_type, revision):
        assert repo_type == "dataset" and revision.startswith("commit of ")
        self.fetched.append((revision.removeprefix("commit of "), name))
        texts = self.branches[revision.removeprefix("commit of ")][name]
        path = self.folder / revision / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table({"text": texts, "sentence": texts}), path)
        return str(path)


@pytest.fixture(autouse=True)
def forgotten():
    """What one test fetched is not there for the next."""
    fetch_split.cache_clear()
    yield
    fetch_split.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(branches):
        fake = Hub(tmp_path, branches)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
        return fake

    return make


def rows(number):
    return [f"row {n}" for n in range(number)]


ROWS = rows(7600)  # as many as the test split of AG News has


def test_the_main_branch_comes_first(hub):
    fake = hub(
        {
            "main": {"README.md": [], "data/train-0.parquet": rows(3), "data/test-0.parquet": ROWS},
            "refs/convert/parquet": {"default/test/0000.parquet": rows(1)},
        }
    )
    documents = list(parse_named("ag_news:test").training().documents())
    assert documents == ROWS
    assert list(parse_named("ag_news:test").training().documents()) == ROWS
    assert fake.fetched == [("main", "data/test-0.parquet")]  # once in a process


def test_a_set_that_is_a_script_is_read_from_the_converted_branch(hub):
    fake = hub(
        {
            "main": {"ptb_text_only.py": []},
            "refs/convert/parquet": {
                "penn_treebank/train/0000.parquet": rows(1),
                "penn_treebank/validation/0000.parquet": rows(3000),
                "penn_treebank/validation/0001.parquet": rows(370),
            },
        }
    )
    assert len(list(parse_named("ptb:validation").training().documents())) == 3370
    assert [name[-12:] for _, name in fake.fetched] == ["0000.parquet", "0001.parquet"]


def test_a_part_of_a_set_is_never_taken_for_it(hub):
    """The hub converts only the first gigabytes of a large set."""
    name = "arxiv/partial/validation/0000.parquet"
    hub({"main": {}, "refs/convert/parquet": {name: rows(6000)}})
    with pytest.raises(UserError, match=r"has 6,000 rows, but validation of .* has 6,436"):
        fetch_split(find_set("scientific_papers_arxiv"), "validation")


def test_without_the_split_or_the_branch_local_files_are_asked_for(hub):
    hub({"main": {"penn_treebank/train/0000.parquet": rows(2)}})
    with pytest.raises(UserError, match=r"no parquet files of the split test .*name local files"):
        fetch_split(find_set("ptb"), "test")


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    """The real library, told that there is no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"ptb cannot be fetched .*offline.*ptb=PATH") as error:
        list(parse_named("ptb").training().documents())
    assert "\n" not in str(error.value) and ". " not in str(error.value)


def test_a_download_that_breaks_off_is_one_sentence_and_resumes(hub, monkeypatch):
    fake = hub({"main": {f"data/test-{n}.parquet": rows(3800) for n in (0, 1)}})
    whole = fake.download

    def broken(repository, name, repo_type, revision):
        if name.endswith("1.parquet"):
            raise ConnectionError("connection reset by peer\nmore")
        return whole(repository, name, repo_type, revision)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(UserError, match=r"\(connection reset by peer\): try again"):
        fetch_split(find_set("ag_news"), "test")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", whole)
    assert len(fetch_split(find_set("ag_news"), "test")) == 2


def cached(folder, monkeypatch, counts):
    """The hub's cache with so many rows in files of AG News, and no network."""
    snapshot = folder / "datasets--fancyzhx--ag_news" / "snapshots" / ("a" * 40)
    (snapshot / "data").mkdir(parents=True)
    for number, count in enumerate(counts):
        file = snapshot / "data" / f"test-{number}.parquet"
        parquet.write_table(arrow.table({"text": rows(count)}), file)
    real = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: real(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_what_was_fetched_before_is_used_without_a_network_if_it_is_whole(tmp_path, monkeypatch):
    cached(tmp_path, monkeypatch, (4000, 3600))
    assert len(fetch_split(find_set("ag_news"), "test")) == 2


def test_half_of_what_was_to_be_fetched_is_not_taken_for_whole(tmp_path, monkeypatch):
    cached(tmp_path, monkeypatch, (4000,))
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch_split(find_set("ag_news"), "test")


def test_files_without_a_split_in_their_names_are_the_training_split():
    fineweb = find_set("fineweb-edu")
    names = ["sample/10BT/000_00000.parquet", "sample/100BT/000_00000.parquet", "data/x.parquet"]
    assert files_of_split(names, fineweb, "train") == names[:1]
    converted = ["sample-10BT/train/0000.parquet", "sample-100BT/train/0000.parquet"]
    assert files_of_split(converted, fineweb, "train") == converted[:1]
    owt = find_set("openwebtext")
    body = [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert files_of_split(body[::-1], owt, "validation") == body


def test_rows_of_a_set_that_is_cut_are_those_of_all_of_it():
    assert expected_rows(find_set("openwebtext"), "validation") == 8_013_769
    assert expected_rows(find_set("fineweb-edu"), "train") is None
    assert all(expected_rows(s, "train") for s in SETS if "train" in s.splits and s.held_out)
