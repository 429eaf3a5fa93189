"""Versions that a result depends on; every report lists them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

import torch
import transformers

from granite_paged import __version__
from granite_paged.device import device_name
from granite_paged.names import MAMBA_PACKAGES, mamba_kernels_of


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a result depends on.

    Packages that are not installed are left out. transformers' modes run Mamba layers with
    mamba_ssm and causal_conv1d where they are installed; `paged` never uses them.
    """
    optional = {}
    for name in ("triton", *MAMBA_PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            optional[name] = importlib.metadata.version(name)
    return {
        "granite_paged": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **optional,
    }


def bits_place(device: torch.device) -> dict[str, str]:
    """Return what the bits of exact mode depend on, apart from the model and the request.

    On a CPU these are its model, its vector instructions and the number of threads as well.
    """
    installed = versions()
    place = {name: installed[name] for name in ("torch", "transformers")}
    if device.type == "cpu":
        capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        return {"device": f"{_cpu_model()}, {capability}", "threads": str(threads), **place}
    return {"device": device_name(device), "triton": installed.get("triton", "none"), **place}


def _cpu_model() -> str:
    """Return the name of this machine's CPU, or its architecture where the system gives no name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def mamba_kernels() -> str:
    """Return what transformers' modes run Mamba layers with: packages, or its reference code."""
    return mamba_kernels_of(versions())


def mamba_note() -> str:
    """Return a warning if transformers' modes run Mamba layers on its slow reference code."""
    missing = [name for name in MAMBA_PACKAGES if name not in versions()]
    if not missing:
        return ""
    return (
        f"note: {' and '.join(missing)} not installed, so transformers' modes run Mamba layers on "
        "its reference code, which is correct but slow"
    )
