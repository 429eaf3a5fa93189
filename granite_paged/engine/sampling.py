"""Sampling on the device, for a batch whose rows have parameters of their own.

A draw depends on its sample's seed, its place in the answer and the row's own logits: the noise is
a hash of (seed, place, token), so other rows, batch sizes and restarts change nothing. Greedy rows
take the argmax. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from granite_paged.device import upload
from granite_paged.engine.request import SamplingParams
from granite_paged.layers.logprobs import by_row, log_probabilities

_LOW_32 = 0xFFFFFFFF
_WHOLE = 2**40
"""Probability 1 as an integer, while probabilities are summed."""

_NOISE_BITS = 23  # of float32: noise in the middle of its 2**23 intervals is never 0 or 1


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw from one row of logits.

    Attributes:
        params: parameters of the request.
        seed: seed of the sample.
        place: index of the token in the answer, from 0.
        seen: [V] bool, tokens that the repetition penalty applies to. The draw updates it.
    """

    params: SamplingParams
    seed: int
    place: int
    seen: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens [n] int64. If any row asks: log-probabilities [n], and those of the top k [n, k]."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_tokens: Tensor | None = None


def draw(logits: Tensor, draws: Sequence[Draw], *, exact: bool = False) -> Drawn:
    """Draw one token per row of logits [n, V], of any float dtype.

    exact: give a row the same bits whatever the other rows are.
    """
    if all(wanted.params.greedy for wanted in draws):
        return Drawn(logits.argmax(dim=-1))
    scores = penalised(logits.float(), draws)
    tokens = scores.argmax(dim=-1)
    sampled = [row for row, wanted in enumerate(draws) if wanted.params.samples]
    if sampled:
        rows = _tensor(sampled, logits)
        tokens[rows] = _sampled(scores[rows], [draws[row] for row in sampled], exact=exact)
    _remember(tokens, draws)
    return _with_logprobs(tokens, logits, draws, exact=exact)


def penalised(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return logits [n, V] with the repetition penalty, as in CTRL (arXiv 1909.05858).

    Positive logits of seen tokens are divided by the penalty, others are multiplied.
    """
    rows = [row for row, wanted in enumerate(draws) if wanted.seen is not None]
    if not rows:
        return logits
    at = _tensor(rows, logits)
    seen = torch.stack([wanted.seen for wanted in draws if wanted.seen is not None])
    penalty = _column([draws[row].params.repetition_penalty for row in rows], logits)
    picked = logits[at]
    pressed = torch.where(picked > 0, picked / penalty, picked * penalty)
    return logits.index_copy(0, at, torch.where(seen, pressed, picked))


def truncated(scores: Tensor, draws: Sequence[Draw], *, exact: bool = False) -> Tensor:
    """Return scores [n, V] with -inf where top-k or top-p excludes a token, never the top one.

    exact: as for `draw`.
    """
    vocabulary = scores.shape[-1]
    if all(w.params.top_k in (0, vocabulary) and w.params.top_p == 1 for w in draws):
        return scores
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    most = [min(w.params.top_k or vocabulary, vocabulary) for w in draws]
    place = torch.arange(vocabulary, device=scores.device)
    kept = place < _tensor(most, scores)[:, None]
    chances = by_row(_softmax, ordered.masked_fill(~kept, -math.inf), exact=exact)
    fixed = (chances * _WHOLE).round().long()  # integers: their sums need no order
    before = fixed.cumsum(dim=-1) - fixed
    # the sum may pass 1 before the last token, which top_p = 1 includes
    mass = [int(w.params.top_p * _WHOLE) if w.params.top_p < 1 else 2 * _WHOLE for w in draws]
    kept &= (before < _tensor(mass, scores)[:, None]) | (place == 0)
    dropped = torch.zeros_like(kept).scatter_(1, tokens, ~kept)
    return scores.masked_fill(dropped, -math.inf)


def gumbel(seeds: Sequence[int], places: Sequence[int], like: Tensor) -> Tensor:
    """Return Gumbel noise [n, V] float32: argmax(log-probabilities + noise) is a sample."""
    keys = [_host_hash(seed, place) for seed, place in zip(seeds, places, strict=True)]
    token = torch.arange(like.shape[-1], device=like.device)
    mixed = _mix_bits(token[None] ^ _tensor(keys, like)[:, None])
    uniform = ((mixed >> (32 - _NOISE_BITS)).float() + 0.5) / 2**_NOISE_BITS
    noise: Tensor = -(-uniform.log()).log()
    return noise


def seen_tokens(tokens: Sequence[int], like: Tensor) -> Tensor:
    """Return the tokens of a prompt as [V] bool, for `Draw.seen`."""
    seen = torch.zeros(like.shape[-1], dtype=torch.bool, device=like.device)
    seen[_tensor(sorted(set(tokens)), like)] = True
    return seen


# -- details ------------------------------------------------------------------------------------


def _sampled(scores: Tensor, draws: Sequence[Draw], *, exact: bool) -> Tensor:
    if exact and len(draws) > 1 and not scores.is_cuda:  # the bits of a logarithm, see `by_row`
        rows = zip(torch.split(scores, 1), draws, strict=True)
        return torch.cat([_sampled(row.clone(), [wanted], exact=True) for row, wanted in rows])
    scaled = scores / _column([wanted.params.temperature for wanted in draws], scores)
    noise = gumbel([w.seed for w in draws], [w.place for w in draws], scores)
    return (truncated(scaled, draws, exact=exact) + noise).argmax(dim=-1)


def _remember(tokens: Tensor, draws: Sequence[Draw]) -> None:
    for row, wanted in enumerate(draws):
        if wanted.seen is not None:
            wanted.seen.index_fill_(0, tokens[row : row + 1], True)


def _with_logprobs(tokens: Tensor, logits: Tensor, draws: Sequence[Draw], *, exact: bool) -> Drawn:
    wanted = [w.params.logprobs for w in draws if w.params.logprobs is not None]
    if not wanted:
        return Drawn(tokens)
    # the model's own distribution, before temperature, penalty and truncation
    logprobs = log_probabilities(logits, exact=exact)
    top_tokens = _top(logits.float(), min(max(wanted), logits.shape[-1]))
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    return Drawn(tokens, chosen, logprobs.gather(1, top_tokens), top_tokens)


def _top(scores: Tensor, most: int) -> Tensor:
    """Return the `most` largest of each row of float32 scores [n, V]; ties go to lower ids.

    `Tensor.topk` orders ties by chance, and by `most`. So each score becomes an integer key: its
    bits, in an order that rises with the score, followed by the token's distance from the end.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    from_end = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    keys = (rising << 32) | from_end
    return scores.shape[-1] - 1 - (keys.topk(most, dim=-1).values & _LOW_32)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1)


def _tensor(numbers: Sequence[int], like: Tensor) -> Tensor:
    return upload(numbers, torch.int64, like.device)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return upload(numbers, torch.float32, like.device)[:, None]


def _mix_bits(words: Tensor) -> Tensor:
    """Mix the low 32 bits of int64 words (lowbias32 by C. Wellons)."""
    words = words & _LOW_32
    words = (words ^ (words >> 16)) * 0x7FEB352D & _LOW_32
    words = (words ^ (words >> 15)) * 0x846CA68B & _LOW_32
    return words ^ (words >> 16)


def _host_hash(seed: int, place: int) -> int:
    """Hash (seed, place) to 32 bits with the finaliser of splitmix64."""
    word = (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03 + 1) & (2**64 - 1)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return (word ^ (word >> 31)) & _LOW_32
