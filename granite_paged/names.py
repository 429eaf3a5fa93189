"""Names that both the command line and the modules behind it use. Imports nothing of ours."""

from collections.abc import Mapping

BASELINES = ("default", "static")
"""transformers' own modes: SDPA with a DynamicCache, and a StaticCache with torch.compile."""

MODES = (*BASELINES, "paged")
"""All modes that are compared; `paged` is ours."""

SERVING_ENGINES = ("paged", "vllm float32 state", "vllm defaults")
"""What `bench serve --mode vllm` compares: our engine, and vLLM with two types of Mamba state."""

CASE_NAMES = ("batch", "context", "decode", "kernel", "memory", "coldstart", "serve")
"""What `granite-paged bench` measures."""

MAMBA_PACKAGES = ("mamba_ssm", "causal_conv1d")
"""Packages that transformers' modes run Mamba layers with, where they are installed."""

MAMBA_REFERENCE = "reference code"
"""What transformers runs Mamba layers with where neither package is installed."""

SUBJECT_NAMES = ("decode", "prefill", "products")
"""What `granite-paged tune` searches constants for."""

FIGURE_FORMATS = ("png", "svg")
"""Formats in which `granite-paged plot` draws."""


def mamba_kernels_of(versions: Mapping[str, str]) -> str:
    """Return what transformers' modes ran Mamba layers with, given the versions of a run."""
    present = [f"{name} {versions[name]}" for name in MAMBA_PACKAGES if name in versions]
    return ", ".join(present) or MAMBA_REFERENCE
