"""Small numbers across the bus, without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the device; on CUDA through pinned memory, so that nobody waits."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_device(device: torch.device, *parts: Tensor) -> list[Tensor]:
    """Move 1-D integer tensors to the device in one copy."""
    packed = torch.cat([part.long() for part in parts])
    if device.type == "cuda":
        packed = packed.pin_memory()
    return list(torch.split(packed.to(device, non_blocking=True), [len(part) for part in parts]))


class Fetch:
    """Tensors on their way to the host; `read` waits until they are there."""

    def __init__(self, device: torch.device, **tensors: Tensor | None) -> None:
        self._landed: Any = None
        if device.type == "cuda":
            self._landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._tensors = {
            name: self._start(tensor) for name, tensor in tensors.items() if tensor is not None
        }
        if self._landed is not None:
            self._landed.record(torch.cuda.current_stream(device))

    def read(self) -> dict[str, list[Any]]:
        """Their contents as lists, by name."""
        if self._landed is not None:
            self._landed.synchronize()
        return {name: tensor.tolist() for name, tensor in self._tensors.items()}

    def _start(self, tensor: Tensor) -> Tensor:
        if self._landed is None:
            return tensor.clone()  # what it came from is written again before it is read
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
