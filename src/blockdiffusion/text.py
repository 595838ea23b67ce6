"""Between text and ids: prompts as ids, and sampled ids as text, all at once or piece by piece.

Sampled ids become text only here. A text is the given text, unchanged, then the new text. New text
comes out as soon as nothing can change it any more, so the pieces of a stream make up the whole
text, and no token is decoded twice.

The text of a token depends on the decoder of its tokenizer:

* a byte-level one (as GPT-2's) adds bytes, and a character comes out with its last byte;
* others add a text, and a different one for the first token of all (many drop the space before
  it). Tokens for single bytes (as Llama's) are decoded together with their neighbours, so they wait
  until another token follows;
* with any other decoder each token is decoded together with the one before it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from blockdiffusion.errors import UserError

Given = tuple[int, int, str]  # start and end of given tokens, and their text

ONE_BYTE = [form.format(byte) for byte in range(256) for form in ("<0x{:02X}>", "<0x{:02x}>")]
BY_TOKEN = {"WordPiece", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
BEFORE = ("a", ".", "\n", "1", "|")  # texts that another one is tokenised behind
# `clean_up_tokenization` of transformers, for tokenizers that ask for it.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


# --- text to ids ----------------------------------------------------------------------------------


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that begins a row; nothing is added to it.

    Raises:
        UserError: there is no tokenizer, or the text is not UTF-8.
    """
    if tokenizer is None:
        raise UserError("this model's directory has no tokenizer; give token ids instead of text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise UserError(
            f"a text is not UTF-8 after {before!r} (character {error.start + 1}); give "
            "text in UTF-8, from a terminal or a program that writes it"
        ) from None
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_behind(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text behind other, unknown tokens.

    Some tokenizers put a space before every text, which would be a real space behind other tokens.
    So the text is tokenised behind another one, which is then cut off.

    Raises:
        UserError: see `encode_text`.
    """
    plain = encode_text(tokenizer, text)
    normalised = whole_text(tokenizer, plain)
    for wanted in (text, normalised):
        for before in ("", *BEFORE):
            first, ids = encode_text(tokenizer, before), encode_text(tokenizer, before + text)
            found = ids[len(first) :]
            stream = Detokenizer(tokenizer)
            stream.push(first or encode_text(tokenizer, BEFORE[0]))
            if ids[: len(first)] == first and stream.push(found) + stream.end() == wanted:
                return found
    return plain


def goes_on_inside_a_word(tokenizer: Any, text: str) -> bool:
    """Return whether the continuation of a text that ends in a space begins inside a word.

    It does if words are tokens together with the space before them: the given space is then a token
    of its own, which in training text precedes the rest of rare words.
    """
    if not text.endswith(" ") or not hasattr(tokenizer, "get_vocab"):
        return False
    ids = encode_text(tokenizer, text)
    spaced = any(
        name[0] in "Ġ▁ " and name[1].isalpha() for name in tokenizer.get_vocab() if name[1:]
    )
    return spaced and token_text(tokenizer, ids[-1]).endswith(" ")


# --- ids to text ----------------------------------------------------------------------------------


class Detokenizer:
    """Turns ids into text as they come; special tokens have none.

    >>> stream = Detokenizer(model.tokenizer)
    >>> print(stream.give(prompt_ids, prompt), end="")
    >>> for ids in chunks:
    ...     print(stream.push(ids), end="")
    >>> print(stream.end())

    Args:
        tokenizer: a Hugging Face tokenizer; None = ids are written as numbers.
    """

    def __init__(self, tokenizer: Any):
        self._pieces = _pieces(tokenizer)
        self._held = [""] * len(CLEAN_UP) if _cleans_up(tokenizer) else []
        self._drop_space = False

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids; return the text that no later id can change."""
        return self._out(self._pieces.push(ids))

    def give(self, ids: Iterable[int], text: str | None) -> str:
        """Take ids that were given as `text`, which comes out unchanged; None = as `push`."""
        if text is None:
            return self.push(ids)
        waited = self.end()
        read = self.push(ids) + self.end()
        # A tokenizer that does not keep a text's last space would now write a second one.
        self._drop_space = text[-1:].isspace() and not read[-1:].isspace()
        return waited + text

    def end(self) -> str:
        """Return the text that waited for later ids."""
        return self._out(self._pieces.end(), last=True)

    def _out(self, text: str, last: bool = False) -> str:
        for number in range(len(self._held)):
            text, self._held[number] = _replace(self._held[number] + text, *CLEAN_UP[number], last)
        if text and self._drop_space:
            self._drop_space, text = False, text.removeprefix(" ")
        return text


def whole_text(tokenizer: Any, ids: Sequence[int], given: Iterable[Given] = ()) -> str:
    """Return the text of `ids`, with given text unchanged."""
    stream, parts, end = Detokenizer(tokenizer), [], 0
    for start, stop, text in given:
        parts += [stream.push(ids[end:start]), stream.give(ids[start:stop], text)]
        end = stop
    return "".join([*parts, stream.push(ids[end:]), stream.end()])


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of a single token inside a text."""
    return _pieces(tokenizer).alone(token)


def byte_letters() -> list[str]:
    """Return GPT-2's printable letter for each byte: itself, or one from U+0100 upwards."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _replace(text: str, old: str, new: str, last: bool) -> tuple[str, str]:
    """Return `text.replace(old, new)`, without an end that may yet become an `old`, and that."""
    *parts, rest = text.split(old)
    held = next((k for k in range(len(old) - 1, 0, -1) if rest.endswith(old[:k])), 0)
    cut = len(rest) if last else len(rest) - held
    return new.join([*parts, rest[:cut]]), rest[cut:]


def _cleans_up(tokenizer: Any) -> bool:
    """Return whether transformers cleans up spaces of this tokenizer; it does not for BPEs."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    return type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


# --- the text of a token --------------------------------------------------------------------------


class _Bytes:
    """Tokens of a byte-level tokenizer."""

    def __init__(self, table: dict[int, bytes]):
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join([self._table[token] for token in ids]))

    def end(self) -> str:
        return self._utf8.decode(b"", True)

    def alone(self, token: int) -> str:
        return self._table[token].decode(errors="replace")


class _Texts:
    """Tokens that add a text, whatever precedes them, or wait together."""

    def __init__(self, table: _TextTable):
        self._table = table
        self._waiting: list[int] = []
        self._begun = False

    def push(self, ids: Iterable[int]) -> str:
        table, out = self._table, []
        for token in ids:
            text = table[token]
            if text is None:
                continue
            if token in table.single_bytes:
                self._waiting.append(token)
                continue
            if self._waiting:
                out.append(self.end())
            out.append(text if self._begun else table.decode([token]))
            self._begun = True
        return "".join(out)

    def end(self) -> str:
        ids, self._waiting = self._waiting, []
        if not ids:
            return ""
        text = self._table.behind(ids) if self._begun else self._table.decode(ids)
        self._begun = True
        return text

    def alone(self, token: int) -> str:
        return self._table.behind([token])


class _Pairs:
    """Tokens of an unknown kind, each decoded with the one before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._last: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        out = []
        for token in ids:
            before, both = self._decode(self._last), self._decode([*self._last, token])
            if both != before:  # else it is special
                out.append(both[len(before) :])
                self._last = [token]
        return "".join(out)

    def end(self) -> str:
        return ""

    def alone(self, token: int) -> str:
        return self._decode([token])


class _ByteTable(dict[int, bytes]):
    """id -> its bytes, found on first use."""

    def __init__(self, backend: Any):
        self._name, self._skipped = backend.id_to_token, _special(backend)
        self._values = {letter: byte for byte, letter in enumerate(byte_letters())}

    def __missing__(self, token: int) -> bytes:
        name = None if token in self._skipped else self._name(token)
        try:
            found = bytes(self._values[letter] for letter in name or "")
        except KeyError:  # an added token, which is text
            found = str(name).encode()
        self[token] = found
        return found


class _TextTable(dict[int, "str | None"]):
    """id -> its text behind another token; None if it is skipped."""

    def __init__(self, backend: Any, falls_back: bool):
        self._backend, self._skipped = backend, _special(backend)
        self.single_bytes = {backend.token_to_id(name) for name in ONE_BYTE if falls_back}
        size = backend.get_vocab_size()
        self._before = next((token for token in range(size) if self._is_plain(token)), None)
        self._cut = 0 if self._before is None else len(self.decode([self._before]))

    def __missing__(self, token: int) -> str | None:
        skipped = token in self._skipped or self._backend.id_to_token(token) is None
        found = self[token] = None if skipped else self.behind([token])
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def behind(self, ids: Sequence[int]) -> str:
        before = [] if self._before is None else [self._before]
        return self.decode([*before, *ids])[self._cut :]

    def _is_plain(self, token: int) -> bool:
        return token not in self.single_bytes and self.decode([token])[-1:].isalnum()


_tables: WeakKeyDictionary[Any, _ByteTable | _TextTable] = WeakKeyDictionary()


def _pieces(tokenizer: Any) -> _Bytes | _Texts | _Pairs:
    """Return the decoder of a new text of this tokenizer."""
    if tokenizer is None:
        return _Pairs(lambda ids: " ".join(map(str, ids)))
    if not hasattr(tokenizer, "backend_tokenizer"):
        return _Pairs(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    backend = tokenizer.backend_tokenizer
    if tokenizer not in _tables:
        decoders = _decoders(backend)
        kinds = [decoder["type"] for decoder in decoders]
        if kinds == ["ByteLevel"]:
            _tables[tokenizer] = _ByteTable(backend)
        elif BY_TOKEN.issuperset(kinds) and not any(found.get("stop") for found in decoders):
            _tables[tokenizer] = _TextTable(backend, "ByteFallback" in kinds)
        else:
            return _Pairs(lambda ids: backend.decode(ids, skip_special_tokens=True))
    table = _tables[tokenizer]
    return _Bytes(table) if isinstance(table, _ByteTable) else _Texts(table)


def _decoders(backend: Any) -> list[dict[str, Any]]:
    """Return a tokenizer's decoders, in order; none = tokens are joined by spaces."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state.get("decoders", [state])


def _special(backend: Any) -> set[int]:
    """Return the ids of special tokens, which have no text."""
    return {n for n, token in backend.get_added_tokens_decoder().items() if token.special}
