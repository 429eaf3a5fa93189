"""Scoring through a `PagedCache`: a context is run once, and forked for its continuations.

    prefix shared by neighbours    run once, parked
      -> rest of the context       a fork of the prefix; its last logits decide every first token
           -> continuations        forks of the context, one a row

A prefix ends at a multiple of the page size and of `mamba_chunk_size`, where stopping and going on
changes no sum: scores are those of a context that was run in one piece.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from granite_paged.cache import PagedCache, Parked
from granite_paged.compat import with_cache
from granite_paged.errors import OutOfPages
from granite_paged.evaluate.scorer import (
    Answer,
    Request,
    Tally,
    Wanted,
    aligned,
    chunked,
    distinct_rows,
    padded,
)
from granite_paged.geometry import PagedConfig
from granite_paged.integrate import patch


@dataclass(frozen=True)
class _Prefix:
    """Tokens that were run, and the cache's state after them."""

    tokens: tuple[int, ...]
    parked: Parked


class PagedScorer:
    """Contexts prefilled once, prefixes shared by neighbouring requests prefilled once.

    Args:
        model: a `GraniteMoeHybridForCausalLM` that is not patched; it stays so. A twin that shares
            its weights is.
        config: of the cache.
        batch: rows a forward pass, where they have the same prefix. From 2 on, continuations run
            beside each other with their contexts instead of as forks of it: more tokens, fewer
            passes.
    """

    def __init__(self, model: Any, config: PagedConfig | None = None, batch: int = 1) -> None:
        self.batch = batch
        self._model = twin(model)
        patch(self._model, config)
        self.cache = PagedCache.for_model(self._model, config)
        self._unit = self.cache.config.page_size
        if self.cache.geometry.mamba_layers:
            self._unit = math.lcm(self._unit, model.config.mamba_chunk_size)
        self._prefixes: list[_Prefix] = []  # each begins with the one before it

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Scorer`."""
        answers: list[Answer] = []
        for group in self._groups(requests):
            try:
                answers += self._score_group(group, together=self.batch > 1)
            except OutOfPages:  # then with as little as it takes
                self.forget()
                for request in group:
                    answers += self._score_group([request], together=False)
        return answers

    @torch.inference_mode()
    def forget(self) -> None:
        """Let go of every sequence and prefix."""
        self.cache.reset()
        while self._prefixes:
            self.cache.discard(self._prefixes.pop().parked)

    def close(self) -> None:
        """As `forget`; pools go with the scorer."""
        self.forget()

    # -- details --------------------------------------------------------------------------------

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        for _, same in itertools.groupby(requests, key=self._prefix_of):
            yield from chunked(list(same), self.batch, request=lambda one: one)

    def _prefix_of(self, request: Request) -> tuple[int, ...]:
        """What is worth keeping of a context; at least one token is left to run after it."""
        tokens = aligned(min(request.shared, len(request.context) - 1), self._unit)
        return tuple(request.context[:tokens])

    def _score_group(self, group: Sequence[Request], *, together: bool) -> list[Answer]:
        prefix = self._prefix_of(group[0])
        reused = self._enter(prefix)
        run = self._beside_each_other if together else self._context_then_forks
        tally, computed = run(group, len(prefix))
        computed[0] += len(prefix) - reused
        found = [reused, *[len(prefix)] * (len(group) - 1)]
        return list(map(Answer, tally.scores(), computed, found))

    def _enter(self, prefix: tuple[int, ...]) -> int:
        """Make the cache hold one row with these tokens. Returns how many it had already."""
        while self._prefixes and not _begins(prefix, self._prefixes[-1].tokens):
            self.cache.discard(self._prefixes.pop().parked)
        known: tuple[int, ...] = ()
        if self._prefixes:
            known = self._prefixes[-1].tokens
            self.cache.resume(self._prefixes[-1].parked)
        else:
            self.cache.reset()
        if len(prefix) > len(known):
            self._feed([prefix[len(known) :]], keep=1)
            self._prefixes.append(_Prefix(prefix, self.cache.park()))
        return len(known)

    def _context_then_forks(self, group: Sequence[Request], skip: int) -> tuple[Tally, list[int]]:
        """One request: its context, then its continuations as forks of that."""
        (request,) = group
        tally = Tally(group)
        rest = request.context[skip:]
        first = [Wanted(0, 0, tokens[0], slot) for slot, tokens in enumerate(request.continuations)]
        tally.add(self._feed([rest], keep=1), first)
        forks = list(dict.fromkeys(tuple(t[:-1]) for t in request.continuations if len(t) > 1))
        if forks:
            self.cache.batch_repeat_interleave(len(forks))
            later = [
                Wanted(forks.index(tuple(tokens[:-1])), at, token, slot)
                for slot, tokens in enumerate(request.continuations)
                for at, token in enumerate(tokens[1:])
            ]
            tally.add(self._feed(forks), later)
        return tally, [len(rest) + sum(map(len, forks))]

    def _beside_each_other(self, group: Sequence[Request], skip: int) -> tuple[Tally, list[int]]:
        """Several requests: what follows the prefix, one row for each different ending."""
        tally = Tally(group)
        rows = distinct_rows(group, skip)
        if skip:
            self.cache.batch_repeat_interleave(len(rows))
        first = min(row.first_read for row in rows)
        width = max(len(row.tokens) for row in rows)
        wanted = [want for i, row in enumerate(rows) for want in row.wanted(i)]
        tally.add(self._feed([row.tokens for row in rows], keep=width - first), wanted, first)
        computed = [sum(len(r.tokens) for r in distinct_rows([one], skip)) for one in group]
        return tally, computed

    def _feed(self, rows: Sequence[Sequence[int]], keep: int = 0) -> Tensor:
        """Run rows on, padded on the right as if that were text: they are not continued.

        Returns the logits of the last `keep` columns (0: all), [n, keep, V].
        """
        ids = padded(rows, self._model.device)
        logits: Tensor = self._model(ids, **with_cache(self.cache), logits_to_keep=keep).logits
        return logits


def twin(model: Any) -> Any:
    """A copy with modules and config of its own, and the same weights."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _begins(tokens: tuple[int, ...], start: tuple[int, ...]) -> bool:
    return tokens[: len(start)] == start
