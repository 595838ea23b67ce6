"""Files of text on their way in: folders with links, packed files, line ends, what is no file."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from blockdiffusion.data import reading
from blockdiffusion.data.reading import TWICE, find, read_lines, read_text, walk
from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import open_regular
from tests.data.test_sources import read, write

# Folders


def test_a_folder_with_links_to_itself_is_read_once(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    write(folder / "sub" / "a.txt", "a")
    write(folder / "b.txt", "b")
    for name, target in (("l1", "."), ("l2", "."), ("sub/up", ".."), ("sub/far", tmp_path),
                         ("root", "/")):  # fmt: skip
        (folder / name).symlink_to(target)
    found = dict(walk(folder))
    assert [path.name for path, why in found.items() if why is None] == ["b.txt", "a.txt"]
    assert [why for why in found.values() if why] == [TWICE] * 5


def test_a_file_is_read_once_whatever_its_names_and_links_elsewhere_are_followed(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "notes"
    elsewhere.mkdir()
    folder.mkdir()
    write(elsewhere / "far.txt", "far")
    write(folder / "a.txt", "a")
    (folder / "b.txt").symlink_to("a.txt")
    os.link(folder / "a.txt", folder / "c.txt")
    (folder / "d.txt").symlink_to(elsewhere / "far.txt")
    (folder / "e").symlink_to(elsewhere)
    assert read(folder) == ["a", "far"]
    assert read(folder, folder) == ["a", "far"] * 2  # what is named twice is meant


def test_what_is_no_file_is_left_out_of_a_folder_and_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind("sock")
    Path("gone.txt").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("zero").symlink_to("/dev/zero")
    left_out: list[str] = []
    with pytest.raises(UserError, match=r"no text, but fifo .a named pipe., gone.txt .a link that"):
        read(".", left_out=left_out)
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "empty.txt", "")
    assert read(".", left_out=left_out) == ["a"]
    assert left_out == [
        "fifo (a named pipe)", "gone.txt (a link that leads nowhere)",
        "loop (a link that leads nowhere)", "sock (a socket)", "zero (a device)",
    ]  # fmt: skip
    server.close()


def test_a_deep_folder_needs_no_deep_stack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    write(Path("a.txt"), "deep")
    os.chdir(tmp_path)
    found = [str(path)[-7:] for path, _ in walk(Path("d"))]
    subprocess.run(["rm", "-r", "d"], check=True)  # pytest cannot: its way is recursive
    assert found == ["d/a.txt"]


@pytest.mark.parametrize("path", ["fifo", "/dev/zero", "/dev/null", "/proc/self/maps", "empty"])
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    write(tmp_path / "empty", "")
    reason = r"is (a named pipe|a device|empty): name a file"
    with pytest.raises(UserError, match=reason):
        read(path)
    with pytest.raises(UserError, match=reason):
        read_text(Path(path), "the prompt file")


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr("blockdiffusion.files.disk.check_regular", lambda *arguments: None)
    with open_regular(tmp_path / "fifo") as file:
        assert file.read() == b""


def test_names_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone is a link to nowhere, which is not there"):
        read("gone")
    for name in ("It was the best of times. " * 200, "~nobody-of-this-name/a.txt"):
        assert find(name) is None
        with pytest.raises(UserError, match="there is no file or folder") as error:
            read(name)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("packing", ["--tokenizer byte --valid-fraction 0", "--tokenizer byte"])
def test_standard_input_is_read_once_or_not_at_all(tmp_path, packing):
    command = "prepare /dev/stdin --seq-len 16 --out out --workers 1 " + packing
    ended = subprocess.run(
        [sys.executable, "-m", "blockdiffusion.cli", *command.split()],
        input=b"A text from a pipe.\n" * 8, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    if "fraction" in packing:
        assert b"1 document            160 tokens" in ended.stdout, ended
    else:
        assert ended.returncode == 2 and b"/dev/stdin is a pipe" in ended.stderr


# Line ends

ENDS = ("\n", "\r\n", "\r")


def test_documents_are_the_same_whatever_the_line_ends(tmp_path):
    lines = ["one", "two ", "", " \t", "three\u2028still\x85three\x0b\x0cso", "", "", "f\u00fcnf"]
    expected = {
        "line": ["one", "two ", "three\u2028still\x85three\x0b\x0cso", "fünf"],
        "blank-line": ["one|two ", "three\u2028still\x85three\x0b\x0cso", "fünf"],
    }
    draw = random.Random(0)
    mixtures = [[end] * len(lines) for end in ENDS]
    mixtures += [[draw.choice(ENDS) for _ in lines] for _ in range(200)]
    for ends in mixtures:
        for place in range(len(lines) - 1):  # CR, then LF with nothing between, is one line end
            if ends[place] == "\r" and not lines[place + 1] and ends[place + 1] == "\n":
                ends[place + 1] = "\r\n"
        file = write(tmp_path / "a.txt", "".join(map("".join, zip(lines, ends, strict=True))))
        for rule, documents in expected.items():
            found = read(file, documents=rule)
            joined = [d.replace("\r\n", "|").replace("\r", "|").replace("\n", "|") for d in found]
            assert joined == documents, (rule, ends)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("document_bytes", [37, 64, 100])
def test_auto_cuts_at_line_ends_of_any_kind(tmp_path, end, document_bytes):
    draw = random.Random(document_bytes)
    text = "".join("x" * draw.randint(0, 30) + "\n" for _ in range(500)).replace("\n", end)
    pieces = read(write(tmp_path / "a.txt", text), document_bytes=document_bytes)
    assert "".join(pieces) == text and len(pieces) > 20
    for before, after in itertools.pairwise(pieces):
        assert before.endswith(end) and not (before.endswith("\r") and after.startswith("\n"))


def test_lines_are_found_wherever_a_chunk_ends(monkeypatch):
    raw = b"one\r\ntwo\rthree\n\r\n\r\r\nlong line\r\n" * 3 + b"no end"
    expected = raw.splitlines(keepends=True)
    for size in range(1, 20):
        monkeypatch.setattr(reading, "CHUNK_BYTES", size)
        found = list(read_lines(io.BytesIO(raw), "x"))
        assert [line for *_, line in found] == expected
        assert all(raw[offset:].startswith(line) for _, offset, line in found)
        assert [number for number, *_ in found] == list(range(1, len(expected) + 1))


def test_json_lines_with_any_line_end(tmp_path):
    rows = ['{"text": "a\u2028b"}', "", '{"text": "c"}']
    for end in ENDS:
        assert read(write(tmp_path / "a.jsonl", end.join(rows))) == ["a\u2028b", "c"]


# Packed files


def zstandard(raw: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_read_like_unpacked_ones(tmp_path, suffix):
    pack = PACKERS[suffix]
    text = "\ufeffOne,\r\ntwo.\n\nThrée.\n"
    write(tmp_path / f"a.txt{suffix}", pack(text.encode()))
    write(tmp_path / f"b.JSONL{suffix.upper()}", pack(b'{"text": "b"}\n') + pack(b'{"text": "c"}'))
    assert read(tmp_path) == [text[1:], "b", "c"]
    assert read_text(tmp_path / f"a.txt{suffix}", "it") == text[1:]
    lines = ["One,", "two.", "Thrée."]
    assert read(tmp_path / f"a.txt{suffix}", documents="line") == lines
    whole = pack(random.Random(0).randbytes(3000).hex().encode())
    for broken in (whole[: len(whole) // 2], whole[:-3], b"no " + whole, whole + b"more"):
        file = write(tmp_path / f"broken.txt{suffix}", broken)
        if suffix in (".bz2", ".xz") and broken.endswith(b"more"):
            continue  # their libraries ignore what follows
        for documents in ("auto", "file", "line"):
            with pytest.raises(UserError, match=r"broken.* cannot be unpacked \(.+\): get it"):
                read(file, documents=documents)
        with pytest.raises(UserError, match="the prompt cannot be unpacked"):
            read_text(file, "the prompt")


def test_what_is_packed_is_bounded(tmp_path, monkeypatch):
    bomb = write(tmp_path / "a.txt.gz", gzip.compress(b"x" * 2**20))
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 2**16)
    with pytest.raises(UserError, match="more than 0 MiB of text: shorten it"):
        read_text(bomb, "the prompt")
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 2**16)
    with pytest.raises(UserError, match=r"line 1 of .* is one document of more"):
        read(bomb, documents="line")


def test_an_archive_that_asks_for_all_the_memory_is_refused(tmp_path):
    """The header of an xz file names the size of its dictionary: here 4 GiB."""
    raw = bytearray(lzma.compress(b"text\n" * 100))
    raw[16] = 40  # the one property of its one filter, LZMA2
    header = slice(12, 12 + 4 * (raw[12] + 1) - 4)
    raw[header.stop : header.stop + 4] = zlib.crc32(raw[header]).to_bytes(4, "little")
    file = write(tmp_path / "a.txt.xz", bytes(raw))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    try:
        with pytest.raises(UserError, match=r"unpacked .it asks for more memory than there is."):
            read(file)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_zstandard_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.txt.zst needs pyarrow: .*blockdiffusion\[data\]"):
        read(write(tmp_path / "a.txt.zst", "x"))


def test_a_packed_parquet_file_is_to_be_unpacked(tmp_path):
    with pytest.raises(UserError, match="is packed, which parquet files are inside: unpack it"):
        read(write(tmp_path / "a.parquet.gz", gzip.compress(b"x")))


# One small file


def test_a_small_file_is_the_text_that_prepare_reads(tmp_path):
    raw = b"\xef\xbb\xbfDear diary,\r\nit rained.\r\rAgain.\n"
    file = write(tmp_path / "a.txt", raw)
    assert [read_text(file, "it")] == read(file) == [raw[3:].decode()]


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"caf\xe9", r"it is not UTF-8 text \(at byte offset 3\)"),
        (b"a\0b", "it is not a text file"),
        ("text".encode("utf-16"), "it is UTF-16 text"),
        ("text".encode("utf-16-be"), "it is not a text file"),
        (b"\xfe\xff\0t", "it is UTF-16 text"),
        ("text".encode("utf-32"), "it is UTF-32 text"),
        (b"\0\0\xfe\xff\0\0\0t", "it is UTF-32 text"),
        (b"\xef\xbb\xbf", "it is empty"),
        (b"\xed\xa0\x80", "it is not UTF-8"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, raw, sentence):
    file = write(tmp_path / "a.txt", raw)
    with pytest.raises(UserError, match=sentence):
        read_text(file, "it")
    for documents in ("auto", "file", "line", "blank-line"):
        if "empty" not in sentence:
            with pytest.raises(UserError, match=sentence[3:]):
                read(file, documents=documents)


def test_a_folder_and_a_missing_file_are_no_small_files(tmp_path):
    with pytest.raises(UserError, match="is a folder: name a file"):
        read_text(tmp_path, "it")
    with pytest.raises(UserError, match="it does not exist"):
        read_text(tmp_path / "a", "it")
    with pytest.raises(UserError, match="name too long"):
        read_text(tmp_path / ("a" * 300), "it")


def test_what_a_shell_hands_over_is_read(tmp_path):
    reader, writer = os.pipe()
    feeder = threading.Thread(target=lambda: (os.write(writer, b"given"), os.close(writer)))
    feeder.start()
    assert read_text(Path(f"/dev/fd/{reader}"), "it") == "given"
    feeder.join()
    os.close(reader)
