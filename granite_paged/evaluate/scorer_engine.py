"""The `paged` scorer: the engine, which batches, shares prefixes and replays graphs itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite_paged.engine.engine import Engine
from granite_paged.engine.request import Score
from granite_paged.evaluate.scorer import Answer, Needs, ScoreRequest, check_requests
from granite_paged.geometry import PagedConfig
from granite_paged.runner.memory_plan import row_bytes
from granite_paged.runner.shapes import SHORT

_SNAPSHOTS, _SNAPSHOTS_ALONE = 4, 2  # prefix states to keep, in batches and one by one


class EngineScorer:
    """`Engine.score` as a `Scorer`.

    The engine counts the tokens that a whole call reused. They are attributed to its requests in
    order, to each at most its context, so only their sum over a call has a meaning.

    Args:
        engine: the engine that scores.
        batch: rows to pass to the engine at once.
    """

    def __init__(self, engine: Engine, batch: int = 1) -> None:
        self.batch = batch
        self.engine = engine

    @classmethod
    def for_model(
        cls, model: Any, config: PagedConfig, needs: Needs, batch: int = 1
    ) -> EngineScorer:
        """Make an engine for an unpatched model, and capture the CUDA graphs that it needs.

        The engine keeps few prefix states, because questions come grouped by prefix and peak
        memory is compared. It keeps none if questions run one by one and share less than a page.
        """
        alone_kept = _SNAPSHOTS_ALONE * needs.shares(config.page_size)
        kept = alone_kept if batch == 1 else _SNAPSHOTS
        state_bytes = kept * max(1, row_bytes(model, config))
        engine = Engine(model, config, state_bytes=state_bytes, warmup="lazy")
        alone = engine.runner.shapes.alone(needs.longest)

        def wanted(rows: int, length: int) -> bool:
            """Select prefill shapes: all of them in batches, else those of one question."""
            few = needs.forks and rows > 1 and length <= SHORT
            return length > 1 and (batch > 1 or few or (rows, length) in alone)

        engine.runner.warm_up(wanted=wanted)
        return cls(engine, batch)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Answer]:
        """See `Scorer`."""
        check_requests(requests)
        before = self.engine.stats().tokens_hit
        found = self.engine.score(requests)
        hit = self.engine.stats().tokens_hit - before
        return list(map(_answer, requests, found, _attributed(hit, requests)))

    def forget(self) -> None:
        """See `Scorer`."""
        self.engine.forget_prefixes()

    def close(self) -> None:
        """See `Scorer`."""
        self.engine.close()


def _attributed(hit: int, requests: Sequence[ScoreRequest]) -> list[int]:
    """Divide `hit` reused tokens among requests, in order, to each at most its context."""
    shares = []
    for request in requests:
        shares.append(min(hit, len(request.context)))
        hit -= shares[-1]
    return shares


def _answer(request: ScoreRequest, scores: Sequence[Score], reused: int) -> Answer:
    forks = {tuple(tokens[:-1]) for tokens in request.continuations}
    computed = len(request.context) + sum(map(len, forks)) - reused
    logprobs = tuple(score.logprob for score in scores)
    return Answer(logprobs, tuple(score.greedy for score in scores), computed, reused)
