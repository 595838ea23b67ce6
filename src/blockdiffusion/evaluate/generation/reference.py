"""Real text to compare samples with, cut to their length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from blockdiffusion.data.loader import TokenRows
from blockdiffusion.data.manifest import MANIFEST_FILE, TOKENIZER_FOLDER
from blockdiffusion.data.sources import open_sources
from blockdiffusion.data.tokenizers import encode, load_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.samples import Sample, documents_of

DOCUMENT_BYTES = 65_536
POOL = 20  # pieces of text files that are read for each one taken


def evenly_spread(number: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 .. number - 1, evenly spread, with the last one."""
    kept = min(number, most)
    return [(index + 1) * number // kept - 1 for index in range(kept)]


def reference_samples(
    sources: Sequence[str], count: int, max_tokens: int, tokenizer: Any, split: str = "valid"
) -> list[Sample]:
    """Read at most `count` pieces of real text of at most `max_tokens` tokens each.

    Args:
        sources: one directory that `blockdiff prepare` made, for rows evenly spread over `split`;
            or text files, folders and the like, as `prepare` reads them, for pieces evenly spread
            over their beginning.
        tokenizer: counts the tokens of text files.

    Raises:
        UserError: there is nothing to read, or no text in it.
    """
    if len(sources) == 1 and (Path(sources[0]) / MANIFEST_FILE).is_file():
        samples = _rows(Path(sources[0]), count, max_tokens, split)
    else:
        pieces = list(islice(_pieces(sources, max_tokens, tokenizer), POOL * count))
        samples = [pieces[index] for index in evenly_spread(len(pieces), count)]
    if not samples:
        raise UserError(f"the reference {', '.join(sources)} holds no text; give other text")
    return samples


def _rows(directory: Path, count: int, max_tokens: int, split: str) -> list[Sample]:
    source, tokenizer = TokenRows(directory, split), load_tokenizer(directory / TOKENIZER_FOLDER)
    batch = source.rows(np.array(evenly_spread(source.num_rows, count)))
    first = int(source.manifest.row_bos)
    samples = []
    for row, ids in enumerate(batch.ids_BL.tolist()):
        length = len(ids) if batch.valid_BL is None else int(batch.valid_BL[row].sum())
        ids = ids[first : min(length, first + max_tokens)]
        documents = documents_of(ids, source.manifest.eos_id, tokenizer)
        samples.append(Sample(text="".join(documents), documents=documents))
    return samples


def _pieces(sources: Sequence[str], max_tokens: int, tokenizer: Any) -> Iterator[Sample]:
    opened = open_sources(sources, field="text", documents="auto", document_bytes=DOCUMENT_BYTES)
    for source in opened:
        for document in source.documents():
            ids = encode(tokenizer, document)
            # The rest of a document is dropped unless it is all of it: it would be shorter.
            for start in range(0, max(len(ids) - max_tokens, 0) + 1, max_tokens):
                text = tokenizer.decode(ids[start : start + max_tokens])
                yield Sample(text=text, documents=(text,))
