"""The report page: well-formed, self-contained, honest about numbers and about what is missing."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from blockdiffusion.errors import UserError
from blockdiffusion.reports.curves import ClipSearch, Curves, ValidationPoint, read_metrics
from blockdiffusion.reports.page import (
    Command,
    LikelihoodNumbers,
    ReportContents,
    RunFacts,
    Sample,
    render_report,
    write_report,
)
from blockdiffusion.reports.trace import Trace, TraceStep, token_texts, trace_of_events
from blockdiffusion.sampling import Finished, TokensRevealed
from tests.tokenizer_kinds import wrapped

HOSTILE = "</script><b onmouseover=\"alert('x')\">&amp;</b>"
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """What a browser would build: fails on tags that do not balance."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data: dict[str, str] = {}
        self.feed(html)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> inside {self.stack}"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.data[self.elements[-1][1].get("id") or "code"] = data
        elif "style" not in self.stack:
            self.text.append(data)

    @property
    def words(self) -> str:
        """The text, with one space wherever there is any."""
        return " ".join("".join(self.text).split())

    def values(self, tag: str, name: str) -> list[str | None]:
        return [attrs.get(name) for found, attrs in self.elements if found == tag]


def trace() -> Trace:
    """S = 4, three given tokens: block 1 has one free position, block 2 all four, two at once."""
    rows = [
        (0, 0, [3], ["\n"], [0.25]),
        (1, 0, [6], [HOSTILE], [0.5]),
        (1, 1, [4, 5], [" a", "b"], [0.125, 1.0]),
        (1, 2, [7], [""], [0.75]),
    ]
    steps = [
        TraceStep(
            block=block,
            step=step,
            positions=positions,
            ids=[100 + position for position in positions],
            texts=texts,
            confidences=confidences,
        )
        for block, step, positions, texts, confidences in rows
    ]
    return Trace(steps=steps, prompt_texts=["<|endoftext|>", HOSTILE, " given"])


def full_contents() -> ReportContents:
    return ReportContents(
        name=f"demo {HOSTILE}",
        summary="One sentence.",
        facts=RunFacts(
            block_size=4,
            seq_len=128,
            vocab_size=2049,
            parameters=3_912_448,
            steps=60,
            batch_size=32,
            training_seconds=534.2,
            tokens_per_second=6132.4,
            data="WikiText-2",
            machine=HOSTILE,
            versions={"torch": "2.13.0"},
        ),
        likelihood=LikelihoodNumbers(
            nats_per_token=4.695123,
            num_tokens=284_416,
            bos=True,
            exact_nats_per_token=4.546321,
            bits_per_byte=1.91273,
            stderr_noise=0.00312,
            stderr_data=0.0211,
            estimator="exact",
        ),
        curves=Curves(
            loss=[(step, 7.0 - step / 30) for step in range(1, 61)],
            grad_norm=[(step, 1.0) for step in range(1, 61)],
            learning_rate=[(step, 0.0) for step in range(1, 61)],
            validation=[
                ValidationPoint(step=step, bound=6.5 - step / 30, stderr_noise=0.1, stderr_data=0.2)
                for step in (10, 20, 30, 40, 50, 60)
            ],
            samples=[(30, [HOSTILE])],
        ),
        trace=trace(),
        samples=[Sample(text=f"Once{HOSTILE}", prompt="Once", seed=7, sampler=HOSTILE, nfe=5)],
        config={"model": {"width": 192, "optimizer": {"betas": [0.9, 0.999]}}, "name": HOSTILE},
        commands=[Command(purpose="again", command=f"blockdiff train x.yaml '{HOSTILE}'")],
    )


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(full_contents())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_is_self_contained(html: str, page: Page) -> None:
    assert not [tag for tag, _ in page.elements if tag in {"link", "img", "iframe", "object"}]
    for name in ("src", "href", "srcset", "data", "action"):
        for tag, attrs in page.elements:
            value = attrs.get(name) or ""
            assert not value or value.startswith("#"), f"<{tag} {name}={value!r}>"
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    assert "default-src 'none'" in (page.values("meta", "content")[-1] or "")


def test_ids_are_unique_and_every_link_has_its_target(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [href for href in page.values("a", "href") if href]
    assert len(links) == 7
    assert {href[1:] for href in links} <= set(ids)


def test_hostile_text_stays_text(html: str, page: Page) -> None:
    assert "<b onmouseover" not in html
    assert not [attrs for _, attrs in page.elements if "onmouseover" in attrs]
    assert "".join(page.text).count(HOSTILE) >= 8  # name twice, token, prompt, sample, command ...
    hints = [attrs.get("title") or "" for tag, attrs in page.elements if tag == "span"]
    assert any(HOSTILE in hint and "confidence 0.500" in hint for hint in hints)


def test_numbers_are_those_given(page: Page) -> None:
    values = [float(value or "nan") for value in page.values("data", "value")]
    assert values == [math.exp(4.695123), math.exp(4.546321), 4.695123, 1.91273]
    text = page.words
    for shown in ("≤ 109.41", "94.28", "≤ 4.6951", "≤ 1.9127", "284,416 tokens", "6,132", "2,049"):
        assert shown in text, shown
    # Both errors, of the perplexity by the delta method: exp(4.695123) * (0.00312, 0.0211).
    assert "± 0.34 noise ± 2.3 data" in text
    assert "± 0.0031 noise ± 0.021 data" in text
    assert "BOS is given and not counted" in text
    assert "the bound lies 0.149 nats per token above it" in text
    assert "245,760" in text  # tokens seen: 60 * 32 * 128


def test_an_exact_value_has_no_bound_sign() -> None:
    numbers = LikelihoodNumbers(
        nats_per_token=3.0,
        exact_nats_per_token=3.0,
        num_tokens=10,
        bos=False,
        is_bound=False,
        stderr_noise=0.0,
    )
    contents = ReportContents(
        name="ar", facts=RunFacts(block_size=1, seq_len=8), likelihood=numbers
    )
    text = Page(render_report(contents)).words
    assert "≤" not in text
    assert "Perplexity, exact 20.09" in text and text.count("Perplexity, exact") == 1
    assert "± 0 noise, no draws ± unknown data" in text
    assert "nothing is given (no BOS)" in text


def test_likelihood_from_a_written_result() -> None:
    written = {"nats_per_token": 2.0, "num_tokens": 3, "bos": False, "perplexity": 7.4, "rows": [1]}
    numbers = LikelihoodNumbers.from_dict(written, text="my text")
    assert numbers == LikelihoodNumbers(nats_per_token=2.0, num_tokens=3, bos=False, text="my text")


def test_curves_in_the_page_are_those_given(html: str, page: Page) -> None:
    records = json.loads(page.data["records"])
    assert [record[0] for record in records] == [*range(1, 61), 10, 20, 30, 40, 50, 60]
    assert records[0] == [1, f"step 1\ntraining loss {7 - 1 / 30:.3f}", False]
    step, words, evaluated = records[-1]
    assert step == 60 and evaluated and "± 0.10 noise\n± 0.20 data" in words
    told = "step 60: bound 4.5000 nats per token, perplexity ≤ 90.02"
    assert html.count(f"<title>{told}</title>") == 3  # wide, narrow and close up
    assert f"<li>{told}</li>" in html  # for who has no pointer
    pictures = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert len(pictures) == 2 + 3 + 1  # the loss twice, the small ones, the mask
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    areas = [attrs["data-plot"] for _, attrs in page.elements if "data-plot" in attrs]
    for area in areas:
        left, right, low, high = map(float, (area or "").split())
        assert 0 < left < right <= 1 and (low, high) == (0, pytest.approx(60 * 1.012, rel=1e-5))


def test_records_outside_the_frame_are_counted() -> None:
    curves = Curves(loss=[(step, 90.0 if step == 5 else 1.0 + step / 1e4) for step in range(400)])
    contents = ReportContents(name="x", facts=RunFacts(block_size=1, seq_len=8), curves=curves)
    text = Page(render_report(contents)).words
    assert "1 of 400 records lies outside the frame." in text
    assert "has no evaluation on validation text yet" in text


def test_without_matplotlib_the_page_says_how_to_get_the_curves(
    monkeypatch: pytest.MonkeyPatch, page: Page
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    contents = full_contents()
    contents = replace(contents, curves=replace(contents.curves, searches=[FIRST]))
    bare = Page(render_report(contents))
    text = bare.words
    assert text.count("pip install 'blockdiffusion[plots]'") == 2
    assert "step 60: bound 4.5000 nats per token" in text and "choice never changed" in text
    assert [attrs["class"] for tag, attrs in bare.elements if tag == "svg"] == ["mask"]
    assert bare.values("input", "max") == page.values("input", "max") == ["4"]  # the replay


def test_the_page_is_the_same_each_time(html: str) -> None:
    assert render_report(full_contents()) == html


def test_nothing_but_the_sizes_still_gives_a_page() -> None:
    contents = ReportContents(name="empty", facts=RunFacts(block_size=64, seq_len=64))
    text = Page(render_report(contents)).words
    for sentence in (
        "This run has no held-out likelihood yet",
        "There are no curves",
        "There is no denoising trace",
        "No sample was drawn",
        "configuration was not given",
        "commands that made this run were not given",
        "Drawn for L = 16 and S = 16; the run's are L = 64 and S = 64.",
    ):
        assert sentence in text, sentence


def test_trace_says_what_was_decided_when(page: Page) -> None:
    tokens = [a for tag, a in page.elements if tag == "span" and "data-when" in a]
    assert [token["data-when"] for token in tokens] == ["1", "3", "3", "2", "4"]
    assert [token["style"] for token in tokens] == [
        f"--c:{confidence:.3f}" for confidence in (0.25, 0.125, 1.0, 0.5, 0.75)
    ]
    assert "id 106 · position 6 · step 1 of its block" in (tokens[3]["title"] or "")
    blocks = [a for tag, a in page.elements if a.get("class") == "block"]
    assert [block["data-from"] for block in blocks] == ["1", "2"]
    assert page.values("input", "max") == ["4"]
    text = page.words
    assert "5 tokens in 4 steps, after 3 given; mean confidence 0.53, 0 of them under 0.1." in text
    assert "↵" in text and "∅" in text


def words():
    """A tokenizer of the SentencePiece kind: decoding drops a leading space."""
    names = ("▁the", "▁cat", "s", "</s>")
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="s"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return wrapped(backend)


def step_event(step: int, tokens: list[tuple[int, int, int, float]]) -> TokensRevealed:
    rows, positions, ids, confidences = zip(*tokens, strict=True)
    return TokensRevealed(
        step,
        torch.tensor(rows),
        torch.tensor(positions),
        torch.tensor(ids),
        torch.tensor(confidences),
    )


def test_trace_of_events_takes_one_row_and_leaves_out_what_was_cut() -> None:
    events = [
        step_event(0, [(0, 1, 2, 0.5), (1, 1, 0, 0.25)]),
        step_event(1, [(0, 0, 2, 0.5)]),
        step_event(0, [(1, 3, 3, 1.0), (1, 2, 1, 0.75)]),
        step_event(1, [(1, 4, 2, 0.125)]),
        Finished(0, [0, 2], 1, None, "length", 2),
        Finished(1, [0, 0, 1, 3], 1, None, "length", 3),
    ]
    got = trace_of_events(events, words(), block_size=2, row=1)
    assert got.prompt_texts == [" the"]
    assert [(s.block, s.step, s.positions, s.ids, s.texts) for s in got.steps] == [
        (0, 0, (1,), (0,), [" the"]),
        (1, 0, (3, 2), (3, 1), ["</s>", " cat"]),
    ]
    assert [s.confidences for s in got.steps] == [(0.25,), (1.0, 0.75)]
    assert token_texts(words(), [1, 2]) == [" cat", "s"]


def test_read_metrics(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 5.0, "lr": 0.1, "grad_norm": 2, "tokens_per_second": 9, "seconds": 1}',
        '{"step": 2, "loss": NaN, "lr": 0.2}',
        '{"step": 3, "loss": 3.5, "l{"step": 2, "loss": 4.0}',
        '{"step": 2, "valid_bound": 4.5, "valid_stderr_noise": 0.1, "valid_stderr_data": null}',
        '{"step": 2, "samples": ["text"]}',
        '{"step": 2, "loss": 4.25, "lr": 0.2}',
        '{"step": 4, "valid_bound": 4.0, "valid_exact": 3.5, "valid_orders": 3.75}',
        '{"step": 5, "valid_bound": 4.0, "valid_exact": 4.0, "valid_perplexity": 54.6}',
        '{"step": 3, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curves = read_metrics(tmp_path)
    assert curves.loss == [(1, 5.0), (2, 4.25)]
    assert curves.learning_rate == [(1, 0.1), (2, 0.2)]
    assert curves.validation == [
        ValidationPoint(step=2, bound=4.5, stderr_noise=0.1),
        ValidationPoint(step=4, bound=4.0, exact=3.5, orders=3.75),
        ValidationPoint(step=5, bound=4.0, is_bound=False),  # which is the exact value
    ]
    assert curves.samples == [(2, ["text"])]
    assert read_metrics(tmp_path / "nowhere") == Curves(loss=[], learning_rate=[], grad_norm=[],
        tokens_per_second=[], validation=[], samples=[], searches=[])  # fmt: skip


FIRST = ClipSearch(
    step=15,
    clip=(0.5, 1.0),
    variances={(0.5, 1.0): 0.1, (0.0, 0.9): 0.4, (0.0, 0.5): 1.0},
    seconds=1.5,
)


def search_page(searches: list[ClipSearch], by: str = "loss") -> Page:
    contents = ReportContents(
        name="searched",
        facts=RunFacts(block_size=4, seq_len=8),
        curves=Curves(searches=searches),
        config={"search": {"by": by}},
    )
    return Page(render_report(contents))


def test_the_searches_are_told_and_drawn(page: Page) -> None:
    second = replace(FIRST, step=30, clip=(0.0, 0.9))
    searched = search_page([FIRST, second], by="gradient")
    assert "search" in [attrs.get("id") for tag, attrs in searched.elements if tag == "section"]
    text = searched.words
    assert "variance of the gradient of a batch's loss" in text
    assert "The last search chose 0.00 – 0.90." in text
    assert "2 searches of 3 clips took 3 s; the choice changed once." in text
    assert text.count("step 30: 0.00 – 0.90, variance") == 2  # the wide and the narrow drawing
    assert "search" not in [attrs.get("id") for _, attrs in page.elements]


def test_many_searches_are_thinned() -> None:
    text = search_page([replace(FIRST, step=15 * n) for n in range(1, 1001)]).words
    assert "80 of them, evenly spread." in text and "the choice never changed" in text
    text = search_page([replace(FIRST, clip=(1.0, 1.0), variances={(1.0, 1.0): 0.0})]).words
    assert "The last search chose all masked." in text and "1 search of 1 clips took 1.5 s" in text


def test_searches_are_read_from_the_metrics(tmp_path: Path) -> None:
    grid = '"clip_grid": [[0.5, 1.0, 0.2], [0.0, 0.9, 0.1]], "search_seconds": 2.5'
    lines = [
        '{"step": 4, "clip": [0.5, 1.0]}',
        '{"step": 10, "loss": 3.0}',
        '{"step": 10, "clip": [0.0, 0.9], ' + grid + "}",
        '{"step": 10, "clip": [0.0, 0.9]}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    variances = {(0.5, 1.0): 0.2, (0.0, 0.9): 0.1}
    expected = ClipSearch(step=10, clip=(0.0, 0.9), variances=variances, seconds=2.5)
    assert read_metrics(tmp_path).searches == [expected]


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    contents = ReportContents(name="one \ud800", facts=RunFacts(block_size=2, seq_len=4))
    write_report(path, contents)
    before = path.read_bytes()
    assert before.endswith(b"</html>\n")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_report(path, full_contents())
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_report(tmp_path / "file" / "report.html", full_contents())
