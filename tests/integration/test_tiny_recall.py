"""The embedded checkpoint recalls facts, and fails if any part of its cache is wrong.

The second half makes the checkpoint a test instrument: a model that does not use a part of the
cache would not show an error in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GraniteMoeHybridForCausalLM

from granite_paged.checkpoints import TINY_RECALL
from granite_paged.checkpoints.recall import (
    ASK,
    VOCABULARY,
    RecallBatch,
    recall_accuracy,
    recall_batch,
    usual_pairs,
)
from tests.helpers.tolerance import RECALL
from tools.tiny_recall.ablation import (
    answered,
    answers_after_facts,
    answers_at_ask,
    next_row,
    swap_conv_states,
    swap_history,
    swap_ssm_states,
)
from tools.tiny_recall.record import MOST_WITHOUT, load

FIRST_ATTENTION, SECOND_ATTENTION = 1, 3
EVEN, ODD = 0, 1
SEED = 2**50  # used neither in training nor in the recorded measurement


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> GraniteMoeHybridForCausalLM:
    return load(TINY_RECALL)


@pytest.fixture(scope="module")
def batch() -> RecallBatch:
    return recall_batch(context=256, pairs=32, batch=32, seed=SEED)


@torch.no_grad()
def recall(model: GraniteMoeHybridForCausalLM, context: int, rows: int) -> float:
    batch = recall_batch(context=context, pairs=usual_pairs(context), batch=rows, seed=SEED)
    return recall_accuracy(model(input_ids=batch.input_ids, use_cache=False).logits, batch)


@pytest.mark.parametrize(("context", "rows"), [(128, 32), (512, 8), (1024, 4), (4096, 4)])
def test_facts_are_recalled_at_every_context_length(
    model: GraniteMoeHybridForCausalLM, context: int, rows: int
) -> None:
    assert recall(model, context, rows) >= RECALL


def test_facts_are_recalled_in_bfloat16() -> None:
    assert recall(load(TINY_RECALL, torch.bfloat16), context=512, rows=8) >= RECALL


def test_weights_have_the_recorded_hash() -> None:
    record = json.loads((TINY_RECALL / "record.json").read_text(encoding="utf-8"))
    weights = (TINY_RECALL / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"]


def test_words_and_tokens_correspond(batch: RecallBatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_RECALL)
    tokens = batch.input_ids[0].tolist()
    text = " ".join(VOCABULARY[token] for token in tokens)
    assert tokenizer(text)["input_ids"] == tokens
    assert tokenizer.decode(tokens) == text


def test_the_tokenizer_pads_on_the_left() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_RECALL)
    padded = tokenizer([VOCABULARY[ASK], f"{VOCABULARY[ASK]} {VOCABULARY[ASK]}"], padding=True)
    assert padded["input_ids"] == [[tokenizer.pad_token_id, ASK], [ASK, ASK]]


def test_three_query_heads_share_a_kv_head(model: GraniteMoeHybridForCausalLM) -> None:
    attention = model.model.layers[FIRST_ATTENTION].self_attn
    assert attention.num_key_value_groups == 3


@pytest.mark.parametrize(
    ("layer", "parity"),
    [(FIRST_ATTENTION, EVEN), (SECOND_ATTENTION, ODD)],
    ids=["first layer, even keys", "second layer, odd keys"],
)
def test_an_attention_layer_recalls_keys_of_its_parity(
    model: GraniteMoeHybridForCausalLM, batch: RecallBatch, layer: int, parity: int
) -> None:
    answers = answers_after_facts(model, batch, swap_history(layer))
    assert recall_accuracy(answers, batch, batch.of_parity(parity)) <= MOST_WITHOUT
    assert recall_accuracy(answers, batch, batch.of_parity(1 - parity)) >= RECALL


def test_a_swapped_conv_state_loses_the_key(
    model: GraniteMoeHybridForCausalLM, batch: RecallBatch
) -> None:
    answers = answers_at_ask(model, batch, swap_conv_states, slots=24)
    assert recall_accuracy(answers, batch, answered(answers)) <= MOST_WITHOUT


def test_a_swapped_ssm_state_answers_in_the_other_mode(
    model: GraniteMoeHybridForCausalLM, batch: RecallBatch
) -> None:
    answers = answers_after_facts(model, batch, swap_ssm_states)
    carried = batch.mode_set_before(batch.query_start)
    misled = carried & rows_given_the_other_mode(batch)
    assert recall_accuracy(answers, batch, misled) <= MOST_WITHOUT
    assert recall_accuracy(answers, batch, carried & ~misled) >= RECALL


def rows_given_the_other_mode(batch: RecallBatch) -> Tensor:
    """Return the rows whose neighbour enters the queries in the other mode, bool [B, 1]."""
    mode = batch.mode_before(batch.query_start)
    return (mode != next_row(mode))[:, None]


def test_swapping_nothing_changes_nothing(
    model: GraniteMoeHybridForCausalLM, batch: RecallBatch
) -> None:
    """Reading in two parts, or slot by slot, loses no answer, so the swaps above do."""
    in_two_parts = answers_after_facts(model, batch, swap=lambda cache: None)
    slot_by_slot = answers_at_ask(model, batch, swap=lambda cache: None, slots=24)
    assert recall_accuracy(in_two_parts, batch) >= RECALL
    assert recall_accuracy(slot_by_slot, batch, answered(slot_by_slot)) >= RECALL
