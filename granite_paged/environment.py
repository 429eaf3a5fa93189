"""What a result depends on besides its inputs: it is named in every report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

import torch
import transformers

from granite_paged import __version__


def versions() -> dict[str, str]:
    """Of everything that a result depends on, where it is installed.

    transformers' modes run Mamba on mamba_ssm and causal_conv1d where they are; ours never do.
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
