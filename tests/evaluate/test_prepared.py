import numpy as np
import pytest

from blockdiffusion.data.loader import TokenRows
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.prepared import read_rows

TEXT = "It was the best of times, it was the worst of times.\n" * 200


@pytest.fixture
def directory(tmp_path):
    """Prepares TEXT as bytes (V = 258) in rows of 32, with or without a BOS."""

    def make(row_bos):
        (tmp_path / "text.txt").write_text(TEXT)
        options = PrepareOptions(
            seq_len=32, tokenizer="byte", row_bos=row_bos, document_bytes=1000, num_workers=1
        )
        prepare([str(tmp_path / "text.txt")], tmp_path / f"data-{row_bos}", options)
        return tmp_path / f"data-{row_bos}"

    return make


def test_rows_and_their_bytes(directory, make_model):
    place, model = directory(False), make_model(vocab_size=258, seq_len=32, mask_id=257)
    source = TokenRows(place, "valid")
    whole, part = read_rows(place, "valid", model), read_rows(place, "valid", model, rows=2)
    assert len(whole.batch.ids_BL) == source.num_rows and len(part.batch.ids_BL) == 2
    assert (part.batch.ids_BL == source.rows(np.arange(2)).ids_BL).all()
    assert whole.num_bytes == source.manifest.splits["valid"].bytes
    # A byte tokenizer: one byte a token, but for the EOS of the documents.
    assert 62 <= part.num_bytes <= 64


def test_model_and_data_must_agree_on_the_bos(directory, make_model):
    sizes = dict(vocab_size=258, seq_len=32, mask_id=257)
    with_bos, without = directory(True), directory(False)
    silent, yes, no = (make_model(**sizes, bos=bos) for bos in (None, True, False))
    assert read_rows(with_bos, "valid", silent).bos and not read_rows(without, "valid", silent).bos
    assert read_rows(with_bos, "valid", yes).bos and not read_rows(without, "valid", no).bos
    with pytest.raises(UserError, match="only the data have"):
        read_rows(with_bos, "valid", no)
    with pytest.raises(UserError, match="only the model has"):
        read_rows(without, "valid", yes)
    assert not read_rows(without, "valid", yes, bos=False).bos


def test_other_vocabularies_and_empty_choices_are_refused(directory, make_model):
    place = directory(False)
    with pytest.raises(UserError, match="V = 258"):
        read_rows(place, "valid", make_model())
    with pytest.raises(UserError, match="rows is 0; it must be at least 1"):
        read_rows(place, "valid", make_model(vocab_size=258, mask_id=257), rows=0)
