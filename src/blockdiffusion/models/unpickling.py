"""Reading what `torch.save` wrote without running anything in it.

Such a file is a zip archive: a pickle describes the objects, and each tensor's numbers are a record
of their own. A pickle names functions and classes to call, which is how it can carry code. The
unpickler here knows a handful of harmless ones (tensors, plain containers); every other name, be it
a class of another library or `os.system`, becomes a `Placeholder`, which does nothing. Tensors are
only descriptions until `Archive.tensor` reads their numbers, so that optimizer states cost neither
time nor memory.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.errors import UserError

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


class Placeholder:
    """Stands for an object of a class, or the result of a function, that is never called.

    Attributes:
        state: what it would have given the object as its attributes; None = nothing.
        entries: what it would have put into the object, where that is a kind of dictionary.
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
    """Where a tensor's numbers are in the archive; as claimed, checked when they are read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def is_sound(self) -> bool:
        """Whether the claims have the right types; a damaged pickle can claim anything."""
        if not isinstance(self.shape, tuple) or not isinstance(self.stride, tuple):
            return False
        numbers = (self.offset, *self.shape, *self.stride)
        return all(type(number) is int and number >= 0 for number in numbers)


class _Callable:
    """A function of ours that a pickle may call; nothing can be assigned to it."""

    __slots__ = ()


class _RebuildTensor(_Callable):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        return StoredTensor(storage, offset, shape, stride)


class _RebuildParameter(_Callable):
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _EncodeBytes(_Callable):
    """How protocol 2 writes bytes."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise pickle.UnpicklingError("bytes that are no latin1 text")
        return text.encode("latin1")


class _MakeMapping(_Callable):
    __slots__ = ()

    def __call__(self, items: Any = ()) -> _Mapping:
        return _Mapping(items)


class _MakeDefaultDict(_Callable):
    __slots__ = ()

    def __call__(self, factory: Any = None, items: Any = ()) -> _Mapping:
        return _Mapping(items)  # its factory is never called


# Built-in types cannot be assigned to either.
_HARMLESS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("collections", "OrderedDict"): _MakeMapping(),
    ("collections", "defaultdict"): _MakeDefaultDict(),
    ("_codecs", "encode"): _EncodeBytes(),
    **{
        (module, kind.__name__): kind
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


class Archive:
    """A file that `torch.save` wrote, in its zip format (that of PyTorch 1.6 and later).

    A context manager; outside of its block nothing can be read.

    Attributes:
        content: the pickled object: plain containers and values, `StoredTensor`, `Placeholder`.

    Raises:
        UserError: the file is something else, damaged or truncated.
    """

    def __init__(self, path: Path):
        self.path = path
        with _damage_is_user_error(path):
            self._file = zipfile.ZipFile(path)
            self._prefix = self._find_prefix()
            self.content: Any = _Unpickler(io.BytesIO(self._record("data.pkl"))).load()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The numbers of a tensor.

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
            content = bytearray(self._record(f"data/{key}"))
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
            order = self._file.read(f"{prefix}byteorder")
            if order != sys.byteorder.encode():
                raise UserError(
                    f"{self.path} was saved on a machine of the other byte order; "
                    "load it there and save it as safetensors"
                )
        return prefix

    def _record(self, name: str) -> bytes:
        info = self._file.getinfo(self._prefix + name)
        if info.compress_type != zipfile.ZIP_STORED:  # small files could become huge
            raise pickle.UnpicklingError(f"{name} is compressed")
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
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is truncated, damaged or no file that torch.save wrote "
            f"({type(error).__name__}: {reason}); copy or download it again"
        ) from error
