"""What `prepare` can be asked for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.shards import PACKERS
from blockdiffusion.data.sources import DOCUMENT_RULES, MAX_DOCUMENT_BYTES
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import MOST_IDS, check_limits


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """How text becomes rows of tokens.

    Attributes:
        seq_len: tokens of one row (L).
        tokenizer: `bpe:SIZE` (trained here, on the training text), `byte`, or a Hugging Face
            name or local path.
        packing: `wrap` (documents in a row, cut to rows; the last partial row is dropped) or
            `document` (one document a row, padded at the right; a longer one goes on in the next
            rows).
        row_bos: begin every row with BOS, which is then given: never masked, never scored.
        row_eos: end every row with EOS.
        document_eos: put EOS after every document.
        valid_fraction: share of documents held out for validation: one of every
            round(1 / valid_fraction), drawn by `seed`, and at least one; 0 for none. Read only
            where `valid` is empty.
        valid: sources of the validation split; a named data set brings its own.
        field: name of the text's field in JSON lines, parquet files and Hugging Face data sets;
            `a.b` is b inside a, unless a field is called that.
        documents: how a text file is cut to documents: `auto`, `file`, `line`, `blank-line`
            (see `sources.TextFile`).
        document_bytes: size above which `auto` cuts a file.
        detokenize: undoes a corpus's marks and spaces, see `detokenizers`; `none` keeps the text,
            but for named data sets, which bring their own.
        skip_invalid: documents that may be left out because they cannot be read: their field is no
            string, their line is no JSON, they are not UTF-8. Any more are an error.
        seed: of the train/validation split.
        num_workers: worker processes; 0 for one per core, and never more than four per core. The
            result does not depend on it.

    Raises:
        UserError: a value that is not allowed.
    """

    seq_len: int = 128
    tokenizer: str = "bpe:2048"
    packing: str = "wrap"
    row_bos: bool = False
    row_eos: bool = False
    document_eos: bool = True
    valid_fraction: float = 0.05
    valid: tuple[str, ...] = ()
    field: str = "text"
    documents: str = "auto"
    document_bytes: int = 65536
    detokenize: str = "none"
    skip_invalid: int = 0
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "valid", tuple(map(str, self.valid)))
        for name, allowed in (
            ("packing", PACKERS),
            ("documents", DOCUMENT_RULES),
            ("detokenize", DETOKENIZERS),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} is {shown(value)}: it must be one of {', '.join(allowed)}")
        if self.seq_len < 1 + self.row_bos + self.row_eos:
            raise UserError(
                f"seq_len is {self.seq_len}, which leaves no room for text: it must be at least "
                f"{1 + self.row_bos + self.row_eos} with these row_bos and row_eos"
            )
        if not 0 <= self.valid_fraction <= 0.5:
            raise UserError(f"valid_fraction is {self.valid_fraction}: it must be from 0 to 0.5")
        most = MAX_DOCUMENT_BYTES // 2
        if not 16 <= self.document_bytes <= most:
            raise UserError(
                f"document_bytes is {self.document_bytes}: it must be from 16 to {most}"
            )
        check_limits(self)
        size = self.tokenizer.removeprefix("bpe:")
        if size != self.tokenizer and not (
            size.isascii() and size.isdecimal() and len(size) <= 9 and int(size) <= MOST_IDS
        ):
            raise UserError(
                f"tokenizer is {shown(self.tokenizer)}: a BPE trained here is bpe:SIZE, like "
                f"bpe:2048, of at most {MOST_IDS} ids"
            )

    def content(self) -> dict[str, Any]:
        """The options that the result depends on, as JSON gives them back."""
        options = dataclasses.asdict(self)
        del options["num_workers"]
        return json.loads(json.dumps(options))
