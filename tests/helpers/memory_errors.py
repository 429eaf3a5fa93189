"""What is raised where memory runs out."""

from __future__ import annotations

import torch

MEMORY_ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB."),
    "driver": RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "python": MemoryError(),
}
"""By their source. The last two concern the host, the others a GPU."""
