"""Make the scorer of a mode."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from granite_paged.evaluate.scorer import Needs, Scorer
from granite_paged.evaluate.scorer_default import DefaultScorer
from granite_paged.evaluate.scorer_engine import EngineScorer
from granite_paged.geometry import PagedConfig

_ENGINE_ROWS = 256  # rows to pass to the engine at once; it batches them itself


def make_scorer(mode: str, model: Any, config: PagedConfig, needs: Needs, batch: int = 1) -> Scorer:
    """Return the scorer of a mode.

    Args:
        mode: a name in `granite_paged.names.MODES`.
        model: a transformers model that is not patched.
        config: settings of `paged`; sizes that it leaves open follow from `needs`.
        needs: the most that any request will take.
        batch: rows per forward pass.
    """
    if mode == "default":
        return DefaultScorer(model, batch)
    if mode == "static":
        from granite_paged.evaluate.scorer_static import StaticScorer  # noqa: PLC0415  # compiles

        return StaticScorer(model, needs.longest)
    rows = batch if batch == 1 else max(batch, _ENGINE_ROWS)
    return EngineScorer.for_model(model, engine_config(config, needs, batch), needs, rows)


def engine_config(config: PagedConfig, needs: Needs, batch: int) -> PagedConfig:
    """Size the pools to the run, not to free memory, so that peaks are comparable across modes."""
    sequences = config.max_sequences or batch + needs.forks
    kept = batch + needs.shares(config.page_size)  # a cached prefix takes pages, but no row
    pages = math.ceil(needs.longest / config.page_size) + 1
    tokens = config.max_tokens or max(sequences, kept) * pages * config.page_size
    return replace(config, max_sequences=sequences, max_tokens=tokens)
