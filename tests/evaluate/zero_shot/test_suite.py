"""Zero-shot suites on small local files: conventions, missing sets, stopping and going on."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate import scoring
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.zero_shot import suite
from blockdiffusion.evaluate.zero_shot.options import SUITES, ZeroShotOptions
from blockdiffusion.evaluate.zero_shot.suite import measure_zero_shot
from blockdiffusion.evaluate.zero_shot.table import (
    zero_shot_csv,
    zero_shot_lines,
    zero_shot_markdown,
)
from tests.hostile import HOSTILE, check_csv, check_markdown

BYTES = dict(vocab_size=258, mask_id=257, seq_len=16, bos_id=256, eos_id=256)
EXACT = LikelihoodOptions(estimator="exact")
SENTENCES = [f" the <unk> 's N shares rose {number} points " for number in range(12)]
PASSAGES = ["\u201cYes,\u201d she said.", "A second passage, which is longer than one window is."]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Small files of two sets, and no network for the others."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "ptb.valid.txt").write_text("\n".join(SENTENCES) + "\n")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES)
    (tmp_path / "lambada_test.jsonl").write_text(lines)
    return tmp_path


@pytest.fixture
def local(place):
    return (f"ptb={place}", f"lambada={place / 'lambada_test.jsonl'}")


def with_bytes(model):
    model.tokenizer = byte_tokenizer()
    return model


def only(local, **changes):
    return ZeroShotOptions(
        **{"tasks": ("ptb", "lambada"), "local": local, "score": EXACT} | changes
    )


def test_the_suite_is_the_papers_table():
    names = [task.name for task in SUITES["paper"]]
    assert names == ["ptb", "wikitext", "lm1b", "lambada", "ag_news", "pubmed", "arxiv"]
    for task, named in ZeroShotOptions().sources():
        assert task.split in named.data_set.splits and named.split == task.split


def test_by_default_rows_are_framed_and_wrapped_as_in_the_paper(make_model, local):
    """Against the rows built by hand: one stream without EOS, 14 of 16 tokens a row."""
    model = with_bytes(make_model(**BYTES))
    table = measure_zero_shot(model, only(local))
    assert (table.frame, table.context, table.stride) == ("bos-eos", 16, None)
    stream = "".join(DETOKENIZERS["ptb"](sentence) for sentence in SENTENCES).encode()
    count = len(stream) // 14
    rows = [[256, *stream[14 * n : 14 * n + 14], 256] for n in range(count)]
    expected = likelihood(model, torch.tensor(rows), "exact", bos=True, num_bytes=14 * count)
    row = table.rows[0]
    assert (row.task, row.documents, row.detokenizer) == ("ptb", 12, "ptb")
    assert row.result.num_tokens == 15 * count and row.result.num_rows == count
    assert row.result.bos and row.num_bytes == pytest.approx(14 * count)
    for name in ("nats_per_token", "exact_nats_per_token", "stderr_data", "bits_per_byte"):
        assert getattr(row.result, name) == pytest.approx(getattr(expected, name)), name


@pytest.mark.parametrize(
    ("bos", "frame", "counted"), [(None, "bos-eos", 15), (True, "bos", 15), (False, "none", 16)]
)
def test_the_frame_follows_the_models_training(make_model, local, bos, frame, counted):
    model = with_bytes(make_model(**BYTES, bos=bos))
    table = measure_zero_shot(model, only(local, tasks=("ptb",), limit=3))
    result = table.rows[0].result
    assert table.frame == frame and result.bos == (frame != "none")
    assert (result.num_tokens, result.num_rows) == (3 * counted, 3)
    if frame == "none":  # a byte is a token
        assert result.bits_per_byte == pytest.approx(result.nats_per_token / math.log(2))


def test_documents_by_themselves_with_a_stride(make_model, local):
    """The short passage has one window; data errors are over documents."""
    model = with_bytes(make_model(**BYTES, bos=False))
    options = only(local, tasks=("lambada",), packing="document", stride=4, document_eos=True)
    table = measure_zero_shot(model, options)
    texts = [f"\n{PASSAGES[0]}".replace("\u201c", '"').replace("\u201d", '"'), f"\n{PASSAGES[1]}"]
    row = table.rows[0]
    assert (row.documents, row.result.num_rows, table.stride) == (2, 2, 4)
    assert row.result.num_tokens == sum(len(text) + 1 for text in texts)
    assert row.num_bytes == sum(map(len, texts))
    ids = torch.tensor([[*texts[0].encode()[:16]]])
    first = likelihood(model, ids, "exact")
    rest = [*texts[0].encode(), 256][4:]
    given = torch.arange(len(rest))[None] < 12
    second = likelihood(model, torch.tensor([rest[:16]]), "exact", given=given[:, :16])
    assert len(texts[0]) + 1 <= 20  # two windows
    expected = float(first.nats_per_row + second.nats_per_row)
    assert float(row.result.nats_per_row[0]) == pytest.approx(expected)


KINDS = {
    "block diffusion": dict(),
    "one block": dict(block_size=16),
    "autoregressive": dict(objective="autoregressive", adaln=False, block_size=1),
}


@pytest.mark.parametrize("packing", ["wrap", "document"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(make_model, local, kind, packing):
    model = with_bytes(make_model(**BYTES, **KINDS[kind]))
    score = LikelihoodOptions(mc_samples=2)
    table = measure_zero_shot(model, only(local, packing=packing, score=score))
    for row in table.rows:
        assert math.isfinite(row.result.perplexity) and row.result.stderr_data > 0
        assert row.result.is_bound == (kind != "autoregressive")
    assert all(len(line) <= 100 for line in zero_shot_lines(table, "m")[1:])


def test_the_number_of_documents_can_be_limited(make_model, local):
    model = with_bytes(make_model(**BYTES))
    table = measure_zero_shot(model, only(local, max_documents=1, packing="document"))
    assert [row.documents for row in table.rows] == [1, 1]
    assert [row.result.num_rows for row in table.rows] == [1, 1]


def test_a_missing_set_is_in_the_table_and_stops_nothing(make_model, local):
    model = with_bytes(make_model(**BYTES))
    table = measure_zero_shot(model, ZeroShotOptions(local=local, score=EXACT))
    found = {row.task: row.missing for row in table.rows}
    assert found["ptb"] is None and found["lambada"] is None and len(found) == 7
    assert all("name local files as" in found[name] for name in ("wikitext", "lm1b", "arxiv"))
    text = "\n".join(zero_shot_lines(table, "model"))
    assert "lm1b: missing, the data set lm1b cannot be fetched" in text


def test_when_a_missing_set_is_there_only_that_one_is_measured(
    make_model, local, tmp_path, monkeypatch
):
    model, journal = with_bytes(make_model(**BYTES)), tmp_path / "z.journal"
    first = measure_zero_shot(model, only(local[:1]), journal=journal)
    assert first.rows[1].missing and journal.exists()
    calls, real = [], likelihood
    monkeypatch.setattr(
        scoring, "likelihood", lambda *args, **more: (calls.append(1), real(*args, **more))[1]
    )
    second = measure_zero_shot(model, only(local), journal=journal)
    assert len(calls) == 1 and second.rows[1].result is not None
    assert second.rows[0].result.nats_per_token == first.rows[0].result.nats_per_token


def test_a_short_or_broken_set_is_missing_too(make_model, place, local):
    (place / "ptb.valid.txt").write_text("short\n")
    model = with_bytes(make_model(**BYTES))
    table = measure_zero_shot(model, only(local))
    assert "does not fill one row of 16 tokens" in table.rows[0].missing
    (place / "ptb.valid.txt").write_bytes(b"\xff not text")
    table = measure_zero_shot(model, only(local))
    assert "not UTF-8 text" in table.rows[0].missing and table.rows[1].result is not None


def test_without_any_set_there_is_no_table(make_model, place):
    model = with_bytes(make_model(**BYTES))
    with pytest.raises(UserError, match="no set of the suite can be read; of ptb: the data set"):
        measure_zero_shot(model, ZeroShotOptions())


def test_the_asked_split_must_be_there(make_model, place, local):
    (place / "ptb.test.txt").write_text("\n".join(SENTENCES))
    model = with_bytes(make_model(**BYTES))
    table = measure_zero_shot(model, only((*local[1:], f"ptb:test={place}")))
    assert table.rows[0].source.startswith("ptb:test=")
    table = measure_zero_shot(model, only((*local[1:], f"ptb={place / 'ptb.test.txt'}")))
    assert "the split test, but validation of ptb is asked" in table.rows[0].missing


def test_a_stopped_measurement_goes_on(make_model, local, tmp_path, monkeypatch):
    model = with_bytes(make_model(**BYTES))
    options = only(local, score=LikelihoodOptions(mc_samples=3))
    whole = measure_zero_shot(model, options)
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 160)
    chunked = measure_zero_shot(model, options)
    calls, real = [], likelihood

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(scoring, "likelihood", interrupted)
    journal = tmp_path / "z.journal"
    with pytest.raises(KeyboardInterrupt):
        measure_zero_shot(model, options, journal=journal)
    assert journal.exists()
    progress = []
    resumed = measure_zero_shot(
        model, options, journal=journal, progress=lambda *state: progress.append(state)
    )
    for before, after, other in zip(chunked.rows, resumed.rows, whole.rows, strict=True):
        assert after.result.nats_per_token == before.result.nats_per_token
        error = math.hypot(after.result.stderr_noise, other.result.stderr_noise)
        # Other chunks draw other masks: 4 standard errors (false alarm 6e-5), each from few draws.
        assert abs(after.result.nats_per_token - other.result.nats_per_token) < 8 * error
    assert progress[0] == ("ptb: documents", 0, None) and progress[-1][0] == "lambada: rows"
    assert next(state for state in progress if state[0] == "ptb: rows")[1] == 10
    total = sum(-(-row.result.num_rows // 10) for row in chunked.rows)
    assert len(calls) == total + 1  # only the one that was interrupted began again


def test_csv_and_markdown_say_the_same(make_model, local):
    model = with_bytes(make_model(**BYTES))
    table = measure_zero_shot(model, only(local, tasks=("ptb", "lm1b", "lambada")))
    records = list(csv.DictReader(io.StringIO(zero_shot_csv(table))))
    assert [record["task"] for record in records] == ["ptb", "lm1b", "lambada"]
    assert records[1]["perplexity"] == "" and "cannot be fetched" in records[1]["missing"]
    page = zero_shot_markdown(table, "model")
    for row, record in zip(table.rows, records, strict=True):
        if row.result is not None:
            assert float(record["perplexity"]) == row.result.perplexity
            assert float(record["exact_perplexity"]) == row.result.exact_perplexity
            assert f"| {row.task} | <= {row.result.perplexity:.2f} | 0.00 |" in page
            assert f"| {row.result.exact_perplexity:.2f} |" in page
            assert f"detokenizer {row.detokenizer}; {row.result.num_rows:,} rows" in page
    assert "| lm1b | missing |" in page and "a BOS at the beginning of every row, given" in page
    assert "nothing between them, wrapped to rows of 16 tokens" in page
    hostile = replace(
        table, rows=(table.rows[0], replace(table.rows[1], task=HOSTILE, missing=HOSTILE))
    )
    check_csv(zero_shot_csv(hostile))
    check_markdown(zero_shot_markdown(hostile, HOSTILE))
    values = json.loads(json.dumps(table.to_dict()))
    assert values["sets"][0]["num_tokens"] == table.rows[0].result.num_tokens
    assert values["context"] == 16 and values["score"]["estimator"] == "exact"


def test_what_is_not_as_it_was_asked_for_is_told(make_model, local, monkeypatch):
    monkeypatch.setattr("blockdiffusion.evaluate.replicates.MAX_SAMPLES", 4)
    model = with_bytes(make_model(**BYTES, block_size=1))
    score = LikelihoodOptions(estimator="complement", mc_samples=2)
    page = zero_shot_markdown(measure_zero_shot(model, only(local, score=score)), "model")
    assert page.count("one is used") == 1
    score = LikelihoodOptions(estimator="bernoulli", mc_samples=2, target_stderr=1e-9)
    page = zero_shot_markdown(measure_zero_shot(model, only(local, score=score)), "model")
    for task in ("ptb", "lambada"):
        assert f"* {task}: the noise error is" in page
    assert page.count("the target of 1e-09 was not reached") == 2
    assert "bernoulli, 4 samples, mask probabilities below 0.001 left out" in page


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(suite="glue"), "suite is 'glue': it must be one of paper"),
        (dict(tasks=("ptb", "wiki")), "has no 'wiki': it has ptb, wikitext"),
        (dict(packing="rows"), "packing is 'rows'"),
        (dict(frame="eos"), "frame is 'eos': it must be one of auto, none, bos, bos-eos"),
        (dict(stride=4), "stride goes with packing document"),
        (dict(packing="document", limit=4), "limit goes with packing wrap"),
        (dict(context=0), "context is 0"),
        (dict(max_documents=0), "max_documents is 0"),
        (dict(local=("ptb",)), "it must be NAME=PATH"),
        (dict(local=("c4=.",)), "with a name of the suite"),
        (dict(local=("ptb=/no/where",)), "no file or folder '/no/where'"),
    ],
)
def test_options_that_cannot_be(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        ZeroShotOptions(**changes)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_read(
    make_model, make_ar, monkeypatch
):
    monkeypatch.setattr(suite.NamedSet, "source", lambda *_: pytest.fail("read"))
    small = make_model()
    for model, options, sentence in [
        (small, ZeroShotOptions(), "has no tokenizer"),
        (with_bytes(make_model()), ZeroShotOptions(), "V = 258 and mask 257, the model V = 13"),
        (
            with_bytes(make_model(**BYTES)),
            ZeroShotOptions(packing="document", stride=6),
            "multiples of the block size 4",
        ),
        (with_bytes(make_model(**BYTES)), ZeroShotOptions(context=2), "no room for text"),
        (
            with_bytes(make_ar(**BYTES)),
            ZeroShotOptions(score=LikelihoodOptions(estimator="count")),
            "exact in one pass",
        ),
    ]:
        with pytest.raises(UserError, match=sentence):
            measure_zero_shot(model, options)


def test_real_sets(make_model, data_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = with_bytes(make_model(**BYTES, bos=False))
    options = ZeroShotOptions(
        tasks=("wikitext", "lambada"),
        local=(
            f"wikitext={data_folder / 'wikitext-2'}",
            f"lambada={data_folder / 'lambada' / 'lambada_test.jsonl'}",
        ),
        limit=8,
        score=LikelihoodOptions(mc_samples=2),
    )
    table = measure_zero_shot(model, options)
    assert [row.result.num_tokens for row in table.rows] == [128, 128]
    assert np.isclose(table.rows[0].num_bytes, 128, rtol=0.02)  # bytes are tokens
