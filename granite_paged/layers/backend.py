"""Which implementation runs: FlexAttention eager or compiled, Triton kernels or plain PyTorch."""

from __future__ import annotations

import functools
import warnings

import torch

from granite_paged.device import cannot_compile, too_old


def refusal(backend: str, activation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a model that asks for this backend runs without kernels; empty where it has them."""
    if backend == "eager":
        return "backend 'eager' was asked for"
    if activation not in ("silu", "swish"):
        return f"activation {activation} has no kernel"
    return unavailable(device, dtype)


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why these kernels cannot run there, in words; empty where they can."""
    if device.type != "cuda":
        return f"device {device.type} has no Triton kernels"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is computed in full precision".replace("torch.", "")
    return cannot_compile(device) or too_old(device, (8, 0))


@functools.cache
def warn_slow(reason: str) -> None:
    """Say once in a process why a GPU runs a slower path."""
    warnings.warn(f"granite_paged takes a slower path: {reason}", stacklevel=3)
