"""Scoring through the engine, which batches, shares prefixes and replays graphs by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite_paged.engine.engine import Engine
from granite_paged.evaluate.scorer import Answer, Needs, Request, Score, check_requests
from granite_paged.geometry import PagedConfig
from granite_paged.runner.memory_plan import row_bytes
from granite_paged.runner.shapes import SHORT

_KEPT, _KEPT_ALONE = 4, 2  # states of beginnings, where questions come together or one by one


class EngineScorer:
    """`Engine.score`, in the form of a `Scorer`.

    Args:
        engine: what answers. Of those asked together, the first says what all of them reused.
        batch: requests to hand over at once.
    """

    def __init__(self, engine: Engine, batch: int = 1) -> None:
        self.batch = batch
        self.engine = engine

    @classmethod
    def for_model(
        cls, model: Any, config: PagedConfig, needs: Needs, batch: int = 1
    ) -> EngineScorer:
        """Make an engine for a model that is not patched, and have it record its graphs.

        It keeps few states: questions come by subject, and peaks of memory are compared. None at
        all where questions alone share less than a page.
        """
        kept = _KEPT_ALONE * needs.shares(config.page_size) if batch == 1 else _KEPT
        state_bytes = kept * max(1, row_bytes(model))
        engine = Engine(model, config, state_bytes=state_bytes)
        alone = engine.runner.shapes.alone(needs.longest)

        def wanted(rows: int, length: int) -> bool:
            """Prefills: all; of a question by itself, and of what its continuations share."""
            few = needs.forks and rows > 1 and length <= SHORT
            return length > 1 and (batch > 1 or few or (rows, length) in alone)

        engine.runner.warm_up(wanted=wanted)
        return cls(engine, batch)

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Scorer`."""
        check_requests(requests)
        pairs = [(request.context, request.continuations) for request in requests]
        before = self.engine.stats().tokens_hit
        found = self.engine.score(pairs)
        hit = self.engine.stats().tokens_hit - before
        return list(map(_answer, requests, found, [hit, *[0] * (len(pairs) - 1)]))

    def forget(self) -> None:
        """See `Scorer`."""
        self.engine.forget_prefixes()

    def close(self) -> None:
        """Give its memory back."""
        self.engine.close()


def _answer(request: Request, scores: Sequence[Any], reused: int) -> Answer:
    forks = {tuple(tokens[:-1]) for tokens in request.continuations}
    computed = len(request.context) + sum(map(len, forks)) - reused
    read = [Score(float(score.logprob), bool(score.greedy)) for score in scores]
    return Answer(read, computed, reused)
