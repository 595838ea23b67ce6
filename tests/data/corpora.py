"""Small made-up corpora for the tests of data."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = """
the a small model reads writes block token of and under river stone light paper wind carries
every morning without naïve café 東京 question answer, slowly. Then it was done
"""


def sentences(num_bytes: int, seed: int = 0) -> str:
    """About `num_bytes` of made-up paragraphs with blank lines between them."""
    draw = random.Random(seed)
    paragraphs = []
    while num_bytes > 0:
        paragraph = " ".join(draw.choice(WORDS.split()) for _ in range(draw.randint(20, 120)))
        paragraphs.append(paragraph)
        num_bytes -= len(paragraph.encode()) + 2
    return "\n\n".join(paragraphs) + "\n"


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by its relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
