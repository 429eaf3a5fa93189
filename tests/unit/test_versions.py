"""Every report names what its numbers depend on."""

from __future__ import annotations

import importlib.metadata

import pytest

from granite_paged.environment import versions


def test_versions_name_what_transformers_modes_run_mamba_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        return "2.3.0" if name == "mamba_ssm" else known(name)

    assert "mamba_ssm" not in versions()
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions()["mamba_ssm"] == "2.3.0"
