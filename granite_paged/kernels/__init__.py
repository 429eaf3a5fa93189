"""Triton kernels for half precision on a GPU: what Inductor leaves far from the memory floor.

Each does what a plain PyTorch function of the package defines (`mamba.py`, `masks.py`, `pool.py`)
and is tested against it, on the CPU under Triton's interpreter and on a GPU. Nothing here is
imported before a runner asks for it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings

import torch

SCRATCH_NUMBERS, SCRATCH_TILES = 2**21, 2**12
"""float32 and int32 that products of few rows share while their depth is split: 8.4 MB."""

TUNED_SHARED_MEMORY = 227 * 1024
"""Bytes a program may have on compute capability 9.0, where the constants were chosen."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why these kernels cannot run there, in words; empty where they can."""
    if device.type != "cuda":
        return f"device {device.type} has no Triton kernels"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is computed in full precision".replace("torch.", "")
    return cannot_compile(device) or _too_old(device, (8, 0))


@functools.cache
def cannot_compile(device: torch.device) -> str:
    """Why nothing can be compiled for a CUDA device, Triton or Inductor; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "there is no C compiler (cc, gcc or clang), which Triton needs"
    return _too_old(device, (7, 0))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; without a GPU, those of the tuned one.

    A block may have all of its multiprocessor's but 1 KiB (CUDA C++ programming guide, 8.0 on).
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return TUNED_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_multiprocessor) - 1024


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def stages_that_fit(stages: int, stage_bytes: int, memory: int) -> int:
    """Stages of a pipeline, fewer where the device's programs have less shared memory."""
    return max(1, min(stages, memory // stage_bytes))


@functools.cache
def warn_slow(reason: str) -> None:
    """Say once in a process why a GPU runs a slower path."""
    warnings.warn(f"granite_paged takes a slower path: {reason}", stacklevel=3)


def _too_old(device: torch.device, needed: tuple[int, int]) -> str:
    if not torch.cuda.is_available():
        return ""
    have = torch.cuda.get_device_capability(device)
    if have >= needed:
        return ""
    return f"compute capability {have[0]}.{have[1]} is older than {needed[0]}.{needed[1]}"


def refusal(backend: str, activation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a model that asks for this backend runs without kernels; empty where it has them."""
    if backend == "eager":
        return "backend 'eager' was asked for"
    if activation not in ("silu", "swish"):
        return f"activation {activation} has no kernel"
    return unavailable(device, dtype)
