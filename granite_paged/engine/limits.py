"""Sizes and costs that the scheduler keeps to.

Host only and without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from granite_paged.arguments import integer, number, one_of
from granite_paged.geometry import pages_for
from granite_paged.runner.shapes import Shapes

if TYPE_CHECKING:
    from granite_paged.runner.runner import Runner

Preemption = Literal["auto", "recompute", "swap"]
"""How a preempted job gets its pages back: they are computed again, or they are copied to host
memory and back, or whichever of the two is estimated to be faster."""

Warmup = Literal["full", "lazy"]
"""When an engine compiles and captures its steps: before the first request, or as they occur."""

PREFILL_TOKENS_PER_SECOND = 1.6e5
"""granite-4.0-h-1b on an H200: 16 prompts of 512 tokens in 50 ms (recorded)."""

HOST_BYTES_PER_SECOND = 50e9
"""Pinned memory over PCIe 5.0 x16, one way."""

LONGEST_STEP = 2.0
"""Limit on a mixed step that decodes a streamed request, as a multiple of its decode-only time. At
2.0, inter-token latency is at most about 3 times that of a decode-only step: a mixed step also
decodes more rows, and its prefill calls have fixed costs."""

STEP_CHUNKS = 4
"""Prefill chunks per step when no streamed request decodes. Larger batches raise throughput and
delay the first token (50 ms instead of 13 ms on an H200)."""

SMALLEST_CHUNK = 256
"""Smallest prefill chunk worth a call. Applies where prompts can be split anywhere: those of
attention-only models, and of exact mode on the CPU. Others split at the Mamba chunk size (256 for
Granite)."""


def check_options(
    *,
    step_tokens: int | None,
    longest_step: float,
    queue: int,
    state_bytes: int,
    swap_bytes: int,
    preemption: Preemption,
    warmup: Warmup,
) -> None:
    """Raise InvalidArgument for an engine's option of the wrong type or out of range."""
    if step_tokens is not None:
        integer("step_tokens", step_tokens, 1)
    number("longest_step", longest_step, lambda value: value >= 1, "be a number of at least 1")
    integer("queue", queue, 1)
    integer("state_bytes", state_bytes, 0)
    integer("swap_bytes", swap_bytes, 0)
    one_of("preemption", preemption, get_args(Preemption))
    one_of("warmup", warmup, get_args(Warmup))


@dataclass(frozen=True, slots=True)
class SwapCost:
    """When to copy a preempted job's pages to host memory instead of computing them again.

    Attributes:
        preemption: the user's choice.
        page_size: tokens per page.
        page_bytes: K and V of one page.
        row_bytes: Mamba state of one row.
        on_gpu: whether pages are on a GPU. Elsewhere `auto` computes them again.
    """

    preemption: Preemption
    page_size: int
    page_bytes: int
    row_bytes: int
    on_gpu: bool

    def pays(self, tokens: int) -> bool:
        """Return whether to copy the pages and the state of `tokens` stored tokens."""
        if self.preemption != "auto":
            return self.preemption == "swap"
        pages = pages_for(tokens, self.page_size) * self.page_bytes
        both_ways = 2 * (pages + self.row_bytes) / HOST_BYTES_PER_SECOND
        return self.on_gpu and both_ways < tokens / PREFILL_TOKENS_PER_SECOND


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold and take.

    Attributes:
        rows: most running jobs.
        longest: most tokens of one sequence.
        step_tokens: most tokens of a step, decoded ones included.
        longest_step: most time of a step that decodes a streamed request, as a multiple of what
            its decodes alone take. A chunk of `alignment` tokens is always allowed. `math.inf`: no
            such limit.
        alignment: chunks are multiples of it, except for the last of a prompt.
        queue: most waiting jobs.
        swap_bytes: most host memory for preempted jobs.
        runner: has the shapes of its calls.
        swap: cost of copying pages to host memory.
    """

    rows: int
    longest: int
    step_tokens: int
    longest_step: float
    alignment: int
    queue: int
    swap_bytes: int
    runner: Runner
    swap: SwapCost

    @classmethod
    def of(
        cls,
        runner: Runner,
        *,
        step_tokens: int | None,
        longest_step: float,
        queue: int,
        swap_bytes: int,
        preemption: Preemption,
    ) -> Limits:
        """Return the limits of an engine on this runner."""
        stateful = bool(runner.geometry.mamba_layers)
        smallest = runner.alignment if stateful and runner.alignment > 1 else SMALLEST_CHUNK
        return cls(
            rows=runner.rows,
            longest=runner.longest,
            step_tokens=step_tokens or STEP_CHUNKS * runner.chunk_tokens + runner.rows,
            longest_step=longest_step,
            alignment=min(smallest, runner.chunk_tokens),
            queue=queue,
            swap_bytes=swap_bytes,
            runner=runner,
            swap=SwapCost(
                preemption,
                runner.config.page_size,
                runner.geometry.bytes_per_page,
                runner.row_bytes,
                runner.device.type == "cuda",
            ),
        )

    @property
    def shapes(self) -> Shapes:
        """Shapes of the runner's calls, and their costs. They change if the live model does."""
        return self.runner.shapes

    @property
    def chunk_tokens(self) -> int:
        """Most tokens of one prefill or score call."""
        return self.shapes.chunk_tokens

    def prefill_time(self, decodes: int, *, streamed: bool) -> float:
        """Return how long prefills may take next to `decodes` rows, in the unit of `shapes`.

        streamed: whether one of these rows is of a streamed request.
        """
        if not (decodes and streamed):
            return math.inf
        return (self.longest_step - 1) * self.shapes.decode_cost(decodes)

    def prefill_tokens(self, decodes: int, time: float) -> int:
        """Return the most prefilled and scored tokens next to `decodes` rows in `time`."""
        return max(int(min(self.step_tokens - decodes, time)), self.alignment)

    def allows(self, lengths: Sequence[int], time: float) -> bool:
        """Return whether one call takes chunks of these lengths, and no longer than `time`."""
        in_time = time == math.inf or self.shapes.prefill_cost(lengths) <= time
        return in_time and self.shapes.fits(lengths)
