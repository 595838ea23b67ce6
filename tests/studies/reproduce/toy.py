"""A scale of seconds, on this project's own pages, and commands that run in this process."""

from __future__ import annotations

from pathlib import Path

from blockdiffusion.studies.reproduce.scales import Measurements, Scale, Steps, Text, TrainedScorer
from tests.command import blockdiff

DOCS = Path(__file__).parents[3] / "docs"
TEXT = Text(
    name="pages",
    data_set="wikitext2-paragraphs",
    option="wikitext2",
    is_local=True,
    tested="test",
    seq_len=32,
    batch_size=4,
    tokenizer="bpe:300",
)
TOY = Scale(
    name="toy",
    about="seconds",
    texts={"lm1b": TEXT, "owt": TEXT},
    model={
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "cond_dim": 8,
        "dropout": 0.0,
    },
    train={"seed": 1, "device": "cpu", "threads": 1},
    optim={"lr": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
    evaluation={"every": None},
    checkpoint={"every": 2, "keep": 1},
    objective={"estimator": "complement"},
    num_noisy=2,
    steps=Steps(base=4, fine_tune=2, single_token=3, clips=1, schedules=1),
    measure=Measurements(
        rows=8,
        samples=2,
        zero_shot_rows=4,
        variance_batch=4,
        variance_batches=2,
        documents=4,
        longest=40,
        generated=3,
        batch=2,
    ),
    scorer=TrainedScorer(
        tokenizer="bpe:310",
        seq_len=32,
        model={"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "dropout": 0.0},
        batch_size=4,
        steps=3,
    ),
    jobs=2,
    threads=1,
    flops=1e9,
)


def write_pages(folder: Path) -> Path:
    """This project's pages as WikiText has its articles: title lines and a line a paragraph."""
    folder.mkdir(parents=True)
    pages = {"train": "concepts.md", "valid": "how-to/train.md", "test": "how-to/evaluate.md"}
    for split, page in pages.items():
        lines = []
        for paragraph in (DOCS / page).read_text().split("\n\n")[:60]:
            text = " ".join(paragraph.split())
            title = text.startswith("#")
            lines.append(f" = {text.strip('# ')} = \n" if title else f" {text} \n")
        (folder / f"wiki.{split}.tokens").write_text(" \n".join(lines))
    return folder


class Finished:
    """A command that has run."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def send_signal(self, number) -> None:
        raise AssertionError("it has ended")


class InProcess:
    """Runs commands at once, in this process; remembers them."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, command, log: Path, slot) -> Finished:
        self.commands.append(list(command))
        ended = blockdiff(*command)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(ended.stdout + ended.stderr)
        return Finished(ended.returncode)
