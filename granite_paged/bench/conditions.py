"""The GPU's clock, and the share of time in which it ran kernels, as its driver reports them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading; None where there is no GPU or no driver tool.

    Attributes:
        clock_mhz: clock of the multiprocessors.
        busy: share of the driver's last sample period in which a kernel ran.
    """

    clock_mhz: int | None = None
    busy: float | None = None


def read_conditions(device: torch.device) -> Reading:
    """Read clock and load now, from NVML through torch, or else from nvidia-smi."""
    if device.type != "cuda":
        return Reading()
    cuda: Any = torch.cuda
    try:
        return Reading(int(cuda.clock_rate(device)), cuda.utilization(device) / 100)
    except Exception:  # pynvml is not installed, or one of its own errors
        return _from_tool(str(torch.cuda.get_device_properties(device).uuid))


def _from_tool(uuid: str) -> Reading:
    fields = "--query-gpu=clocks.sm,utilization.gpu"
    command = ["nvidia-smi", "-i", f"GPU-{uuid}", fields, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        clock, load = (int(part) for part in done.stdout.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return Reading()
    return Reading(clock, load / 100)
