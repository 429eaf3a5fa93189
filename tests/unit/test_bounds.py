"""Each tolerance is pinned to its derivation, to the documents, and to a fault it must detect.

A tolerance that is loosened by mistake fails one of these tests. Faults are about twice the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged, tolerances
from granite_paged.bench import calibration, judge
from granite_paged.hf import patching
from granite_paged.hf.compat import with_cache
from granite_paged.verify import RAGGED_LONGEST
from tests.helpers.golden_models import golden_model

ROOT = Path(__file__).parents[2]
BOUNDS = (ROOT / "docs" / "golden.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = PagedConfig(page_size=16)


# -- derivations --------------------------------------------------------------------------------


RULE = "a bound changes only with the derivation beside it, never to let a test pass"


def test_the_float32_bound_is_170_roundings() -> None:
    assert 0.95 < tolerances.LOGITS_FLOAT32 / (170 * 2**-23) <= 1, RULE


def test_the_float64_bound_is_at_most_10000_roundings() -> None:
    assert 0.4 < tolerances.LOGITS_FLOAT64 / (1e4 * 2**-52) <= 1, RULE


@pytest.mark.parametrize(
    ("dtype", "attention_only", "layers", "expected"),
    [
        (torch.float32, False, 1, 2e-5),
        (torch.float32, True, 4, 2e-5),
        (torch.float32, False, 16, 4e-5),
        (torch.float64, False, 4, 2e-5),
        (torch.float64, True, 4, 1e-12),
        (torch.float64, True, 36, 3e-12),
        (torch.bfloat16, True, 4, None),
    ],
)
def test_the_bound_of_logits_grows_with_the_root_of_the_layers(
    dtype: torch.dtype, attention_only: bool, layers: int, expected: float | None
) -> None:
    """Errors of layers are independent, so that their squares add."""
    found = tolerances.logit_bound(dtype, attention_only=attention_only, layers=layers)
    assert found == (None if expected is None else pytest.approx(expected)), RULE


def test_the_waste_bound_follows_its_derivation() -> None:
    half_a_page = 128 / 2 / ((1 + RAGGED_LONGEST) / 2)
    assert 1 < tolerances.WASTE / half_a_page < 1.34, RULE


def test_the_ratio_and_recall_bounds_are_as_stated() -> None:
    assert (tolerances.SDPA_RATIO, tolerances.RECALL) == (1.1, 0.98), RULE


def test_gate_limits_lie_half_way_to_the_loss_to_detect() -> None:
    assert judge.limit_of(judge.LAW_SEEN) == pytest.approx(1.025), RULE
    assert (judge.SEEN, judge.ENGINE_SEEN) == (1.05, 1.10), RULE
    assert judge.limit_of(judge.SEEN) - 1 > calibration.LEAST, RULE


def test_the_intervals_share_the_false_alarms_of_a_suite() -> None:
    ratios = sum(gated.time and gated.default for gated in judge.GATED)
    assert 0.75 < ratios * (1 - judge.CONFIDENCE) / 2 / calibration.ALARMS <= 1, RULE


@pytest.mark.parametrize(("suites", "enough"), [([5], True), ([4], False), ([3, 3], True)])
def test_a_bound_needs_a_spread_of_four_degrees_of_freedom(suites: list[int], enough: bool) -> None:
    sessions = [[1.0] * count for count in suites]
    assert (calibration.bound_of(sessions, 9) is not None) == enough


# -- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentence",
    [
        f"logits differ by at most {tolerances.LOGITS_FLOAT32:g}".replace("e-0", "e-"),
        f"at most {tolerances.SDPA_RATIO:g} times SDPA's own",
        f"more than {judge.MEMORY - 1:.0%} above `default`'s".replace("%", " %"),
        f"more than {judge.MEMORY - 1:.0%} above the record's".replace("%", " %"),
        f"at least {calibration.LEAST:.0%}".replace("%", " %"),
        f"{judge.SEEN - 1:.0%} against the record".replace("%", " %"),
        f"{judge.ENGINE_SEEN - 1:.0%} for the engine".replace("%", " %"),
        f"Less than {1e6 * judge.LEAST_SECONDS:g} microseconds",
        f"{judge.LEAST_BYTES / 2**20:g} MiB more",
    ],
)
def test_the_documents_state_the_bounds(sentence: str) -> None:
    assert_says("docs/golden.md", BOUNDS, sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        f"agree to {tolerances.LOGITS_FLOAT32:g} of".replace("e-0", "e-"),
        f"at most {tolerances.SDPA_RATIO:g} times SDPA's own",
    ],
)
def test_the_readme_states_the_bounds_of_logits(sentence: str) -> None:
    assert_says("README.md", README, sentence)


def assert_says(page: str, text: str, sentence: str) -> None:
    if sentence not in text:
        pytest.fail(f"the code says {sentence!r} and {page} does not; {RULE}", pytrace=False)


# -- faults of about twice a bound --------------------------------------------------------------


def logits(model: Any, ids: Tensor, attention: Callable[..., Any] | None = None) -> Tensor:
    """Return the logits of one prefill; with `attention`, through pages that use it."""
    with torch.inference_mode():
        if attention is None:
            return model(ids, **with_cache(DynamicCache(config=model.config))).logits
        with mock.patch.object(patching, "paged_attention", attention), paged(model, PAGES):
            return model(ids, **with_cache(PagedCache.for_model(model, PAGES))).logits


def scaled(factor: float) -> Callable[..., Tensor]:
    right = patching.paged_attention
    return lambda *args, scale, **kwargs: right(*args, scale=scale * factor, **kwargs)


def rounded(dtype: torch.dtype) -> Callable[..., Tensor]:
    right = patching.paged_attention
    return lambda *args, **kwargs: right(*args, **kwargs).to(dtype).float()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 296, (2, 60), generator=draw)


def difference(attention: Callable[..., Any], ids: Tensor) -> float:
    """Return the largest logit difference over the largest logit, of the embedded checkpoint."""
    model = golden_model("tiny-recall").model
    expected = logits(model, ids)
    return float((logits(model, ids, attention) - expected).abs().max() / expected.abs().max())


def test_a_scale_off_by_1e_4_exceeds_the_float32_bound(ids: Tensor) -> None:
    found = difference(scaled(1 + 1e-4), ids)
    assert found > tolerances.LOGITS_FLOAT32, f"the bound would let this fault pass; {RULE}"
    assert found < 3 * tolerances.LOGITS_FLOAT32
    assert difference(scaled(1), ids) < tolerances.LOGITS_FLOAT32 / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attention_exceeds_the_float32_bound(
    dtype: torch.dtype, ids: Tensor
) -> None:
    assert difference(rounded(dtype), ids) > 2 * tolerances.LOGITS_FLOAT32


# -- the gate at its boundaries -----------------------------------------------------------------


@pytest.mark.parametrize(("excess", "verdict"), [(0.009, "passed"), (0.015, "failed")])
def test_memory_may_exceed_its_bound_by_one_per_cent(excess: float, verdict: str) -> None:
    assert judge.judge_bytes(int(1e9 * (1 + excess)), 10**9) == verdict


@pytest.mark.parametrize(("slowdown", "verdict"), [(1.04, "failed"), (1.01, "passed")])
def test_a_quiet_measurement_is_judged_by_the_limit(slowdown: float, verdict: str) -> None:
    draw = torch.Generator().manual_seed(0)
    noise = (1 + 0.001 * torch.randn(5, generator=draw)).tolist()
    interval = judge.visit_ratio([slowdown * n for n in noise], [1.0] * 5)
    assert judge.judge_ratio(interval, base=1.0, seen=judge.LAW_SEEN) == verdict


@pytest.mark.parametrize(("slowdown", "verdict"), [(1.03, "failed"), (1.015, "passed")])
def test_a_quiet_calibration_is_judged_by_the_least_bound(slowdown: float, verdict: str) -> None:
    bound = calibration.bound_of([[1.0, 1.001] * 10], 9)
    assert bound is not None
    assert judge.judge_time([slowdown] * 5, 1.0, bound, judge.SEEN) == verdict
