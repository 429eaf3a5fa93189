"""Folders are the layers: a test's marker follows from where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU then

TESTS = Path(__file__).parent
LAYERS = ("unit", "property", "golden", "integration", "gpu")

settings.register_profile(
    "default",
    deadline=None,
    max_examples=50,
    derandomize=True,  # the same cases everywhere: a red run can be had again
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "deep", settings.get_profile("default"), max_examples=2000, derandomize=False, print_blob=True
)
settings.register_profile("wide", settings.get_profile("deep"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    # workers share the cores: one thread each is faster, and sums in one order everywhere
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device: run `nox -s gpu_tests` where there is one")
    for item in items:
        layer = item.path.relative_to(TESTS).parts[0]
        assert layer in LAYERS, f"{item.path} lies in no layer"
        item.add_marker(layer)
        if layer == "gpu" and not torch.cuda.is_available():
            item.add_marker(no_gpu)
