"""The device: its abilities, its memory, and copies to and from it."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from granite_paged.errors import DeviceError

TUNED_SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory per program on compute capability 9.0, where kernels were tuned."""

TMA_TORCH = "2.11"
"""The oldest torch whose FlexAttention was run with TMA, a GPU's unit that copies blocks of memory.
Torch 2.9 does not check whether a load by TMA is possible."""

_DEVICE_IS_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the messages of the CUDA driver and Triton, and of cuBLAS."""

_HOST_IS_FULL = "DefaultCPUAllocator"
"""In the message of torch's allocator on the CPU."""


# -- abilities ----------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first GPU, else the CPU.

    Raises:
        DeviceError: for an unknown name, or a GPU that this machine does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise DeviceError(f"{name} does not exist: this machine has {gpus} CUDA devices")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise DeviceError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use.

    This is the multiprocessor's shared memory less 1 KiB (CUDA C++ programming guide, compute
    capability 8.0 and later). Without a GPU it is `TUNED_SHARED_MEMORY`.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return TUNED_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_multiprocessor) - 1024


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; 1 on other devices."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Return whether FlexAttention loads by TMA: from compute capability 9.0 and `TMA_TORCH` on."""
    if device.type != "cuda" or torch.__version__ < TMA_TORCH:  # compared as versions
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def stages_that_fit(stages: int, stage_bytes: int, memory: int) -> int:
    """Return `stages`, or as many stages of `stage_bytes` bytes as fit into `memory` bytes."""
    return max(1, min(stages, memory // stage_bytes))


def device_name(device: torch.device) -> str:
    """Return a GPU's product name; for other devices, their type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


# -- memory -------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory ran out.

    torch's allocator has an error of its own for that. The CUDA driver, Triton and cuBLAS raise
    RuntimeError, and only the message tells.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(words in said for words in _DEVICE_IS_FULL)


@contextlib.contextmanager
def one_memory_error() -> Iterator[None]:
    """Raise `torch.OutOfMemoryError` for every error that says that memory ran out.

    The memory is a GPU's or the host's.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        host_is_full = isinstance(error, MemoryError) or _HOST_IS_FULL in str(error)
        if not host_is_full and not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated: free memory of a GPU, all memory of the host."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def allocated_bytes(device: torch.device) -> int | None:
    """Return the bytes of live tensors on a GPU; None on other devices."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def release_memory(device: torch.device) -> None:
    """Return to the device what freed models and engines held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def used_bytes(device: torch.device) -> int | None:
    """Return the device memory in use, of all processes; None on the CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def graph_bytes(device: torch.device) -> int:
    """Return the bytes that CUDA graphs use for intermediate tensors.

    That is their private memory, less the tensors in it that are alive.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one inside the block; change nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# -- copies -------------------------------------------------------------------------------------


def upload(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of these numbers on the device, without waiting for the copy."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_device(device: torch.device, *parts: Tensor) -> list[Tensor]:
    """Move 1-D integer tensors to the device in one copy."""
    packed = torch.cat([part.long() for part in parts])
    if device.type == "cuda":
        packed = packed.pin_memory()
    return list(torch.split(packed.to(device, non_blocking=True), [len(part) for part in parts]))


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned and still on its way if the tensor is on a GPU."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Fetch:
    """An asynchronous copy of some tensors to the host; `read` waits for it."""

    def __init__(self, device: torch.device, **tensors: Tensor | None) -> None:
        self._landed: Any = None
        if device.type == "cuda":
            self._landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._tensors = {
            name: host_copy(tensor) for name, tensor in tensors.items() if tensor is not None
        }
        if self._landed is not None:
            self._landed.record(torch.cuda.current_stream(device))

    def read(self) -> dict[str, list[Any]]:
        """Wait for the copy, and return the tensors' contents as lists, by name."""
        if self._landed is not None:
            self._landed.synchronize()
        return {name: tensor.tolist() for name, tensor in self._tensors.items()}


def finite_rows(numbers: torch.Tensor) -> torch.Tensor:
    """Return which rows of [n, m] are finite throughout, as [n] bool, without a copy of them."""
    low, high = numbers.aminmax(dim=1)
    return low * 0 == high * 0  # NaN and infinity times 0 are NaN, which equals nothing
