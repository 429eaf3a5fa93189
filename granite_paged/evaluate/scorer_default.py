"""What transformers does today: SDPA, whole sequences, no cache; the `default` to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from granite_paged.evaluate.scorer import (
    Answer,
    Request,
    Row,
    Tally,
    distinct_rows,
    full_length,
    padded,
)


class DefaultScorer:
    """Runs context and continuation together, as lm-eval's `HFLM` does.

    Rows of a batch are padded on the right: without a cache, no position that is read sees them.
    Unlike `HFLM`, only the logits that are read are computed, which makes it a harder mark to beat.

    Args:
        model: a transformers causal language model in eval mode.
        batch: rows a forward pass. 1 is how the original study ran.
    """

    def __init__(self, model: Any, batch: int = 1) -> None:
        self.batch = batch
        self._model = model

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Scorer`."""
        tally = Tally(requests)
        rows = sorted(distinct_rows(requests), key=lambda row: -len(row.tokens))
        for start in range(0, len(rows), self.batch):
            self._run(rows[start : start + self.batch], tally)
        return [
            Answer(scores, computed=full_length(request), reused=0)
            for request, scores in zip(requests, tally.scores(), strict=True)
        ]

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is kept."""

    def _run(self, rows: Sequence[Row], tally: Tally) -> None:
        ids = padded([row.tokens for row in rows], self._model.device)
        first = min(row.first_read for row in rows)
        keep = ids.shape[1] - first
        logits = self._model(ids, use_cache=False, logits_to_keep=keep).logits
        wanted = [want for i, row in enumerate(rows) for want in row.wanted(i)]
        tally.add(logits, wanted, first)
