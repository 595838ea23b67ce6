"""Hand-written lines, in the form in which the sets have them."""

import json
import re

import pytest

from blockdiffusion.data.detokenizers import (
    DETOKENIZERS,
    detokenize_lambada,
    detokenize_wikitext_paper,
)


def test_wikitext_is_undone():
    raw = (
        " \n = = History = = \n \n The role @-@ playing game ( 2011 ) , sold 1 @,@ 500 @.@ 5 copies"
        " ; it 's \" good \" , and they did n't stop : the players ' ratio was 10 : 1 in 1990"
        " \u2013 91 . \n"
    )
    assert DETOKENIZERS["wikitext"](raw) == (
        "\n== History ==\n\nThe role-playing game (2011), sold 1,500.5 copies"
        "; it's \"good\", and they didn't stop: the players' ratio was 10:1 in 1990\u201391.\n"
    )


def test_the_papers_wikitext_keeps_its_quirks():
    raw = (
        " = Ferry = \n"
        " The steam @-@ powered ferry ( 1908 ) cost 1 @,@ 500 @.@ 5 pounds ; the owners ' names ,"
        ' " Fly " and [ Bee ] , are lost : why ? It was 4 ° C . \n'
        " = = Later = = \n"
        " = = = Fate = = = \n"
    )
    assert detokenize_wikitext_paper(raw) == (
        " = Ferry =\n"
        " The steam-powered ferry (1908) cost 1,500.5 pounds; the owners' names,"
        ' "Fly" and [Bee], are lost: why? It was 4°C.\n'
        " == Later ==\n"
        " === Fate ===\n"
    )


def test_the_papers_wikitext_is_the_same_line_by_line_and_whole():
    lines = [' A quote " begins here . \n', ' and " ends there ( so ) . \n']
    whole = detokenize_wikitext_paper("".join(lines))
    assert whole == "".join(map(detokenize_wikitext_paper, lines))
    assert '" begins here' in whole  # a quote does not reach over a line's end


def test_ptb():
    assert (
        DETOKENIZERS["ptb"](
            "the <unk> 's shares rose N N to $ N a share and n't # N \\/ traders ' hopes N N N"
        )
        == "the ?'s shares rose 1 1 to $1 a share andn't #1 / traders' hopes 1 1 N"
    )


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            'He said , " We \'re done ; see http : / / a.example . "',
            'He said, "We\'re done; see http://a.example ."',
        ),
        ("It cost $ 5 ( or £ 3 ) , and / or less .", "It cost $5 (or £3), and/or less."),
        ("Why ? Because . Stop ! Go [ now ] : go !", "Why? Because. Stop! Go [now]: go!"),
        ("Is it ' so ' ?", "Is it 'so'?"),
        ("Is it ?", "Is it?"),
    ],
)
def test_lm1b(raw, text):
    assert DETOKENIZERS["lm1b"](raw) == text


def test_lambada():
    assert detokenize_lambada(" \u201cYes,\u201d she said. \n") == '\n"Yes," she said.'


def test_scientific_papers_have_the_rules_of_both():
    raw = "we find ( see fig . 2 ) , at 5 ° C : a 2 @-@ fold rise of $ 3 / 4 .\nthe end ?"
    assert DETOKENIZERS["scientific-papers"](raw) == (
        "we find (see fig. 2), at 5°C: a 2-fold rise of $3/4 .\nthe end?"
    )


@pytest.mark.parametrize("name", DETOKENIZERS)
@pytest.mark.parametrize("text", ["", " ", "\n", "plain words stay", "Ünï © 東京 \U0001f600"])
def test_plain_text_stays(name, text):
    assert DETOKENIZERS[name](text).strip() == text.strip()


def test_real_wikitext_has_no_marks_left(data_folder):
    lines = (data_folder / "wikitext-2" / "wiki.valid.tokens").read_text().splitlines(True)
    text = "".join(map(detokenize_wikitext_paper, lines))
    assert not re.search(r" @[-,.]@ | , | \. |= =| 's ", text)
    assert text.count("\n") == len(lines)
    assert 0.94 < len(text) / sum(map(len, lines)) < 0.97


def test_real_lambada_has_straight_quotes(data_folder):
    lines = (data_folder / "lambada" / "lambada_test.jsonl").read_text().splitlines()
    texts = [detokenize_lambada(json.loads(line)["text"]) for line in lines]
    assert len(texts) == 5153 and all(text.startswith("\n") for text in texts)
    assert not any(quote in text for text in texts for quote in "\u201c\u201d")
