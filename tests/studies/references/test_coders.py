"""Coders side by side: the same symbols for all, each number against what it is made of."""

import bz2
import gzip
import lzma
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from blockdiffusion.data.loader import TokenRows
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.evaluate.scoring import ScoreOptions
from blockdiffusion.studies.references import coders
from blockdiffusion.studies.references.coders import CoderOptions, compare_coders
from blockdiffusion.studies.references.ngram import count_ngrams
from blockdiffusion.studies.references.table import coders_markdown
from tests.data.corpora import sentences
from tests.hostile import HOSTILE, check_markdown

SIZES = dict(vocab_size=258, seq_len=32, mask_id=257)
TRAIN = [sentences(4000, seed) for seed in range(3)]
VALID = [sentences(1500, seed) for seed in (7, 8)]


@pytest.fixture
def directory(tmp_path):
    """Prepares three training and two held-out files."""

    def make(name="data", **changes):
        for split, texts in (("train", TRAIN), ("valid", VALID)):
            (tmp_path / split).mkdir(exist_ok=True)
            for number, text in enumerate(texts):
                (tmp_path / split / f"{number}.txt").write_text(text)
        base = dict(seq_len=32, tokenizer="byte", valid=(str(tmp_path / "valid"),), num_workers=1)
        prepare([str(tmp_path / "train")], tmp_path / name, PrepareOptions(**(base | changes)))
        return tmp_path / name

    return make


def by_name(table):
    return {row.coder: row for row in table.rows}


def text_of(texts):
    """What compressors get: the rows' text, a byte after each document."""
    return "".join(f"{text}\0" for text in texts).encode()


def test_compressors_code_the_same_text(directory):
    table = compare_coders(directory())
    found = by_name(table)
    before, text = text_of(TRAIN), text_of(VALID)
    before, text = before[: len(before) // 32 * 32], text[: len(text) // 32 * 32]
    assert table.num_tokens == len(text) and table.train_tokens == len(before)
    # The documents' EOS are symbols, and no text.
    assert table.num_bytes == pytest.approx(len(text) - 2, abs=1)
    for name, compress in (
        ("gzip -9", lambda t: gzip.compress(t, 9)),
        ("bzip2 -9", lambda t: bz2.compress(t, 9)),
        ("xz -9e (lzma)", lambda t: lzma.compress(t, preset=9 | lzma.PRESET_EXTREME)),
    ):
        alone = 8 * len(compress(text))
        after = 8 * (len(compress(before + text)) - len(compress(before)))
        assert found[f"{name}, alone"].bits_per_token == pytest.approx(alone / len(text))
        both = found[f"{name}, after the training text"]
        assert both.bits_per_token == pytest.approx(after / len(text))
        assert both.bits_per_byte == pytest.approx(after / table.num_bytes)
        assert after < alone and both.stderr_data is None


def test_ngrams_code_the_rows_that_the_model_is_scored_on(directory, make_model):
    place, model = directory(), make_model(**SIZES)
    options = CoderOptions(rows=10, order=3, score=ScoreOptions(estimator="exact"))
    table = compare_coders(place, options, {"ours": model})
    found = by_name(table)
    train, valid = TokenRows(place, "train"), TokenRows(place, "valid")
    ids_RL = train.rows(np.arange(train.num_rows)).ids_BL.numpy()
    everywhere = np.ones(ids_RL.shape, dtype=bool)
    ngrams = count_ngrams(ids_RL, everywhere, everywhere, order=3, vocab_size=258, num_symbols=257)
    rows = valid.rows(np.arange(10)).ids_BL
    for k, nats_RL in enumerate(ngrams.nats(rows.numpy()), 1):
        row = found[f"{k}-gram (Kneser-Ney)"]
        assert row.bits_per_token == pytest.approx(nats_RL.mean() / math.log(2))
        error = nats_RL.mean(1).std(ddof=1) / math.sqrt(10) / math.log(2)
        assert row.stderr_data == pytest.approx(error * table.num_tokens / table.num_bytes)
    known = likelihood(model, rows, "exact", bos=False, num_bytes=table.num_bytes)
    bound, exact = found["ours, bound"], found["ours, exact"]
    assert bound.bits_per_byte == pytest.approx(known.bits_per_byte)
    assert exact.bits_per_byte == pytest.approx(known.exact_bits_per_byte)
    assert bound.is_bound and not exact.is_bound and bound.stderr_noise is None
    assert table.num_tokens == known.num_tokens == 320
    assert table.models["ours"]["estimator"] == "exact"


def test_drawn_masks_orders_and_autoregressive_models_have_their_rows(
    directory, make_model, make_ar
):
    place = directory()
    models = {"blocks": make_model(**SIZES), "next": make_ar(**SIZES)}
    options = CoderOptions(rows=4, score=ScoreOptions(samples=4))  # too few to enumerate
    found = by_name(compare_coders(place, options, models))
    assert found["blocks, bound"].stderr_noise > 0 and found["blocks, bound"].is_bound
    assert not found["next, exact"].is_bound and found["next, exact"].stderr_noise is None
    valid = TokenRows(place, "valid").rows(np.arange(4)).ids_BL
    exact = likelihood(models["next"], valid, bos=False).nats_per_token / math.log(2)
    assert found["next, exact"].bits_per_token == pytest.approx(exact)
    options = CoderOptions(rows=4, score=ScoreOptions(estimator="orders", samples=2, orders=2))
    found = by_name(compare_coders(place, options, {"blocks": models["blocks"]}))
    assert found["blocks, 2-order bound"].bits_per_byte < found["blocks, bound"].bits_per_byte


@pytest.mark.parametrize("packing", ["wrap", "document"])
def test_given_and_padded_positions_are_not_coded(directory, make_model, packing):
    place = directory(packing, packing=packing, row_bos=True)
    model = make_model(**SIZES, bos=True)
    table = compare_coders(place, CoderOptions(order=2), {"ours": model})
    text = text_of(VALID)
    if packing == "wrap":
        text = text[: len(text) // 31 * 31]
    assert table.bos and table.num_tokens == len(text)
    compressed = by_name(table)["gzip -9, alone"]
    assert compressed.bits_per_token == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert table.models["ours"]["num_tokens"] == table.num_tokens
    # Every row of one padded document more or less: its n-grams never cross into padding.
    counts = torch.tensor([row.bits_per_token for row in table.rows])
    assert counts.isfinite().all() and (counts > 0).all()


def test_symbols_need_not_be_bytes(directory):
    table = compare_coders(directory("bpe", tokenizer="bpe:300"), CoderOptions(order=2))
    text = text_of(VALID)
    row = by_name(table)["xz -9e (lzma), alone"]
    # Tokens that cover the text, but for the last ones, which did not fill a row.
    assert len(text) - 32 * 16 < table.num_bytes < len(text) and table.num_tokens < len(text) / 1.5
    assert row.bits_per_byte * table.num_bytes == pytest.approx(
        row.bits_per_token * table.num_tokens
    )
    assert row.bits_per_byte == pytest.approx(
        8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text), rel=0.1
    )


def test_it_learns_from_the_first_training_rows_only(directory):
    place = directory()
    whole, part = compare_coders(place), compare_coders(place, CoderOptions(train_rows=5))
    assert part.train_tokens == 5 * 32
    for name in ("5-gram (Kneser-Ney)", "gzip -9, after the training text"):
        assert by_name(part)[name].bits_per_byte > by_name(whole)[name].bits_per_byte
    assert by_name(part)["gzip -9, alone"] == by_name(whole)["gzip -9, alone"]


def test_it_goes_on_where_it_was_stopped(directory, make_model, tmp_path, monkeypatch):
    place, model, journal = directory(), make_model(**SIZES), tmp_path / "journal"
    options = CoderOptions(rows=6)

    def stop(stage, done, total):
        if stage.startswith("ours"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_coders(place, options, {"ours": model}, stop, journal)
    assert journal.exists()
    with monkeypatch.context() as patch:
        patch.setattr(coders, "count_ngrams", None)  # nothing is counted or compressed again
        patch.setattr(coders.Compressor, "bits", None)
        resumed = compare_coders(place, options, {"ours": model}, journal=journal)
    journal.unlink()
    again = compare_coders(place, options, {"ours": model})
    assert resumed.rows == again.rows
    # Another question finds nothing there.
    with pytest.raises(KeyboardInterrupt):
        compare_coders(place, options, {"ours": model}, stop, journal)
    monkeypatch.setattr(coders, "count_ngrams", None)
    with pytest.raises(TypeError):
        compare_coders(place, CoderOptions(rows=7), journal=journal)


def test_the_page_has_every_coder_and_its_conventions(directory, make_model):
    table = compare_coders(directory(), CoderOptions(rows=4), {"ours": make_model(**SIZES)})
    page = coders_markdown(table, "data (valid)")
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(table.rows) and len({line.count("|") for line in lines}) == 1
    bound, exact = table.rows[-2:]
    assert f"| ours, bound | <= {bound.bits_per_byte:.4f} |" in page
    assert f"| ours, exact | {exact.bits_per_byte:.4f} |" in page
    assert "128 tokens" in page and "no BOS given" in page
    assert "ours: S = 4, all mask sets enumerated\n" in page
    named = replace(table.rows[-1], coder=HOSTILE)
    models = {HOSTILE: table.models["ours"]}
    check_markdown(coders_markdown(replace(table, rows=(named,), models=models), HOSTILE))
    values = table.to_dict()
    assert values["rows"] == 4 and len(values["coders"]) == len(table.rows)
    assert values["versions"]["torch"] == torch.__version__


def test_what_cannot_be_is_refused(directory, make_model, monkeypatch):
    place = directory()
    for mistake, sentence in (
        (dict(order=0), "order is 0"),
        (dict(rows=0), "rows is 0"),
        (dict(train_rows=-1), "train_rows is -1"),
        (dict(split="train"), "split is train"),
    ):
        with pytest.raises(UserError, match=sentence):
            CoderOptions(**mistake)
    with pytest.raises(UserError, match="no split 'test'"):
        compare_coders(place, CoderOptions(split="test"))
    with pytest.raises(UserError, match="V = 258"):
        compare_coders(place, models={"other": make_model()})
    with pytest.raises(UserError, match="only the model has a given BOS"):
        compare_coders(place, models={"other": make_model(**SIZES, bos=True)})
    clipped = CoderOptions(score=ScoreOptions(estimator="count[0.3,0.8]"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="clipped"):
        patch.setattr(coders, "count_ngrams", None)  # refused before anything is counted
        compare_coders(place, clipped, {"ours": make_model(**SIZES)})
    monkeypatch.setattr(coders, "MAX_TRAIN_TOKENS", 320)
    with pytest.raises(UserError, match="give train_rows, up to 10"):
        compare_coders(place)
    assert compare_coders(place, CoderOptions(train_rows=10)).train_tokens == 320
