"""Mutation tests of the golden logits: when a side is changed on purpose, it is the one named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged.paging import masks
from tests.helpers.golden_extension import (
    AGREE,
    INPUTS_CHANGED,
    Comparison,
    LogitsExtension,
    Measured,
    compare,
    difference,
)
from tests.helpers.golden_models import (
    MODELS,
    golden_model,
    prefill,
    three_way,
    tiny_weights,
    tokens,
)

Record = Callable[[str], Any]
LENGTHS = (21, 16, 8, 5)


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Record:
    """The recorded logits of `test_left_padded_batch[name]`."""

    def read(name: str) -> Any:
        file = f"test_left_padded_batch-{name}.safetensors"
        path = Path(pytestconfig.rootpath, "golden", "logits", file)
        return LogitsExtension().read_snapshot_data_from_location(snapshot_location=str(path))

    return read


def measure(name: str) -> Measured:
    golden = golden_model(name)
    return three_way(golden, prefill, tokens(golden.model, LENGTHS, seed=2))


def broken_by(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Return `paged_mask_mod` with its inverse map or positions changed first."""
    right = masks.paged_mask_mod

    def wrong(physical: Tensor, logical: Tensor, positions: Tensor, **sizes: int) -> Any:
        return right(physical, *change(logical, positions), **sizes)

    return wrong


def loses_the_last_token(logical: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return logical, positions - (positions > 0).int()


def loses_the_first_page(logical: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return logical.where(logical != 0, -1), positions


def sees_a_token_ahead(logical: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return logical, positions + (positions >= 0).int()


@pytest.mark.parametrize("defect", [loses_the_last_token, loses_the_first_page, sees_a_token_ahead])
@pytest.mark.parametrize("name", MODELS)
def test_wrong_mask_is_reported_as_ours(
    name: str, defect: Any, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "paged_mask_mod", broken_by(defect))

    comparison = compare(measure(name), record(name))

    assert comparison.verdict == "paged moved, SDPA did not"
    assert comparison.paged_sdpa.ratio > 100, "such a defect must exceed the bound by far"


@pytest.mark.parametrize("name", MODELS)
def test_changed_forward_is_reported_as_transformers(
    name: str, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in golden_model(name).model.modules():
        if hasattr(module, "scaling"):  # of the attention scores
            monkeypatch.setattr(module, "scaling", 1.01 * module.scaling)

    comparison = compare(measure(name), record(name))

    assert comparison.verdict == "transformers' SDPA moved (we followed it)"


def test_changed_weights_are_reported_as_inputs(record: Record) -> None:
    comparison = _with_origin(record("hybrid"), weights_sha256="of other weights")

    assert comparison.verdict == INPUTS_CHANGED
    assert comparison.changed_inputs == ("weights_sha256",)


def test_changed_ids_are_reported_as_inputs(record: Record) -> None:
    comparison = _with_origin(record("hybrid"), ids_sha256="of other ids")

    assert comparison.verdict == INPUTS_CHANGED
    assert comparison.changed_inputs == ("ids_sha256",)


def _with_origin(recorded: Any, **changed: str) -> Comparison:
    return compare(Measured(recorded.sdpa, recorded.sdpa, {**recorded.origin, **changed}), recorded)


@pytest.mark.parametrize("name", MODELS)
def test_float32_rounding_stays_well_within_the_bound(name: str, record: Record) -> None:
    comparison = compare(measure(name), record(name))

    assert comparison.verdict == AGREE
    assert comparison.paged_sdpa.ratio < 0.5, (
        "rounding comes too close to the bound: choose other weights"
    )


@pytest.mark.parametrize("name", MODELS)
def test_weights_do_not_depend_on_the_global_seed(name: str) -> None:
    torch.manual_seed(1)
    one = MODELS[name]()
    torch.manual_seed(2)
    other = MODELS[name]()

    assert one.origin == other.origin
    differing = difference(one.model.state_dict(), other.model.state_dict())
    assert differing.ratio == 0, differing.text


def test_another_seed_gives_other_weights() -> None:
    config = golden_model("hybrid").model.config

    assert not all(
        torch.equal(one, other)
        for one, other in zip(
            tiny_weights(config, 0).values(), tiny_weights(config, 1).values(), strict=True
        )
    )
