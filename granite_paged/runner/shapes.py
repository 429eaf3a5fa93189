"""Which shapes a runner's steps have, and what each takes.

A captured step has a fixed shape, and every shape is a CUDA graph to compile and to keep. So there
are few: a decode step for each power of two of rows, and a prefill for each power of two of tokens,
alone and in one batch or two, none larger than the rows can fill. Chunks are computed at the next
larger shape, or, where that takes less time, in pieces one after the other: 16 prompts of 384
tokens as 256 and 128 of each.

::

    length  32  64  128  256  512  1024  2048     tokens of each chunk
    batch   1   1   1    1    1    1     1        with 2,048 tokens a call and 16 rows or more
            16  8   4    8    4    2
                    16

Costs are times in a unit of the device: what one more token of a long prompt takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from granite_paged.geometry import bucket

SHORTEST_CHUNK = 32
"""Least tokens a captured prefill computes for a chunk."""

FEW_TOKENS, SHORT = 512, 128
"""Chunks of up to `SHORT` tokens also have a graph for so many tokens together: what a question's
answers need, or a few prompts that come at once."""

STEP_TOKENS = 450
"""Tokens that take as long as a prefill's launches and weights do: 128 tokens of granite-4.0-h-1b
take 3.1 ms on an H200, 2,048 take 13.3 (`golden/perf/nvidia-h200.json`)."""

DECODE_TOKENS, DECODE_TOKENS_A_ROW = 290, 7.7
"""What a decode step takes, in such tokens: with a row 1.4 ms there, with 32 rows 2.9, with 128
rows 6.3."""


class Piece(NamedTuple):
    """Tokens `start` to `end` of a chunk, which is named by its place among those given."""

    chunk: int
    start: int
    end: int


class Batch(NamedTuple):
    """Pieces that one step computes, of different chunks, and the step's shape."""

    pieces: list[Piece]
    batch: int
    length: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of a runner.

    Attributes:
        chunk_tokens: most tokens of a chunk, and of a step.
        rows: most chunks of a call.
        captured: whether steps are graphs. If not, a step has the shape of what it is given.
        alignment: a chunk may be cut at multiples of it, where it starts at one.
    """

    chunk_tokens: int
    rows: int
    captured: bool
    alignment: int = 1

    def decode_batch(self, rows: int) -> int:
        """Rows that a decode step for so many computes."""
        return bucket(rows) if self.captured else rows

    def length(self, tokens: int) -> int:
        """Tokens that a chunk of so many is computed at."""
        if not self.captured:
            return tokens
        return max(min(SHORTEST_CHUNK, self.chunk_tokens), bucket(tokens))

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether one call takes chunks of these lengths: it makes as many steps as it needs, but
        where steps are not captured, one.
        """
        at_once = 1 if self.captured else len(lengths)
        return at_once * max(lengths, default=0) <= self.chunk_tokens

    def arrange(self, lengths: Sequence[int], *, cut: bool = True) -> list[Batch]:
        """Share chunks of these lengths out over steps, which are made in the order given.

        Of every length, all chunks that can be cut are, if that takes less time.

        cut: whether chunks may be cut.
        """
        chunks = [[Piece(place, 0, tokens)] for place, tokens in enumerate(lengths)]
        if not self.captured:
            return [Batch([piece for (piece,) in chunks], len(lengths), max(lengths))]
        steps = self._steps(chunks)
        classes = sorted({self.length(tokens) for tokens in lengths}, reverse=True)
        for length in classes if cut else ():
            others = [
                self._pieces(place, tokens) if self.length(tokens) == length else chunks[place]
                for place, tokens in enumerate(lengths)
            ]
            if _cost(found := self._steps(others)) < _cost(steps):
                chunks, steps = others, found
        return steps

    def _steps(self, chunks: Iterable[Sequence[Piece]]) -> list[Batch]:
        """Pieces of one length share steps, of those batches that take the least time a piece.

        The longest first: a chunk's pieces are in their order then (`_pieces`).
        """
        by_length: dict[int, list[Piece]] = {}
        for piece in (piece for chunk in chunks for piece in chunk):
            by_length.setdefault(self.length(piece.end - piece.start), []).append(piece)
        steps = []
        for length, left in sorted(by_length.items(), reverse=True):
            while left:
                batch = self.cheapest_batch(length, len(left))
                steps.append(Batch(left[:batch], batch, length))
                del left[:batch]
        return steps

    def _pieces(self, chunk: int, tokens: int) -> list[Piece]:
        """Of a chunk that is cut as far as it can be: each of a smaller length than the last."""
        pieces: list[Piece] = []
        start, length = 0, self.length(tokens)
        while True:
            half, rest = length // 2, tokens - start - length // 2
            if half % self.alignment or rest < 1 or self.length(rest) >= half:
                return [*pieces, Piece(chunk, start, tokens)]
            pieces.append(Piece(chunk, start, start + half))
            start, length = start + half, self.length(rest)

    def prefill_cost(self, lengths: Sequence[int]) -> float:
        """What chunks of these lengths take."""
        return _cost(self.arrange(lengths))

    def decode_cost(self, rows: int) -> float:
        """What a decode step for so many rows takes."""
        return DECODE_TOKENS + DECODE_TOKENS_A_ROW * self.decode_batch(rows)

    def alone(self, longest: int) -> set[tuple[int, int]]:
        """(batch, length) of every step that one chunk after the other takes, of up to so many
        tokens.
        """
        lengths = range(1, min(longest, self.chunk_tokens) + 1)
        steps = (step for tokens in lengths for step in self.arrange([tokens]))
        return {(step.batch, step.length) for step in steps}

    def batches(self, length: int) -> list[int]:
        """Batches that a captured prefill of so many tokens a row has graphs for, ascending."""
        batches = {1}
        if length <= SHORT:
            batches.add(min(FEW_TOKENS, self.chunk_tokens) // length)
        if length >= SHORT:
            batches.add(self.chunk_tokens // length)
        return sorted({min(batch, bucket(self.rows)) for batch in batches - {0}})

    def cheapest_batch(self, length: int, chunks: int) -> int:
        """The batch that takes the least time a chunk, where so many of that length are run."""

        def cost(batch: int) -> float:
            return _step_cost(batch, length) / min(batch, chunks)

        return min(self.batches(length), key=cost)

    def all(self) -> Iterator[tuple[int, int]]:
        """(batch, length) of every captured step, those whose first token is soonest first.

        Length 1: a decode step.
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


def _step_cost(batch: int, length: int) -> float:
    return STEP_TOKENS + batch * length


def _cost(steps: Iterable[Batch]) -> float:
    return sum(_step_cost(step.batch, step.length) for step in steps)
