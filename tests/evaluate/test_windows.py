"""Windows: every token once, with enough before it, and the same value as computed directly."""

import math

import numpy as np
import pytest
import torch

from blockdiffusion.diffusion.exact import exact_blocks
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.scoring import ScoreOptions, score
from blockdiffusion.evaluate.windows import check_stride, default_stride, document_windows

BOS = 11


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize(("context", "stride"), [(16, 4), (16, 8), (16, 12), (8, 4), (12, 1)])
def test_every_token_is_scored_once_with_enough_before_it(context, stride, bos_id):
    first = [] if bos_id is None else [bos_id]
    payload = context - len(first)
    for length in [*range(1, 60), 200]:
        scored = []
        windows = list(document_windows(range(100, 100 + length), 3, context, stride, bos_id))
        for number, window in enumerate(windows):
            ids = window.ids.tolist()
            assert window.unit == 3 and len(ids) <= context and ids[: len(first)] == first
            text = ids[len(first) :]
            assert text == list(range(text[0], text[0] + len(text)))  # the document as it stands
            new = ids[window.given :]
            assert new and scored + new == list(range(100, 100 + len(scored) + len(new)))
            scored += new
            assert window.given == (len(first) if number == 0 else context - stride)
            assert number == 0 or len(new) <= stride
        assert len(scored) == length
        assert len(windows) == 1 + max(0, math.ceil((length - payload) / stride))


def directly(model, document, context, stride, bos_id):
    """Nats of a document, block by block: each from a row that ends with it, nothing after."""
    size = model.config.block_size
    first = [] if bos_id is None else [bos_id]
    payload = context - len(first)
    total, begin = 0.0, 0
    while begin < len(document):
        end = min(payload if begin == 0 else begin + stride, len(document))
        start = 0 if begin == 0 else begin - (payload - stride)
        row = torch.tensor([[*first, *document[start:end]]])
        for block in range(0, row.shape[1], size):
            free = torch.zeros_like(row, dtype=torch.bool)
            free[:, max(block, len(first) + begin - start) : block + size] = True
            upto = slice(0, block + size)
            if free[:, upto].any():
                pad = (0, -row[:, upto].shape[1] % size)
                valid = torch.nn.functional.pad(torch.ones_like(row[:, upto]), pad).bool()
                clean, free = (torch.nn.functional.pad(x[:, upto], pad) for x in (row, free))
                total += float(exact_blocks(model, clean, free, valid).nelbo_BK.sum())
        begin = end
    return total


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize(
    ("block_size", "context", "stride"), [(4, 16, 4), (4, 16, 12), (2, 8, 6), (1, 8, 3), (8, 8, 3)]
)
def test_windows_give_the_value_computed_directly(
    make_model, random_ids, block_size, context, stride, bos_id
):
    model = make_model(block_size=block_size, seq_len=context)
    check_stride(context, stride, block_size, bos_id is not None)
    documents = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 16, 37)]
    windows = [
        window
        for unit, document in enumerate(documents)
        for window in document_windows(document, unit, context, stride, bos_id)
    ]
    found = score(
        model, windows, ScoreOptions(estimator="exact"), bos=bos_id is not None, num_bytes=100
    )
    expected = [directly(model, document, context, stride, bos_id) for document in documents]
    assert found.nats_per_row.tolist() == pytest.approx(expected, rel=1e-9)
    assert found.num_tokens == 3 + 16 + 37 and found.num_rows == 3
    assert found.bits_per_byte == pytest.approx(sum(expected) / 100 / math.log(2))


@pytest.mark.parametrize("bos", [False, True])
def test_windows_of_an_autoregressive_model_token_by_token(make_ar, random_ids, bos):
    """Each token from exactly the tokens before it in its window."""
    model, context, stride = make_ar(bos=bos), 8, 3
    document = random_ids(1, 21)[0].tolist()
    start_symbol = BOS if bos else model.config.mask_id
    payload = context - bos
    total = 0.0
    for position, token in enumerate(document):
        start = 0
        if position >= payload:
            start = ((position - payload) // stride + 1) * stride
        before = torch.tensor([[start_symbol, *document[start:position]]])
        with torch.no_grad():
            logits = model.head(model.encode_causal(before))[0, -1]
        logits[model.config.mask_id] = -math.inf
        total -= float(logits.log_softmax(-1)[token])
    windows = list(document_windows(document, 0, context, stride, BOS if bos else None))
    found = score(model, windows, ScoreOptions(), bos=bos)
    assert float(found.nats_per_row[0]) == pytest.approx(total, rel=1e-9)
    assert found.num_tokens == 21 and found.is_bound is False


def test_more_context_never_changes_what_is_scored(make_model, random_ids):
    model, document = make_model(), random_ids(1, 50)[0].tolist()
    totals = [
        score(
            model,
            list(document_windows(np.array(document), 0, context, 4)),
            ScoreOptions(estimator="exact"),
            bos=False,
        ).num_tokens
        for context in (4, 8, 16)
    ]
    assert totals == [50, 50, 50]


@pytest.mark.parametrize(
    ("context", "stride", "block_size", "bos", "sentence"),
    [
        (16, 6, 4, False, "multiples of the block size 4"),
        (18, 4, 4, False, "multiples of the block size 4"),
        (16, 16, 4, True, "the stride at most 12"),
        (16, 17, 4, False, "from 1 to the context"),
        (16, 16, 16, True, "from 1 to 15"),
        (1, 1, 1, True, "from 1 to the context"),
    ],
)
def test_windows_that_cannot_be_scored(context, stride, block_size, bos, sentence):
    with pytest.raises(UserError, match=sentence):
        check_stride(context, stride, block_size, bos)


@pytest.mark.parametrize(
    ("context", "block_size", "stride"), [(128, 4, 64), (24, 16, 16), (12, 8, 8), (16, 16, 8)]
)
def test_the_default_stride_is_half_of_the_context_in_blocks(context, block_size, stride):
    assert default_stride(context, block_size) == stride
