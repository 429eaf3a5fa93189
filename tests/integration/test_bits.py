"""Digests of bits: what they cover, how they are compared, and what was recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged import PagedConfig, bits
from granite_paged.bits import BitsReport, bits_report, digest_of, read_reports, write_report
from granite_paged.cli.main import run
from granite_paged.cli.options import FAILED, OK
from granite_paged.errors import CannotBeExact
from granite_paged.models import LoadedModel, load
from tests.helpers.command_line import Capture, assert_one_line
from tests.helpers.golden_bits import compare_with_recorded
from tests.helpers.tiny_models import tiny_model

SHORT = {"short": (7, ()), "chunked": (20, (3, 16))}
CONFIG = PagedConfig(page_size=16)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Run shorter requests, except against what was recorded."""
    if "recorded" not in request.node.name:
        monkeypatch.setattr(bits, "REQUESTS", SHORT)


def tiny(seed: int = 0) -> LoadedModel:
    return LoadedModel("tiny", tiny_model(seed=seed).requires_grad_(False), None)


def test_the_embedded_model_has_the_recorded_bits() -> None:
    compare_with_recorded(bits_report(load(device="cpu"), CONFIG))


def test_a_digest_is_the_sha256_of_the_bits() -> None:
    expected = "df3f619804a92fdb4057192dc43dd748ea778adc52bc498ce80524c014b81119"  # of 4 zero bytes
    assert digest_of(torch.zeros(1)) == expected
    assert digest_of(torch.zeros(1)) != digest_of(-torch.zeros(1)), "-0.0 has another bit"
    assert digest_of(torch.ones(2, 2).T) == digest_of(torch.ones(4))


def test_bits_do_not_depend_on_pages_and_chunks() -> None:
    first = bits_report(tiny(), CONFIG)
    assert first == bits_report(tiny(), PagedConfig(page_size=64, chunk_tokens=512))
    assert list(first.requests["short"]) == [
        *("0 mamba", "1 attention", "2 mamba", "3 attention", "logits")
    ]


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("model.layers.0.mamba.in_proj", "0 mamba"),
        ("model.layers.0.shared_mlp.input_linear", "1 attention"),
        ("model.layers.1.self_attn.k_proj", "1 attention"),
        ("model.layers.2.mamba.conv1d", "2 mamba"),
        ("model.norm", "logits"),
    ],
)
def test_one_changed_bit_is_found_in_the_layer_that_it_reaches_first(part: str, layer: str) -> None:
    before, changed = bits_report(tiny(), CONFIG), tiny()
    weight = changed.model.get_submodule(part).weight
    weight.view(torch.int32).view(-1)[weight.numel() // 2] ^= 1 << 12
    after = bits_report(changed, CONFIG)
    assert not before.same_model(after)
    assert set(before.differences(after).values()) == {layer}


def test_a_model_that_cannot_be_exact_has_no_digests() -> None:
    with pytest.raises(CannotBeExact):
        bits_report(tiny(), replace(CONFIG, backend="compiled"))


# -- files --------------------------------------------------------------------------------------


def changed(report: BitsReport, request: str, layer: str, **place: str) -> BitsReport:
    requests = {name: dict(digests) for name, digests in report.requests.items()}
    found = requests[request]
    for name in list(found)[list(found).index(layer) :]:
        found[name] = "0" * 64
    return replace(report, requests=requests, place={**report.place, **place})


@pytest.fixture(scope="module")
def report() -> BitsReport:
    requests = {name: {"0 mamba": "a", "1 attention": "b", "logits": "c"} for name in SHORT}
    place = {"device": "cpu", "torch": "2.14.1"}
    return BitsReport("tiny", "f00", "float32", place, requests)


def test_a_file_keeps_one_report_of_each_model_and_place(
    report: BitsReport, tmp_path: Path
) -> None:
    path = tmp_path / "bits.json"
    newer = changed(report, "short", "logits", torch="2.15.0")
    for one in (report, newer, replace(report, dtype="float64"), report):
        write_report(path, one)
    assert read_reports(path) == [newer, replace(report, dtype="float64"), report]


def test_two_files_are_bisected_by_layer(
    report: BitsReport, tmp_path: Path, capsys: Capture
) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_report(first, report)
    write_report(second, changed(report, "chunked", "1 attention", torch="2.15.0"))
    assert run(["verify", "--bits", str(first), str(first)]) == OK
    assert "short: the same bits" in capsys.readouterr().out
    assert run(["verify", "--bits", str(first), str(second)]) == FAILED
    shown = capsys.readouterr().out
    assert "other places: torch 2.14.1 and 2.15.0" in shown
    assert "short: the same bits" in shown
    assert "chunked: differs first in layer 1 attention" in shown


def test_files_of_other_models_and_broken_files_are_one_line(
    report: BitsReport, tmp_path: Path, capsys: Capture
) -> None:
    first, second, broken = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    write_report(first, report)
    write_report(second, replace(report, weights="other"))
    broken.write_text("{")
    assert run(["verify", "--bits", str(first), str(second)]) not in (OK, FAILED)
    assert_one_line(capsys, "no model in common")
    assert run(["verify", "--bits", str(first), str(broken)]) not in (OK, FAILED)
    assert_one_line(capsys, "c.json")
    broken.write_text('{"reports": []}')
    assert run(["verify", "--bits", str(first), str(broken)]) not in (OK, FAILED)
    assert_one_line(
        capsys, "holds no report; write such files with `granite-paged verify --bits-out`"
    )


def test_the_command_writes_what_it_compares(tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "bits.json")
    assert run(["verify", "--device", "cpu", "--bits-out", path]) == OK
    assert run(["verify", "--bits", path, path]) == OK
    shown: Any = capsys.readouterr()
    assert shown.out.splitlines()[1] == "tiny-recall, float32"


# -- what was recorded --------------------------------------------------------------------------


def test_other_bits_than_the_recorded_ones_name_the_first_layer(
    report: BitsReport, tmp_path: Path
) -> None:
    write_report(tmp_path / "cpu.json", report)
    compare_with_recorded(report, tmp_path)
    with pytest.raises(AssertionError, match="chunked: differs first in layer 0 mamba"):
        compare_with_recorded(changed(report, "chunked", "0 mamba"), tmp_path)


def test_what_was_recorded_elsewhere_is_not_compared(report: BitsReport, tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="no bits of tiny in float32"):
        compare_with_recorded(report, tmp_path)
    write_report(tmp_path / "cpu.json", report)
    with pytest.raises(pytest.skip.Exception, match=r"torch 2\.14\.1 and 2\.15\.0"):
        compare_with_recorded(changed(report, "short", "0 mamba", torch="2.15.0"), tmp_path)


def test_the_command_line_runs_exact_mode_with_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    path = str(tmp_path / "bits.json")

    assert run(["verify", "--device", "cpu", "--bits-out", path]) == OK
    assert chosen == [1]
    assert f"the bits of tiny-recall in float32 are in {path}" in capsys.readouterr().out
    assert run(["generate", "--device", "cpu", "--max-new-tokens", "1", "x"]) == OK
    assert chosen == [1]
