"""The `static` scorer: transformers' `StaticCache` and its compiled decode step.

It works as `generate(cache_implementation="static")` does: the context runs eagerly in one pass,
and each further token in one compiled step. Before each continuation, the cache returns to its
state at the end of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from granite_paged.errors import OutOfPages
from granite_paged.evaluate.scorer import Answer, ScoreRequest, Tally, TokenRead, padded
from granite_paged.hf.compat import with_cache


class StaticScorer:
    """Scores one request and one continuation at a time.

    Args:
        model: a transformers causal language model in eval mode.
        longest: length of the cache, in tokens; no scored sequence may be longer.
    """

    batch = 1

    def __init__(self, model: Any, longest: int) -> None:
        self._model = model
        self._longest = longest
        self._cache = StaticCache(config=model.config, max_cache_len=longest)
        self._step = model.get_compiled_call(None)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Answer]:
        """See `Scorer`."""
        return [self._score_one(request) for request in requests]

    def forget(self) -> None:
        """Do nothing; nothing is kept between requests."""

    def close(self) -> None:
        """Do nothing; the cache goes with the scorer."""

    def _score_one(self, request: ScoreRequest) -> Answer:
        tally = Tally([request])
        self._check_fits(request)
        self._cache.reset()
        logits = self._run(self._model, request.context)
        tally.add(logits, [TokenRead(0, 0, t[0], i) for i, t in enumerate(request.continuations)])
        beginnings = list(dict.fromkeys(tuple(t[:-1]) for t in request.continuations if len(t) > 1))
        context_end = [(state, state.clone()) for state in self._states()]
        for tokens in beginnings:
            for state, saved in context_end:
                state.copy_(saved)
            logits = torch.cat([self._run(self._step, [token]).clone() for token in tokens], dim=1)
            tally.add(logits, _later(request, tokens))
        computed = len(request.context) + sum(map(len, beginnings))
        return Answer(*tally.sums()[0], computed=computed, reused=0)

    def _run(self, forward: Any, tokens: Sequence[int]) -> Tensor:
        """Run the tokens and return the logits of the last, [1, 1, V]."""
        ids = padded([tokens], self._model.device)
        logits: Tensor = forward(ids, **with_cache(self._cache), logits_to_keep=1).logits
        return logits

    def _states(self) -> list[Tensor]:
        """Return the lengths and Mamba states, which a step changes and no mask hides."""
        return [
            state
            for layer in self._cache.layers
            for name in ("cumulative_length", "conv_states", "recurrent_states")
            for state in _tensors(getattr(layer, name, None))
        ]

    def _check_fits(self, request: ScoreRequest) -> None:
        needed = request.longest
        if needed > self._longest:
            raise OutOfPages(needed=needed, free=self._longest, advice="make a longer StaticCache")


def _tensors(held: Any) -> list[Tensor]:
    """Return the tensors in a tensor, list or dict, since transformers' releases differ."""
    if isinstance(held, Tensor):
        return [held]
    values = held.values() if isinstance(held, dict) else held or ()
    return [value for value in values if isinstance(value, Tensor)]


def _later(request: ScoreRequest, beginning: tuple[int, ...]) -> list[TokenRead]:
    """Return reads of the second and later tokens of continuations that begin like this."""
    return [
        TokenRead(0, at, token, slot)
        for slot, tokens in enumerate(request.continuations)
        if tuple(tokens[:-1]) == beginning
        for at, token in enumerate(tokens[1:])
    ]
