"""The README's picture: a text of `pretrained/books` as it is denoised, block by block.

python -m studies.denoising_picture docs/denoising.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import blockdiffusion
from blockdiffusion.escape import html
from blockdiffusion.sampling import BlockDone, TokensRevealed
from blockdiffusion.text import token_text

MODEL = Path(__file__).parents[1] / "pretrained" / "books"
PROMPT, NEW_TOKENS, SEED = "It was a", 76, 1
COLUMNS, CHARACTER, LINE, MARGIN = 84, 8.43, 24, 20  # of 14 px in a monospaced font
SECONDS_PER_PASS, PAUSE = 0.16, 4.0
STYLE = """
  svg { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
  .card { fill: #0f172a } .given { fill: #94a3b8 } .new { fill: #f1f5f9 } .mask { fill: #334155 }
  .head { fill: #38bdf8; font-size: 12px } text { white-space: pre }
"""


def draw(path: Path) -> None:
    """Samples the text and writes the animation."""
    model = blockdiffusion.load(MODEL, dtype=torch.float32)
    texts, shown, hidden, passes, prompt = [], [], [], 0, 0
    size = model.config.block_size
    for event in blockdiffusion.stream(
        model, [PROMPT], max_new_tokens=NEW_TOKENS, top_p=0.9, seed=SEED
    ):
        if isinstance(event, TokensRevealed):
            passes += 1
            shown += [(position, passes) for position in event.positions.tolist()]
        elif isinstance(event, BlockDone):
            texts += [token_text(model.tokenizer, token) for token in event.ids[0].tolist()]
            hidden += [max(1, passes - size + 1)] * size
    prompt = len(texts) - len(shown)
    path.write_text(svg([text.replace("\n", " ") for text in texts], dict(shown), hidden, passes))
    print(f"{path}: {len(shown)} tokens in {passes} passes, {prompt} given")


def svg(texts: list[str], shown: dict[int, int], opened: list[int], passes: int) -> str:
    """The picture: each token appears in its pass; masks stand there while its block is open."""
    seconds = passes * SECONDS_PER_PASS + PAUSE
    parts, column, row = [], 0, 0
    for position, text in enumerate(texts):
        if column + len(text) > COLUMNS:
            column, row, text = 0, row + 1, text.lstrip()
        x, y = MARGIN + column * CHARACTER, 2 * MARGIN + LINE * (row + 1)
        column += len(text)
        if position not in shown:
            parts.append(f'<text class="given" x="{x:.1f}" y="{y}">{html(text)}</text>')
            continue
        at = shown[position] * SECONDS_PER_PASS / seconds
        opens = min(at, opened[position] * SECONDS_PER_PASS / seconds)
        width = max(6.0, len(text) * CHARACTER - 3)
        parts.append(
            f'<rect class="mask" x="{x + 1:.1f}" y="{y - 14}" width="{width:.1f}" height="19" '
            f'rx="3">{appears(opens, at, seconds)}</rect>'
            f'<text class="new" x="{x:.1f}" y="{y}">{html(text)}{appears(at, 1.0, seconds)}</text>'
        )
    width, height = 2 * MARGIN + COLUMNS * CHARACTER, 3 * MARGIN + LINE * (row + 1)
    title = "A text is written block by block; inside a block, tokens appear in random order"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        f'aria-label="{title}">'
        f"<title>{title}</title><style>{STYLE}</style>"
        f'<rect class="card" width="100%" height="100%" rx="10"/>'
        f'<text class="head" x="{MARGIN}" y="{MARGIN + 8}">blocks of four tokens, one pass a token'
        f"</text>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def appears(begin: float, end: float, seconds: float) -> str:
    """An opacity that is 1 between two fractions of the animation, and 0 elsewhere."""
    values, times = ("0;1;0", f"0;{begin:.4f};{end:.4f}") if end < 1 else ("0;1", f"0;{begin:.4f}")
    return (
        f'<animate attributeName="opacity" values="{values}" keyTimes="{times}" '
        f'calcMode="discrete" dur="{seconds:.2f}s" repeatCount="indefinite"/>'
    )


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
