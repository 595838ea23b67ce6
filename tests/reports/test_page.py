"""The report page: well-formed, self-contained, honest about numbers and about what is missing."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from blockdiffusion.errors import UserError
from blockdiffusion.models.masks import Streams, dense_mask
from blockdiffusion.reports.markup import count, duration, script_json, two_digits
from blockdiffusion.reports.page import (
    ClipSearch,
    Command,
    Curves,
    LikelihoodNumbers,
    ReportContents,
    RunFacts,
    Sample,
    ValidationPoint,
    read_metrics,
    render_report,
    write_report,
)
from blockdiffusion.reports.pictures import (
    drawn_blocks,
    evenly_spread,
    mask_picture,
    mask_rows,
    nice_ticks,
    running_mean,
    thin_out,
    tick_label,
)
from blockdiffusion.reports.trace import Trace, TraceStep, token_texts, trace_of_events
from blockdiffusion.sampling.loop import DoneEvent, StepEvent
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
        samples=[Sample(text=f"Once{HOSTILE}", prompt="Once", seed=7, policy=HOSTILE, nfe=5)],
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


def test_hostile_text_cannot_leave_the_data_script() -> None:
    assert "<" not in script_json({"a": HOSTILE})
    assert json.loads(script_json({"a": HOSTILE})) == {"a": HOSTILE}


def test_numbers_are_those_given(page: Page) -> None:
    values = [float(value or "nan") for value in page.values("data", "value")]
    assert values == [math.exp(4.695123), math.exp(4.546321), 4.695123, 1.91273]
    text = "".join(page.text)
    for shown in ("≤ 109.41", "94.28", "≤ 4.6951", "≤ 1.9127", "284,416 tokens", "6,132", "2,049"):
        assert shown in text, shown
    # Both errors, of the perplexity by the delta method: exp(4.695123) * (0.00312, 0.0211).
    assert "± 0.34 noise± 2.3 data" in text
    assert "± 0.0031 noise± 0.021 data" in text
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
    text = "".join(Page(render_report(contents)).text)
    assert "≤" not in text
    assert "Perplexity, exact20.09" in text and text.count("Perplexity, exact") == 1
    assert "± 0 noise, no draws± unknown data" in text
    assert "nothing is given (no BOS)" in text


def test_likelihood_from_a_written_result() -> None:
    written = {"nats_per_token": 2.0, "num_tokens": 3, "bos": False, "perplexity": 7.4, "rows": [1]}
    numbers = LikelihoodNumbers.from_dict(written, text="my text")
    assert numbers == LikelihoodNumbers(nats_per_token=2.0, num_tokens=3, bos=False, text="my text")


def test_curves_in_the_page_are_those_given(html: str, page: Page) -> None:
    data = json.loads(page.data["data-loss"])
    assert [row[:2] for row in data["rows"]] == [[s, 7.0 - s / 30] for s in range(1, 61)]
    assert data["bars"][0] == [10, 6.5 - 10 / 30, 0.1, 0.2]
    titles = re.findall(r"step 60: bound 4\.5000 nats per token, perplexity ≤ 90\.02", html)
    assert len(titles) == 3  # the wide and the narrow drawing, and the close-up


@pytest.mark.parametrize(
    ("name", "words"), [("exact", "exact"), ("orders", "tighter bound")], ids=["exact", "orders"]
)
def test_what_is_known_better_than_the_bound_is_drawn_with_it(name: str, words: str) -> None:
    points = [
        ValidationPoint(step=step, bound=5.0 - step / 20, **{name: 4.5 - step / 20})
        for step in (10, 20, 30, 40)
    ]
    contents = ReportContents(
        name="run", facts=RunFacts(block_size=4, seq_len=8), curves=Curves(validation=points)
    )
    html = render_report(contents)
    data = json.loads(Page(html).data["data-loss"])
    expected = {str(point.step): getattr(point, name) for point in points}
    assert data["tighter"] == {f"validation, {words}": expected}
    assert html.count(f'<i class="key tighter"></i>validation, {words}</li>') == 1
    assert html.count('<path class="tighter"') == 3  # wide, narrow and close up
    assert f"perplexity ≤ 20.09; {words} 2.5000" in html
    plain = render_report(
        ReportContents(
            name="run",
            facts=RunFacts(block_size=4, seq_len=8),
            curves=Curves(validation=[ValidationPoint(step=p.step, bound=p.bound) for p in points]),
        )
    )
    assert 'class="tighter"' not in plain and 'class="key tighter"' not in plain


def test_nothing_but_the_sizes_still_gives_a_page() -> None:
    contents = ReportContents(name="empty", facts=RunFacts(block_size=64, seq_len=64))
    text = "".join(Page(render_report(contents)).text)
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


@pytest.mark.parametrize(
    "curves",
    [
        Curves(loss=[(1, 2.0)]),
        Curves(loss=[(0, 0.0)]),
        Curves(loss=[(1, 2.0), (2, 2.0)]),
        Curves(validation=[ValidationPoint(step=0, bound=5.0)]),
        Curves(validation=[ValidationPoint(step=s, bound=900.0) for s in range(5)]),
        Curves(loss=[(s, 1e9 if s == 3 else 1.0) for s in range(5000)]),
    ],
)
def test_odd_curves_are_drawn(curves: Curves) -> None:
    html = render_report(
        ReportContents(name="odd", facts=RunFacts(block_size=2, seq_len=8), curves=curves)
    )
    Page(html)
    numbers = re.findall(r' d="(M[^"]*)"', html)
    assert not any("nan" in path or "inf" in path for path in numbers)


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
    text = "".join(page.text)
    assert "5 tokens in 4 steps, after 3 given; mean confidence 0.53, 0 of them under 0.1." in text
    assert "↵" in text and "∅" in text


def words():
    """A tokenizer of the SentencePiece kind: decoding drops a leading space."""
    names = ("▁the", "▁cat", "s", "</s>")
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="s"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return wrapped(backend)


def step_event(step: int, tokens: list[tuple[int, int, int, float]]) -> StepEvent:
    rows, positions, ids, confidences = zip(*tokens, strict=True)
    return StepEvent(
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
        DoneEvent(
            torch.zeros(2, 5), torch.tensor([2, 4]), torch.tensor([1, 1]), torch.tensor([2, 3])
        ),
    ]
    got = trace_of_events(events, words(), block_size=2, prompt_ids=[0], row=1)
    assert got.prompt_texts == [" the"]
    assert [(s.block, s.step, s.positions, s.ids, s.texts) for s in got.steps] == [
        (0, 0, (1,), (0,), [" the"]),
        (1, 0, (3, 2), (3, 1), ["</s>", " cat"]),
    ]
    assert [s.confidences for s in got.steps] == [(0.25,), (1.0, 0.75)]
    assert token_texts(words(), [1, 2]) == [" cat", "s"]


@pytest.mark.parametrize("clean_attention", ["block", "causal"])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 5), (4, 3), (3, 1)])
def test_mask_picture_covers_exactly_the_mask(block_size, num_blocks, clean_attention) -> None:
    length = block_size * num_blocks
    mask = dense_mask(Streams(length, block_size, clean_attention=clean_attention))
    rows = mask_rows(block_size, num_blocks, clean_attention)
    assert [[letter != "." for letter in row] for row in rows] == mask.tolist()
    svg = mask_picture(block_size, num_blocks, clean_attention)
    drawn = torch.zeros_like(mask, dtype=torch.int64)
    cell = 384 / (2 * length)
    rectangles = re.findall(
        r'<rect class="part-(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"/>',
        svg,
    )
    for part, *box in rectangles:
        x, y, width, height = (float(number) for number in box)
        left, top = round((x - 74) / cell), round((y - 74) / cell)
        right, bottom = left + round(width / cell), top + round(height / cell)
        drawn[top:bottom, left:right] += 1
        noisy_query, noisy_key = top < length, left < length
        expected = {"diagonal": (True, True), "offset": (True, False), "clean": (False, False)}
        assert (noisy_query, noisy_key) == expected[part]
    assert torch.equal(drawn, mask.long())


def test_the_mask_of_the_documentation_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "mask.svg"
    if not path.exists():
        pytest.skip("the documentation is not beside the tests")
    assert path.read_text(encoding="utf-8") == mask_picture(4, 4, standalone=True) + "\n"


def test_every_picture_of_the_documentation_has_a_name() -> None:
    for path in (Path(__file__).parents[2] / "docs").rglob("*.svg"):
        picture = ET.fromstring(path.read_bytes())
        assert picture.get("role") == "img", path
        assert picture[0].tag.endswith("title") and picture[0].text == picture.get("aria-label")


def test_drawn_blocks_stay_small() -> None:
    assert drawn_blocks(4, 128) == (4, 4)
    assert drawn_blocks(1, 1024) == (1, 8)
    assert drawn_blocks(16, 1024) == (16, 3)
    assert drawn_blocks(1024, 1024) == (16, 1)


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 810, 6) == [0, 200, 400, 600, 800]
    assert nice_ticks(4.1, 7.9, 4) == [5, 6, 7]
    assert [tick_label(v) for v in (0, 2e-4, 0.5, 1500, 25_000, 5e7)] == [
        "0", "2e-4", "0.5", "1,500", "25k", "50M",
    ]  # fmt: skip


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (0.5, 61, 3 * 3600 + 125)] == ["0.5 s", "1 min 1 s", "3 h 2 min"]
    assert [count(n) for n in (999, 25_300, 999_999, 169_000_000)] == [
        "999", "25.3 K", "1 M", "169 M",
    ]  # fmt: skip
    assert [two_digits(error) for error in (0.00312, 2.34, 123.4)] == ["0.0031", "2.3", "123"]


def test_running_mean_keeps_a_line_straight() -> None:
    line = [(step, 2.0 * step) for step in range(20)]
    smooth = running_mean(line, 4)
    assert smooth[:2] == [None, None] and smooth[-2:] == [None, None]
    assert smooth[2:-2] == line[2:-2]


def test_thinning_keeps_the_extremes() -> None:
    points = [(step, 50.0 if step == 333 else -50.0 if step == 700 else 0.0) for step in range(999)]
    thin = thin_out(points, 100)
    assert len(thin) <= 100 and thin == sorted(thin)
    assert {(333, 50.0), (700, -50.0)} <= set(thin)


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


# --- the search of the schedule


def search(step: int, variances: dict[tuple[float, float], float]) -> ClipSearch:
    clip = min(variances, key=variances.__getitem__)
    return ClipSearch(step=step, clip=clip, variances=variances, seconds=1.5)


FIRST = search(15, {(0.5, 1.0): 0.1, (0.0, 0.9): 0.4, (0.0, 0.5): 1.0})
SECOND = search(30, {(0.5, 1.0): 0.4, (0.0, 0.9): 0.1, (0.0, 0.5): 0.8})


def search_page(searches: list[ClipSearch], by: str = "loss") -> tuple[str, Page]:
    contents = ReportContents(
        name="searched",
        facts=RunFacts(block_size=4, seq_len=8),
        curves=Curves(searches=searches),
        config={"search": {"by": by}},
    )
    html = render_report(contents)
    return html, Page(html)


def test_the_search_is_drawn_by_width_and_offset_with_its_choice_outlined() -> None:
    html, page = search_page([FIRST, SECOND], by="gradient")
    assert "search" in [attrs.get("id") for tag, attrs in page.elements if tag == "section"]
    wide = re.findall(r'<svg class="heat".*?</svg>', html)[0]
    labels = re.findall(r'<text class="(?:row end|group)"[^>]*>([^<]*)<', wide)
    assert labels == ["0.00 – 0.50", "width 0.5", "0.50 – 1.00", "0.00 – 0.90", "width 0.9"]
    cells = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]* style="--v:([\d.]+)"/>', wide)
    # log(ratio to the least) / log(8), at most 1; columns are searches, rows are clips
    assert [level for *_, level in cells] == ["1.00", "0.00", "0.67", "1.00", "0.67", "0.00"]
    chosen = re.findall(r'<rect class="chosen" x="([\d.]+)" y="([\d.]+)"[^>]*><title>([^<]*)', wide)
    assert [(x, y) for x, y, _ in chosen] == [cells[1][:2], cells[5][:2]]
    assert chosen[0][2] == "step 15: 0.50 – 1.00, variance 0.1"
    text = "".join(page.text)
    assert "under which the gradient of a batch's loss scatters least" in text
    assert "The last one took 0.00 – 0.90." in text
    assert "2 searches of 3 clips took 3 s; the choice changed once." in text


def test_a_variance_of_zero_leaves_the_others_beyond_the_scale() -> None:
    html, page = search_page([search(5, {(1.0, 1.0): 0.0, (0.0, 0.5): 1e-9, (0.0, 0.6): 3.0})])
    levels = re.findall(r"--v:([\d.]+)", html)
    assert levels == 2 * ["0.00", "1.00", "1.00"]
    text = "".join(page.text)
    assert "The last one took all masked." in text
    assert "1 search of 3 clips took 1.5 s; the choice never changed." in text


def test_many_searches_are_thinned_and_no_search_is_no_section(page: Page) -> None:
    html, many = search_page([replace(FIRST, step=15 * n) for n in range(1, 1001)])
    wide, narrow = re.findall(r'<svg class="heat".*?</svg>', html)
    assert (wide.count('class="chosen"'), narrow.count('class="chosen"')) == (80, 24)
    assert "step 15,000: " in wide and "step 15,000: " in narrow
    assert "Drawn are 80 of them, evenly spread." in "".join(many.text)
    assert evenly_spread(3, 5) == [0, 1, 2] and evenly_spread(10, 3) == [2, 5, 9]
    assert "search" not in [attrs.get("id") for _, attrs in page.elements]


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
