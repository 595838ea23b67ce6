"""Scorers: every token scored once, in batches and windows, against one token at a time."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.diffusion.exact import exact_blocks
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate import scorer as scorer_module
from blockdiffusion.evaluate.generation import perplexity
from blockdiffusion.evaluate.generation.perplexity import score_texts, scorer_features, window_sizes
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.evaluate.scorer import OwnScorer, load_scorer
from blockdiffusion.evaluate.windows import spans
from tests.evaluate.scorers import BYTES, save_gpt2, slow_nats, with_bytes

TEXTS = ["", "a", "It was the best of times", "x" * 23, "ab" * 12, "the worst of times, é! " * 5]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return load_scorer(str(save_gpt2(tmp_path_factory.mktemp("judge"))))


def read(scorer, texts=TEXTS):
    return [scorer.read((text,) if text else ()) for text in texts]


@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 7), (8, 1), (5, 3), (64, 1)])
def test_windows_score_every_token_once(context, stride):
    for length in range(1, 40):
        found = list(spans(length, context, stride))
        scored = [token for start, end, first in found for token in range(first, end)]
        assert scored == list(range(length))
        for number, (start, end, first) in enumerate(found):
            assert start == number * stride and end - start <= context
            assert number == 0 or first - start >= context - stride  # what it is read with


@pytest.mark.parametrize(("context", "stride"), [(None, None), (24, 23), (7, 3)])
def test_a_causal_scorer_is_that_of_one_token_at_a_time(gpt2, context, stride, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", 4 * 258 * 60)  # several passes
    tokens = read(gpt2)
    used, step = window_sizes(gpt2, context, stride)
    assert context is not None or (used, step) == (24, 12)
    found = score_texts(gpt2, tokens, context=context, stride=stride)
    for text, sample, nats in zip(TEXTS, tokens, found, strict=True):
        assert sample.ids == (256, *text.encode()) and sample.text == tuple(text.encode())
        assert sum(sample.scored) == len(text.encode())  # after the BOS the first token, too
        expected = slow_nats(
            lambda ids: gpt2.model(torch.tensor([ids])).logits[0, -1],
            sample.ids, sample.scored, used, step,
        )  # fmt: skip
        assert nats == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_real_text_with_the_tokenizer_of_gpt2(tmp_path, data_folder):
    """Another tokenizer than any model of ours, from a lone tokenizer.json."""
    source = data_folder / "tokenizers" / "gpt2" / "tokenizer.json"
    save_gpt2(tmp_path, vocab_size=50257, n_embd=4, bos_token_id=50256, eos_token_id=50256)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    shutil.copy(source, tmp_path)
    scorer = load_scorer(str(tmp_path))
    with open(data_folder / "wikitext-2" / "wiki.valid.tokens", encoding="utf-8") as file:
        text = file.read(400)
    (sample,) = read(scorer, [text])
    expected = Tokenizer.from_file(str(source)).encode(text).ids
    assert sample.ids == (50256, *expected) and len(expected) > 48
    (nats,) = score_texts(scorer, [sample])
    slow = slow_nats(
        lambda ids: scorer.model(torch.tensor([ids])).logits[0, -1],
        sample.ids, sample.scored, 24, 12,
    )  # fmt: skip
    assert nats == pytest.approx(slow, rel=1e-5)


def test_without_a_bos_the_first_token_is_not_scored(tmp_path):
    scorer = load_scorer(str(save_gpt2(tmp_path)))
    scorer.tokenizer.bos_token = None
    tokens = read(scorer)
    assert [sum(t.scored) for t in tokens] == [max(len(x.encode()) - 1, 0) for x in TEXTS]
    assert tokens[2].ids == tokens[2].text


def test_between_documents_stands_an_eos_that_is_not_scored(gpt2):
    found = gpt2.read(("ab", "c"))
    assert found.ids == (256, 97, 98, 256, 99) and found.text == (97, 98, 99)
    assert found.scored == (False, True, True, False, True)


def test_special_tokens_spelt_in_a_text_are_text(gpt2):
    assert gpt2.read(("<|endoftext|>",)).text == tuple(b"<|endoftext|>")


@pytest.mark.parametrize("bos", [True, False, None])
def test_an_autoregressive_scorer_of_ours(make_ar, bos):
    """Every window begins with what training rows begin with."""
    model = with_bytes(make_ar(**BYTES, seq_len=12, bos=bos))
    scorer = OwnScorer("ours", model)
    used, step = window_sizes(scorer, None, None)
    assert used == (11 if bos else 12)
    start = 256 if bos else 257  # the mask token is the start symbol
    tokens = read(scorer)

    def logits(ids):
        out = model.head(model.encode_causal(torch.tensor([[start, *ids]])))[0, -1].detach()
        out[257] = -torch.inf
        return out

    found = score_texts(scorer, tokens)
    for sample, nats in zip(tokens, found, strict=True):
        assert all(sample.scored)
        expected = slow_nats(logits, sample.ids, sample.scored, used, step)
        assert nats == pytest.approx(expected, rel=1e-9, abs=1e-9)
    short = [index for index, t in enumerate(tokens) if 0 < len(t.ids) <= used]
    whole = likelihood(model, [TEXTS[index] for index in short])
    assert whole.nats_per_row.tolist() == pytest.approx([found[index] for index in short])


@pytest.mark.parametrize("bos", [True, False])
def test_a_diffusion_scorer_gives_the_bound(make_model, bos):
    """Short texts: the enumerated bound of `likelihood`; long ones: window by window."""
    model = with_bytes(make_model(**BYTES, seq_len=16, bos=bos))
    scorer = OwnScorer("ours", model)
    assert scorer.is_bound and window_sizes(scorer, None, None) == (16 - bos, 8)
    texts = ["a", "It was the", "the worst of times, of all times that there were"]
    tokens = read(scorer, texts)
    found = score_texts(scorer, tokens)
    short = likelihood(model, texts[:2], estimator="exact")
    assert found[:2] == pytest.approx(short.nats_per_row.tolist())
    expected = 0.0
    for start, end, first in spans(len(tokens[2].ids), 16 - bos, 8):
        ids = [256] * bos + list(tokens[2].ids[start:end])
        valid = torch.zeros(1, -(-len(ids) // 4) * 4, dtype=torch.bool)
        valid[:, : len(ids)] = True
        free = valid.clone()
        free[:, : first - start + bos] = False
        clean = torch.zeros(valid.shape, dtype=torch.long)
        clean[:, : len(ids)] = torch.tensor(ids)
        expected += float(exact_blocks(model, clean, free, valid).nelbo_BK.sum())
    assert found[2] == pytest.approx(expected)


def test_a_diffusion_scorer_with_long_blocks_draws_its_masks(make_model, monkeypatch):
    """Against enumeration: 40 draws lie within 4.5 of their standard error (false alarm 7e-6)."""
    scorer = OwnScorer("ours", with_bytes(make_model(**BYTES, seq_len=16, bos=False)))
    row = [scorer_module.Row(t.ids, t.scored) for t in read(scorer, ["It was the bes"])]
    exact = scorer.nll(row, 0)[0]
    monkeypatch.setattr(scorer_module, "MAX_BLOCK_SIZE", 3)
    monkeypatch.setattr(scorer_module, "PAIRS", 2)
    drawn = torch.tensor([scorer.nll(row, number)[0] for number in range(40)])
    assert drawn[0] == scorer.nll(row, 0)[0] and drawn.std() > 0
    assert abs(drawn.mean() - exact) < 4.5 * drawn.std() / 40**0.5


def test_a_scorer_whose_block_is_the_whole_row(make_model):
    """S = L: every window is a block of its own, also of a text that is longer."""
    model = with_bytes(make_model(**BYTES, seq_len=8, block_size=8, bos=False))
    scorer = OwnScorer("ours", model)
    assert window_sizes(scorer, None, None) == (8, 8)
    parts = [score_texts(scorer, read(scorer, [text]))[0] for text in ("It was t", "he best")]
    whole = score_texts(scorer, read(scorer, ["It was the best"]))
    assert whole == [pytest.approx(sum(parts))]


def test_a_block_of_one_token_is_no_bound(make_model):
    scorer = OwnScorer("ours", with_bytes(make_model(**BYTES, block_size=1)))
    assert not scorer.is_bound


def test_a_killed_scorer_goes_on(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", 4 * 258 * 60)
    tokens, real, calls = read(gpt2), gpt2.nll, []
    whole = score_texts(gpt2, tokens)

    def counted(rows, number):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(rows, number)

    monkeypatch.setattr(gpt2, "nll", counted)
    with pytest.raises(KeyboardInterrupt):
        score_texts(gpt2, tokens, journal=tmp_path / "journal")
    seen = []
    again = score_texts(
        gpt2, tokens, journal=tmp_path / "journal", progress=lambda *call: seen.append(call)
    )
    assert again == whole and calls[:4] == [0, 1, 2, 2]  # two passes were finished
    assert seen[-1][0] == seen[-1][1]


def test_features_are_the_last_state_of_each_text(gpt2, make_ar):
    tokens = read(gpt2, TEXTS[1:])
    found = scorer_features(gpt2, tokens)
    for sample, vector in zip(tokens, found, strict=True):
        ids = torch.tensor([sample.ids[:24]])
        hidden = gpt2.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert vector == pytest.approx(hidden.detach().numpy(), abs=1e-5)
    ours = OwnScorer("ours", with_bytes(make_ar(**BYTES, seq_len=12, bos=False)))
    hidden = ours.model.encode_causal(torch.tensor([[257, *b"ab"]]))[0, -1]
    vector = scorer_features(ours, read(ours, ["ab", "abcde"]))[0]
    assert vector == pytest.approx(hidden.detach().numpy(), abs=1e-6)


def test_windows_that_do_not_fit_are_refused(gpt2, make_model):
    for context, stride, message in (
        (25, None, "from 2 to 24"), (1, None, "from 2 to 24"), (8, 8, "stride is 8"),
        (8, 0, "stride is 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            window_sizes(gpt2, context, stride)
    scorer = OwnScorer("ours", with_bytes(make_model(**BYTES, seq_len=16, bos=True)))
    for context, stride in ((14, 4), (15, 6)):
        with pytest.raises(UserError, match="whole blocks of 4"):
            window_sizes(scorer, context, stride)
    assert window_sizes(scorer, 11, 4) == (11, 4)


def test_what_cannot_scorer_is_refused(tmp_path, make_model):
    def refused(name, message):
        with pytest.raises(UserError, match=message) as found:
            load_scorer(str(name))
        assert "\n" not in str(found.value)

    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no model's configuration")
    bare = save_gpt2(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(bare, "no usable tokenizer|no tokenizer")
    broken = save_gpt2(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    refused(broken, "lack transformer.h.1.mlp.c_fc.weight")
    pickled = save_gpt2(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, "never opened")
    other = save_gpt2(tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"model_type": "nonsense"}
    (other / "config.json").write_text(json.dumps(config))
    refused(other, "cannot be read as a causal language model")
    silent = make_model(**BYTES)
    silent.save_pretrained(tmp_path / "silent")
    refused(tmp_path / "silent", "no tokenizer")
    timed = with_bytes(make_model(**BYTES, time_conditioning=True))
    timed.save_pretrained(tmp_path / "timed")
    timed.tokenizer.save_pretrained(tmp_path / "timed")
    refused(tmp_path / "timed", "reads the time")


def test_a_tokenizer_of_another_network_is_found_out(tmp_path, make_ar):
    save_gpt2(tmp_path / "gpt2", vocab_size=100, bos_token_id=1, eos_token_id=1)
    with_bytes(make_ar()).save_pretrained(tmp_path / "ours")
    byte_tokenizer().save_pretrained(tmp_path / "ours")
    for name, size in (("gpt2", 100), ("ours", 13)):
        with pytest.raises(UserError, match=f"network has {size} ids; the two do not belong"):
            load_scorer(str(tmp_path / name))


def test_a_special_token_that_no_text_gets_may_be_beyond_the_network(tmp_path):
    """As where a pad token was added without a place in the network."""
    scorer = load_scorer(str(save_gpt2(tmp_path, vocab_size=257)))  # the mask token is 257
    assert scorer.read(("<|mask|>",)).text == tuple(b"<|mask|>")
    (nats,) = score_texts(scorer, read(scorer, ["some text"]))
    assert nats > 0


def test_a_lightning_file_is_to_be_converted(tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"")
    (tmp_path / "text.txt").write_text("")
    for name in (file, tmp_path):
        with pytest.raises(UserError, match=rf"blockdiff convert {file} --out DIRECTORY$"):
            load_scorer(str(name))
    with pytest.raises(UserError, match=r"text\.txt is a file, and a scorer is a directory"):
        load_scorer(str(tmp_path / "text.txt"))


def test_no_hub_is_asked_for_a_path(tmp_path, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"^runs/judge does not exist: the folder runs is here"):
        load_scorer("runs/judge")
    with pytest.raises(UserError, match=r"could not be loaded from the hub \(AssertionError\)"):
        load_scorer("run/judge")  # no folder here: an id


def test_ours_are_read_from_their_directories(tmp_path, make_model, make_ar):
    for make, kind in ((make_model, OwnScorer), (make_ar, OwnScorer)):
        model = with_bytes(make(**BYTES))
        model.save_pretrained(tmp_path / kind.__name__)
        model.tokenizer.save_pretrained(tmp_path / kind.__name__)
        assert isinstance(load_scorer(str(tmp_path / kind.__name__)), kind)
