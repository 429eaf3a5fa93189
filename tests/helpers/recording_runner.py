"""A runner that computes nothing: it records its calls and checks that they are consistent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged.bench import modes
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.paging.allocator import AppendPlan
from granite_paged.runner.runner import Chunk
from granite_paged.runner.shapes import Shapes


class RecordingRunner:
    """Records every call. Refuses to read a token whose page was never written.

    Rows and pages are those of `PagedConfig`. Its logits are zeros.
    """

    chunk_tokens = 64
    alignment = 16
    shapes = Shapes(chunk_tokens, 8, captured=False)
    fallback = ""
    made: list[RecordingRunner]

    def __init__(self, model: Any, config: PagedConfig) -> None:
        assert config.max_sequences is not None
        assert config.max_tokens is not None
        self.config = config
        self.geometry = CacheGeometry.from_config(
            model.config, page_size=config.page_size, dtype=model.dtype
        )
        self.rows = config.max_sequences
        self.pages = config.max_tokens // config.page_size + 1
        self.longest = config.max_tokens
        self.vocabulary = model.config.vocab_size
        self.tokens = torch.zeros(self.rows + 1, dtype=torch.int64)
        self.lengths = [0] * (self.rows + 1)
        self.table: dict[int, dict[int, int]] = {row: {} for row in range(1, self.rows + 1)}
        self.filled: set[int] = set()
        self.calls: list[tuple[str, Any]] = []
        self.closed = False

    @classmethod
    def for_model(cls, model: Any, config: PagedConfig) -> RecordingRunner:
        cls.made.append(cls(model, config))
        return cls.made[-1]

    def warm_up(self, progress: Any = None) -> None:
        self.calls.append(("warm_up", None))

    def write_pages(self, plan: AppendPlan, row_of: Mapping[int, int]) -> None:
        for write in plan.writes:
            assert 0 < write.physical_page < self.pages
            self.table[row_of[write.sequence]][write.logical_page] = write.physical_page

    def forget_pages(self, pages: Sequence[int]) -> None:
        self.filled -= set(pages)

    def clear_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.lengths[row], self.table[row] = 0, {}

    def save_row(self, row: int, *, to_host: bool = False) -> int:
        return self.lengths[row]

    def load_row(self, row: int, state: int) -> None:
        self.lengths[row] = state

    def save_pages(self, pages: Sequence[int]) -> int:
        assert set(pages) <= self.filled, "pages were saved that hold no tokens"
        return len(pages)

    def load_pages(self, pages: Sequence[int], contents: int) -> None:
        assert len(pages) == contents
        self.filled |= set(pages)

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        assert self.shapes.fits([len(chunk.tokens) for chunk in chunks])
        self.calls.append(("prefill", [(c.row, c.start, len(c.tokens)) for c in chunks]))
        for row, start, tokens in chunks:
            assert start == self.lengths[row], "a chunk does not start where its row ended"
            assert start % self.alignment == 0
            self.lengths[row] += len(tokens)
            self._fill(row, start, self.lengths[row])
        return torch.zeros(len(chunks), self.vocabulary)

    def decode(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        self.calls.append(("decode", (list(rows), list(positions))))
        for row, position in zip(rows, positions, strict=True):
            before = {self._page(row, at) for at in range(position)}
            assert before <= self.filled, "a context is read that was never filled"
            self._fill(row, position, position + 1)
        return torch.zeros(len(rows), self.vocabulary)

    def notice_changes(self, *, idle: bool) -> bool:
        """Return False: there is no model to change."""
        return False

    def close(self) -> None:
        self.closed = True

    def _fill(self, row: int, start: int, end: int) -> None:
        self.filled |= {self._page(row, position) for position in range(start, end)}

    def _page(self, row: int, position: int) -> int:
        return self.table[row][position // self.config.page_size]


@contextmanager
def installed() -> Iterator[type[RecordingRunner]]:
    """Replace the benchmark's runner by a `RecordingRunner`. Yields the class; see its `made`."""
    made = type("RecordingRunner", (RecordingRunner,), {"made": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "Runner", made)
        yield made
