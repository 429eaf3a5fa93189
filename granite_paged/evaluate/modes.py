"""The ways to answer: `default`, `static`, `paged`; which scorer each of them is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from granite_paged.evaluate.scorer import Needs, Scorer
from granite_paged.evaluate.scorer_default import DefaultScorer
from granite_paged.evaluate.scorer_engine import EngineScorer
from granite_paged.geometry import PagedConfig

MODES = ("default", "static", "paged")

ENGINE_ROWS = 256  # rows handed to the engine at once, which batches by itself


def make_scorer(mode: str, model: Any, config: PagedConfig, needs: Needs, batch: int = 1) -> Scorer:
    """The scorer of a mode, for a model that is not patched.

    Args:
        mode: one of `MODES`.
        model: the model.
        config: of `paged`. Sizes that it leaves open follow from `needs`.
        needs: what will be asked.
        batch: rows a forward pass.
    """
    if mode == "default":
        return DefaultScorer(model, batch)
    if mode == "static":
        from granite_paged.evaluate.scorer_static import StaticScorer  # noqa: PLC0415  # compiles

        return StaticScorer(model, needs.longest)
    rows = batch if batch == 1 else max(batch, ENGINE_ROWS)
    return EngineScorer.for_model(model, engine_config(config, needs, batch), needs, rows)


def engine_config(config: PagedConfig, needs: Needs, batch: int) -> PagedConfig:
    """Pools of what the run needs instead of a part of the memory: peaks are to be compared."""
    sequences = config.max_sequences or batch + needs.forks
    kept = batch + needs.shares(config.page_size)  # what others begin with takes pages, but no row
    pages = math.ceil(needs.longest / config.page_size) + 1
    tokens = config.max_tokens or max(sequences, kept) * pages * config.page_size
    return replace(config, max_sequences=sequences, max_tokens=tokens)
