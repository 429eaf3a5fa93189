"""A runner driven by an allocator: the smallest policy that can run steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from granite_paged.geometry import PagedConfig
from granite_paged.paging.allocator import PageAllocator
from granite_paged.runner.runner import Chunk, Runner


class Driver:
    """A runner whose row `r` holds the allocator's sequence `sequences[r]`."""

    def __init__(self, model: Any, config: PagedConfig | None = None) -> None:
        self.runner = Runner.for_model(model, config)
        self.allocator = PageAllocator(self.runner.pages, self.runner.config.page_size)
        self.sequences: dict[int, int] = {}

    def open(self, row: int) -> None:
        self.runner.clear_rows([row])
        self.sequences[row] = self.allocator.open()

    def close(self, row: int) -> None:
        self.runner.forget_pages(self.allocator.release(self.sequences.pop(row)))

    def fork(self, source: int, target: int) -> None:
        self.sequences[target] = self.allocator.fork(self.sequences[source])
        self.runner.fork_row(source, target)

    def prefill(self, tokens: dict[int, Sequence[int]]) -> Tensor:
        """Run the next tokens of each row, and return the logits of each last token, [rows, V]."""
        return self.runner.prefill(self.chunks(tokens))

    def chunks(self, tokens: dict[int, Sequence[int]]) -> list[Chunk]:
        starts = {row: self.allocator.length(self.sequences[row]) for row in tokens}
        self._grow({row: len(new) for row, new in tokens.items()})
        return [Chunk(row, starts[row], new) for row, new in tokens.items()]

    def decode(self, tokens: dict[int, int]) -> Tensor:
        rows = list(tokens)
        positions = [self.allocator.length(self.sequences[row]) for row in rows]
        self._grow(dict.fromkeys(rows, 1))
        device = self.runner.device
        fed = torch.tensor(list(tokens.values()), device=device)
        self.runner.tokens[torch.tensor(rows, device=device)] = fed
        return self.runner.decode(rows, positions)

    def greedy(self, row: int, prompt: Sequence[int], count: int, chunk: int) -> list[int]:
        """Prefill a prompt in chunks of `chunk` tokens and return `count` greedy tokens."""
        for start in range(0, len(prompt), chunk):
            logits = self.prefill({row: prompt[start : start + chunk]})
        answer = [int(logits[0].argmax())]
        while len(answer) < count:
            answer.append(int(self.decode({row: answer[-1]})[0].argmax()))
        return answer

    def check_valid(self) -> None:
        self.allocator.check_valid()
        by_row = [self.sequences.get(row) for row in range(self.runner.rows + 1)]
        table = self.runner.storage.pages.table.physical.tolist()
        for row, sequence in enumerate(by_row):
            if sequence is not None:
                held = self.allocator.pages_of(sequence)
                assert tuple(table[row][: len(held)]) == held, f"row {row}: page table is stale"

    def _grow(self, growth: dict[int, int]) -> None:
        plan = self.allocator.append({self.sequences[row]: n for row, n in growth.items()})
        row_of = {sequence: row for row, sequence in self.sequences.items()}
        self.runner.write_pages(plan, row_of)
