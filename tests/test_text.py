"""Ids as text, piece by piece, for every kind of tokenizer; and text as ids in its place."""

import random
from dataclasses import replace
from typing import Any

import pytest

import blockdiffusion
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import Engine, Finished
from blockdiffusion.text import (
    Detokenizer,
    encode_behind,
    encode_text,
    goes_on_inside_a_word,
    token_text,
    whole_text,
)
from tests.tokenizer_kinds import KINDS, TEXT, byte_fallback, byte_level, word_piece

SAID = "it's the é 深, we do not walk! I'm i've\n  cats"


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return KINDS[request.param]()


def random_ids(rng, tokenizer, most=14):
    """Any ids, a few that no token has among them, and those of ordinary text."""
    said = encode_text(tokenizer, SAID)
    return [
        rng.randrange(len(tokenizer) + 3) if rng.random() < 0.5 else rng.choice(said)
        for _ in range(rng.randrange(most))
    ]


def pieces(rng, stream, ids):
    """The ids in chunks of 0 to 3 tokens."""
    found = []
    while ids:
        size = rng.randrange(4)
        found.append(stream.push(ids[:size]))
        ids = ids[size:]
    return [*found, stream.end()]


def test_pieces_make_up_the_whole(tokenizer):
    """10 kinds, 1,000 texts each: as the library decodes all at once."""
    rng = random.Random(1)
    for _ in range(1000):
        ids = random_ids(rng, tokenizer)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert whole_text(tokenizer, ids) == whole, ids
        assert "".join(pieces(rng, Detokenizer(tokenizer), ids)) == whole, ids


def test_a_prompt_stays_as_it_was_given(tokenizer):
    rng = random.Random(2)
    for _ in range(500):
        prompt = "".join(rng.choices([*SAID, "the ", "Cat", "\x1b", "\ufffd"], k=rng.randrange(9)))
        given, new = encode_text(tokenizer, prompt), random_ids(rng, tokenizer)
        stream = Detokenizer(tokenizer)
        assert stream.give(given, prompt) == prompt
        text = prompt + "".join(pieces(rng, stream, new))
        assert text == whole_text(tokenizer, given + new, [(0, len(given), prompt)])


def test_given_ids_are_decoded_with_what_follows(tokenizer):
    rng = random.Random(3)
    for _ in range(300):
        ids = random_ids(rng, tokenizer)
        cut = rng.randrange(len(ids) + 1)
        stream = Detokenizer(tokenizer)
        text = stream.give(ids[:cut], None) + "".join(pieces(rng, stream, ids[cut:]))
        assert text == whole_text(tokenizer, ids)


@pytest.mark.parametrize("kind", ["bytes", "byte level", "byte fallback"])
def test_a_stray_byte_swallows_nothing(kind):
    tokenizer = KINDS[kind]()
    [stray] = encode_text(byte_tokenizer(), "é")[:1]
    if kind != "bytes":
        name = "<0xC3>" if kind == "byte fallback" else "Ã"
        stray = tokenizer.convert_tokens_to_ids(name)
    given = encode_text(tokenizer, "the 深")
    text = whole_text(tokenizer, [*given, stray], [(0, len(given), "the 深")])
    assert text == "the 深\ufffd"


def test_a_character_comes_out_with_its_last_byte():
    stream = Detokenizer(byte_tokenizer())
    shown = [stream.push([byte]) for byte in "aé深".encode()]
    assert shown == ["a", "", "é", "", "", "深"]
    assert stream.push([0xFF]) == "\ufffd"
    assert (stream.push([0xC3]), stream.end()) == ("", "\ufffd")


def test_bytes_between_words_wait_for_the_next_word():
    """Of Llama's kind a run of bytes is text or not as a whole."""
    tokenizer = byte_fallback()
    ids = encode_text(tokenizer, "the é end")
    stream = Detokenizer(tokenizer)
    shown = [stream.push([token]) for token in ids]
    assert "".join(shown) + stream.end() == "the é end"
    first = tokenizer.convert_tokens_to_ids("<0xC3>")
    assert shown[ids.index(first)] == shown[ids.index(first) + 1] == ""


def test_a_space_is_not_written_twice():
    """A BERT drops the last space of a prompt, and puts one before every word."""
    tokenizer = word_piece()
    for prompt, text in (("The cat", "The cat walks"), ("The cat ", "The cat walks")):
        given = encode_text(tokenizer, prompt)
        new = tokenizer.convert_tokens_to_ids(["walk", "##s"])
        assert whole_text(tokenizer, given + new, [(0, len(given), prompt)]) == text


def test_without_a_tokenizer_ids_are_numbers():
    assert whole_text(None, [5, 12, 3]) == "5 12 3"
    assert "".join(pieces(random.Random(0), Detokenizer(None), [5, 12, 3, 4])) == "5 12 3 4"


def test_a_long_text_costs_no_more_per_token(tokenizer, monkeypatch):
    """Tokens that the library decodes, in all: no more for ten times the text."""
    from blockdiffusion import text

    calls = []
    decode = text._TextTable.decode
    monkeypatch.setattr(
        text._TextTable, "decode", lambda table, ids: calls.append(len(ids)) or decode(table, ids)
    )
    work = []
    ids = [token for token in encode_text(tokenizer, TEXT) if token]
    for times in (1, 1, 10):  # the first time fills the table
        calls.clear()
        stream = Detokenizer(tokenizer)
        for token in ids * times:
            stream.push([token])
        work.append((sum(calls) + 1) / (len(ids) * times))
    assert work[2] <= 1.2 * work[1] and work[1] < 10


def test_tokens_by_themselves():
    tokenizer = word_piece()
    ids = tokenizer.convert_tokens_to_ids(["the", "##s", "[SEP]"])
    assert [token_text(tokenizer, token) for token in ids] == [" the", "s", ""]
    assert token_text(byte_tokenizer(), 0xC3) == "\ufffd"


# --- text to ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "piece", [". The end", " of the king", "ing", "\n\nReturn", "", " ", "é 深"]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("w")])
def test_a_piece_reads_in_its_place_as_it_was_given(kind, piece):
    tokenizer = KINDS[kind]()
    if kind == "metaspace" and ("\n" in piece or piece == " "):
        pytest.skip("this one has no token for such a space")
    stream = Detokenizer(tokenizer)
    stream.push(encode_text(tokenizer, "the"))
    assert stream.push(encode_behind(tokenizer, piece)) + stream.end() == piece


def test_pieces_of_a_lossy_tokenizer_are_tokenised_by_themselves():
    tokenizer = word_piece()
    assert encode_behind(tokenizer, ". The Cats") == encode_text(tokenizer, ". the cats")


@pytest.mark.parametrize(("kind", "warns"), [
    ("bytes", False), ("word piece", False), ("byte level", True), ("byte fallback", True),
    ("metaspace", True),
])  # fmt: skip
def test_a_last_space_begins_inside_a_word(kind, warns):
    tokenizer = KINDS[kind]()
    assert goes_on_inside_a_word(tokenizer, "Return of the ") is warns
    assert not goes_on_inside_a_word(tokenizer, "Return of the")
    assert not goes_on_inside_a_word(tokenizer, "")


@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
def test_text_that_is_not_utf8_is_refused(kind, make_model):
    model = make_model(vocab_size=400)
    model.tokenizer = KINDS[kind]()
    for call in (
        lambda text: blockdiffusion.generate(model, text, bos=False),
        lambda text: blockdiffusion.infill(model, text + "[MASK]", bos=False),
        lambda text: Engine(model).submit(text, bos=False),
        lambda text: blockdiffusion.likelihood(model, [text], bos=False),
    ):
        with pytest.raises(UserError, match=r"not UTF-8 after 'caf' \(character 4\)"):
            call("caf\udce9")


# --- who uses it ----------------------------------------------------------------------------------


def test_all_ways_to_sample_write_the_same_text(tokenizer, make_model):
    model = make_model(vocab_size=len(tokenizer) + 1, seq_len=32, bos=False)
    model.tokenizer = tokenizer
    for seed, prompt in enumerate(["", "The Cat", "Return of "]):
        options = dict(max_new_tokens=21, eos=False)
        [whole] = blockdiffusion.generate(model, prompt, seed=seed, **options).texts or []
        assert whole.startswith(prompt)
        engine = Engine(model)
        engine.submit(prompt, seed=seed, **options)
        assert [e.text for e in engine.run() if isinstance(e, Finished)] == [whole]
        *_, done = blockdiffusion.stream(model, prompt, seed=seed, **options)
        assert isinstance(done, Finished) and done.text == whole
        assert whole == whole_text(tokenizer, done.ids, [(0, done.prompt_tokens, prompt)])


@pytest.mark.parametrize("kind", KINDS)
def test_infilling_keeps_the_pieces(kind, make_model):
    model = make_model(vocab_size=400, mask_id=399, seq_len=64)
    model.tokenizer = KINDS[kind]()
    pieces = ["Return", ". The end", "ing  of\n", "[x]"]
    template = f"{pieces[0]}[MASK:3]{pieces[1]}[MASK]{pieces[2]}[MASK:2]{pieces[3]}"
    for bos in (False, True):
        model.config = replace(model.config, bos_id=1)
        filled = blockdiffusion.infill(
            model, [template, "[MASK]it"], num_samples=3, bos=bos, seed=1
        )
        assert filled.texts is not None
        for text in filled.texts[:3]:
            end = 0
            for piece in pieces:
                end = text.index(piece, end) + len(piece)
            assert text.startswith(pieces[0]) and text.endswith(pieces[-1])
        assert all(text.endswith("it") for text in filled.texts[3:])


def test_a_prompt_of_a_byte_level_tokenizer_keeps_its_letters(make_model):
    """Normalised or not: what was given stands in the text."""
    model = make_model(vocab_size=400, mask_id=399)
    model.tokenizer = byte_level()
    prompts: Any = iter(["e\u0301", "zé"])  # an iterator, which can be read once
    texts = blockdiffusion.generate(
        model, prompts, num_samples=2, max_new_tokens=3, bos=False, seed=0
    ).texts
    assert [text[:2] for text in texts or []] == ["e\u0301"] * 2 + ["zé"] * 2
