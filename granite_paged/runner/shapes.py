"""The shapes of a runner's steps, and what each step costs.

Each captured step has a fixed shape: a CUDA graph to compile and to keep in memory. So there are
few: a decode step for each power of two of rows, and a prefill step for each power of two of
tokens per chunk, with one row and with one or two larger batches. A chunk is computed at the next
larger length, or in several pieces where that takes less time.

::

    length  32  64  128  256  512  1024  2048     tokens per chunk
    batch   1   1   1    1    1    1     1        with 2,048 tokens per step and 16 rows or more
            16  8   4    8    4    2
                    16

The unit of cost is the time that one more token of a long prompt takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from granite_paged.geometry import bucket

SHORTEST_CHUNK = 32
"""Smallest length of a captured prefill step, in tokens."""

FEW_TOKENS, SHORT = 512, 128
"""Lengths of up to `SHORT` tokens also have a step of `FEW_TOKENS` tokens in all: enough for the
answers to one question, or for a few prompts that arrive together."""

STEP_TOKENS = 450
"""Fixed cost of a prefill step: its launches and the weights it reads. On an H200, 128 tokens of
granite-4.0-h-1b take 3.1 ms and 2,048 take 13.3 ms (recorded on an H200)."""

DECODE_TOKENS, DECODE_TOKENS_PER_ROW = 290, 7.7
"""Fixed cost of a decode step, and the cost of each of its rows. From the same record: 1.4 ms with
one row, 2.9 ms with 32 rows, 6.3 ms with 128 rows."""


class ChunkPiece(NamedTuple):
    """Tokens `start` to `end` of a chunk. `chunk` is its index in the call."""

    chunk: int
    start: int
    end: int


class Batch(NamedTuple):
    """Pieces of different chunks that one step computes, and the step's shape."""

    pieces: tuple[ChunkPiece, ...]
    batch: int
    length: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes of a runner's steps.

    Attributes:
        chunk_tokens: most tokens of a chunk, and of a captured step.
        rows: most chunks of a call.
        captured: whether steps are CUDA graphs. If not, a step has the shape of its input.
        alignment: chunks that start at a multiple of it may be cut at its multiples.
    """

    chunk_tokens: int
    rows: int
    captured: bool
    alignment: int = 1

    def decode_batch(self, rows: int) -> int:
        """Return the rows that a decode step for `rows` rows computes."""
        return bucket(rows) if self.captured else rows

    def length(self, tokens: int) -> int:
        """Return the length at which a chunk of `tokens` tokens is computed."""
        if not self.captured:
            return tokens
        return max(min(SHORTEST_CHUNK, self.chunk_tokens), bucket(tokens))

    def fits(self, lengths: Sequence[int]) -> bool:
        """Return whether one call takes chunks of these lengths.

        A call makes as many captured steps as it needs, but only one that is not captured.
        """
        at_once = 1 if self.captured else len(lengths)
        return at_once * max(lengths, default=0) <= self.chunk_tokens

    def arrange(self, lengths: Sequence[int], *, cut: bool = True) -> tuple[Batch, ...]:
        """Divide chunks of these lengths over steps, in the order in which the steps must run.

        Where `cut` allows it, all chunks of one length are cut if that takes less time. Recent
        answers are remembered, since the scheduler asks for the price of a call before it runs.
        """
        return _arrange(self, tuple(lengths), cut)

    def prefill_cost(self, lengths: Sequence[int]) -> float:
        """Return what a call with chunks of these lengths costs, each starting at an aligned place.

        Example: 16 chunks of 384 tokens, with 2,048 tokens per step and an alignment of 256::

            whole       4 steps of 4 x 512                       4 x (450 + 2,048) = 9,992
            cut at 256  2 steps of 8 x 256, 1 step of 16 x 128   3 x (450 + 2,048) = 7,494

        The 384 tokens are computed at length 512. Cutting avoids that padding, so the chunks are
        cut.
        """
        return _cost(self.arrange(lengths))

    def decode_cost(self, rows: int) -> float:
        """Return what a decode step for `rows` rows costs."""
        return DECODE_TOKENS + DECODE_TOKENS_PER_ROW * self.decode_batch(rows)

    def alone(self, longest: int) -> set[tuple[int, int]]:
        """Return (batch, length) of every step that calls with one chunk make.

        longest: most tokens of such a chunk.
        """
        lengths = range(1, min(longest, self.chunk_tokens) + 1)
        steps = (step for tokens in lengths for step in self.arrange([tokens]))
        return {(step.batch, step.length) for step in steps}

    def batches(self, length: int) -> list[int]:
        """Return the batch sizes of captured prefill steps of this length, ascending."""
        batches = {1}
        if length <= SHORT:
            batches.add(min(FEW_TOKENS, self.chunk_tokens) // length)
        if length >= SHORT:
            batches.add(self.chunk_tokens // length)
        return sorted({min(batch, bucket(self.rows)) for batch in batches - {0}})

    def cheapest_batch(self, length: int, chunks: int) -> int:
        """Return the batch size with the lowest cost per chunk, for `chunks` chunks."""

        def cost(batch: int) -> float:
            return _step_cost(batch, length) / min(batch, chunks)

        return min(self.batches(length), key=cost)

    def all(self) -> Iterator[tuple[int, int]]:
        """Yield (batch, length) of every captured step; length 1 is a decode step.

        Steps that a first request needs come first.
        """
        if not self.captured:
            return
        lengths = [self.length(1)]
        while lengths[-1] < self.chunk_tokens:
            lengths.append(2 * lengths[-1])
        yield from ((1, length) for length in lengths)
        yield from ((1 << i, 1) for i in range(bucket(self.rows).bit_length()))
        for length in lengths:
            yield from ((batch, length) for batch in self.batches(length) if batch > 1)


@functools.lru_cache(maxsize=256)
def _arrange(shapes: Shapes, lengths: tuple[int, ...], cut: bool) -> tuple[Batch, ...]:
    chunks = [[ChunkPiece(chunk, 0, tokens)] for chunk, tokens in enumerate(lengths)]
    if not shapes.captured:
        return (Batch(tuple(piece for (piece,) in chunks), len(lengths), max(lengths)),)
    steps = _steps(shapes, chunks)
    classes = sorted({shapes.length(tokens) for tokens in lengths}, reverse=True)
    for length in classes if cut else ():
        others = [
            _pieces(shapes, chunk, tokens) if shapes.length(tokens) == length else chunks[chunk]
            for chunk, tokens in enumerate(lengths)
        ]
        if _cost(found := _steps(shapes, others)) < _cost(steps):
            chunks, steps = others, found
    return tuple(steps)


def _steps(shapes: Shapes, chunks: Iterable[Sequence[ChunkPiece]]) -> list[Batch]:
    """Let pieces of one length share steps, at the batch size that costs least per piece.

    The longest come first, so that the pieces of a chunk run in their order (`_pieces`).
    """
    by_length: dict[int, list[ChunkPiece]] = {}
    for piece in (piece for chunk in chunks for piece in chunk):
        by_length.setdefault(shapes.length(piece.end - piece.start), []).append(piece)
    steps = []
    for length, left in sorted(by_length.items(), reverse=True):
        while left:
            batch = shapes.cheapest_batch(length, len(left))
            steps.append(Batch(tuple(left[:batch]), batch, length))
            del left[:batch]
    return steps


def _pieces(shapes: Shapes, chunk: int, tokens: int) -> list[ChunkPiece]:
    """Cut a chunk as often as possible, into pieces of strictly decreasing lengths."""
    pieces: list[ChunkPiece] = []
    start, length = 0, shapes.length(tokens)
    while True:
        half, rest = length // 2, tokens - start - length // 2
        if half % shapes.alignment or rest < 1 or shapes.length(rest) >= half:
            return [*pieces, ChunkPiece(chunk, start, tokens)]
        pieces.append(ChunkPiece(chunk, start, start + half))
        start, length = start + half, shapes.length(rest)


def _step_cost(batch: int, length: int) -> float:
    return STEP_TOKENS + batch * length


def _cost(steps: Iterable[Batch]) -> float:
    return sum(_step_cost(step.batch, step.length) for step in steps)
