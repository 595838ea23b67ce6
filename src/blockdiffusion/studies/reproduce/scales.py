"""At which sizes the tables can be rebuilt: `tiny`, `small` and `paper`, as data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blockdiffusion.errors import UserError, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A training text and the text that is tested on.

    Attributes:
        name: of the folder of its rows.
        data_set: its name in the registry.
        option: name of the `--data` that gives its local files.
        is_local: whether they must be given: this scale downloads nothing.
        tested: the split that is tested on, where it is not the one that the set holds out.
        seq_len: L.
        batch_size: rows of an update of the weights.
        micro_batch_size: rows of one pass; None: all of them.
        tokenizer, row_bos, row_eos: see `data.options.PrepareOptions`. An EOS stands after every
            document.
    """

    name: str
    data_set: str
    option: str
    is_local: bool = False
    tested: str | None = None
    seq_len: int
    batch_size: int
    micro_batch_size: int | None = None
    tokenizer: str
    row_bos: bool = False
    row_eos: bool = False
    document_eos: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedScorer:
    """An autoregressive scorer that is trained on other text (`--data judge=PATH`).

    Attributes:
        model: sections of its recipe, as for the candidates.
    """

    tokenizer: str
    seq_len: int
    model: Mapping[str, Any]
    batch_size: int
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Updates of the weights.

    Attributes:
        base: with S = L, from which MDLM and the short blocks start.
        fine_tune: of each of those. Models from scratch get base + fine_tune.
        single_token: of the arms of table 1, from scratch.
        clips, schedules: of each arm of tables 2 and 8, from the finished MDLM.
    """

    base: int
    fine_tune: int
    single_token: int
    clips: int
    schedules: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """How much is measured; None: all there is.

    Attributes:
        rows: of the test text, for perplexities.
        samples: draws of the masks where a bound is estimated.
        zero_shot_rows: of each set of table 5.
        variance_batch, variance_batches: rows of a batch, and batches, of tables 1, 2 and 8.
        documents, longest: documents of table 6, and their greatest length.
        generated: samples of table 7.
        batch: samples drawn together.
    """

    rows: int | None
    samples: int = 8
    zero_shot_rows: int | None
    variance_batch: int
    variance_batches: int
    documents: int = 500
    longest: int
    generated: int
    batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Everything that a plan depends on but the table and the places of files.

    Attributes:
        about: for whom it is.
        texts: "lm1b" and "owt" -> what stands for them.
        model, train, optim, evaluation, checkpoint: sections of every recipe; `train` without steps
            and batches.
        objective: of masked diffusion, where a table does not ask for another noise.
        num_noisy: noisy copies that D3PM draws: as many as the others.
        search: of the clip, for the short blocks; empty: none.
        scorer: a Hugging Face id, or one that is trained here.
        jobs: steps at a time, of `threads` CPU threads each; None: one for each GPU.
        spread: one step at a time instead, and those whose work processes share
            (`distributed.SHARED`) on all GPUs of the machine.
        flops: per second and run that the hours of a plan are estimated with.
    """

    name: str
    about: str
    texts: Mapping[str, Text]
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    optim: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    objective: Mapping[str, Any]
    num_noisy: int = 1
    search: Mapping[str, Any] = field(default_factory=dict)
    steps: Steps
    measure: Measurements
    scorer: str | TrainedScorer
    jobs: int | None = None
    threads: int = 1
    spread: bool = False
    flops: float

    def processes(self, gpus: int) -> int:
        """How many processes share a step where it is spread: as many of the GPUs as divide the
        batches."""
        batches = [text.batch_size for text in self.texts.values()]
        fitting = (n for n in range(gpus, 1, -1) if not any(size % n for size in batches))
        return next(fitting, 1) if self.spread else 1


def find_scale(name: str) -> Scale:
    """The scale called `name`.

    Raises:
        UserError: there is none.
    """
    if name in SCALES:
        return SCALES[name]
    near = difflib.get_close_matches(name, SCALES, n=1, cutoff=0.0)
    raise UserError(
        f"there is no scale {shown(name)}; the nearest is {near[0]} (there are {', '.join(SCALES)})"
    )


GPT2_LARGE = "openai-community/gpt2-large"

_WIKITEXT2 = Text(
    name="wikitext2",
    data_set="wikitext2-paragraphs",
    option="wikitext2",
    is_local=True,
    tested="test",
    seq_len=128,
    batch_size=16,
    tokenizer="bpe:2048",
)

TINY = Scale(
    name="tiny",
    about="two CPU cores; tables 3 to 7 together take about two hours",
    texts={"lm1b": _WIKITEXT2, "owt": _WIKITEXT2},
    model={
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "cond_dim": 64,
        "dropout": 0.0,
    },
    train={"seed": 1, "device": "cpu", "threads": 1},
    optim={"lr": 2e-3, "betas": [0.9, 0.99], "warmup_steps": 50, "ema_decay": 0.99},
    evaluation={"every": 500, "rows": 128, "mc_samples": 4},
    checkpoint={"every": 100, "keep": 1},
    objective={"estimator": "complement"},
    num_noisy=2,
    steps=Steps(base=1500, fine_tune=600, single_token=1200, clips=300, schedules=300),
    measure=Measurements(
        rows=1024,
        samples=4,
        zero_shot_rows=512,
        variance_batch=16,
        variance_batches=32,
        documents=200,
        longest=4096,
        generated=100,
        batch=50,
    ),
    scorer=TrainedScorer(
        tokenizer="bpe:4096",
        seq_len=256,
        model={
            "num_hidden_layers": 6,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "dropout": 0.0,
        },
        batch_size=8,
        steps=1200,
    ),
    jobs=2,
    threads=1,
    flops=3e10,
)

_PAPER_OPTIM = {
    "lr": 3e-4, "betas": [0.9, 0.999], "warmup_steps": 2500, "ema_decay": 0.9999,
}  # fmt: skip
_LM1B = Text(
    name="lm1b",
    data_set="lm1b",
    option="lm1b",
    seq_len=128,
    batch_size=512,
    micro_batch_size=128,
    tokenizer="bert-base-uncased",
    row_bos=True,  # as the authors pack it
    row_eos=True,
)
_OWT = Text(
    name="owt",
    data_set="openwebtext",
    option="openwebtext",
    seq_len=1024,
    batch_size=512,
    micro_batch_size=16,
    tokenizer="gpt2",
)

SMALL = Scale(
    name="small",
    about="one GPU for hours: the paper's data, a network a fifth as large, 1.6B tokens a model",
    texts={
        "lm1b": replace(_LM1B, batch_size=256),
        "owt": replace(_OWT, batch_size=32),
    },
    model={
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "cond_dim": 128,
        "dropout": 0.1,
    },
    train={"dtype": "bfloat16", "compile": True, "seed": 1},
    optim=_PAPER_OPTIM
    | {"lr": 1e-3, "betas": [0.9, 0.99], "warmup_steps": 1000, "ema_decay": 0.9995},
    evaluation={"every": 2500, "rows": 512},
    checkpoint={"every": 1000},
    objective={"estimator": "bernoulli"},
    search={"every": 1000},
    steps=Steps(base=40_000, fine_tune=10_000, single_token=20_000, clips=5000, schedules=5000),
    measure=Measurements(
        rows=8192,
        zero_shot_rows=2048,
        variance_batch=64,
        variance_batches=100,
        longest=131_072,
        generated=300,
        batch=50,
    ),
    scorer=GPT2_LARGE,
    flops=1.5e14,
)

PAPER = Scale(
    name="paper",
    about="the paper's recipe: 110M parameters, 65B tokens of LM1B, 524B of OpenWebText a model",
    texts={"lm1b": _LM1B, "owt": _OWT},
    model={
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "cond_dim": 128,
        "dropout": 0.1,
    },
    train={"dtype": "bfloat16", "compile": True, "seed": 1},
    optim=_PAPER_OPTIM,
    evaluation={"every": 10_000, "rows": 1024},
    checkpoint={"every": 5000},
    objective={"estimator": "bernoulli"},
    search={"every": 5000},
    steps=Steps(
        base=850_000, fine_tune=150_000, single_token=244_000, clips=150_000, schedules=46_000
    ),
    measure=Measurements(
        rows=None,
        zero_shot_rows=None,
        variance_batch=512,
        variance_batches=100,
        longest=131_072,
        generated=300,
        batch=50,
    ),
    scorer=GPT2_LARGE,
    spread=True,
    flops=3e14,
)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER)}
