"""Versions that a result depends on; every report lists them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

import torch
import transformers

from granite_paged import __version__


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a result depends on.

    Packages that are not installed are left out. transformers' modes run Mamba layers with
    mamba_ssm and causal_conv1d where they are installed; `paged` never uses them.
    """
    optional = {}
    for name in ("triton", "mamba_ssm", "causal_conv1d"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            optional[name] = importlib.metadata.version(name)
    return {
        "granite_paged": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **optional,
    }
