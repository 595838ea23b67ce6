"""Small tokenizers of every kind that matters for how ids become text, built on the spot."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from blockdiffusion.data.tokenizers import byte_tokenizer, train_bpe

TEXT = "\n\n".join(
    f"Return of the king number {n}. It's the end, we do not know. The naïve é – 深い学習"
    for n in range(30)
)
WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK] it ' s do not n t . , ? ! we ve re m i you cat ##s ##ing
walk the ##' 've return of king""".split()  # noqa: SIM905


def byte_level() -> Any:
    """GPT-2's kind, with tokens of several bytes, of parts of characters, and added ones."""
    made = train_bpe([TEXT], 300)
    made.add_tokens(["<é x>", "zé"])
    return made


def word_piece(cleanup: bool = True, whole_cleanup: bool = False) -> Any:
    """BERT's kind; `cleanup` by its decoder, `whole_cleanup` by transformers, over all."""
    made = Tokenizer(models.WordPiece({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=cleanup)
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    return wrapped(made, mask_token="[MASK]", clean_up_tokenization_spaces=whole_cleanup)


def byte_fallback(drops_first_space: bool = True) -> Any:
    """Llama's kind: a space is put before every text; what is unknown is written as bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    ])  # fmt: skip
    strip = [decoders.Strip(" ", 1, 0)] * drops_first_space
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    plain = TEXT.encode("ascii", "ignore").decode().split()
    made.train_from_iterator(plain, trainer(trainers.BpeTrainer, 340, special_tokens=special))
    state = json.loads(made.to_str())  # bytes are ordinary tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"][:3] != "<0x"]
    return wrapped(Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>")


def metaspace() -> Any:
    """T5's kind."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = dict(special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    made.train_from_iterator([TEXT], trainer(trainers.UnigramTrainer, 90, **special))
    return wrapped(made, eos_token="</s>")


def word_ends() -> Any:
    """The first GPT's kind: a token tells where a word ends."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    options = dict(special_tokens=["<unk>"], end_of_word_suffix="</w>")
    made.train_from_iterator([TEXT], trainer(trainers.BpeTrainer, 150, **options))
    return wrapped(made)


def whole_words() -> Any:
    """No decoder: tokens are joined by spaces."""
    words = ["[UNK]", *sorted(set(TEXT.split()))]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(made)


def trainer(kind: Any, size: int, **options: Any) -> Any:
    return kind(vocab_size=size, show_progress=False, **options)


def wrapped(backend: Tokenizer, **named: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


KINDS = {
    "bytes": byte_tokenizer,
    "byte level": byte_level,
    "word piece": word_piece,
    "word piece, spaces kept": lambda: word_piece(cleanup=False),
    "word piece, cleaned as a whole": lambda: word_piece(cleanup=False, whole_cleanup=True),
    "byte fallback": byte_fallback,
    "byte fallback, first space kept": lambda: byte_fallback(drops_first_space=False),
    "metaspace": metaspace,
    "word ends": word_ends,
    "whole words": whole_words,
}
