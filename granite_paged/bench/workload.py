"""Requests as they arrive at a server, drawn from a seed.

Arrivals form a Poisson process, lengths vary, and prompts share prefixes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from granite_paged.errors import InvalidArgument

FIRST_TOKEN = 3  # in Granite's tokenizers, smaller ids are padding and end-of-text tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """A distribution of requests.

    Attributes:
        requests: number of requests.
        rate: mean arrivals per second; 0 for all at once.
        prompt_tokens, new_tokens: (minimum, maximum), drawn uniformly.
        shared_tokens: tokens of the shared prefix that precedes a prompt's own tokens.
        kinds: number of different shared prefixes.
        long_every: make every Nth request a prompt of `long_tokens`; 0 for none.
    """

    requests: int = 64
    rate: float = 0.0
    prompt_tokens: tuple[int, int] = (8, 64)
    new_tokens: tuple[int, int] = (8, 32)
    shared_tokens: int = 0
    kinds: int = 4
    long_every: int = 0
    long_tokens: int = 0

    def __post_init__(self) -> None:
        ranges = {"prompt tokens": self.prompt_tokens, "new tokens": self.new_tokens}
        for name, (least, most) in ranges.items():
            if not 1 <= least <= most:
                raise InvalidArgument(
                    f"the range of {name} must start at 1 or more and not descend, "
                    f"got {least} to {most}"
                )
        if self.long_every and self.long_tokens < 1:
            raise InvalidArgument(
                f"long prompts need at least 1 token, got {self.long_tokens}: pass --long-tokens"
            )

    @property
    def expected_prompt(self) -> float:
        """Mean prompt tokens of all requests, without long and shared ones."""
        return self.requests * sum(self.prompt_tokens) / 2

    @property
    def expected_new(self) -> float:
        """Mean new tokens of all requests."""
        return self.requests * sum(self.new_tokens) / 2

    @property
    def longest(self) -> int:
        """Maximum tokens of one request, prompt and answer."""
        prompt = max(self.shared_tokens + self.prompt_tokens[1], self.long_tokens)
        return prompt + self.new_tokens[1]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: its arrival in seconds since the start, its prompt and its answer's length."""

    at: float
    prompt: tuple[int, ...]
    new_tokens: int


def arrivals(workload: Workload, vocabulary: int, seed: int) -> list[Arrival]:
    """Draw the workload's requests, in order of arrival."""
    draw = random.Random(seed)
    prefixes = [_tokens(draw, workload.shared_tokens, vocabulary) for _ in range(workload.kinds)]
    at, coming = 0.0, []
    for number in range(1, workload.requests + 1):
        at += draw.expovariate(workload.rate) if workload.rate else 0.0
        if workload.long_every and number % workload.long_every == 0:
            prompt = _tokens(draw, workload.long_tokens, vocabulary)
        else:
            own = draw.randint(*workload.prompt_tokens)
            prompt = draw.choice(prefixes) + _tokens(draw, own, vocabulary)
        coming.append(Arrival(at, prompt, draw.randint(*workload.new_tokens)))
    return coming


def _tokens(draw: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST_TOKEN, vocabulary) for _ in range(count))
