"""Measure what `tiny_recall` can do and what it relies on, record it, and check bounds."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GraniteMoeHybridForCausalLM

from granite_paged.checkpoints.recall import RecallBatch, recall_accuracy, recall_batch, usual_pairs
from granite_paged.tolerances import RECALL
from tools.tiny_recall.ablation import (
    answered,
    answers_after_facts,
    answers_at_ask,
    next_row,
    swap_conv_states,
    swap_history,
    swap_ssm_states,
)

WEIGHTS, RECORD = "model.safetensors", "record.json"

CONTEXTS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens; training ends at 1024
BFLOAT16_CONTEXTS = (512, 4096)
QUESTIONS = 1024  # per accuracy, at least
TOKENS_PER_PASS = 8192  # bounds memory, whatever the context
MEASURE_SEED = 2**40 + 1  # beyond the draws of every training
SWAP_CONTEXT, SWAP_ROWS = 256, 64
CONV_SLOTS = 24  # query slots, one after the other, at which conv states are swapped

LONGEST_BOUND = 4096  # longest context, in tokens, for which `tolerances.RECALL` must hold
MOST_WITHOUT = 0.1  # highest accuracy on the questions that need a component, when it is swapped


def load(folder: Path, dtype: torch.dtype = torch.float32) -> GraniteMoeHybridForCausalLM:
    """Load a saved checkpoint in evaluation mode."""
    return GraniteMoeHybridForCausalLM.from_pretrained(folder, dtype=dtype)


def measure(folder: Path) -> dict[str, Any]:
    """Measure every recorded number of the checkpoint in `folder`."""
    model = load(folder)
    halved = load(folder, torch.bfloat16)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "sha256": sha256(folder / WEIGHTS),
        "recall": {str(context): recall(model, context) for context in CONTEXTS},
        "recall_bfloat16": {str(context): recall(halved, context) for context in BFLOAT16_CONTEXTS},
        "substituted": substituted(model),
    }


@torch.no_grad()
def recall(model: GraniteMoeHybridForCausalLM, context: int) -> float:
    """Return the accuracy on at least QUESTIONS questions, without a cache."""
    pairs = usual_pairs(context)
    rows = -(-QUESTIONS // pairs)
    batch = recall_batch(context=context, pairs=pairs, batch=rows, seed=MEASURE_SEED)
    answers = [
        model(input_ids=part, use_cache=False).logits.argmax(dim=-1)
        for part in torch.split(batch.input_ids, max(1, TOKENS_PER_PASS // context))
    ]
    return recall_accuracy(torch.cat(answers), batch)


def substituted(model: GraniteMoeHybridForCausalLM) -> dict[str, dict[str, float]]:
    """Replace each component of the cache by the next row's, and measure accuracy.

    Returns, per component, the accuracy on the questions that need it and on all others.
    """
    pairs = usual_pairs(SWAP_CONTEXT)
    batch = recall_batch(context=SWAP_CONTEXT, pairs=pairs, batch=SWAP_ROWS, seed=MEASURE_SEED)
    first, second = attention_layers(model)
    without_first = answers_after_facts(model, batch, swap_history(first))
    without_second = answers_after_facts(model, batch, swap_history(second))
    without_ssm = answers_after_facts(model, batch, swap_ssm_states)
    without_conv = answers_at_ask(model, batch, swap_conv_states, slots=CONV_SLOTS)

    carried = batch.mode_set_before(batch.query_start)
    misled = carried & mode_differs_in_next_row(batch)
    return {
        "first attention layer": _split(without_first, batch, batch.of_parity(0)),
        "second attention layer": _split(without_second, batch, batch.of_parity(1)),
        "SSM state": _split(without_ssm, batch, misled)
        | {"whether the mode differs or not": recall_accuracy(without_ssm, batch, carried)},
        "conv state": {"affected": recall_accuracy(without_conv, batch, answered(without_conv))},
    }


def attention_layers(model: GraniteMoeHybridForCausalLM) -> list[int]:
    """Return the indices of the attention layers."""
    return [index for index, layer in enumerate(model.model.layers) if layer.mamba is None]


def mode_differs_in_next_row(batch: RecallBatch) -> Tensor:
    """Rows whose mode at the first query differs from the next row's: bool [B, 1]."""
    mode = batch.mode_before(batch.query_start)
    return (mode != next_row(mode))[:, None]


def _split(answers: Tensor, batch: RecallBatch, affected: Tensor) -> dict[str, float]:
    return {
        "affected": recall_accuracy(answers, batch, affected),
        "others": recall_accuracy(answers, batch, ~affected),
    }


def shortfalls(folder: Path, measured: dict[str, Any]) -> list[str]:
    """Return one line per missed bound, and one if the weights are not the recorded ones."""
    recalls = [
        f"{name} at {context} tokens is {accuracy:.4f}, less than {RECALL}"
        for name in ("recall", "recall_bfloat16")
        for context, accuracy in measured[name].items()
        if int(context) <= LONGEST_BOUND and accuracy < RECALL
    ]
    swaps = [
        f"recall with another sequence's {name} is {accuracy['affected']:.4f}, above {MOST_WITHOUT}"
        for name, accuracy in measured["substituted"].items()
        if accuracy["affected"] > MOST_WITHOUT
    ]
    recorded = read_record(folder)["sha256"]
    strange = (
        [] if recorded == measured["sha256"] else [f"{WEIGHTS} is not the recorded {recorded}"]
    )
    return recalls + swaps + strange


def sha256(file: Path) -> str:
    """Return a file's SHA-256 as hex digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_record(folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Measure the checkpoint and write its record into its folder. Returns the record."""
    record = {"training": training, "versions": versions()} | measure(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """Read what was measured when this folder was made."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record


def versions() -> dict[str, str]:
    """Return what the weights' bytes depend on besides the seed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
    }
