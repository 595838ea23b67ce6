"""Tokenizers: any fast Hugging Face one, bytes, or a byte-level BPE trained on the spot.

A tokenizer of this package is a `PreTrainedTokenizerFast` that has a mask token, adds no special
tokens to a text, and reads names of special tokens in a text as plain text (otherwise a document
could contain the mask).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockdiffusion.checkpoints.finding import GGUF
from blockdiffusion.errors import UserError, reason, shown
from blockdiffusion.from_pretrained import from_pretrained
from blockdiffusion.text import byte_letters

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
OTHER_MASKS = ("[MASK]", "<mask>", "[mask]")
MIN_BPE_VOCAB = 257  # every byte, and the end of text


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer `spec`: `byte`, a folder or file that exists, or a Hugging Face name.

    A folder is one written by `save_pretrained`, or holds a `tokenizer.json` or the `vocab.txt` of
    a BERT. The mask is the tokenizer's own if it has one, else `<|mask|>`, appended as the last id.
    If no BOS and EOS are named, a BERT's are [CLS] and [SEP], and a GPT-2's both <|endoftext|>. A
    GGUF file holds one, too.

    Raises:
        UserError: there is no such tokenizer, or it has no fast form.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if path.is_file():
        if path.suffix == GGUF:
            return _load_pretrained(str(path.parent), gguf_file=path.name)
        return _load_file(path)
    if spec == "byte":
        return byte_tokenizer()
    is_path = str(spec).startswith((".", "/", "~")) or str(spec).count("/") > 1
    in_folder = "/" in str(spec) and path.parent.is_dir()  # not an OWNER/NAME of the hub
    if is_path or in_folder or path.suffix == ".json":
        raise UserError(
            f"there is no tokenizer {spec}: give a folder or a tokenizer.json that exists, byte, "
            "bpe:SIZE, or a Hugging Face name"
        )
    return _load_pretrained(str(spec))


def _load_folder(path: Path) -> PreTrainedTokenizerFast:
    if (path / "tokenizer_config.json").exists():
        return _load_pretrained(str(path))
    if (path / "tokenizer.json").exists():
        return _load_file(path / "tokenizer.json")
    if (path / "vocab.txt").exists():
        return _bert(path / "vocab.txt")
    raise UserError(
        f"the folder {path} holds no tokenizer: it needs a tokenizer.json, or a BERT's vocab.txt"
    )


def _load_pretrained(name: str, **options: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(
        AutoTokenizer,
        name,
        f"cannot load the tokenizer {shown(name)}",
        "check the name and the network, or give a tokenizer.json",
        **options,
    )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer {shown(name)} has no fast form (tokenizer.json): convert it, or use "
            "another"
        )
    named = {
        key: str(value)
        for key, value in tokenizer.special_tokens_map.items()
        if key.endswith("_token") and isinstance(value, str)
    }
    return _wrap(tokenizer.backend_tokenizer, named, getattr(tokenizer, "chat_template", None))


def _load_file(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    try:
        return _wrap(Tokenizer.from_file(str(path)), {})
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{path} cannot be read as a tokenizer ({reason(error)}): give a whole tokenizer.json"
        ) from error


def _bert(vocab_file: Path) -> PreTrainedTokenizerFast:
    """Make BERT's WordPiece; uncased if no word of the vocabulary has a capital letter."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    named = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "pad", "cls", "sep", "mask")}
    words = vocab_file.read_text(encoding="utf-8").split("\n")
    vocab = {word.rstrip("\r"): number for number, word in enumerate(words) if word.strip()}
    if missing := [token for token in named.values() if token not in vocab]:
        raise UserError(f"{vocab_file} is no BERT vocabulary: it lacks {', '.join(missing)}")
    uncased = all(word == word.lower() for word in vocab if not word.startswith("["))
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=uncased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _wrap(backend, named)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make ids 0..255 of the bytes, <|endoftext|> = 256 (BOS and EOS) and <|mask|> = 257."""
    from tokenizers import models

    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    backend = _byte_level(models.BPE(vocab, []))
    backend.add_special_tokens([_added_token(END_OF_TEXT)])
    return _wrap(backend, {})


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of `vocab_size` ids from `documents`; <|endoftext|> is the first.

    <|mask|> is appended, so V = vocab_size + 1. The same text gives the same tokenizer. Memory
    grows only with the number of different words.

    Raises:
        UserError: `vocab_size` is below 257, or the text is too short for so many ids.
    """
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < MIN_BPE_VOCAB:
        raise UserError(
            f"a byte-level BPE of {vocab_size} ids is too small: it needs at least {MIN_BPE_VOCAB} "
            "(the 256 bytes and <|endoftext|>)"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_added_token(END_OF_TEXT)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,  # no ids for rulers of dashes
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise UserError(
            f"the text is too short for a BPE of {vocab_size} ids, it gives only {found}: ask for "
            f"bpe:{found} or fewer, or give more text"
        )
    return _wrap(backend, {})


def _byte_level(model: Any) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _added_token(content: str):
    from tokenizers import AddedToken

    return AddedToken(content, special=True, normalized=False)


def _wrap(
    backend: Tokenizer, named: dict[str, str], chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Wrap `backend` with its `named` tokens (`bos_token`, ...) and those that it needs."""
    from transformers import PreTrainedTokenizerFast

    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = None  # it would add BOS, [CLS] and the like to every text
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    named = dict(named)
    if "bos_token" not in named and "eos_token" not in named and END_OF_TEXT in special:
        named |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    for name, bert_name in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
        if name not in named and bert_name in named:
            named[name] = named[bert_name]
    if "mask_token" not in named:
        named["mask_token"] = next((m for m in (MASK, *OTHER_MASKS) if m in special), MASK)
    backend.add_special_tokens([_added_token(named["mask_token"])])  # nothing if it is there
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=True, chat_template=chat_template, **named
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files of a tokenizer, which `load_tokenizer` reads.

    Raises:
        OSError: they cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the library written in Rust raises bare Exception
        if match := re.search(r"os error (\d+)", str(error)):
            code = int(match.group(1))
            raise OSError(code, os.strerror(code), str(folder)) from error
        raise


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return V, the number of ids with the mask: the largest id plus 1."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of `text` alone, with no special tokens added or recognised."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 of all that decides the ids of a text and the special ids."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    content = json.dumps([tokenizer.backend_tokenizer.to_str(), special])
    return hashlib.sha256(content.encode()).hexdigest()


def require_token(tokenizer: PreTrainedTokenizerFast, kind: str, option: str) -> int:
    """Return the id of the tokenizer's `kind` ("bos" or "eos") token, which `option` needs.

    Raises:
        UserError: the tokenizer has none.
    """
    number = tokenizer.bos_token_id if kind == "bos" else tokenizer.eos_token_id
    if number is None:
        raise UserError(
            f"{option} needs a tokenizer with a {kind.upper()} token, and this one has none: turn "
            f"{option} off or use another tokenizer"
        )
    return number
