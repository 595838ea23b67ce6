"""Sampling: `generate` for whole results, `stream` for events as they happen, `Engine` for many
requests that come and go; `SamplingParams` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockdiffusion.lazy import attributes
from blockdiffusion.sampling.params import SamplingParams

if TYPE_CHECKING:
    from blockdiffusion.sampling.api import Generation, collect, finish, generate, infill, stream
    from blockdiffusion.sampling.engine import Engine
    from blockdiffusion.sampling.loop import BlockEvent, DoneEvent, Event, StepEvent
    from blockdiffusion.sampling.requests import prepare_prompts
    from blockdiffusion.text import Detokenizer

__all__ = [
    "BlockEvent",
    "Detokenizer",
    "DoneEvent",
    "Engine",
    "Event",
    "Generation",
    "SamplingParams",
    "StepEvent",
    "collect",
    "finish",
    "generate",
    "infill",
    "prepare_prompts",
    "stream",
]

_MODULES = {
    "sampling.api": ("Generation", "collect", "finish", "generate", "infill", "stream"),
    "sampling.engine": ("Engine",),
    "sampling.loop": ("BlockEvent", "DoneEvent", "Event", "StepEvent"),
    "sampling.requests": ("prepare_prompts",),
    "text": ("Detokenizer",),
}
__getattr__ = attributes(
    __name__, {name: f"blockdiffusion.{home}" for home, names in _MODULES.items() for name in names}
)
