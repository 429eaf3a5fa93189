"""What a measurement depended on: clock and load of the GPU, and what ran the Mamba layers."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged import environment
from granite_paged.bench.conditions import Reading, read_conditions

GPU = torch.device("cuda", 0)


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "clock_rate", missing)
    properties = SimpleNamespace(uuid="0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def answer(monkeypatch: pytest.MonkeyPatch, out: str) -> list[list[str]]:
    """Let nvidia-smi print this; return the commands that are called."""
    called: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        called.append(command)
        return SimpleNamespace(stdout=out)

    monkeypatch.setattr(subprocess, "run", run)
    return called


def test_a_cpu_has_no_clock_to_read() -> None:
    assert read_conditions(torch.device("cpu")) == Reading(None, None)


def test_clock_and_load_come_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1755)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    assert read_conditions(GPU) == Reading(1755, 0.87)


def test_without_nvml_the_drivers_tool_is_asked(
    no_nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = answer(monkeypatch, "1980, 100\n")
    assert read_conditions(GPU) == Reading(1980, 1.0)
    assert "GPU-0123" in called[0]


@pytest.mark.parametrize("out", ["", "[N/A], 3", "1980"])
def test_an_answer_without_numbers_is_no_reading(
    out: str, no_nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, out)
    assert read_conditions(GPU) == Reading()


def test_a_missing_tool_is_no_reading(no_nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert read_conditions(GPU) == Reading()


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, "reference code"),
        ({"mamba_ssm": "2.3.0"}, "mamba_ssm 2.3.0"),
        ({"causal_conv1d": "1.6", "mamba_ssm": "2.3.0"}, "mamba_ssm 2.3.0, causal_conv1d 1.6"),
    ],
)
def test_mamba_kernels_are_named(
    installed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "2.14", **installed})
    assert environment.mamba_kernels() == said
