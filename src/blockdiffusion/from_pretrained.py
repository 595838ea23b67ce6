"""Loading through transformers in one place, so that code that comes with a model never runs.

A folder or a repository of the hub may name Python code of its own (`auto_map`). Without an
explicit no, transformers asks on standard input whether to run it, where a `y` may be meant for
something else.
"""

from __future__ import annotations

from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError, reason


def from_pretrained(
    loader: Any, name: str | Path, problem: str, advice: str, **options: Any
) -> Any:
    """Call `loader.from_pretrained` for a folder or a hub id, without running its code.

    Args:
        loader: a class of transformers.
        problem: the beginning of the message, "the scorer x cannot be read".
        advice: its end, behind the reason.
        options: of the loader.

    Raises:
        UserError: there is nothing of this kind, or it needs code of its own.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would interrupt ours
    logger = getLogger("transformers.configuration_utils")
    logger.addFilter(_is_not_of_model_type)
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # the library, the network and broken files raise many classes
        why = reason(error)
        if "trust_remote_code" in str(error):
            why = "it needs Python code of its own (auto_map), which is never run"
        raise UserError(f"{problem} ({why}); {advice}") from error
    finally:
        logger.removeFilter(_is_not_of_model_type)
        logging.enable_progress_bar()


def _is_not_of_model_type(record: LogRecord) -> bool:
    """Leave out the warning about a `model_type` that is unknown to transformers, as those of
    published families are when their tokenizers are read."""
    return "using a model of type" not in record.getMessage()
