"""Choose the implementation that runs, and say why.

::

    attention_backend   FlexAttention as a fused kernel, or SDPA over gathered pages
    check_compilable    refuse sizes and dtypes that the fused kernel cannot compute
    kernel_refusal      why the package's Triton kernels cannot run on a device and dtype
    triton_refusal      why a runner uses `EagerModel` and not `TritonModel` with CUDA graphs
    exact_refusal       why a runner cannot give the same bits whatever else runs
    warn_if_slow        tell the user about it, once per process

A refusal is a reason in words, for a warning or an error; an empty string means that nothing is in
the way.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import threading
import warnings
from typing import Any

import torch

from granite_paged.errors import CannotBeExact, GeometryError
from granite_paged.geometry import Backend
from granite_paged.layers.mamba import MambaSizes, mixers
from granite_paged.layers.modules import changed_part

HALF = (torch.bfloat16, torch.float16)

COMPILING = threading.RLock()
"""Held while something is compiled or captured. Engines on several GPUs share one process, and
neither dynamo's tracing nor a CUDA graph's memory pool works in two threads at once."""

SMALLEST_KERNEL_BLOCK = 16
"""Least tokens per page and elements per head of the fused kernel. Triton's matrix product needs
16 on every side. On the CPU the kernel computes 16 tokens at once: with AVX2 it wrote beyond a page
of 8 tokens (torch 2.9 to 2.15)."""

_FLEX_CAPABILITY, _KERNEL_CAPABILITY = (7, 0), (8, 0)  # oldest GPUs: Triton's, and our kernels'


# -- FlexAttention ------------------------------------------------------------------------------


def attention_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Backend:
    """Return how attention runs: `eager` or `compiled`.

    `auto` is compiled on CUDA where a fused kernel exists (any dtype but float64, heads of at least
    16 elements) and can be built. If it cannot be built, a warning says why, once per process.
    """
    if backend != "auto":
        return backend
    has_kernel = dtype != torch.float64 and head_dim >= SMALLEST_KERNEL_BLOCK
    if device.type != "cuda" or not has_kernel:
        return "eager"
    reason = _cannot_compile(device)
    if reason:
        _warn_once(reason)
    return "eager" if reason else "compiled"


def check_compilable(
    device: torch.device, dtype: torch.dtype, *, page_size: int, head_dim: int
) -> None:
    """Raise GeometryError for a dtype or size that the fused kernel cannot compute."""
    if dtype == torch.float64:
        raise GeometryError("float64 has no fused kernel: use backend='eager' (or 'auto')")
    sizes = {"page_size": page_size}
    if device.type == "cuda":
        sizes["head_dim"] = head_dim
    for name, size in sizes.items():
        if size < SMALLEST_KERNEL_BLOCK:
            raise GeometryError(
                f"{name} {size} is too small for the fused kernel: "
                f"use at least {SMALLEST_KERNEL_BLOCK}, or backend='eager'"
            )


# -- Triton kernels -----------------------------------------------------------------------------


def triton_refusal(model: Any, backend: Backend) -> str:
    """Return why a runner cannot use `TritonModel` for this model; empty where it can.

    model: a `GraniteMoeHybridForCausalLM`.
    """
    config = model.config
    if config.attention_bias or config.mamba_proj_bias:
        return "projections with a bias have no kernel"
    if changed := changed_part(model):
        return f"{changed}, so modules are called and not their weights read"
    return kernel_refusal(backend, model.device, model.dtype, activation=config.hidden_act)


def kernel_refusal(
    backend: Backend, device: torch.device, dtype: torch.dtype, *, activation: str = "silu"
) -> str:
    """Return why the Triton kernels cannot run for these tensors; empty where they can.

    activation: of the model, where the kernels compute it.
    """
    if backend == "eager":
        return "backend 'eager' was asked for"
    if activation not in ("silu", "swish"):
        return f"activation {activation} has no kernel"
    if device.type != "cuda":
        return f"device {device.type} has no Triton kernels"
    if dtype not in HALF:
        return f"{dtype} is computed in full precision".replace("torch.", "")
    return _cannot_compile(device) or _too_old(device, _KERNEL_CAPABILITY)


def exact_refusal(model: Any, backend: Backend) -> str:
    """Return why a runner cannot run this model in exact mode; empty where it can.

    model: a `GraniteMoeHybridForCausalLM`.
    """
    if changed := changed_part(model):
        return f"{changed}, and its arithmetic may depend on what else runs"
    limits = {MambaSizes.of(mixer).time_step_limit for mixer in mixers(model).values()}
    if limits - {(0.0, math.inf)}:
        return "transformers applies this model's time_step_limit to prompts, not to new tokens"
    if not uses_exact_kernels(model.device):
        return "backend 'compiled' sums blocks of tokens" if backend == "compiled" else ""
    if model.config.num_local_experts:
        return "experts have no exact kernel"
    return triton_refusal(model, backend)


def uses_exact_kernels(device: torch.device) -> bool:
    """Return whether exact mode runs Triton kernels there, and not one token at a time."""
    return device.type != "cpu"


def check_exact(model: Any, backend: Backend) -> None:
    """Raise CannotBeExact, with the reason, where `exact_refusal` gives one."""
    if reason := exact_refusal(model, backend):
        raise CannotBeExact(reason)


def warn_if_slow(refusal: str, device: torch.device, dtype: torch.dtype) -> None:
    """Warn of a refusal where kernels were to be expected: half precision on a GPU."""
    if refusal and device.type == "cuda" and dtype in HALF:
        _warn_once(refusal)


# -- details ------------------------------------------------------------------------------------


@functools.cache
def _cannot_compile(device: torch.device) -> str:
    """Return why Triton and Inductor cannot compile for a CUDA device; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "Triton needs a C compiler (cc, gcc or clang), and none is installed"
    return _too_old(device, _FLEX_CAPABILITY)


def _too_old(device: torch.device, needed: tuple[int, int]) -> str:
    """Return how a GPU's compute capability falls short of `needed`; empty where it does not."""
    if not torch.cuda.is_available():
        return ""
    have = torch.cuda.get_device_capability(device)
    if have >= needed:
        return ""
    return f"compute capability {have[0]}.{have[1]} is older than {needed[0]}.{needed[1]}"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"granite_paged takes a slower path: {reason}", stacklevel=4)
