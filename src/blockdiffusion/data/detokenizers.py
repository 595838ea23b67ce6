"""From the tokenised text of published corpora back to text as people write it.

The rules named after the paper's sets are those of its evaluation (Arriola et al., and the papers
it compares with): a perplexity compares with theirs only if the text is the same, quirks included
(one rule is left out, which only damages text that has `/' 5/` in it). `wikitext` is this package's
own, and reads better.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# A string is replaced wherever it stands, a pattern as `re.sub` does; in this order.
Rule = tuple[str | re.Pattern[str], str]

LINES = re.compile(r"[^\n]*\n|[^\n]+")


def apply_rules(text: str, rules: Sequence[Rule]) -> str:
    """`text` after one rule after the other."""
    for old, new in rules:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text


def _hugged(opening: str, inside: str, closing: str) -> Rule:
    """Quotes or brackets around `inside`, with the spaces just within them taken out."""
    left, right = re.escape(opening), re.escape(closing)
    pattern = rf"{left}\s*({inside}*?)\s*{right}"
    return re.compile(pattern), rf"{opening}\1{closing}"


WIKITEXT_PAPER: list[Rule] = [
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    _hugged("(", r"[^\)]", ")"),
    _hugged("[", r"[^\]]", "]"),
    _hugged("{", "[^}]", "}"),
    _hugged('"', '[^"]', '"'),
    _hugged("'", "[^']", "'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]
PTB: list[Rule] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    (re.compile(r" N(?= )"), " 1"),  # numbers; also where two stand side by side
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]
LM1B: list[Rule] = [
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("£ ", "£"),
]
# WikiText's own marks and its spaces around punctuation, in the order in which they are undone.
WIKITEXT: list[Rule] = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in [
        (r" @([-,.])@ ", r"\1"),
        (r"^ +| +$", ""),
        (r"(?<==) (?==)", ""),  # "= = Title = =" is the heading "== Title =="
        (r"(?<=\d) : (?=\d)", ":"),
        (r" n't\b", "n't"),
        (r" '(s|re|ve|ll|d|m)\b", r"'\1"),
        (r"(?<=s) '(?= )", "'"),
        (r"\" ([^\"\n]*?) \"", r'"\1"'),
        (r" ([.,;:!?%)\]}°])", r"\1"),
        (r"([(\[{$£€]) ", r"\1"),
        (r"(?<=\d) \u2013 (?=\d)", "\u2013"),  # the en dash of a range
    ]
]


def detokenize_wikitext(text: str) -> str:
    """WikiText as prose: `role @-@ playing game ,` becomes `role-playing game,`."""
    return apply_rules(text, WIKITEXT)


def detokenize_wikitext_paper(text: str) -> str:
    """WikiText by the paper's rules, line by line as its evaluation reads it."""
    return "".join(apply_rules(line, WIKITEXT_PAPER) for line in LINES.findall(text))


def detokenize_ptb(text: str) -> str:
    """A Penn Treebank sentence; `N` is 1 and `<unk>` a question mark."""
    return apply_rules(text, PTB)


def detokenize_lm1b(text: str) -> str:
    """A sentence of the One Billion Words benchmark."""
    return apply_rules(text, LM1B)


def detokenize_lambada(text: str) -> str:
    """A LAMBADA passage: straight quotes, and a line end before it."""
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()


def detokenize_scientific_papers(text: str) -> str:
    """An article: the rules for WikiText over the whole of it, then those for LM1B."""
    return apply_rules(text, [*WIKITEXT_PAPER, *LM1B])


def keep_text(text: str) -> str:
    """The text as it is."""
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": keep_text,
    "wikitext": detokenize_wikitext,
    "wikitext-paper": detokenize_wikitext_paper,
    "ptb": detokenize_ptb,
    "lm1b": detokenize_lm1b,
    "lambada": detokenize_lambada,
    "scientific-papers": detokenize_scientific_papers,
}
