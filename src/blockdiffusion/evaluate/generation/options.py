"""What `generate-eval` can be asked for. This module imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limits
from blockdiffusion.options import REQUIRED, all_but, option
from blockdiffusion.sampling.params import FIELDS, SamplingParams

SCORER = "Evaluator: a Hugging Face causal language model, or one of ours; not MODEL."


def _again(name: str, default: Any) -> Any:
    """An option of sampling with another default."""
    return field(default=default, metadata=FIELDS[name].metadata)


@dataclass(frozen=True, kw_only=True)
class DrawOptions(SamplingParams):
    """How samples are drawn, from nothing (or a BOS).

    Attributes:
        num_samples: samples to have; only those of a last, short batch depend on it.
        batch_size: samples drawn together. They share a random stream, so a sample depends on it.
        int8: by a copy of the network in 8 bits: an approximation; see `models.inference`.
    """

    num_samples: int = _again("num_samples", 64)
    max_new_tokens: int = _again("max_new_tokens", 256)
    seed: int = _again("seed", 0)
    batch_size: int = option(16, "Samples drawn together; a sample depends on it.")
    int8: bool = False


@dataclass(frozen=True, kw_only=True)
class ScorerOptions:
    """What samples are compared with, and how the scorer reads them."""

    reference: tuple[str, ...] = option(
        (), "Real text beside it: prepared data, or text files; may be repeated."
    )
    split: str = option("valid", "Split of a prepared --reference.")
    context: int | None = option(
        None, "Tokens of the scorer's windows; all it can read by default."
    )
    stride: int | None = option(None, "Tokens between two windows; half the context by default.")


@dataclass(frozen=True, kw_only=True)
class GenerateEval(ScorerOptions):
    """What to evaluate.

    Attributes:
        model: directory or id of the model under test; may be None where samples are given.
        scorer: see `scorer.load_scorer`.
        draw: how samples are drawn; not read where they are given.
        label: what the result is called; the model or the samples file by default.
    """

    model: str | None = option(
        None, "Model under test; may be left out with --samples-from.", positional=True
    )
    scorer: str = option(REQUIRED, SCORER)
    draw: Annotated[DrawOptions, all_but(DrawOptions, "stride", "int8")] = field(
        default=DrawOptions()
    )
    min_entropy: float | None = option(
        None, "Guard: reject samples whose tokens have less entropy; the authors: 4."
    )
    entropy_window: int = option(256, "Last tokens that --min-entropy looks at, after every block.")
    samples_from: Path | None = option(
        None, "Score the samples of this JSON lines file; draw none."
    )
    mauve: bool = option(False, "MAUVE against --reference; needs mauve-text.", flags="--mauve")
    label: str | None = option(None, "Name in tables and pictures.")

    def __post_init__(self) -> None:
        if self.model is None and self.samples_from is None:
            raise UserError("there is nothing to score; give a model, or samples (--samples-from)")
        check_limits(self)
        if self.min_entropy is not None:
            check_min_entropy(self.min_entropy)
        if self.mauve and not self.reference:
            raise UserError("MAUVE compares with real text; give --reference, or leave it out")


def check_min_entropy(value: float) -> None:
    """Refuse an entropy that every sample has."""
    if not value > 0:
        raise UserError(f"the guard asks for an entropy of {value} nats; it must be above 0")
