"""General compressors of the standard library, by the bits that they spend on a text."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import dataclass

PREFIX_BYTES = 64 * 2**20  # training text that is put before: what the longest window here holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressor:
    """A compressor at its strongest ordinary setting.

    Attributes:
        window: how far back it can look, in words.
    """

    name: str
    window: str
    compress: Callable[[bytes], bytes]

    def bits(self, text: bytes) -> int:
        """Of the whole file that it writes, its header included."""
        return 8 * len(self.compress(text))

    def bits_after(self, before: bytes, text: bytes) -> int:
        """What `text` adds to the file when it follows `before`."""
        return self.bits(before + text) - self.bits(before)


COMPRESSORS = (
    Compressor(
        name="gzip -9",
        window="32 KiB",
        compress=lambda text: gzip.compress(text, 9, mtime=0),
    ),
    Compressor(
        name="bzip2 -9",
        window="its block of at most 900 kB",
        compress=lambda text: bz2.compress(text, 9),
    ),
    Compressor(
        name="xz -9e (lzma)",
        window="64 MiB",
        compress=lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    ),
)
