"""Sampling: `generate` for whole results, `stream` for events as they happen, `Engine` for many
requests that come and go; `SamplingParams` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockdiffusion.lazy import attributes
from blockdiffusion.sampling.params import SamplingParams

if TYPE_CHECKING:
    from blockdiffusion.sampling.api import Generation, collect, generate, infill, stream
    from blockdiffusion.sampling.engine import Engine
    from blockdiffusion.sampling.events import BlockDone, Event, Finished, TokensRevealed
    from blockdiffusion.sampling.requests import prepare_prompts
    from blockdiffusion.text import Detokenizer

__all__ = [
    "BlockDone",
    "Detokenizer",
    "Engine",
    "Event",
    "Finished",
    "Generation",
    "SamplingParams",
    "TokensRevealed",
    "collect",
    "generate",
    "infill",
    "prepare_prompts",
    "stream",
]

_MODULES = {
    "sampling.api": ("Generation", "collect", "generate", "infill", "stream"),
    "sampling.engine": ("Engine",),
    "sampling.events": ("BlockDone", "Event", "Finished", "TokensRevealed"),
    "sampling.requests": ("prepare_prompts",),
    "text": ("Detokenizer",),
}
__getattr__ = attributes(
    __name__,
    {name: f"blockdiffusion.{home}" for home, names in _MODULES.items() for name in names},
    {"StepEvent": "TokensRevealed", "BlockEvent": "BlockDone", "DoneEvent": "Finished"},
)
