"""What a user would otherwise pick: `StaticCache` and transformers' own compiled decode step.

As under `generate(cache_implementation="static")`: the context eagerly, in one pass, then one
compiled step a token. Before each further continuation the states return to the context's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from granite_paged.errors import OutOfPages
from granite_paged.evaluate.scorer import Answer, Request, Tally, Wanted, padded
from granite_paged.hf.compat import with_cache


class StaticScorer:
    """One request at a time, one continuation at a time.

    Args:
        model: a transformers causal language model in eval mode.
        longest: tokens of the longest sequence that will be scored.
    """

    batch = 1

    def __init__(self, model: Any, longest: int) -> None:
        self._model = model
        self._longest = longest
        self._cache = StaticCache(config=model.config, max_cache_len=longest)
        self._step = model.get_compiled_call(None)

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Scorer`."""
        return [self._score_one(request) for request in requests]

    def forget(self) -> None:
        """Nothing is kept from one request to the next."""

    def close(self) -> None:
        """Nothing is kept."""

    def _score_one(self, request: Request) -> Answer:
        tally = Tally([request])
        self._check_fits(request)
        self._cache.reset()
        logits = self._run(self._model, request.context)
        tally.add(logits, [Wanted(0, 0, t[0], i) for i, t in enumerate(request.continuations)])
        beginnings = list(dict.fromkeys(tuple(t[:-1]) for t in request.continuations if len(t) > 1))
        context_end = [(state, state.clone()) for state in self._states()]
        for tokens in beginnings:
            for state, saved in context_end:
                state.copy_(saved)
            logits = torch.cat([self._run(self._step, [token]).clone() for token in tokens], dim=1)
            tally.add(logits, _later(request, tokens))
        computed = len(request.context) + sum(map(len, beginnings))
        return Answer(tally.scores()[0], computed=computed, reused=0)

    def _run(self, forward: Any, tokens: Sequence[int]) -> Tensor:
        """Logits of the last one, [1, 1, V]."""
        ids = padded([tokens], self._model.device)
        logits: Tensor = forward(ids, **with_cache(self._cache), logits_to_keep=1).logits
        return logits

    def _states(self) -> list[Tensor]:
        """What a step changes and the mask does not hide: lengths and Mamba states."""
        return [
            state
            for layer in self._cache.layers
            for name in ("cumulative_length", "conv_states", "recurrent_states")
            for state in _tensors(getattr(layer, name, None))
        ]

    def _check_fits(self, request: Request) -> None:
        needed = request.longest
        if needed > self._longest:
            raise OutOfPages(needed=needed, free=self._longest, advice="make a longer StaticCache")


def _tensors(held: Any) -> list[Tensor]:
    """A tensor, or those of a list or a dict: releases of transformers differ."""
    if isinstance(held, Tensor):
        return [held]
    values = held.values() if isinstance(held, dict) else held or ()
    return [value for value in values if isinstance(value, Tensor)]


def _later(request: Request, beginning: tuple[int, ...]) -> list[Wanted]:
    """All but the first token of the continuations that begin so."""
    return [
        Wanted(0, at, token, slot)
        for slot, tokens in enumerate(request.continuations)
        if tuple(tokens[:-1]) == beginning
        for at, token in enumerate(tokens[1:])
    ]
