"""The data sets that are known by name: one table of what each is, where it is, how it is read.

To add one, add an entry to `SETS`; nothing else knows a set by its name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from blockdiffusion.errors import UserError, shown

SPLIT_WORDS = {
    "train": re.compile("train.*"),
    "validation": re.compile("valid.*|val|dev|development"),
    "test": re.compile("test.*|heldout"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LastDocuments:
    """One body of documents, of which the last `number` are the split `held_out`."""

    number: int
    held_out: str = "validation"


@dataclass(frozen=True, kw_only=True, slots=True)
class CharacterRanges:
    """One text, cut at characters: split -> (begin, end), an end of None is the text's."""

    ranges: Mapping[str, tuple[int, int | None]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DataSet:
    """A data set; two are the same only if they are the same object.

    Attributes:
        name: its name for `blockdiff prepare`.
        about: a few words on what it is.
        repository: on the Hugging Face hub; its parquet files are in one of `folders` (a
            configuration) on the main branch, or else on `refs/convert/parquet`.
        folders: tried in this order.
        field: the text's field in parquet, JSON lines and CSV files.
        splits: split -> its rows on the hub (None: unknown, and not checked), so that a part of a
            set, or another set of the same name, is never taken for it.
        held_out: the split that becomes `valid` in a prepared directory; None: documents are drawn.
        cut: how splits are made if the set is published as one; None: files are named by split.
        documents: `row` (each row, or line of a text file), `article` (rows joined from one
            WikiText title to the next), `paragraph` (a WikiText paragraph and the titles before it)
            or `piece` (the text cut at spaces).
        detokenize: see `detokenizers`.
        columns: of CSV files without a header, by name; `field` joins those of the same name.
        licence: as far as known; look it up before you publish anything made from it.
        paper: the paper's use of it.
    """

    name: str
    about: str
    repository: str
    folders: tuple[str, ...]
    field: str = "text"
    splits: Mapping[str, int | None]
    held_out: str | None
    cut: LastDocuments | CharacterRanges | None = None
    documents: Literal["row", "article", "paragraph", "piece"] = "row"
    detokenize: str = "none"
    columns: tuple[str, ...] = ()
    licence: str
    paper: str

    @property
    def is_one_body(self) -> bool:
        """Whether all splits are parts of the same published documents."""
        return isinstance(self.cut, LastDocuments)


SETS = (
    DataSet(
        name="lm1b",
        about="One Billion Words: shuffled news sentences",
        repository="billion-word-benchmark/lm1b",
        folders=("plain_text",),
        splits={"train": 30_301_028, "test": 306_688},
        held_out="test",
        detokenize="lm1b",
        licence="Apache-2.0 (scripts); news text",
        paper="trains and tests (tables 1 to 3, 8): bert-base-uncased, L = 128; zero-shot",
    ),
    DataSet(
        name="openwebtext",
        about="web pages linked from Reddit",
        repository="Skylion007/openwebtext",
        folders=("plain_text", "data"),
        splits={"train": 8_013_769 - 100_000, "validation": 100_000},
        held_out="validation",
        cut=LastDocuments(number=100_000),
        licence="CC0-1.0 (the packaging)",
        paper="trains and tests (tables 4 to 7): GPT-2, L = 1024; the last 100K held out",
    ),
    DataSet(
        name="wikitext2",
        about="Wikipedia's good and featured articles, 2 M words",
        repository="Salesforce/wikitext",
        folders=("wikitext-2-raw-v1",),
        splits={"train": 36_718, "validation": 3_760, "test": 4_358},
        held_out="validation",
        documents="article",
        detokenize="wikitext-paper",
        licence="CC BY-SA 3.0, GFDL",
        paper="zero-shot (table 5, Wikitext); its validation text is also wikitext103's",
    ),
    DataSet(
        name="wikitext2-paragraphs",
        about="the same text in short documents",
        repository="Salesforce/wikitext",
        folders=("wikitext-2-raw-v1",),
        splits={"train": 36_718, "validation": 3_760, "test": 4_358},
        held_out="validation",
        documents="paragraph",
        detokenize="wikitext-paper",
        licence="CC BY-SA 3.0, GFDL",
        paper="not used; `blockdiff reproduce --scale tiny`, whose L is shorter than an article",
    ),
    DataSet(
        name="wikitext103",
        about="the same, 103 M words",
        repository="Salesforce/wikitext",
        folders=("wikitext-103-raw-v1",),
        splits={"train": 1_801_350, "validation": 3_760, "test": 4_358},
        held_out="validation",
        documents="article",
        detokenize="wikitext-paper",
        licence="CC BY-SA 3.0, GFDL",
        paper="zero-shot (table 5, Wikitext)",
    ),
    DataSet(
        name="ptb",
        about="Penn Treebank: Wall Street Journal sentences, 10,000 words",
        repository="ptb-text-only/ptb_text_only",
        folders=("penn_treebank",),
        field="sentence",
        splits={"train": 42_068, "validation": 3_370, "test": 3_761},
        held_out="validation",
        detokenize="ptb",
        licence="LDC user agreement",
        paper="zero-shot (table 5, PTB)",
    ),
    DataSet(
        name="lambada",
        about="passages of books; OpenAI's version, with capital letters",
        repository="EleutherAI/lambada_openai",
        folders=("default",),
        splits={"test": 5_153},
        held_out="test",
        detokenize="lambada",
        licence="CC BY 4.0",
        paper="zero-shot (table 5, Lambada): the whole passages",
    ),
    DataSet(
        name="ag_news",
        about="titles and first sentences of news",
        repository="fancyzhx/ag_news",
        folders=("data",),
        splits={"train": 120_000, "test": 7_600},
        held_out="test",
        columns=("label", "text", "text"),
        licence="for non-commercial use",
        paper="zero-shot (table 5, AG News)",
    ),
    DataSet(
        name="scientific_papers_pubmed",
        about="articles of PubMed Open Access",
        repository="armanc/scientific_papers",
        folders=("pubmed",),
        field="article",
        splits={"train": 119_924, "validation": 6_633, "test": 6_658},
        held_out="validation",
        detokenize="scientific-papers",
        licence="not stated; that of each article",
        paper="zero-shot (table 5, PubMed)",
    ),
    DataSet(
        name="scientific_papers_arxiv",
        about="articles of arXiv",
        repository="armanc/scientific_papers",
        folders=("arxiv",),
        field="article",
        splits={"train": 203_037, "validation": 6_436, "test": 6_440},
        held_out="validation",
        detokenize="scientific-papers",
        licence="not stated; that of each article",
        paper="zero-shot (table 5, arXiv)",
    ),
    DataSet(
        name="text8",
        about="Wikipedia of 2006 as 27 characters: letters and spaces",
        repository="afmck/text8",
        folders=("data", "default"),
        splits={"train": 1, "validation": 1, "test": 1},
        held_out="validation",
        cut=CharacterRanges(
            ranges={
                "train": (0, 90_000_000),
                "validation": (90_000_000, 95_000_000),
                "test": (95_000_000, None),
            }
        ),
        documents="piece",
        licence="CC BY-SA",
        paper="not used; the usual benchmark at character level (90 M / 5 M / 5 M)",
    ),
    DataSet(
        name="fineweb-edu",
        about="educational web pages, the sample of 10 B tokens",
        repository="HuggingFaceFW/fineweb-edu",
        folders=("sample/10BT", "sample-10BT"),
        splits={"train": None},
        held_out=None,
        licence="ODC-By 1.0",
        paper="not used; to train at the size of GPT-2 without OpenWebText",
    ),
)
DATA_SETS = {data_set.name: data_set for data_set in SETS}
BUILT_INS = ("python-docs", "python-source")  # corpora, see `python_library`


def split_of(path: PurePath) -> str | None:
    """Return the split that the words of a path name, if any; the file's own name comes first."""
    for part in reversed(path.parts):
        for word in re.findall("[a-z]+", part.lower()):
            for split, pattern in SPLIT_WORDS.items():
                if pattern.fullmatch(word):
                    return split
    return None


def find_set(name: str) -> DataSet:
    """Return the data set called `name`.

    Raises:
        UserError: there is none.
    """
    if name in DATA_SETS:
        return DATA_SETS[name]
    near = difflib.get_close_matches(name, DATA_SETS, n=2)
    meant = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(DATA_SETS)}"
    raise UserError(f"there is no data set named {shown(name)}: {meant}")


def set_lines() -> list[str]:
    """Return the table in words, for `blockdiff datasets`."""
    lines = []
    for s in SETS:
        splits = ", ".join(
            f"{split} ({'rows not counted' if rows is None else f'{rows:,} rows'})"
            for split, rows in s.splits.items()
        )
        held = "drawn (--valid-fraction)" if s.held_out is None else s.held_out
        if isinstance(s.cut, LastDocuments):
            held += f", the last {s.cut.number:,} documents"
        article = "an" if s.documents[0] in "aeiou" else "a"
        lines += [
            f"{s.name}: {s.about}",
            f"  splits      {splits}",
            f"  held out    {held}",
            f"  read        field {s.field}, a document is {article} {s.documents}, "
            f"detokenizer {s.detokenize}",
            f"  from        {s.repository} ({' or '.join(s.folders)}), or {s.name}=PATH",
            f"  licence     {s.licence}",
            f"  paper       {s.paper}",
        ]
    return lines
