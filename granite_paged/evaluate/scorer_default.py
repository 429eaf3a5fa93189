"""The `default` scorer: transformers with SDPA, whole sequences, and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from granite_paged.evaluate.scorer import (
    Answer,
    ScoredSequence,
    ScoreRequest,
    Tally,
    distinct_sequences,
    padded,
    uncached_tokens,
)


class DefaultScorer:
    """Runs context and continuation together, as lm-eval's `HFLM` does.

    Rows of a batch are padded on the right; without a cache, no position that is read sees the
    padding. Unlike `HFLM`, it computes only the logits that are read, and so it is faster.

    Args:
        model: a transformers causal language model in eval mode.
        batch: rows per forward pass; the original study used 1.
    """

    def __init__(self, model: Any, batch: int = 1) -> None:
        self.batch = batch
        self._model = model

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Answer]:
        """See `Scorer`."""
        tally = Tally(requests)
        sequences = sorted(distinct_sequences(requests), key=lambda one: -len(one.tokens))
        for start in range(0, len(sequences), self.batch):
            self._run(sequences[start : start + self.batch], tally)
        return [
            Answer(*sums, computed=uncached_tokens(request), reused=0)
            for request, sums in zip(requests, tally.sums(), strict=True)
        ]

    def forget(self) -> None:
        """Do nothing; no cache is kept."""

    def close(self) -> None:
        """Do nothing; no cache is kept."""

    def _run(self, sequences: Sequence[ScoredSequence], tally: Tally) -> None:
        ids = padded([sequence.tokens for sequence in sequences], self._model.device)
        first = min(sequence.first_read for sequence in sequences)
        keep = ids.shape[1] - first
        logits = self._model(ids, use_cache=False, logits_to_keep=keep).logits
        reads = [read for row, sequence in enumerate(sequences) for read in sequence.reads(row)]
        tally.add(logits, reads, first)
