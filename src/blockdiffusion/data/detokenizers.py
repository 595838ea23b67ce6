"""From the tokenised text of published corpora back to text as people write it.

The rules named after the paper's sets are those of its evaluation (Arriola et al., and the papers
it compares with), quirks included: perplexities compare only on the same text. (One rule is left
out, which only damages text that contains `/' 5/`.) `wikitext` is this package's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

# A string is replaced wherever it occurs, a pattern as by `re.sub`; rules apply in order.
Rule = tuple[str | re.Pattern[str], str]

LINES = re.compile(r"[^\n]*\n|[^\n]+")


def apply_rules(rules: Sequence[Rule], text: str) -> str:
    for old, new in rules:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text


def _hugged(opening: str, inside: str, closing: str) -> Rule:
    """Return the rule that removes the spaces just within quotes or brackets around `inside`."""
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
PTB: list[Rule] = [  # `N` becomes 1, `<unk>` a question mark
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    (re.compile(r" N(?= )"), " 1"),  # numbers; also two side by side
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
# WikiText's own marks and its spaces around punctuation: `role @-@ playing game ,` becomes
# `role-playing game,`.
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


def detokenize_wikitext_paper(text: str) -> str:
    """Apply the paper's rules line by line, as its evaluation reads WikiText."""
    return "".join(apply_rules(WIKITEXT_PAPER, line) for line in LINES.findall(text))


def detokenize_lambada(text: str) -> str:
    """Make quotes straight, and put a line end before the passage."""
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "wikitext": partial(apply_rules, WIKITEXT),
    "wikitext-paper": detokenize_wikitext_paper,
    "ptb": partial(apply_rules, PTB),
    "lm1b": partial(apply_rules, LM1B),
    "lambada": detokenize_lambada,
    "scientific-papers": partial(apply_rules, [*WIKITEXT_PAPER, *LM1B]),
}
