"""MAUVE: how close the samples' distribution is to that of real text (Pillutla et al. 2021)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from blockdiffusion.errors import UserError


def require_mauve() -> Any:
    """Import the package `mauve`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("mauve")
    except ImportError as error:
        raise UserError(
            f"MAUVE needs the package mauve-text ({error}): pip install 'blockdiffusion[metrics]', "
            "or leave --mauve out"
        ) from error


def mauve_score(reference_ND: np.ndarray, samples_MD: np.ndarray, seed: int = 0) -> float:
    """Return MAUVE in [0, 1], with the package's defaults; 1 if the two cannot be distinguished.

    Args:
        reference_ND, samples_MD: feature vectors of texts, see `perplexity.scorer_features`.
        seed: of the clustering.

    Raises:
        UserError: the package is not installed.
    """
    found = require_mauve().compute_mauve(
        p_features=reference_ND, q_features=samples_MD, seed=seed, verbose=False
    )
    return float(found.mauve)
