"""Read files of `torch.save` without running anything in them.

Such a file is a zip archive: a pickle describes the objects, and each tensor's numbers are a record
of their own. A pickle can carry code, because it names functions and classes to call. The unpickler
here knows a few harmless ones (tensors, plain containers); every other name, a class of another
library or `os.system`, becomes a `Placeholder`, which does nothing. Tensors are only descriptions
until `Archive.tensor` reads their numbers, so optimizer states cost neither time nor memory.

A few bytes of a pickle can demand any amount of memory, time or stack: values shared repeatedly,
nested tuples, distant places in the memo, calls that copy. So `_check_pickle` scans it first, and
the sizes that tensors claim are counted against the file.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from blockdiffusion.errors import UserError, reason

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


MOST_OPCODES = 2**21
MOST_NAMES = 50_000  # each becomes a class
MOST_PARTS = 1000  # of a tuple, with all that is in it, however often: what hashing it takes
MOST_BITS = 2048  # of a whole number
MOST_WIDE = 1000  # numbers of more than 64 bits, keys made of parts: all can have one hash
COPIED = 2  # times the file's size: tensors may share numbers
READ = 8


class Placeholder:
    """An object of an unknown class, or the result of an unknown function, which is never called.

    Attributes:
        state: the pickled attributes of the object; None = none.
        entries: the pickled items of the object, if it is a kind of dictionary.
    """

    state: Any
    entries: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        made = super().__new__(cls)
        made.state, made.entries = None, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:  # a kind of list
        pass


class _Mapping(dict):
    """An OrderedDict or defaultdict, without the attributes that those may have."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class _Storage:
    """The record that holds a tensor's numbers."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's numbers are, as the archive claims; checked when they are read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def is_sound(self) -> bool:
        """Return whether the claims have the right types; a damaged pickle can claim anything."""
        if not isinstance(self.shape, tuple) or not isinstance(self.stride, tuple):
            return False
        numbers = (self.offset, *self.shape, *self.stride)
        return all(type(number) is int and number >= 0 for number in numbers)


class _Function(NamedTuple):
    """A function of ours that a pickle may call. Being a tuple, it takes no attributes: a pickle
    cannot change it."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _encode_bytes(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("bytes that are no latin1 text")
    return text.encode("latin1")


def _make(kind: Any, items: Any = ()) -> Any:
    """Copy a container as another one. A number, which `bytes` would take, is refused."""
    if not isinstance(items, list | tuple | set | dict | bytes):
        raise pickle.UnpicklingError(f"a {kind.__name__} of {type(items).__name__}")
    return kind(items)


def _make_default_dict(factory: Any = None, items: Any = ()) -> Any:
    return _make(_Mapping, items)  # its factory is never called


_HARMLESS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Function(lambda *args: StoredTensor(*args[:4])),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
    ("collections", "OrderedDict"): _Function(partial(_make, _Mapping)),
    ("collections", "defaultdict"): _Function(_make_default_dict),
    ("_codecs", "encode"): _Function(_encode_bytes),
    **{
        (module, kind.__name__): _Function(partial(_make, kind)) if kind is not complex else kind
        for module in ("builtins", "__builtin__")  # of Python 3 and, in protocol 2, of Python 2
        for kind in (set, frozenset, bytes, complex)
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in `_HARMLESS` and storages; gives a `Placeholder` for every other one."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        # A new class each time: what a pickle assigns to one is gone with what was read.
        return type(f"{module}.{name}", (Placeholder,), {})

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"a reference to {kind!r}")
        return _Storage(key, dtype)


# Opcodes whose result holds what they take from the stack, and is hashed through it.
_HOLDS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "BINPERSID"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
_NAMES = {"GLOBAL", "STACK_GLOBAL", "INST"}


_Value = list[int]


def _check_pickle(content: bytes) -> None:
    """Refuse a pickle that would take more time, memory or stack than its size justifies.

    A copy of the stack has a pair for every value: its parts, which hashing visits, and its size,
    which a call may copy.
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    copied = names = wide = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        names += name in _NAMES
        if number > MOST_OPCODES or names > MOST_NAMES:
            raise pickle.UnpicklingError("more objects than any checkpoint has")
        bits = argument.bit_length() if isinstance(argument, int) else 0
        wide += bits > 64
        if bits > MOST_BITS or wide > MOST_WIDE:
            raise pickle.UnpicklingError(f"a whole number of {bits} bits, or too many such")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else int(argument)
            if not 0 <= place <= number:  # memory for all places before it would be taken
                raise pickle.UnpicklingError(f"place {place} in a memo of {len(memo)}")
            memo[place] = _value(stack)
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
            continue
        if name == "DUP":
            stack.append(_value(stack))
            continue
        if not opcode.stack_before:  # most opcodes: a new value, or a mark
            size = len(argument) if isinstance(argument, str | bytes | bytearray) else 1
            for kind in opcode.stack_after:
                stack.append(None if kind is pickletools.markobject else [1, size])
            continue
        taken = _take(stack, opcode.stack_before)
        wide += sum(taken[place][0] > 1 for place in _keys(name, len(taken)))
        if wide > MOST_WIDE:
            raise pickle.UnpicklingError("too many keys that are no text and no usual number")
        parts = sum(value[0] for value in taken) + 1
        size = sum(value[1] for value in taken)
        if parts > MOST_PARTS and name in _HOLDS | _CALLS:
            raise pickle.UnpicklingError(f"a value of more than {MOST_PARTS} parts in parts")
        copied += size if name in _CALLS else 0
        if copied > len(content) + COPIED * MOST_OPCODES:
            raise pickle.UnpicklingError("calls that copy more than the file holds")
        if name in _HOLDS or name in _CALLS:
            made = [parts, size]
        elif taken and opcode.stack_after:  # a container that has got more
            made = taken[0]
            made[1] += len(taken) - 1
        else:
            made = [1, 1]
        stack += [made for _ in opcode.stack_after]


def _value(stack: list[_Value | None]) -> _Value:
    """The value on top."""
    value = stack[-1]
    if value is None:
        raise pickle.UnpicklingError("a mark instead of a value")
    return value


def _keys(name: str, number: int) -> range:
    """Which of the values that an opcode takes are hashed."""
    if name in ("SETITEM", "SETITEMS"):
        return range(1, number, 2)
    if name == "DICT":
        return range(0, number, 2)
    return range(name == "ADDITEMS", number if name in ("ADDITEMS", "FROZENSET") else 0)


def _take(stack: list[_Value | None], before: list[Any]) -> list[_Value]:
    """Take the values of an opcode off the stack, and return them in the order of the stack."""
    taken = []
    for kind in reversed(before):
        if kind is pickletools.stackslice:
            while (value := stack[-1]) is not None:
                taken.append(value)
                stack.pop()
        elif kind is pickletools.markobject:
            if stack.pop() is not None:
                raise pickle.UnpicklingError("a value instead of a mark")
        else:
            taken.append(_value(stack))
            stack.pop()
    return taken[::-1]


class Archive:
    """A file of `torch.save` in the zip format (of PyTorch 1.6 and later), as a context manager.

    Attributes:
        content: the pickled object: plain containers and values, `StoredTensor`, `Placeholder`.

    Raises:
        UserError: the file is something else, damaged or truncated.
    """

    def __init__(self, path: Path):
        self.path = path
        with _damage_is_user_error(path):
            self._size = path.stat().st_size
            self._copied = self._read = 0
            self._last: tuple[str, bytearray] | None = None
            self._file = zipfile.ZipFile(path)
            self._prefix = self._find_prefix()
            content = self._record("data.pkl")
            _check_pickle(content)
            self.content: Any = _Unpickler(io.BytesIO(content)).load()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Return the numbers of a tensor.

        Raises:
            UserError: its record is missing, damaged, or smaller than the tensor.
        """
        with _damage_is_user_error(self.path):
            dtype, key = stored.storage.dtype, stored.storage.key
            if not stored.is_sound():
                raise pickle.UnpicklingError("a tensor of an impossible shape")
            if 0 in stored.shape:
                return torch.empty(stored.shape, dtype=dtype)
            steps = zip(stored.shape, stored.stride, strict=True)
            needed = stored.offset + 1 + sum((size - 1) * step for size, step in steps)
            self._copied += math.prod(stored.shape) * dtype.itemsize
            if self._copied > COPIED * self._size:
                raise pickle.UnpicklingError("its tensors claim more bytes than it has")
            content = self._numbers(f"data/{key}")
            if len(content) < needed * dtype.itemsize or math.prod(stored.shape) > needed:
                raise pickle.UnpicklingError(f"record {key} is too short for its tensor")
            flat = torch.frombuffer(content, dtype=dtype)
            return flat.as_strided(stored.shape, stored.stride, stored.offset).clone()

    def _find_prefix(self) -> str:
        """The folder in the archive; torch.save names it after the file."""
        pickles = [name for name in self._file.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{self.path} is a zip archive, but not one that torch.save wrote")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in self._file.namelist():
            self._prefix = prefix
            order = self._record("byteorder")
            if order != sys.byteorder.encode():
                raise UserError(
                    f"{self.path} was saved on a machine of the other byte order; "
                    "load it there and save it as safetensors"
                )
        return prefix

    def _numbers(self, name: str) -> bytearray:
        """A tensor's record; the last one is kept, since tensors may share one."""
        if self._last is None or self._last[0] != name:
            self._last = (name, bytearray(self._record(name)))
        return self._last[1]

    def _record(self, name: str) -> bytes:
        info = self._file.getinfo(self._prefix + name)
        if info.compress_type != zipfile.ZIP_STORED:  # small files could become huge
            raise pickle.UnpicklingError(f"{name} is compressed")
        self._read += info.file_size
        if info.file_size > self._size or self._read > READ * self._size:
            raise pickle.UnpicklingError(f"{name} claims more bytes than there are")
        return self._file.read(info)


@contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # what a damaged pickle raises is whatever its nonsense leads to
        raise UserError(
            f"{path} is truncated, damaged or no file that torch.save wrote "
            f"({type(error).__name__}: {reason(error)}); copy or download it again"
        ) from error
