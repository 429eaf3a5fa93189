"""Which shapes a runner's steps have, and what each takes.

A captured step has a fixed shape, and every shape is a CUDA graph to compile and to keep. So there
are few: a decode step for each power of two of rows, and a prefill for each power of two of tokens,
alone and in one batch or two. Chunks are computed at the next larger shape.

::

    length  32  64  128  256  512  1024  2048     tokens of each chunk
    batch   1   1   1    1    1    1     1        with 2,048 tokens a call
            16  8   4    8    4    2
                    16

Costs are times in a unit of the device: what one more token of a long prompt takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SHORTEST_CHUNK = 32
"""Least tokens a captured prefill computes for a chunk."""

FEW_TOKENS, SHORT = 512, 128
"""Chunks of up to `SHORT` tokens also have a graph for so many tokens together: what a question's
answers need, or a few prompts that come at once."""

STEP_TOKENS = 450
"""Tokens that take as long as a prefill's launches and weights do: 128 tokens of granite-4.0-h-1b
take 3.0 ms on an H200, 2,048 take 12.7 (`golden/perf/nvidia-h200.json`)."""

DECODE_TOKENS, DECODE_TOKENS_A_ROW = 290, 7.7
"""What a decode step takes, in such tokens: with a row 1.4 ms there, with 32 rows 3.0, with 128
rows 6.4."""


class Batch(NamedTuple):
    """Chunks that one step computes: their places among those given, and the step's shape."""

    members: list[int]
    batch: int
    length: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of a runner that takes so many tokens in one prefill.

    Attributes:
        captured: whether steps are graphs. If not, a step has the shape of what it is given.
    """

    chunk_tokens: int
    captured: bool

    def decode_batch(self, rows: int) -> int:
        """Rows that a decode step for so many computes."""
        return next_power_of_two(rows) if self.captured else rows

    def length(self, tokens: int) -> int:
        """Tokens that a chunk of so many is computed at."""
        if not self.captured:
            return tokens
        return max(min(SHORTEST_CHUNK, self.chunk_tokens), next_power_of_two(tokens))

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether one call takes chunks of these lengths."""
        if self.captured:
            return sum(map(self.length, lengths)) <= self.chunk_tokens
        return len(lengths) * max(lengths, default=0) <= self.chunk_tokens

    def arrange(self, lengths: Sequence[int]) -> list[Batch]:
        """Share chunks of these lengths out over steps.

        Chunks of one length share steps, of those batches that take the least time a chunk.
        """
        if not self.captured:
            return [Batch(list(range(len(lengths))), len(lengths), max(lengths))]
        places: dict[int, list[int]] = {}
        for place, tokens in enumerate(lengths):
            places.setdefault(self.length(tokens), []).append(place)
        arranged = []
        for length, left in places.items():
            while left:
                batch = cheapest_batch(length, len(left), self.chunk_tokens)
                arranged.append(Batch(left[:batch], batch, length))
                del left[:batch]
        return arranged

    def prefill_cost(self, lengths: Sequence[int]) -> float:
        """What chunks of these lengths take."""
        return sum(STEP_TOKENS + batch * length for _, batch, length in self.arrange(lengths))

    def decode_cost(self, rows: int) -> float:
        """What a decode step for so many rows takes."""
        return DECODE_TOKENS + DECODE_TOKENS_A_ROW * self.decode_batch(rows)

    def all(self, rows: int) -> Iterator[tuple[int, int]]:
        """(batch, length) of every captured step, those whose first token is soonest first.

        rows: the most that decode at once. Length 1: a decode step.
        """
        if not self.captured:
            return
        lengths = [self.length(1)]
        while lengths[-1] < self.chunk_tokens:
            lengths.append(2 * lengths[-1])
        yield from ((1, length) for length in lengths)
        yield from ((1 << i, 1) for i in range(next_power_of_two(rows).bit_length()))
        for length in lengths:
            batches = prefill_batches(length, self.chunk_tokens)
            yield from ((batch, length) for batch in batches if batch > 1)


def next_power_of_two(count: int) -> int:
    """The least that is not below `count`, which is at least 1."""
    return int(1 << (count - 1).bit_length())


def prefill_batches(length: int, chunk_tokens: int) -> list[int]:
    """Batches that a captured prefill of so many tokens a row has graphs for, ascending."""
    batches = {1}
    if length <= SHORT:
        batches.add(min(FEW_TOKENS, chunk_tokens) // length)
    if length >= SHORT:
        batches.add(chunk_tokens // length)
    return sorted(batches - {0})


def cheapest_batch(length: int, chunks: int, chunk_tokens: int) -> int:
    """The batch that takes the least time a chunk, where so many of that length are to be run."""

    def cost(batch: int) -> float:
        return (STEP_TOKENS + batch * length) / min(batch, chunks)

    return min(prefill_batches(length, chunk_tokens), key=cost)
