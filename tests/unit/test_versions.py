"""Reports name the versions that their numbers depend on."""

from __future__ import annotations

import importlib.metadata

import pytest

from granite_paged.environment import versions


def test_versions_include_mamba_ssm_if_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        return "2.3.0" if name == "mamba_ssm" else known(name)

    assert "mamba_ssm" not in versions()
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions()["mamba_ssm"] == "2.3.0"
