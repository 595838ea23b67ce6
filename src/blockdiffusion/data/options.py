"""The options of `prepare`. This module imports no numpy: the command line is made from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from blockdiffusion.data.registry import BUILT_INS, DATA_SETS
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import MOST_IDS, check_limits
from blockdiffusion.options import check_words, option


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """How text becomes rows of tokens.

    Raises:
        UserError: a value is not allowed.
    """

    tokenizer: str = option(
        "bpe:2048",
        "bpe:SIZE (trained here, on the training text), byte, or a Hugging Face name or path.",
        choices="bpe: byte",
    )
    seq_len: int = option(128, "L, tokens per row; the block size must divide it.")
    packing: Literal["wrap", "document", "chat"] = option(
        "wrap",
        "wrap (documents one after another; the last partial row is dropped), document (one a "
        "row, padded at the right; a longer one continues in the next rows) or chat (messages, by "
        "the tokenizer's chat template; several conversations a row, which do not see each other; "
        "only responses are learnt).",
    )
    align: int = option(
        32,
        "With chat: fill each conversation with EOS, which is learnt, to a multiple of this; the "
        "model's block size must divide it.",
    )
    row_bos: bool = option(
        False, "Begin every row with a BOS (context): never masked, never scored."
    )
    row_eos: bool = option(False, "End every row with an EOS.")
    document_eos: bool = option(True, "Put an EOS after every document.")
    valid: tuple[str, ...] = option(
        (),
        "Source of the validation split; may be repeated. A named data set brings its own.",
        choices=" ".join((*DATA_SETS, *BUILT_INS)),
    )
    valid_fraction: float = option(
        0.05,
        "Share of documents held out if no --valid is given: one of every round(1 / fraction), "
        "drawn by --seed, and at least one; 0 for none.",
    )
    field: str = option(
        "text",
        "Field of the text in JSON lines, CSV, parquet files and Hugging Face data sets; a.b is "
        "b inside a, unless a field is called that. With chat messages by default.",
    )
    skip_invalid: int = option(
        0, "Documents that may be left out because they cannot be read; any more are an error."
    )
    documents: Literal["auto", "file", "line", "blank-line"] = option(
        "auto",
        "Documents of a text file: auto, file, line or blank-line.",
    )
    document_bytes: int = option(65536, "Size above which auto splits a text file at a blank line.")
    detokenize: Literal[
        "none", "wikitext", "wikitext-paper", "ptb", "lm1b", "lambada", "scientific-papers"
    ] = option(
        "none",
        "none (a set by name brings its own), wikitext, wikitext-paper, ptb, lm1b, lambada or "
        "scientific-papers: undo a corpus's marks and spaces.",
    )
    seed: int = option(0, "Of the train/validation split.")
    num_workers: int = option(
        0,
        "Worker processes; 0 for one per core, and never more than four per core. The result does "
        "not depend on it.",
        flags="--workers",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "valid", tuple(map(str, self.valid)))
        check_words(self)
        check_limits(self)
        least = 1 + self.row_bos + self.row_eos
        if self.seq_len < least:
            raise UserError(
                f"seq_len is {self.seq_len}, which leaves no room for text: it must be at least "
                f"{least} with these row_bos and row_eos"
            )
        if self.packing == "chat":
            self._check_chat()
        size = self.tokenizer.removeprefix("bpe:")
        if size != self.tokenizer and not (
            size.isascii() and size.isdecimal() and len(size) <= 9 and int(size) <= MOST_IDS
        ):
            raise UserError(
                f"tokenizer is {shown(self.tokenizer)}: a BPE trained here is bpe:SIZE, like "
                f"bpe:2048, of at most {MOST_IDS} ids"
            )

    def _check_chat(self) -> None:
        """The template writes BOS and EOS, and the field is not that of a text."""
        for name, unused in (("row_bos", False), ("row_eos", False), ("detokenize", "none")):
            if getattr(self, name) != unused:
                raise UserError(
                    f"{name} is {shown(getattr(self, name))}, but packing is chat, whose template "
                    f"writes all that is not a message; leave out {name}"
                )
        if self.seq_len % self.align:
            raise UserError(
                f"seq_len is {self.seq_len}, which align={self.align} does not divide; give a "
                "multiple of it"
            )
        object.__setattr__(self, "document_eos", False)
        if self.field == "text":
            object.__setattr__(self, "field", "messages")

    def content(self) -> dict[str, Any]:
        """Return the options that the result depends on, as JSON gives them back."""
        options = asdict(self)
        del options["num_workers"]
        return json.loads(json.dumps(options))
