"""The picture of the attention mask: exactly the mask, in the page and in the documentation."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from blockdiffusion.models.masks import Streams, dense_mask
from blockdiffusion.reports.mask import (
    LEFT,
    SIDE,
    TOP,
    causal_rows,
    drawn_blocks,
    legend,
    mask_picture,
    mask_rows,
)


@pytest.mark.parametrize("clean_attention", ["block", "causal"])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 5), (4, 3), (3, 1)])
def test_mask_picture_covers_exactly_the_mask(block_size, num_blocks, clean_attention) -> None:
    length = block_size * num_blocks
    mask = dense_mask(Streams(length, block_size, clean_attention=clean_attention))
    rows = mask_rows(block_size, num_blocks, clean_attention)
    assert [[letter != "." for letter in row] for row in rows] == mask.tolist()
    svg = mask_picture(rows, block_size)
    ET.fromstring(svg)
    drawn = torch.zeros_like(mask, dtype=torch.int64)
    cell = SIDE / (2 * length)
    rectangles = re.findall(
        r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"><title>'
        r"(\w+) token (\d+) sees (\w+) token (\d+) to \w+ token (\d+): ([^<]+)",
        svg,
    )
    for part, *box, query, number, key, first, last, name in rectangles:
        x, y, width, height = map(float, box)
        left, top = round((x - LEFT) / cell), round((y - TOP) / cell)
        right, bottom = left + round(width / cell), top + round(height / cell)
        drawn[top:bottom, left:right] += 1
        noisy_query, noisy_key = top < length, left < length
        expected = {"diagonal": (True, True), "offset": (True, False), "clean": (False, False)}
        assert (noisy_query, noisy_key) == expected[part]
        assert (query == "noisy", key == "noisy") == expected[part]
        assert [int(number), int(first), int(last)] == [
            top % length + 1, left % length + 1, (right - 1) % length + 1,
        ]  # fmt: skip
        assert name == next(name for css, name, _ in legend() if css == part)
    assert torch.equal(drawn, mask.long())


def test_the_mask_of_the_documentation_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "mask.svg"
    if not path.exists():
        pytest.skip("the documentation is not beside the tests")
    assert (
        path.read_text(encoding="utf-8") == mask_picture(mask_rows(4, 4), 4, words=legend()) + "\n"
    )


def test_a_file_has_its_colours_and_a_legend_and_a_page_has_the_colours() -> None:
    alone = mask_picture(mask_rows(4, 4, "causal"), 4, words=legend("causal"))
    assert all(name in alone and meaning in alone for _, name, meaning in legend("causal"))
    assert "prefers-color-scheme:dark" in alone and "token by token" in alone
    assert "prefers-color-scheme" not in mask_picture(mask_rows(4, 4), 4)


def test_the_mask_of_an_autoregressive_network() -> None:
    rows = causal_rows(3)
    assert rows == ["c..", "cc.", "ccc"]
    picture = ET.fromstring(mask_picture(rows, 1, ("",)))
    words = [e.text for e in picture.iter() if e.tag.endswith("}text")]
    assert words.count("tokens") == 2 and words.count("3") == 2


def test_drawn_blocks_stay_small() -> None:
    assert drawn_blocks(4, 128) == (4, 4)
    assert drawn_blocks(1, 1024) == (1, 8)
    assert drawn_blocks(16, 1024) == (16, 3)
    assert drawn_blocks(1024, 1024) == (16, 1)
