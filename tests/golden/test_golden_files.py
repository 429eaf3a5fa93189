"""The folder of golden data: no orphans, no shared files, and a small total size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.golden_extension import contested, orphans

LARGEST = 1_000_000
"""Limit on the bytes of all logits and tables: they are reviewed, and cloned with the code."""


def test_every_golden_file_belongs_to_a_test(
    golden_claims: dict[Path, list[str]], pytestconfig: pytest.Config
) -> None:
    left_behind = orphans(pytestconfig.rootpath, golden_claims)

    assert not left_behind, (
        f"no test claims {', '.join(left_behind)}: delete it, or restore its test"
    )


def test_no_two_tests_share_a_golden_file(golden_claims: dict[Path, list[str]]) -> None:
    assert not contested(golden_claims)


def test_golden_data_stays_small(golden_claims: dict[Path, list[str]]) -> None:
    sizes = {path.name: path.stat().st_size for path in golden_claims if path.exists()}

    assert sum(sizes.values()) < LARGEST, sizes
