from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from blockdiffusion.data import corpus, packing, parts
from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.data.packing import Manifest, PrepareOptions, prepare
from blockdiffusion.data.shards import PACKERS
from blockdiffusion.data.tokenizers import load_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.files.checksums import NOTES
from tests.data.corpora import contents, sentences


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(sentences(200_000), encoding="utf-8")
    return path


def options(**changes) -> PrepareOptions:
    base = {"seq_len": 32, "tokenizer": "byte", "num_workers": 1, "document_bytes": 1000}
    return PrepareOptions(**base | changes)


def run(source, out, progress=None, **changes) -> Manifest:
    return prepare([str(source)], out, options(**changes), progress)


def stream(out: Path, split: str) -> list[int]:
    rows = TokenRows(out, split)
    return rows.rows(np.arange(rows.num_rows)).ids_BL.flatten().tolist()


# What is made


def test_wrap_keeps_the_text_and_counts_it(source, tmp_path):
    manifest = run(source, tmp_path / "out", valid_fraction=0, document_eos=False)
    text = source.read_bytes()
    ids = stream(tmp_path / "out", "train")
    assert bytes(ids) == text[: len(text) // 32 * 32]
    split = manifest.splits["train"]
    assert list(manifest.splits) == ["train"]
    assert split.tokens == split.bytes == len(ids) == split.rows * 32
    assert split.dropped_tokens == len(text) % 32 > 0
    assert split.documents == manifest.sources[0]["documents"] > 100
    assert Manifest.load(tmp_path / "out") == manifest
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {NOTES} == {"SHA256SUMS", "manifest.json", "tokenizer", "train-00000.bin"}


def test_document_packing_keeps_everything(source, tmp_path):
    manifest = run(source, tmp_path / "out", packing="document", row_bos=True, valid_fraction=0)
    split = manifest.splits["train"]
    rows = TokenRows(tmp_path / "out", "train")
    batch = rows.rows(np.arange(rows.num_rows))
    assert (batch.ids_BL[:, 0] == 256).all()
    kept = batch.ids_BL[:, 1:][batch.valid_BL[:, 1:]].tolist()
    assert bytes(token for token in kept if token < 256) == source.read_bytes()
    assert kept.count(256) == split.documents
    assert split.bytes == len(source.read_bytes())
    assert split.tokens == split.bytes + split.documents + split.rows
    assert split.dropped_tokens == 0
    assert manifest.row_bos


def test_the_split_is_by_document_at_random_and_of_the_size_asked_for(tmp_path):
    lines = [f"<{number}>" for number in range(1000)]
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(lines))
    held_out = []
    for seed in (0, 1):
        out = tmp_path / f"out{seed}"
        manifest = run(file, out, documents="line", packing="document", seed=seed)
        text = {}
        for split in ("train", "valid"):
            ids = [token for token in stream(out, split) if token < 256]
            text[split] = bytes(ids).replace(b"><", b">\n<").decode().split("\n")
        assert sorted(text["train"] + text["valid"]) == sorted(lines)
        assert manifest.splits["valid"].documents == len(text["valid"]) == 50
        places = [int(line[1:-1]) % 20 for line in text["valid"]]
        assert len(set(places)) > 8  # not every 20th
        held_out.append(text["valid"])
    assert held_out[0] != held_out[1]


@pytest.mark.parametrize("count", [2, 3, 11])
def test_a_small_corpus_gives_exactly_one_validation_document(tmp_path, count):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join("x" * 40 for _ in range(count)))
    manifest = run(file, tmp_path / "out", documents="line")
    assert manifest.splits["valid"].documents == 1
    assert manifest.splits["train"].documents == count - 1


def test_validation_sources_of_their_own(source, tmp_path):
    other = tmp_path / "valid.jsonl"
    other.write_text(json.dumps({"text": "v" * 100}) + "\n")
    manifest = run(source, tmp_path / "out", valid=(str(other),), document_eos=False)
    assert bytes(stream(tmp_path / "out", "valid")) == b"v" * 96
    assert b"v" * 90 not in bytes(stream(tmp_path / "out", "train"))
    assert manifest.splits["valid"].documents == manifest.sources[1]["documents"] == 1
    assert [s["valid_only"] for s in manifest.sources] == [False, True]
    assert manifest.splits["train"].documents == manifest.sources[0]["documents"]


def test_a_bpe_learns_from_the_training_split_only(tmp_path):
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    train.write_text("banana bandana " * 500)
    valid.write_text("zyxzyx " * 500)
    run(train, tmp_path / "out", tokenizer="bpe:265", valid=(str(valid),))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    words = set(tokenizer.get_vocab())
    assert "banana" in words
    assert not any("zy" in word for word in words)
    assert TokenRows(tmp_path / "out", "train").manifest.vocab_size == 266


def test_a_bpe_reads_a_bounded_part_of_the_text(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BPE_TEXT_BYTES", 5000)
    seen = []
    run(
        source,
        tmp_path / "out",
        lambda stage, done, total: seen.append((stage, done, total)),
        tokenizer="bpe:300",
    )
    learnt = [done for stage, done, _ in seen if stage == "tokenizer"]
    assert 5000 <= learnt[-1] < 7000
    size = source.stat().st_size
    assert [s for s in seen if s[0] == "tokenize"][-1] == ("tokenize", size, size)
    assert seen[-1] == ("pack", size, size)


def test_special_names_in_a_text_stay_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("<|mask|> and <|endoftext|> " * 20)
    run(file, tmp_path / "out", valid_fraction=0)
    ids = stream(tmp_path / "out", "train")
    assert 257 not in ids and 256 not in ids


def test_text_that_becomes_the_mask_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<mask>": 0, "a": 1, "[U]": 2}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<mask>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "a.txt"
    file.write_text("a a <mask> a " * 10)
    with pytest.raises(UserError, match="contains the tokenizer's mask"):
        run(
            file,
            tmp_path / "out",
            tokenizer=str(tmp_path / "tokenizer.json"),
            valid_fraction=0,
            document_eos=False,
        )


# The same whatever happens


@pytest.mark.parametrize("changes", [{}, {"packing": "document", "tokenizer": "bpe:300"}])
def test_the_number_of_workers_and_the_size_of_units_change_nothing(
    source, tmp_path, monkeypatch, changes
):
    run(source, tmp_path / "one", **changes)
    for workers, unit in ((1, 7000), (2, 30_000)):
        monkeypatch.setattr(packing, "UNIT_BYTES", unit)
        out = tmp_path / f"{workers}-{unit}"
        run(source, out, num_workers=workers, **changes)
        assert contents(out) == contents(tmp_path / "one")


def killed_prepare(source: Path, out: Path, workers: int, stage: str, call: int) -> int:
    asked = {"seq_len": 32, "tokenizer": "bpe:300", "num_workers": workers, "document_bytes": 1000}
    script = Path(__file__).with_name("killed_prepare.py")
    arguments = [str(source), str(out), json.dumps(asked), stage, str(call)]
    return subprocess.run([sys.executable, str(script), *arguments], check=False).returncode


def check_killed(source: Path, tmp_path: Path, workers: int, moments: list[tuple[str, int]]):
    run(source, tmp_path / "whole", tokenizer="bpe:300")
    out = tmp_path / "out"
    for stage, call in moments:
        assert killed_prepare(source, out, workers, stage, call) == -signal.SIGKILL
        with pytest.raises(UserError, match="holds no prepared data"):
            TokenRows(out, "train")
        pids = json.loads(Path(f"{out}.pids").read_text())
        assert workers == 1 or stage != "tokenize" or pids
        limit = time.monotonic() + 120
        while any(is_running(pid) for pid in pids) and time.monotonic() < limit:
            time.sleep(0.05)
        assert not any(is_running(pid) for pid in pids), "a worker outlived its parent"
    assert killed_prepare(source, out, workers, "never", 1) == 0
    assert contents(out) == contents(tmp_path / "whole")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie has ended; who inherited it has not asked yet


def test_killed_half_way_and_run_again_it_gives_the_same_bytes(source, tmp_path):
    check_killed(source, tmp_path, workers=2, moments=[("tokenize", 4)])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_many_moments_it_gives_the_same_bytes(source, tmp_path, workers):
    moments = [("tokenizer", 20), ("tokenize", 1), ("tokenize", 6), ("pack", 1), ("pack", 7)]
    check_killed(source, tmp_path, workers, moments)


def test_what_was_tokenised_is_not_tokenised_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "UNIT_BYTES", 20_000)
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage == "pack":
            raise Stop

    with pytest.raises(Stop):
        run(source, out, stop)
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.part")}
    assert len(before) > 5
    written = []
    real = parts.write_part
    monkeypatch.setattr(parts, "write_part", lambda job: (written.append(job), real(job)))
    # Options that are about rows only use the same parts.
    run(source, out, seq_len=64)
    assert written == []
    run(source, tmp_path / "whole", seq_len=64)
    assert len(written) == len(before)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_directory_is_left_as_it_is(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = run(source, out)
    before = contents(out)
    (out / "parts").mkdir()  # killed between the manifest and the tidying up
    monkeypatch.setattr(packing, "run_jobs", lambda *_: pytest.fail("worked again"))
    assert run(source, out, num_workers=2) == first
    assert contents(out) == before
    assert not (out / "parts").exists()


def test_other_options_or_sources_are_refused(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    before = contents(out)
    with pytest.raises(UserError, match=r"prepared with seq_len=32, not 64; seed=0, not 1: name"):
        run(source, out, seq_len=64, seed=1)
    with pytest.raises(UserError, match="prepared from other sources"):
        prepare([str(source), "python-docs"], out, options())
    os.utime(source, (1, 1))
    with pytest.raises(UserError, match=r"text\.txt has changed since"):
        run(source, out)
    assert contents(out) == before


def test_a_bad_file_can_be_mended_without_losing_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "UNIT_BYTES", 20_000)
    bad = tmp_path / "z.txt"
    bad.write_bytes(b"text \xff text")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"z\.txt is not UTF-8 .*byte offset 5"):
        prepare([str(source), str(bad)], out, options())
    done = len(list((out / "parts").glob("*.part")))
    assert done > 5
    bad.write_text("text text")
    written = []
    real = parts.write_part
    monkeypatch.setattr(parts, "write_part", lambda job: (written.append(job), real(job)))
    prepare([str(source), str(bad)], out, options())
    assert len(written) == 1
    assert TokenRows(out, "train").num_rows > 1000


# Mistakes


def test_other_files_in_the_directory_are_left_alone(source, tmp_path):
    with pytest.raises(UserError, match=r"holds other files \(text\.txt\)"):
        run(source, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(source, source)
    assert list(tmp_path.iterdir()) == [source]


def test_a_second_process_in_the_same_directory_is_refused(source, tmp_path):
    out = tmp_path / "out"

    def again(stage, done, total):
        with pytest.raises(UserError, match="another process is preparing"):
            run(source, out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, again)
    assert run(source, out).splits["train"].rows > 0


@pytest.mark.parametrize(
    ("text", "changes", "sentence"),
    [
        ("short", {"valid_fraction": 0}, "training text has 6 tokens, fewer than the 32"),
        ("one document only " * 9, {}, "one document, which cannot be split .*--valid-fraction 0"),
        ("x" * 90 + "\nv" * 2, {"documents": "line"}, "validation text has 2 tokens"),
        (" \n\n \n", {}, "training text has 0 tokens"),
    ],
)
def test_too_little_text(tmp_path, text, changes, sentence):
    file = tmp_path / "a.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        run(file, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "wrapp"}, "packing is 'wrapp': it must be one of wrap, document"),
        ({"documents": "page"}, "documents is 'page'"),
        ({"detokenize": "pbt"}, "detokenize is 'pbt'"),
        ({"seq_len": 2, "row_bos": True, "row_eos": True}, "must be at least 3"),
        ({"valid_fraction": 0.9}, r"valid_fraction is 0\.9; it must be in \[0, 0\.5\]"),
        ({"document_bytes": 1}, "document_bytes is 1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"skip_invalid": -1}, "skip_invalid is -1"),
        ({"tokenizer": "bpe:many"}, "bpe:SIZE"),
    ],
)
def test_options_that_cannot_be(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        options(**changes)


def test_the_words_of_options_are_what_there_is():
    words = {name: get_args(hint) for name, hint in get_type_hints(PrepareOptions).items()}
    assert words["packing"] == tuple(PACKERS) and words["detokenize"] == tuple(DETOKENIZERS)


def test_no_source_at_all(tmp_path):
    with pytest.raises(UserError, match="no source"):
        prepare([], tmp_path / "out", options())


def test_a_tokenizer_without_the_token_an_option_needs(source, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    for option in ("document_eos", "row_bos", "row_eos"):
        flags = {"document_eos": False} | {option: True}
        with pytest.raises(UserError, match=f"{option} needs a tokenizer with a"):
            run(source, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"), **flags)


def test_documents_that_cannot_be_read_are_counted(tmp_path):
    rows = ['{"text": "a fine document"}', '{"text": null}', "{", '{"text": "another one"}'] * 5
    file, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text("\n".join(rows))
    bad.write_text('{"text": 1}\n{"text": "a document to validate with, of one row"}\n')
    changes = dict(valid=(str(bad),), tokenizer="bpe:258")
    with pytest.raises(UserError, match=r"line 2 of .*null.*, or leave .* \(--skip-invalid N\)$"):
        run(file, tmp_path / "out", **changes)
    with pytest.raises(UserError, match=r"line 1 of .*b\.jsonl .*which has left out 10 already$"):
        run(file, tmp_path / "out", skip_invalid=10, **changes)
    manifest = run(file, tmp_path / "out", skip_invalid=11, **changes)
    assert [source["documents"] for source in manifest.sources] == [10, 1]
    assert [source["skipped"] for source in manifest.sources] == [10, 1]
    assert run(file, tmp_path / "out", skip_invalid=11, **changes) == manifest
    with pytest.raises(UserError, match="prepared with skip_invalid=11, not 0"):
        run(file, tmp_path / "out", **changes)


def test_a_directory_of_before_an_option_was_there_is_still_the_same(source, tmp_path):
    manifest = run(source, tmp_path / "out")
    saved = dataclasses.asdict(manifest)
    del saved["options"]["skip_invalid"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(saved))
    assert run(source, tmp_path / "out").splits == manifest.splits
    with pytest.raises(UserError, match="prepared with skip_invalid=0, not 1"):
        run(source, tmp_path / "out", skip_invalid=1)


def test_what_was_read_is_told(source, tmp_path):
    for number in range(5):
        (tmp_path / f"ptb.train-{number}.txt").write_text("A line of the data set.\n" * 9)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    for sources, expected in (
        ([str(source)], [f"read 1 source: {source}"]),
        ([f"ptb:train={tmp_path}/ptb.train-1.txt"], [f"read 1 source: {tmp_path}/ptb.train-1.txt"]),
        ([str(tmp_path)], [
            "read 6 sources: " + ", ".join(f"{tmp_path}/ptb.train-{n}.txt" for n in range(3))
            + " and 3 more",
            f"left out 1: {tmp_path}/gone.txt (a link that leads nowhere)",
        ]),
    ):  # fmt: skip
        told: list[str] = []
        with tempfile.TemporaryDirectory() as out:
            prepare(sources, out, options(valid_fraction=0), tell=told.append)
        assert told == expected


def test_short_documents_in_long_rows_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHARD_TOKENS", 2**14)
    sizes, real = [], packing.PACKERS["document"].add

    def add(packer, *documents):
        rows, row_lengths = real(packer, *documents)
        sizes.append(rows.size)
        return rows, row_lengths

    monkeypatch.setattr(packing.PACKERS["document"], "add", add)
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{number:05}" for number in range(99)))
    run(file, tmp_path / "out", documents="line", packing="document", seq_len=4096)
    assert max(sizes) <= 2**14
    ids = [token for split in ("train", "valid") for token in stream(tmp_path / "out", split)]
    documents = bytes(token for token in ids if token < 256)
    assert len(documents) == 5 * 99 and documents.startswith(b"00000")


# The disk


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("limit", [1000, 20_000, 45_000, 200_000])
def test_a_full_disk_loses_nothing(source, tmp_path, monkeypatch, limit, workers):
    """No file may grow beyond `limit`: the tokenizer, a part and a shard fail in turn."""
    monkeypatch.setattr(packing, "UNIT_BYTES", 20_000)
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"no room left to write .* run the same command again"):
            run(source, out, num_workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in out.rglob("*.partial") if path.is_file()]
    assert run(source, out).splits["train"].rows > 0


def test_a_disk_that_fills_up_while_packing(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(packing.ShardWriter, "finish", full)
        with pytest.raises(UserError, match="no room left"):
            run(source, out)
    assert list((out / "parts").glob("*.part"))
    run(source, out)
    run(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_directory_that_may_not_be_written(source, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere/out")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match="somewhere/out: Permission denied"):
        run(source, tmp_path / "out")


# The real corpora


def test_python_docs_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "blockdiffusion.data.python_library._module_documents", lambda: iter(["module\n" * 30])
    )
    from blockdiffusion.data.python_library import python_docs

    python_docs.cache_clear()
    manifest = prepare(["python-docs"], tmp_path / "out", options())
    python_docs.cache_clear()
    assert manifest.sources[0]["python"] == sys.version.split()[0].rstrip("+")
    assert manifest.splits["train"].bytes > 300_000


def test_wikitext2_valid(data_folder, tmp_path):
    file = data_folder / "wikitext-2" / "wiki.valid.tokens"
    manifest = run(
        file,
        tmp_path / "out",
        seq_len=128,
        tokenizer=str(data_folder / "tokenizers" / "gpt2"),
        detokenize="wikitext",
        document_bytes=65536,
        valid_fraction=0.1,
    )
    rows = TokenRows(tmp_path / "out", "train")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    text = tokenizer.decode(rows.rows(np.arange(1)).ids_BL[0].tolist())
    assert text.startswith(
        "\n= Homarus gammarus =\n\nHomarus gammarus, known as the European lobster"
    )
    assert manifest.vocab_size == 50258
    split = manifest.splits["train"]
    assert 4.0 < split.bytes / split.tokens < 4.8


def test_the_options_of_the_manifest_are_all_but_the_number_of_workers(source, tmp_path):
    manifest = run(source, tmp_path / "out")
    names = {field.name for field in dataclasses.fields(PrepareOptions)} - {"num_workers"}
    assert set(manifest.options) == names
    assert corpus.Corpus([str(source)], options()).signatures() == [
        {key: value for key, value in manifest.sources[0].items() if key != "documents"}
    ]


def test_a_worker_that_is_killed_is_told_in_a_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "UNIT_BYTES", 20_000)
    real = parts.Worker.write_part

    def kill_first(worker, job):
        worker.process.kill()
        worker.process.wait()
        real(worker, job)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(parts.Worker, "write_part", kill_first)
        with pytest.raises(UserError, match=r"a worker process ended by itself .*resumes"):
            run(source, out, num_workers=2)
    assert run(source, out, num_workers=2).splits["train"].rows > 0


def test_workers_that_cannot_be_started_are_told_in_a_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(packing, "_num_cores", lambda: 1)
    real, started = subprocess.Popen, []

    def popen(*arguments, **options):
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(real(*arguments, **options))
        return started[-1]

    with monkeypatch.context() as patch:
        patch.setattr(parts.subprocess, "Popen", popen)
        with pytest.raises(UserError, match=r"cannot start that many worker .*smaller num_workers"):
            run(source, tmp_path / "out", num_workers=64)
    assert [process.poll() for process in started] == [0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(parts.ThreadPoolExecutor, "submit", no_thread)
        with pytest.raises(UserError, match="cannot start that many worker"):
            run(source, tmp_path / "out", num_workers=2)
    monkeypatch.setattr(parts, "Worker", StarvedWorker)
    with pytest.raises(UserError, match="a worker process is out of memory"):
        run(source, tmp_path / "out", num_workers=2)


def no_thread(*_):
    raise RuntimeError("can't start new thread")


class StarvedWorker(parts.Worker):
    """One that answers every job with a lack of memory."""

    def __init__(self):
        answer = "import pickle, sys; pickle.load(sys.stdin.buffer); "
        answer += "sys.stdout.buffer.write(pickle.dumps(MemoryError()))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", answer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )


def test_a_script_without_a_main_guard_can_use_workers(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from blockdiffusion.data import packing\n"
        "print('once')\n"
        "packing.UNIT_BYTES = 20_000\n"
        "options = packing.PrepareOptions(seq_len=32, tokenizer='byte', num_workers=2)\n"
        f"packing.prepare([{str(source)!r}], {str(tmp_path / 'out')!r}, options)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True
    )
    assert result.stdout == "once\n"
    assert TokenRows(tmp_path / "out", "train").num_rows > 1000


def test_a_named_set_brings_its_splits_and_its_detokenizer(tmp_path):
    """A set beside a plain file: each has its own rules, and only the set holds some out."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(f"{split} 's N shares\n" * 40)
    (tmp_path / "notes.txt").write_text("My note 's N stays as it is.\n" * 40)
    sources = [f"ptb={tmp_path}", str(tmp_path / "notes.txt")]
    manifest = prepare(sources, tmp_path / "out", options(valid_fraction=0.5))
    texts = {}
    for split in ("train", "valid"):
        rows = TokenRows(tmp_path / "out", split)
        tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
        ids = rows.rows(np.arange(rows.num_rows)).ids_BL.flatten().tolist()
        texts[split] = tokenizer.decode(ids)
    assert texts["train"].startswith("train's 1 shares<|endoftext|>train's 1 shares")
    assert "My note 's N stays" in texts["train"] and "note" not in texts["valid"]
    assert texts["valid"].startswith("valid's 1 shares") and "test" not in texts["valid"]
    assert [source["documents"] for source in manifest.sources] == [40, 2, 40]
    assert manifest.splits["valid"].documents == 40
    again = prepare(sources, tmp_path / "out", options(valid_fraction=0.5))
    assert again == manifest
    (tmp_path / "ptb.valid.txt").write_text("changed\n")
    with pytest.raises(UserError, match=r"ptb:validation=.* has changed since"):
        prepare(sources, tmp_path / "out", options(valid_fraction=0.5))


def test_a_named_validation_set_and_another_detokenizer(tmp_path):
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "Two words are here."}\n' * 30)
    (tmp_path / "ptb.train.txt").write_text("the ' N shares\n" * 30)
    manifest = prepare(
        [f"ptb:train={tmp_path}"],
        tmp_path / "out",
        options(valid=(f"lambada={tmp_path}",), detokenize="wikitext"),
    )
    rows = TokenRows(tmp_path / "out", "valid")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    text = tokenizer.decode(rows.rows(np.arange(1)).ids_BL[0].tolist())
    assert text.startswith("Two words are here.<|endoftext|>")  # not with LAMBADA's line end
    assert "N" in tokenizer.decode(
        TokenRows(tmp_path / "out", "train").rows(np.arange(1)).ids_BL[0].tolist()
    )
    assert [source["name"].split("=")[0] for source in manifest.sources] == [
        "ptb:train",
        "lambada:test",
    ]
