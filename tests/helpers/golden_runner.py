"""A runner, with either model and on any device, on the inputs of SDPA's golden logits."""

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
    """Return the recorded logits of SDPA, by name."""
    return load_file(LOGITS / f"test_{case}-{name}.safetensors")


def make_driver(name: str, device: str, *, kernels: bool) -> Driver:
    """Build a float32 runner for a golden model, with the Triton kernels if `kernels`."""
    model = golden_model(name).model
    driver = Driver(model if device == "cpu" else _copy(name, device), CONFIG)
    if kernels:
        use_kernels(driver, name)
    return driver


def use_kernels(driver: Driver, name: str) -> None:
    """Run the next steps with the Triton kernels.

    A runner chooses them for half precision only, but they are right in every dtype.
    """
    runner = driver.runner
    runner._steps.model = TritonModel(golden_model(name).model, runner.storage, "auto")


def prefilled(driver: Driver, name: str, chunk: int = 37) -> Tensor:
    """Return the logits of the golden prefill's last token, [V], after chunks of `chunk` tokens."""
    prompt = tokens(golden_model(name).model, (37,), seed=1).ids[0].tolist()
    driver.open(1)
    for start in range(0, len(prompt), chunk):
        logits = driver.prefill({1: prompt[start : start + chunk]})
    return logits[0].cpu()


def decoded(driver: Driver, name: str, steps: int = DECODED, *, kernels: bool = False) -> Tensor:
    """Return the logits of the first golden decode steps, in one batch, [rows, steps, V].

    With `kernels`, a runner in plain PyTorch fills the cache and the Triton kernels decode.
    """
    golden = tokens(golden_model(name).model, (40, 31), seed=3)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(golden.ids, golden.mask, strict=True)]
    for row, text in enumerate(rows, start=1):
        driver.open(row)
        for start in range(0, len(text) - DECODED, CHUNK):
            driver.prefill({row: text[start : min(start + CHUNK, len(text) - DECODED)]})
    if kernels:
        use_kernels(driver, name)
    logits = [
        driver.decode({row: text[at] for row, text in enumerate(rows, start=1)}).cpu().clone()
        for at in range(-DECODED, steps - DECODED)
    ]
    return torch.stack(logits, dim=1)


def _copy(name: str, device: str) -> Any:
    return copy.deepcopy(golden_model(name).model).to(device)
