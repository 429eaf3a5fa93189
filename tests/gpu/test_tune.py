"""Tuning on a CUDA device: candidates run, and every choice gives the same answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.bench.search_space import (
    FEW_ROWS_CHOICES,
    ONE_ROW_CHOICES,
    SUBJECTS,
    TuningTarget,
    candidates,
    groups_of,
)
from granite_paged.bench.tune import sweep
from granite_paged.layers.triton.tiles import few_rows_tiles, one_row_tiles
from granite_paged.layers.tuning import TUNED
from granite_paged.models import load

ONE_STEP = 2**-7
"""Relative tolerance for bfloat16: sums in another order may round to the next number."""


@pytest.fixture(scope="module")
def target() -> TuningTarget:
    return TuningTarget(load(device="cuda", dtype="bfloat16").model, PagedConfig(page_size=16))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_candidate_runs(target: TuningTarget, subject: str) -> None:
    group = groups_of(target, [subject], quick=True)[0]
    few = replace(group, candidates=group.candidates[:3], shapes=group.shapes[:1])
    outcome = sweep(few)
    (trials,) = outcome.trials.values()
    assert outcome.skipped == 0, [trial.error for trial in trials]
    assert all(0.1 < trial.microseconds < 1e5 for trial in trials)


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("gated", [False, True])
def test_every_product_constant_gives_the_same_answer(rows: int, gated: bool) -> None:
    kernels = pytest.importorskip("granite_paged.layers.triton.linear")
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, weight = torch.randn(rows, 512, **options), torch.randn(384, 512, **options)
    expected = kernels.linear(x, weight, gated=gated)[0].double()
    case: dict[str, Any] = {"gated": gated, "few_columns": True}
    if rows == 1:
        rule, choices, options_of = TUNED.for_one_row(**case), ONE_ROW_CHOICES, one_row_tiles
    else:
        rule = TUNED.for_few_rows(rows, **case)
        choices, options_of = FEW_ROWS_CHOICES, few_rows_tiles
    for constants in candidates(rule, choices, quick=True):
        found = kernels.linear(x, weight, gated=gated, **options_of(constants, 512))[0].double()
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference <= ONE_STEP, constants
