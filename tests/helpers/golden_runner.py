"""A runner, in any of its forms and on any device, against the golden logits of SDPA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from granite_paged import PagedConfig
from granite_paged.runner.triton_model import TritonModel
from tests.helpers.driver import Driver
from tests.helpers.golden_models import CHUNK, DECODED, golden_model, tokens

LOGITS = Path(__file__).parents[2] / "golden" / "logits"

CONFIG = PagedConfig(page_size=16, max_tokens=256, max_sequences=2, chunk_tokens=64)


def recorded(case: str, name: str) -> dict[str, Tensor]:
    """What SDPA gave once, by name."""
    return load_file(LOGITS / f"test_{case}-{name}.safetensors")


def make_driver(name: str, device: str, *, kernels: bool) -> Driver:
    """A runner for a golden model, in float32; with the kernels' forms if asked for."""
    model = golden_model(name).model
    driver = Driver(model if device == "cpu" else _copy(name, device), CONFIG)
    if kernels:  # a runner takes them for half precision only, but they are right in any
        runner = driver.runner
        runner._model = TritonModel(model, runner.storage, "auto")
    return driver


def prefilled(driver: Driver, name: str) -> Tensor:
    """[vocabulary] of the golden prefill's last token."""
    prompt = tokens(golden_model(name).model, (37,), seed=1).ids[0].tolist()
    driver.open(1)
    return driver.prefill({1: prompt})[0].cpu()


def decoded(driver: Driver, name: str) -> Tensor:
    """[rows, DECODED, vocabulary] of the golden chunks and steps, both rows in one batch."""
    golden = tokens(golden_model(name).model, (40, 31), seed=3)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(golden.ids, golden.mask, strict=True)]
    for row, text in enumerate(rows, start=1):
        driver.open(row)
        for start in range(0, len(text) - DECODED, CHUNK):
            driver.prefill({row: text[start : min(start + CHUNK, len(text) - DECODED)]})
    steps = [
        driver.decode({row: text[at] for row, text in enumerate(rows, start=1)}).cpu().clone()
        for at in range(-DECODED, 0)
    ]
    return torch.stack(steps, dim=1)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest, as a part of the largest logit."""
    return float((actual - expected).abs().max() / expected.abs().max())


def _copy(name: str, device: str) -> Any:
    return copy.deepcopy(golden_model(name).model).to(device)
