"""Associative recall: facts in the first half of a sequence, questions about them in the second.

    <bos> mode | key value filler | key value filler ... | key <ask> filler | key <ask> filler ...
      header   |             fact slots                  |             query slots

A slot is three tokens wide. About every 48 tokens, a mode token replaces a filler. After
`key <ask>` the right answer is the key's value if the latest mode token is `<plain>`, and the
value 64 places later in the list of values if it is `<shift>`.

An answer therefore needs all three kinds of memory: the attention cache (the pair), the
convolution state (the key before `<ask>` or before a value) and the SSM state (the latest mode).
A `RecallBatch` records, for every question, where the sequence states each of them.

Every function depends on its arguments only; the seed decides a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# --- vocabulary ----------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SPECIAL_WORDS = _words(
    "<pad> <bos> <eos> <unk> <ask> <lost> <plain> <shift>"
    " <reserved-0> <reserved-1> <reserved-2> <reserved-3>"
)
PAD, BOS, EOS, UNK, ASK, LOST, PLAIN, SHIFT = range(8)
"""LOST is a training target only: the answer where the fact cannot be reached."""

_COLOURS = _words(
    "amber azure black brown coral green grey indigo ivory lilac ochre pink red teal violet white"
)
_ANIMALS = _words("bear crane deer fox hare otter swan wolf")
_MATERIALS = _words(
    "brass bronze clay copper cotton felt glass iron linen marble oak paper pine silk silver wool"
)
_OBJECTS = _words("basket bell boat bowl chair drum kite lamp")

KEY_WORDS = tuple(f"{colour}-{animal}" for colour in _COLOURS for animal in _ANIMALS)
VALUE_WORDS = tuple(f"{material}-{thing}" for material in _MATERIALS for thing in _OBJECTS)
FILLER_WORDS = _words(
    "and then so but while near by under over past through along across around"
    " here there now later soon often once again still quite rather almost also too"
)

VOCABULARY = SPECIAL_WORDS + KEY_WORDS + VALUE_WORDS + FILLER_WORDS
"""The word of every token id: 12 special, 128 keys, 128 values, 28 fillers."""

KEYS, VALUES = len(KEY_WORDS), len(VALUE_WORDS)
VOCAB_SIZE = len(VOCABULARY)
FIRST_KEY = len(SPECIAL_WORDS)
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_FILLER = FIRST_VALUE + VALUES

# --- layout --------------------------------------------------------------------------------------

HEADER = 2  # tokens: <bos> and the first mode
SLOT = 3  # tokens: key, value or <ask>, filler or mode
MODE_INTERVAL = 16  # slots, so 48 tokens
PLAIN_VALUES = VALUES // 2  # facts state these; the other half are their <shift> partners
NOT_SCORED = -100  # the target that torch's cross_entropy ignores
MIN_CONTEXT = HEADER + 2 * SLOT


def fact_slots(context: int) -> int:
    """Return the number of facts that fit into the first half of `context` tokens."""
    return (context - HEADER) // SLOT // 2


def query_start(context: int) -> int:
    """Return the position of the first query slot; every fact is stated before it."""
    return HEADER + SLOT * fact_slots(context)


def usual_pairs(context: int) -> int:
    """Return one pair per 8 tokens, at least 1 and at most `KEYS`."""
    return min(KEYS, max(1, context // 8))


@dataclass(frozen=True, eq=False)
class RecallBatch:
    """B sequences of S tokens with their questions.

    Every tensor is int64 [B, S]. All but `input_ids` describe the question that ends at a
    position; elsewhere `targets` holds `NOT_SCORED` and the others hold -1.
    """

    input_ids: Tensor
    targets: Tensor  # token that the logits at this position (not the next) must choose
    key_parity: Tensor  # 0 or 1: parity of the queried key's index
    fact_position: Tensor  # position of the queried key's value
    mode_position: Tensor  # position of the mode token that decides this answer
    mode: Tensor  # 0: the answer is the value itself; 1: its partner
    query_start: int  # facts come before this position, questions after it

    @property
    def scored(self) -> Tensor:
        """Positions at which a question ends: bool [B, S]."""
        return self.targets != NOT_SCORED

    def of_parity(self, parity: int) -> Tensor:
        """Questions about even (0) or odd (1) keys: bool [B, S]."""
        return self.key_parity == parity

    def mode_set_before(self, position: int) -> Tensor:
        """Questions from `position` on whose mode token comes before it: bool [B, S].

        For these, only the SSM state carries the mode across `position`.
        """
        later = torch.arange(self.input_ids.shape[1], device=self.targets.device) >= position
        return later & (self.mode_position < position) & self.scored

    def mode_before(self, position: int) -> Tensor:
        """Return each row's mode after the tokens before `position`: 0 or 1, int64 [B]."""
        read = self.input_ids[:, :position]
        latest = _latest_mode_position(read)[:, -1:]
        return (read.gather(1, latest) == SHIFT).long().squeeze(1)


def recall_batch(
    *,
    context: int,
    pairs: int,
    keys: int = KEYS,
    batch: int,
    seed: int,
    mode_interval: int = MODE_INTERVAL,
    with_replacement: bool = False,
) -> RecallBatch:
    """Draw `batch` sequences of `context` tokens with `pairs` facts about the first `keys` keys.

    Each window of `mode_interval` slots holds one mode token. Every fact is asked for exactly
    once, in random order. `with_replacement` draws the questions independently instead.

    Raises:
        ValueError: for sizes that are too small, or more pairs than keys or slots.
    """
    _check_sizes(context=context, pairs=pairs, keys=keys)
    if batch < 1 or mode_interval < 1:
        raise ValueError(f"batch={batch} and mode_interval={mode_interval} must be at least 1")
    draw = torch.Generator().manual_seed(seed)
    start = query_start(context)
    queries_fit = (context - start) // SLOT

    input_ids = torch.randint(FIRST_FILLER, VOCAB_SIZE, (batch, context), generator=draw)
    input_ids[:, 0] = BOS
    _announce_modes(input_ids, mode_interval, draw)

    # All [B, pairs]: which key and value, and where their slots begin.
    key = _distinct(batch, keys, pairs, draw)
    value = torch.randint(0, PLAIN_VALUES, (batch, pairs), generator=draw)
    fact_at = HEADER + SLOT * _distinct(batch, fact_slots(context), pairs, draw)
    input_ids.scatter_(1, fact_at, FIRST_KEY + key)
    input_ids.scatter_(1, fact_at + 1, FIRST_VALUE + value)

    query_at = start + SLOT * _distinct(batch, queries_fit, pairs, draw)
    if with_replacement:
        asked = torch.randint(0, pairs, (batch, pairs), generator=draw)
        key, value, fact_at = (of_pair.gather(1, asked) for of_pair in (key, value, fact_at))
    ask_at = query_at + 1
    input_ids.scatter_(1, query_at, FIRST_KEY + key)
    input_ids.scatter_(1, ask_at, ASK)

    mode_position = _latest_mode_position(input_ids).gather(1, ask_at)
    mode = (input_ids.gather(1, mode_position) == SHIFT).long()
    target = FIRST_VALUE + value + PLAIN_VALUES * mode

    def at_questions(of_question: Tensor, elsewhere: int = -1) -> Tensor:
        return torch.full_like(input_ids, elsewhere).scatter_(1, ask_at, of_question)

    return RecallBatch(
        input_ids=input_ids,
        targets=at_questions(target, NOT_SCORED),
        key_parity=at_questions(key % 2),
        fact_position=at_questions(fact_at + 1),
        mode_position=at_questions(mode_position),
        mode=at_questions(mode),
        query_start=start,
    )


def recall_accuracy(
    logits_or_predictions: Tensor, batch: RecallBatch, where: Tensor | None = None
) -> float:
    """Return the share of right answers among the questions that `where` (bool [B, S]) selects.

    Takes logits [B, S, vocabulary] or chosen token ids [B, S], on any device.

    Raises:
        ValueError: if no question is selected.
    """
    predictions = logits_or_predictions
    if predictions.dim() == 3:
        predictions = predictions.argmax(dim=-1)
    targets = batch.targets.to(predictions.device)
    selected = targets != NOT_SCORED
    if where is not None:
        selected &= where.to(predictions.device)
    if not selected.any():
        raise ValueError("no question is selected: accuracy is undefined")
    return (predictions == targets)[selected].double().mean().item()


def _check_sizes(*, context: int, pairs: int, keys: int) -> None:
    if context < MIN_CONTEXT:
        raise ValueError(f"context={context} is shorter than {MIN_CONTEXT}: no fact fits")
    if not 1 <= keys <= KEYS:
        raise ValueError(f"keys={keys} is not in 1..{KEYS}")
    if not 1 <= pairs <= min(keys, fact_slots(context)):
        raise ValueError(
            f"pairs={pairs}: context={context} holds 1..{fact_slots(context)}, and keys={keys}"
        )


def _distinct(batch: int, choices: int, count: int, draw: torch.Generator) -> Tensor:
    """Draw `count` distinct numbers below `choices` for each row: int64 [batch, count]."""
    return torch.rand(batch, choices, generator=draw).argsort(dim=1, stable=True)[:, :count]


def _announce_modes(input_ids: Tensor, interval: int, draw: torch.Generator) -> None:
    """Write one mode token into the header and one into every window of slots."""
    batch, context = input_ids.shape
    slots = (context - HEADER) // SLOT
    windows = -(-slots // interval)
    slot = torch.randint(0, interval, (batch, windows), generator=draw)
    slot += interval * torch.arange(windows)
    # A slot beyond the last, partial window is dropped: its token goes to the header.
    position = torch.where(slot < slots, HEADER + SLOT * slot + SLOT - 1, HEADER - 1)
    header = torch.full((batch, 1), HEADER - 1)
    position = torch.cat([header, position], dim=1)
    mode = torch.randint(PLAIN, SHIFT + 1, position.shape, generator=draw)
    mode = torch.where(position == HEADER - 1, mode[:, :1], mode)
    input_ids.scatter_(1, position, mode)


def _latest_mode_position(input_ids: Tensor) -> Tensor:
    """Return the position of the latest mode token at or before each position: [B, S]."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    is_mode = (input_ids == PLAIN) | (input_ids == SHIFT)
    return torch.where(is_mode, position, 0).cummax(dim=1).values
