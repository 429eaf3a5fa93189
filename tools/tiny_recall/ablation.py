"""Ablation: measure what breaks when one component of a cache comes from another sequence.

A model that fails without a component uses it. Zeroing is weak evidence, because a model can
learn to notice zeros. Here every row receives its neighbour's component instead, which is equally
plausible and wrong. The functions work on transformers' cache of a Granite-4 hybrid, where
attention layers hold `keys` and `values` and Mamba layers `conv_states` and `recurrent_states`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from granite_paged.checkpoints.recall import SLOT, RecallBatch
from granite_paged.hf.compat import with_cache

Swap = Callable[[DynamicCache], None]
"""Changes a cache in place so that every row holds some component of the row after it."""

UNANSWERED = -1  # no token id: never equal to a target


def next_row(tensor: Tensor) -> Tensor:
    """Return `tensor` with row i replaced by row i + 1, and the last by the first."""
    return tensor.roll(-1, dims=0)


def swap_history(layer: int) -> Swap:
    """Exchange the K and V history of one attention layer."""

    def swap(cache: DynamicCache) -> None:
        held: Any = cache.layers[layer]
        held.keys, held.values = next_row(held.keys), next_row(held.values)

    return swap


def swap_conv_states(cache: DynamicCache) -> None:
    """Exchange the convolution windows of all Mamba layers."""
    for held in _mamba_layers(cache):
        held.conv_states[0].copy_(next_row(held.conv_states[0]))


def swap_ssm_states(cache: DynamicCache) -> None:
    """Exchange the SSM states of all Mamba layers."""
    for held in _mamba_layers(cache):
        held.recurrent_states[0].copy_(next_row(held.recurrent_states[0]))


@torch.no_grad()
def answers_after_facts(model: PreTrainedModel, batch: RecallBatch, swap: Swap) -> Tensor:
    """Read the facts, swap, then read all queries. Returns the chosen tokens, [B, S]."""
    cache = DynamicCache(config=model.config)
    facts, queries = batch.input_ids.tensor_split([batch.query_start], dim=1)
    model(input_ids=facts, **with_cache(cache), logits_to_keep=1)
    swap(cache)
    answers = model(input_ids=queries, **with_cache(cache)).logits.argmax(dim=-1)
    return torch.cat([torch.full_like(facts, UNANSWERED), answers], dim=1)


@torch.no_grad()
def answers_at_ask(model: PreTrainedModel, batch: RecallBatch, swap: Swap, *, slots: int) -> Tensor:
    """For each of the first `slots` query slots: swap after its key, read `<ask>`, swap back.

    Returns the chosen tokens [B, S], `UNANSWERED` elsewhere.
    """
    cache = DynamicCache(config=model.config)
    answers = torch.full_like(batch.input_ids, UNANSWERED)
    read = 0
    for ask in range(batch.query_start + 1, batch.query_start + SLOT * slots, SLOT):
        model(input_ids=batch.input_ids[:, read:ask], **with_cache(cache), logits_to_keep=1)
        swapped = copy.deepcopy(cache)
        swap(swapped)
        logits = model(input_ids=batch.input_ids[:, ask : ask + 1], **with_cache(swapped)).logits
        answers[:, ask] = logits[:, -1].argmax(dim=-1)
        read = ask
    return answers


def answered(answers: Tensor) -> Tensor:
    """Positions that hold an answer: bool [B, S]."""
    return answers != UNANSWERED


def _mamba_layers(cache: DynamicCache) -> list[Any]:
    return [held for held in cache.layers if hasattr(held, "recurrent_states")]
