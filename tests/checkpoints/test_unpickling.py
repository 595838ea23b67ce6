"""Pickles are read, not run."""

import contextlib
import pickle
import struct
import subprocess
import time
import zipfile
from collections import OrderedDict, defaultdict

import pytest
import torch

from blockdiffusion.checkpoints.unpickling import Archive, Placeholder, StoredTensor
from blockdiffusion.errors import UserError


def save(tmp_path, content):
    torch.save(content, tmp_path / "file.ckpt")
    return tmp_path / "file.ckpt"


def test_plain_containers_and_values_come_back(tmp_path):
    content = {
        "numbers": [1, 2**80, -0.5, True, None, 1 + 2j],
        "texts": ("ä", b"\x00\xff", b""),
        "sets": [{1, 2}, frozenset({3})],
        "ordered": OrderedDict(a=1),
        "default": defaultdict(list, {"b": [2]}),
        3: {"deep": [{}]},
    }
    assert Archive(save(tmp_path, content)).content == content


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    content = {
        "whole": base,
        "view": base[1:4, ::2].T,
        "parameter": torch.nn.Parameter(base.float()),
        "scalar": base[2, 2].clone(),
        "none": base[:0],
    }
    with Archive(save(tmp_path, content)) as archive:
        for name, tensor in content.items():
            again = archive.tensor(archive.content[name])
            assert again.dtype == tensor.dtype and torch.equal(again, tensor), name
            assert again.shape == tensor.shape


class Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_code_never_runs(tmp_path):
    import os

    witness = tmp_path / "witness"
    content = {
        "bombs": [
            Calls(os.system, f"touch {witness}"),
            Calls(subprocess.call, ["touch", str(witness)]),
            Calls(eval, f"open({str(witness)!r}, 'w')"),
            Calls(exec, f"open({str(witness)!r}, 'w')"),
            Calls(getattr, witness, "touch"),
            Calls(open, str(witness), "w"),
            Calls(torch.load, str(witness)),
        ],
        "kept": 5,
    }
    archive = Archive(save(tmp_path, content))
    assert archive.content["kept"] == 5 and not witness.exists()
    assert all(isinstance(bomb, Placeholder) for bomb in archive.content["bombs"])
    with contextlib.suppress(Exception):
        torch.load(archive.path, weights_only=False)  # the bombs are real
    assert witness.exists()


ATTACKS = {
    "state for a function": b"c__builtin__\nset\n}(X\x01\x00\x00\x00aK\x01ub.",
    "attributes of a function": b"c_codecs\nencode\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
    "a call of a text": b"X\x01\x00\x00\x00a)R.",
    "an extension": b"\x82\x01.",
    "a reference to a file": b"(X\x04\x00\x00\x00filetQ.",
    "nothing": b"",
    "no end": b"(((",
    "a new type": b"c__builtin__\ntype\n(X\x01\x00\x00\x00a)}tR.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_odd_pickles_are_refused_or_inert(tmp_path, attack):
    path = tmp_path / "odd.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("odd/data.pkl", ATTACKS[attack])
    if attack == "a new type":
        assert isinstance(Archive(path).content, Placeholder)
    else:
        with pytest.raises(UserError, match="is truncated, damaged or no file"):
            Archive(path)


TUPLES = b"\x85" * 2_000_000
TWICE = b"N" + b"2\x86" * 60  # a tuple of itself and itself, 60 times
GREEDY = {
    "deep tuples as a key": b"}N" + TUPLES + b"Ns.",
    "deep tuples in a set": b"\x8f(N" + TUPLES + b"\x90.",
    "wide tuples as a key": b"}" + TWICE + b"Ns.",
    "wide tuples for a frozenset": b"c__builtin__\nfrozenset\n](" + TWICE + b"e\x85R.",
    "a place in the memo": b"Nr\xff\xff\xff\xff.",
    "another place": b"Np4294967295\n.",
    "bytes of a number": b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "new bytes of a number": b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85\x81.",
    "more bytes than there are": b"\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
    "a text longer than there is": b"X\xff\xff\xff\x7fa.",
    "a long number": b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".",
    "many digits": b"L" + b"9" * 10**6 + b"L\n.",
    "many values": b"](" + b"N" * 2_200_000 + b"e.",
    "many classes": b"](" + b"ca\nb\n" * 60_000 + b"e.",
    "copies of a list": b"](" + b"N" * 1000 + b"eq\x00(" + b"c__builtin__\nset\nh\x00\x85R" * 9_000
    + b"t.",
    "copies of a text": b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6
    + b"q\x00(" + b"c_codecs\nencode\nh\x00\x85R" * 1_000 + b"t.",
    "keys with one hash": b"}(" + b"".join(
        b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") + b"N" for n in range(60_000)
    ) + b"u.",
    "complex keys with one hash": b"c__builtin__\ncomplex\nq\x000}(" + b"".join(
        b"h\x00G" + struct.pack(">d", -1000003.0 * n) + b"G" + struct.pack(">d", n) + b"\x86RN"
        for n in range(1, 60_001)
    ) + b"u.",
    "a set of tuples": b"\x8f(" + b"K\x01K\x02\x86" * 2000 + b"\x90.",
    "no mark": b"NNt.",
    "a mark for a value": b"(q\x00.",
}  # fmt: skip


@pytest.mark.parametrize("attack", GREEDY)
def test_few_bytes_get_neither_memory_nor_time_nor_stack(tmp_path, attack):
    path = tmp_path / "greedy.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("greedy/data.pkl", GREEDY[attack])
    began = time.process_time()
    with pytest.raises(UserError, match="is truncated, damaged or no file") as told:
        Archive(path)
    assert time.process_time() - began < 10 and len(str(told.value)) < 500


def test_the_largest_pickle_that_is_read_takes_seconds(tmp_path):
    content = {"vocabulary": {str(i): i for i in range(200_000)}, "random": tuple(range(625))}
    began = time.process_time()
    assert Archive(save(tmp_path, content)).content == content
    assert time.process_time() - began < 10


def test_tensors_that_claim_more_than_the_file_has_are_refused(tmp_path):
    one = torch.ones(1000, 1000)
    archive = Archive(save(tmp_path, {"tied": [one] * 2, "views": [one[i] for i in range(1000)]}))
    with archive:
        for stored in (*archive.content["views"], archive.content["tied"][0]):
            archive.tensor(stored)  # shared numbers count once more
        with pytest.raises(UserError, match="claim more bytes than it has"):
            archive.tensor(archive.content["tied"][1])


def test_a_small_record_that_unpacks_to_much_is_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"N.", zipfile.ZIP_STORED)
        file.writestr("a/byteorder", bytes(2**26))
    with pytest.raises(UserError, match="byteorder is compressed"):
        Archive(path)


def test_what_a_pickle_assigns_is_gone_with_it(tmp_path):
    """Each file has its own placeholder classes."""
    first = Archive(save(tmp_path, [Calls(pickle.Pickler, 1)])).content[0]
    type(first).__setstate__ = None
    again = Archive(save(tmp_path, [Calls(pickle.Pickler, 1)])).content[0]
    assert type(again) is not type(first) and callable(type(again).__setstate__)


@pytest.mark.parametrize("kept", [0, 1, 100, -1, -30, -2000])
def test_truncated_files_are_refused(tmp_path, kept):
    path = save(tmp_path, {"a": torch.ones(2000)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"file\.ckpt is truncated"):
        Archive(path)


def test_a_changed_byte_of_a_tensor_is_noticed(tmp_path):
    path = save(tmp_path, {"a": torch.arange(2000.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(2000.0)[1000:1004].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    archive = Archive(path)
    with pytest.raises(UserError, match="CRC"):
        archive.tensor(archive.content["a"])


@pytest.mark.parametrize(
    "change",
    [
        dict(shape=(3000,)),
        dict(shape=(-1,)),
        dict(shape=(10**9,), stride=(0,)),
        dict(offset=1),
        dict(offset=10**18),
        dict(shape=("a",)),
        dict(shape=Placeholder()),
        dict(stride=(1, 1)),
        dict(storage=Placeholder()),
    ],
)
def test_tensors_that_reach_outside_of_their_record_are_refused(tmp_path, change):
    archive = Archive(save(tmp_path, {"a": torch.ones(2000)}))
    stored = archive.content["a"]
    with pytest.raises(UserError, match="damaged"):
        archive.tensor(StoredTensor(**{**vars(stored), **change}))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(UserError, match="is a zip archive, but not one"):
        Archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle.dumps([0] * 10_000))
    with pytest.raises(UserError, match="compressed"):
        Archive(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps(1, protocol=2))
        file.writestr("a/byteorder", "big")
    with pytest.raises(UserError, match="other byte order"):
        Archive(path)
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        Archive(tmp_path / "nowhere.ckpt")
