"""Scoring through the engine, which batches, shares prefixes and replays graphs by itself."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from granite_paged.evaluate.scorer import Answer, Request, Score
from granite_paged.geometry import PagedConfig

_MODULE = "granite_paged.engine.engine"


class EngineScorer:
    """`Engine.score`, in the form of a `Scorer`.

    Args:
        engine: a `granite_paged.Engine`.
        batch: requests to hand over at once.
    """

    def __init__(self, engine: Any, batch: int = 1) -> None:
        self.batch = batch
        self.engine = engine

    @classmethod
    def for_model(
        cls, model: Any, config: PagedConfig | None = None, batch: int = 1
    ) -> EngineScorer:
        """Make an engine for a model that is not patched."""
        return cls(importlib.import_module(_MODULE).Engine(model, config), batch)

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Scorer`."""
        pairs = [(request.context, request.continuations) for request in requests]
        return [
            Answer([Score(float(s.logprob), bool(s.greedy)) for s in scores], None, None)
            for scores in self.engine.score(pairs)
        ]

    def forget(self) -> None:
        """What the engine keeps is its own affair."""


def has_engine() -> bool:
    """Whether this version of the package has one."""
    try:
        return importlib.util.find_spec(_MODULE) is not None
    except ModuleNotFoundError:
        return False
