"""Requests as they arrive at a server, from a seed: Poisson arrivals, ragged, prefixes shared."""

from __future__ import annotations

import random
from dataclasses import dataclass

from granite_paged.errors import InvalidArgument

FIRST_TOKEN = 3  # smaller ones are padding and the ends of texts, in the family's tokenizers


@dataclass(frozen=True, slots=True)
class Workload:
    """What arrives.

    Attributes:
        requests: how many.
        rate: arrivals a second, on average; 0: all at once.
        prompt_tokens, new_tokens: (fewest, most), drawn evenly.
        shared_tokens: tokens that prompts of one kind begin with, before their own.
        kinds: different shared beginnings.
        long_every: each so many requests, one has a prompt of `long_tokens`; 0: none has.
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
        for name, (fewest, most) in (
            ("prompt tokens", self.prompt_tokens),
            ("new tokens", self.new_tokens),
        ):
            if not 1 <= fewest <= most:
                raise InvalidArgument(f"{name} from {fewest} to {most}: give 1 or more, then more")
        if self.long_every and self.long_tokens < 1:
            raise InvalidArgument("long prompts need a length of at least 1 token")

    @property
    def longest(self) -> int:
        """Most tokens that one request can have, answer included."""
        return (
            max(self.shared_tokens + self.prompt_tokens[1], self.long_tokens) + self.new_tokens[1]
        )


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes, in seconds, and what it wants."""

    at: float
    prompt: tuple[int, ...]
    new_tokens: int


def arrivals(workload: Workload, vocabulary: int, seed: int) -> list[Arrival]:
    """The workload's requests, in the order they come."""
    chance = random.Random(seed)
    beginnings = [
        _tokens(chance, workload.shared_tokens, vocabulary) for _ in range(workload.kinds)
    ]
    at, coming = 0.0, []
    for number in range(1, workload.requests + 1):
        at += chance.expovariate(workload.rate) if workload.rate else 0.0
        if workload.long_every and number % workload.long_every == 0:
            prompt = _tokens(chance, workload.long_tokens, vocabulary)
        else:
            own = chance.randint(*workload.prompt_tokens)
            prompt = chance.choice(beginnings) + _tokens(chance, own, vocabulary)
        coming.append(Arrival(at, prompt, chance.randint(*workload.new_tokens)))
    return coming


def _tokens(chance: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(chance.randrange(FIRST_TOKEN, vocabulary) for _ in range(count))
