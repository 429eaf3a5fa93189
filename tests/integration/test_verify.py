"""`verify` passes on correct code and detects every injected fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from granite_paged import PagedConfig, verify
from granite_paged.cli.main import run
from granite_paged.cli.options import FAILED, OK
from granite_paged.errors import DeviceError
from granite_paged.geometry import CacheGeometry
from granite_paged.models import LoadedModel, load
from tests.helpers import faults
from tests.helpers.memory_errors import MEMORY_ERRORS
from tests.helpers.tiny_models import FLAVOURS, tiny_model
from tests.helpers.tolerance import LOGITS_FLOAT32, RECALL, SDPA_RATIO, WASTE

PAGES = PagedConfig(page_size=16)
CASES = ["prefill", "chunked prefill", "decode", "ragged batch", "fork and continue"]


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load(device="cpu")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode fewer steps and use one recall context."""
    monkeypatch.setattr(verify, "DECODE_STEPS", 8)
    monkeypatch.setattr(verify, "RECALL_CONTEXTS", (128,))


def loaded(model: Any) -> LoadedModel:
    return LoadedModel("tiny", model.requires_grad_(False), None)


def test_a_reference_beyond_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> Any:
        raise MEMORY_ERRORS["cpu"]

    model = tiny_model()
    monkeypatch.setattr(type(model), "double", refuse)
    with pytest.raises(
        DeviceError, match=r"needs [\d.]+ GB, which is more than is free; pass --no"
    ):
        verify.float64_copy(model)


def test_the_embedded_model_passes_every_tolerance(embedded: LoadedModel) -> None:
    report = verify.verify(embedded, config=PAGES, context=200)
    assert report.passed, report
    assert [case.name for case in report.cases] == CASES
    assert max(case.relative_diff for case in report.cases) <= LOGITS_FLOAT32
    assert all(case.tokens_equal for case in report.cases)
    assert report.recall is not None
    assert report.recall.default == report.recall.paged >= RECALL


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_sdpa(embedded: LoadedModel, dtype: str) -> None:
    report = verify.verify(load(device="cpu", dtype=dtype), config=PAGES, context=200)
    ratios = {case.name: case.error_ratio for case in report.cases}
    assert all(ratio is not None and ratio <= SDPA_RATIO for ratio in ratios.values()), ratios
    assert report.recall is not None
    assert report.recall.default == report.recall.paged >= RECALL


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("flavour", list(FLAVOURS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_model_passes(flavour: str, dtype: torch.dtype) -> None:
    model = tiny_model(flavour).to(dtype)
    model.set_experts_implementation("eager")  # the grouped kernel does not support float64
    report = verify.verify(loaded(model), config=PagedConfig(page_size=8), context=64)
    assert report.passed, report
    assert report.recall is None


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("fault", faults.SEEN_BY_VERIFY)
def test_a_fault_is_detected(embedded: LoadedModel, fault: str) -> None:
    with faults.SEEN_BY_VERIFY[fault]():
        report = verify.verify(loaded(embedded.model), config=PAGES, context=64, reference=False)
    assert report.recall is None  # the logits alone must tell
    assert not report.passed
    worst = max(case.relative_diff for case in report.cases)
    assert worst > 10 * LOGITS_FLOAT32, f"the logit tolerance missed {fault}"


@pytest.mark.usefixtures("short")
def test_values_of_other_keys_lower_recall(embedded: LoadedModel) -> None:
    with faults.crossed_values():
        recall = verify.verify(embedded, config=PAGES, context=16, reference=False).recall
    assert recall is not None
    assert recall.default >= RECALL
    assert recall.paged < 0.5


@pytest.mark.usefixtures("short")
def test_mamba_states_lost_in_a_fork_are_detected(
    embedded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_fork", _fork_of_two_prompts)
    with faults.unforked_state():
        report = verify.verify(embedded, config=PAGES, context=64, reference=False)
    failed = [case.name for case in report.cases if not case.passed]
    assert failed == ["fork and continue"]


def _fork_of_two_prompts(ids: torch.Tensor, then: torch.Tensor) -> list[verify.Move]:
    two = torch.cat([ids, ids.flip(1)])
    return [verify.Feed(two[:, :-1]), verify.Fork((1, 0, 0)), verify.Feed(then)]


def test_waste_over_256_ragged_sequences_is_within_the_tolerance(embedded: LoadedModel) -> None:
    for page_size in (16, 128):
        geometry = CacheGeometry.from_config(
            embedded.model.config, page_size=page_size, dtype=torch.float32
        )
        kv = verify.kv_memory(geometry, seed=0)
        assert kv.sequences == 256
        assert 0 < kv.waste_fraction <= WASTE
        assert kv.bytes_paged < kv.bytes_contiguous


# -- the command --------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
def test_json_output_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--device", "cpu", "--context", "64", "--json", "-"]) == OK
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["passed"] is True
    assert {"model", "device", "cases", "recall", "kv", "versions"} <= report.keys()
    assert {"name", "max_abs_diff", "error_ratio", "tokens_equal"} <= report["cases"][0].keys()
    assert {"default", "paged"} <= report["recall"].keys()
    assert {"bytes_contiguous", "bytes_paged", "waste_fraction"} <= report["kv"].keys()
    assert "chunked prefill" in err, (
        "tables go to standard error when the JSON goes to standard output"
    )


@pytest.mark.usefixtures("short")
def test_an_exceeded_tolerance_exits_with_1(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.json"
    with faults.wrong_scale():
        status = run(["verify", "--device", "cpu", "--context", "32", "--json", str(target)])
    assert status == FAILED
    report = json.loads(target.read_text())
    assert report["passed"] is False
    assert report["recall"]["paged"] >= RECALL  # docs/checkpoint.md: recall is blind to it
    assert "FAILED" in capsys.readouterr().out


def test_progress_counts_every_stage_once(embedded: LoadedModel, short: None) -> None:
    seen: list[tuple[str, int, int]] = []
    verify.verify(
        embedded, config=PAGES, context=16, reference=False, progress=lambda *s: seen.append(s)
    )
    assert seen == [(name, i, 7) for i, name in enumerate([*CASES, "recall", "memory"])]
