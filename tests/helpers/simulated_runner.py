"""A simulated runner: pages hold token ids, and a Mamba state is the list of tokens it has seen.

It carries out the engine's decisions literally. If the engine names another sequence's page, a
state of another boundary or a lost row, other tokens are read: `mismatches` then says so, and the
logits are those of the tokens that were read. An `Oracle` computes them from a whole sequence.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from granite_paged.device import finite_rows
from granite_paged.paging.allocator import AppendPlan
from granite_paged.runner.memory_plan import MemoryPlan
from granite_paged.runner.shapes import Shapes

BLANK, POISON = None, -1


class Oracle(Protocol):
    vocabulary: int

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        """Return the logits of a sequence run by itself, [len(tokens), V]."""
        ...

    def last(self, tokens: tuple[int, ...]) -> Tensor:
        """Return the logits of its last token, [V]."""
        ...


class ModelOracle:
    """Logits of plain transformers: SDPA, no cache, one sequence at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocabulary = model.config.vocab_size
        self.logits = functools.lru_cache(maxsize=4096)(self._logits)

    def _logits(self, tokens: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    def last(self, tokens: tuple[int, ...]) -> Tensor:
        return self.logits(tokens)[-1]


class HashOracle:
    """A cheap oracle: the next token is a hash of all tokens before it."""

    def __init__(self, vocabulary: int = 97) -> None:
        self.vocabulary = vocabulary
        self._rows = torch.eye(vocabulary)

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.stack([self.last(tokens[: end + 1]) for end in range(len(tokens))])

    def last(self, tokens: tuple[int, ...]) -> Tensor:
        first, second = hash(tokens) % self.vocabulary, hash((tokens, 1)) % self.vocabulary
        return self._rows[first] + 0.5 * self._rows[second]


class SimulatedState(NamedTuple):
    tokens: tuple[int, ...]
    unsound: bool

    @property
    def nbytes(self) -> int:
        return SimulatedRunner.row_bytes

    def all_finite(self) -> Tensor:
        return torch.tensor([not self.unsound])


class SimulatedPages(NamedTuple):
    contents: list[list[int | None]]

    @property
    def nbytes(self) -> int:
        return 10 * len(self.contents)


@dataclass
class SimulatedScores:
    logprobs: Tensor
    greedy: Tensor


class SimulatedRunner:
    """The runner's API without a model.

    Args:
        nan: a token id whose computation gives NaN.
    """

    device, dtype = torch.device("cpu"), torch.float32
    row_bytes = 100
    late_captures = 0

    def __init__(
        self,
        oracle: Oracle,
        *,
        pages: int = 64,
        page_size: int = 4,
        rows: int = 4,
        alignment: int = 8,
        chunk_tokens: int = 32,
        stateful: bool = True,
        nan: int = -2,
    ) -> None:
        self.oracle = oracle
        self.vocabulary = oracle.vocabulary
        self.rows, self.pages = rows, pages
        self.config = SimpleNamespace(page_size=page_size, exact=False)
        self.geometry = SimpleNamespace(
            mamba_layers=(0,) if stateful else (),
            bytes_per_page=10,
            pages_for=lambda tokens: -(-tokens // page_size),
        )
        self.plan = MemoryPlan(
            weight_bytes=0,
            row_bytes=self.row_bytes * (rows + 1),
            page_bytes=0,
            workspace_bytes=0,
            logit_bytes=0,
            graph_bytes=0,
        )
        self.longest = (pages - 1) * page_size
        self.chunk_tokens, self.alignment = chunk_tokens, alignment
        self.shapes = Shapes(chunk_tokens, rows, captured=False)
        self.tokens = torch.zeros(rows + 1, dtype=torch.int64)
        self.nonfinite = torch.zeros(rows + 1, dtype=torch.bool)
        self.mismatches: list[str] = []
        self.calls: Counter[str] = Counter()
        self.computed = 0  # number of tokens
        self.forked = 0  # number of rows
        self.fault: Callable[[str, Sequence[int]], None] = lambda call, rows: None
        self.closed = False
        self._nan = nan
        self._stateful = stateful
        self._contents: dict[int, list[int | None]] = {}
        self._tables: dict[int, dict[int, int]] = {row: {} for row in range(rows + 1)}
        self._states: dict[int, tuple[int, ...]] = dict.fromkeys(range(rows + 1), ())
        self._loads: dict[int, SimulatedState] = {}

    # -- memory ---------------------------------------------------------------------------------

    def write_pages(self, plan: AppendPlan, row_of: Mapping[int, int]) -> None:
        self._called("write_pages", list(row_of.values()))
        for source, target in plan.copies:
            self._contents[target] = list(self._page(source))
        for sequence, logical, physical in plan.writes:
            self._tables[row_of[sequence]][logical] = physical

    def forget_pages(self, pages: Sequence[int]) -> None:
        self._called("forget_pages", [])
        for page in pages:
            self._contents[page] = [POISON] * self.config.page_size

    def fork_row(self, source: int, *targets: int) -> None:
        self._called("fork_row", [source, *targets])
        self.load_states([source])
        self.forked += len(targets)
        for target in targets:
            self._tables[target] = dict(self._tables[source])
            self._states[target] = self._states[source]
            self.nonfinite[target] = self.nonfinite[source]

    def clear_rows(self, rows: Sequence[int]) -> None:
        self._called("clear_rows", rows)
        for row in rows:
            self._tables[row], self._states[row] = {}, ()
            self.nonfinite[row] = False
            self._loads.pop(row, None)

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        self._called("set_pages", [row])
        self._tables[row] = dict(enumerate(pages))
        if not self._stateful:  # the pages alone say how long the row is
            self._states[row] = tuple(
                t for page in pages for t in self._page(page) if t is not None
            )

    def save_row(self, row: int, *, to_host: bool = False) -> SimulatedState:
        self._called("save_row", [row])
        self.load_states([row])
        return SimulatedState(self._states[row], bool(self.nonfinite[row]))

    def load_row(self, row: int, state: SimulatedState) -> None:
        self._called("load_row", [row])
        self._loads[row] = state

    def load_states(self, rows: Sequence[int]) -> None:
        states = {row: self._loads.pop(row) for row in rows if row in self._loads}
        self._called("load_states", rows)
        for row, state in states.items():
            self._states[row] = state.tokens
            self.nonfinite[row] = state.unsound

    def save_pages(self, pages: Sequence[int]) -> SimulatedPages:
        self._called("save_pages", [])
        return SimulatedPages([list(self._page(page)) for page in pages])

    def load_pages(self, pages: Sequence[int], contents: SimulatedPages) -> None:
        self._called("load_pages", [])
        for page, content in zip(pages, contents.contents, strict=True):
            self._contents[page] = list(content)

    # -- computing ------------------------------------------------------------------------------

    def prefill(self, chunks: Sequence[Any]) -> Tensor:
        self._called("prefill", [chunk.row for chunk in chunks])
        assert self.shapes.fits([len(chunk.tokens) for chunk in chunks]), (
            "more tokens than one call takes"
        )
        assert all(chunk.start % self.alignment == 0 for chunk in chunks), (
            "a chunk starts off the alignment"
        )
        return torch.stack([self._last(c.row, c.start, c.tokens) for c in chunks])

    def score(self, chunks: Sequence[Any], targets: Sequence[Sequence[int]]) -> SimulatedScores:
        self._called("score", [chunk.row for chunk in chunks])
        assert self.shapes.fits([len(chunk.tokens) for chunk in chunks]), (
            "more tokens than one call takes"
        )
        rows = [self._all(c.row, c.start, c.tokens)[-len(c.tokens) :] for c in chunks]
        wanted = torch.tensor([target for each in targets for target in each])
        logits = torch.cat(rows)
        assert len(wanted) == len(logits), "one target per token"
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        return SimulatedScores(chosen, logits.argmax(-1) == wanted)

    def decode(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        self._called("decode", rows)
        assert len(set(rows)) == len(rows), "a row appears twice"
        fed = [int(self.tokens[row]) for row in rows]
        outputs = [
            self._last(row, position, [token])
            for row, position, token in zip(rows, positions, fed, strict=True)
        ]
        logits = torch.stack(outputs)
        self.tokens[list(rows)] = logits.argmax(dim=-1)
        self.nonfinite[list(rows)] |= ~finite_rows(logits)
        return logits

    def warm_up(self, progress: Any = None) -> None: ...

    def notice_changes(self, *, idle: bool) -> bool:
        """Return False: there is no model to change."""
        return False

    def close(self) -> None:
        self.closed = True

    # -- details --------------------------------------------------------------------------------

    def _last(self, row: int, start: int, tokens: Sequence[int]) -> Tensor:
        read = self._compute(row, start, tokens)
        return self._unsound(row, read, 1)[0] if self._is_off(read) else self.oracle.last(read)

    def _all(self, row: int, start: int, tokens: Sequence[int]) -> Tensor:
        read = self._compute(row, start, tokens)
        if self._is_off(read):
            return self._unsound(row, read, len(tokens))
        return self.oracle.logits(read)

    def _is_off(self, read: tuple[Any, ...]) -> bool:
        return POISON in read or BLANK in read or self._nan in read

    def _unsound(self, row: int, read: tuple[Any, ...], tokens: int) -> Tensor:
        if self._nan in read:
            self.nonfinite[row] = True
        return torch.full((tokens, self.vocabulary), float("nan"))

    def _compute(self, row: int, start: int, tokens: Sequence[int]) -> tuple[Any, ...]:
        """Write the tokens to pages and state, and return the tokens that the pages hold."""
        assert 0 < row <= self.rows, "the null row must compute nothing"
        assert row not in self._loads, f"row {row}: its state is not loaded"
        self.computed += len(tokens)
        if len(self._states[row]) != start:
            self.mismatches.append(
                f"row {row} starts at {start}, its state has seen {len(self._states[row])} tokens"
            )
        self._states[row] = (*self._states[row], *tokens)
        for at, token in enumerate(tokens, start):
            assert 0 <= token < self.vocabulary, f"row {row}: no such token: {token}"
            page = self._tables[row].get(at // self.config.page_size)
            assert page, f"row {row}: no page for position {at}"
            self._page(page)[at % self.config.page_size] = token
        read = self._read(row, start + len(tokens))
        if read != self._states[row]:
            self.mismatches.append(
                f"row {row}: its pages hold {read}, but its state has seen {self._states[row]}"
            )
        return read

    def _read(self, row: int, length: int) -> tuple[int, ...]:
        size = self.config.page_size
        slots: list[Any] = []
        for logical in range(-(-length // size)):
            slots += self._page(self._tables[row].get(logical, 0))
        return tuple(slots[:length])

    def _page(self, page: int) -> list[int | None]:
        return self._contents.setdefault(page, self._blank())

    def _blank(self) -> list[int | None]:
        return [BLANK] * self.config.page_size

    def _called(self, call: str, rows: Sequence[int]) -> None:
        self.calls[call] += 1
        self.fault(call, rows)
