from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from blockdiffusion.data.tokenizers import (
    byte_tokenizer,
    encode,
    fingerprint,
    load_tokenizer,
    require_token,
    train_bpe,
    vocab_size,
)
from blockdiffusion.errors import UserError
from tests.data.corpora import sentences

# The names of special tokens are plain text in a text.
TEXT = "Hello  wörld,\n\n<|mask|> [MASK]<|endoftext|> 東京\t😀"


def write_bert(folder, words=("hello", "world", "##s", ",")):
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n", encoding="utf-8")
    return folder


def test_byte_ids_are_bytes():
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, TEXT) == list(TEXT.encode())
    assert encode(tokenizer, "".join(map(chr, range(256)))) == list(
        "".join(map(chr, range(256))).encode()
    )
    assert tokenizer.decode(encode(tokenizer, TEXT)) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 256)
    assert tokenizer.mask_token_id == 257
    assert vocab_size(tokenizer) == len(tokenizer) == 258


def test_bpe_has_the_size_asked_for_and_the_mask_after_it():
    text = sentences(50_000)
    tokenizer = train_bpe(iter([text]), 300)
    assert vocab_size(tokenizer) == len(tokenizer) == 301
    assert tokenizer.mask_token_id == 300
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.decode(encode(tokenizer, TEXT)) == TEXT
    assert len(encode(tokenizer, text)) < 0.7 * len(text.encode())
    assert max(encode(tokenizer, TEXT + text)) < 300
    assert 0 not in encode(tokenizer, TEXT)
    assert fingerprint(train_bpe(iter([text]), 300)) == fingerprint(tokenizer)
    assert fingerprint(train_bpe(iter([text[:30_000]]), 300)) != fingerprint(tokenizer)


def test_bpe_sizes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(iter(["text"]), 256)
    with pytest.raises(UserError, match=r"gives only 2\d\d: ask for bpe:2\d\d"):
        train_bpe(iter(["short short"]), 2048)


def test_errors_of_the_documents_come_through_bpe_training():
    def documents():
        yield "text"
        raise UserError("line 7 is bad")

    with pytest.raises(UserError, match="line 7 is bad"):
        train_bpe(documents(), 300)


def make(kind, folder):
    if kind == "bpe":
        return train_bpe(iter([sentences(20_000)]), 300)
    return byte_tokenizer() if kind == "byte" else load_tokenizer(write_bert(folder / "bert"))


@pytest.mark.parametrize("kind", ["byte", "bpe", "bert"])
def test_a_saved_tokenizer_is_the_same_for_us_and_for_transformers(tmp_path, kind):
    tokenizer = make(kind, tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert fingerprint(again) == fingerprint(tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.mask_token_id == tokenizer.mask_token_id
    for other in (tokenizer, again, theirs):
        assert other.encode(TEXT) == encode(tokenizer, TEXT)  # nothing added, nothing parsed


def test_bert_uses_its_own_mask_and_brackets(tmp_path):
    tokenizer = load_tokenizer(write_bert(tmp_path / "bert"))
    assert vocab_size(tokenizer) == 9
    assert tokenizer.mask_token_id == 4
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 3)
    assert encode(tokenizer, "Hello Worlds,") == [5, 6, 7, 8]
    cased = load_tokenizer(write_bert(tmp_path / "cased", ("Hello", "hello")))
    assert encode(cased, "Hello hello") == [5, 6]


def test_a_tokenizer_with_a_post_processor_adds_nothing(tmp_path):
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.encode("text") == list(b"text")
        assert (loaded.mask_token_id, loaded.eos_token_id) == (257, 256)


def test_bad_tokenizers_are_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    for missing in (tmp_path / "missing", f"{tmp_path.name}/missing"):  # no id of the hub
        with pytest.raises(UserError, match=r"no tokenizer .*missing"):
            load_tokenizer(missing)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"cut of')
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    folder = write_bert(tmp_path / "bert")
    (folder / "vocab.txt").write_text("hello\n[UNK]\n")
    with pytest.raises(UserError, match=r"lacks \[PAD\], \[CLS\]"):
        load_tokenizer(folder)


def test_a_missing_token_is_named_with_the_option_that_needs_it(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.mask_token_id == 2
    with pytest.raises(UserError, match="row_bos needs a tokenizer with a BOS"):
        require_token(tokenizer, "bos", "row_bos")
    assert require_token(byte_tokenizer(), "eos", "document_eos") == 256


def test_gpt2_and_bert_have_the_paper_s_ids(data_folder):
    gpt2 = load_tokenizer(data_folder / "tokenizers" / "gpt2")
    assert (vocab_size(gpt2), gpt2.mask_token_id, gpt2.eos_token_id) == (50258, 50257, 50256)
    assert encode(gpt2, "Hello world") == [15496, 995]
    bert = load_tokenizer(data_folder / "tokenizers" / "bert-base-uncased")
    assert (vocab_size(bert), bert.mask_token_id) == (30522, 103)
    assert (bert.bos_token_id, bert.eos_token_id) == (101, 102)
    assert encode(bert, "Hello world") == [7592, 2088]
