"""Triton kernels for half precision on a GPU: what Inductor leaves far from the memory floor.

Each does what a plain PyTorch function of the package defines (`mamba.py`, `masks.py`, `pool.py`)
and is tested against it, on the CPU under Triton's interpreter and on a GPU. Nothing here is
imported before a runner asks for it.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

SCRATCH_NUMBERS, SCRATCH_TILES = 2**21, 2**12
"""float32 and int32 that products of few rows share while their depth is split: 8.4 MB."""


@functools.cache
def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why these kernels cannot run there, in words; empty where they can."""
    if device.type != "cuda":
        return f"device {device.type} has no Triton kernels"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is computed in full precision".replace("torch.", "")
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"compute capability {major}.{minor} is older than 8.0"
    return ""


def unsupported(activation: str) -> str:
    """Why a model of this activation has no kernels; empty where it has."""
    return "" if activation in ("silu", "swish") else f"activation {activation} has no kernel"
