"""The tuned constants: reading and checking them, and what the rules derive from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged.errors import TunedFileError
from granite_paged.layers.attention import DecodePlan, kernel_options
from granite_paged.layers.triton import tiles
from granite_paged.layers.tuning import PATH, ROW_TILES, TUNED, read_tuned
from tests.helpers.strategies import make_geometry

CPU = torch.device("cpu")
GEOMETRY = make_geometry(page_size=128, kv_heads=4, head_dim=64, dtype=torch.bfloat16)

HOPPER = 132
"""Multiprocessors of an H100 (SXM) or an H200."""


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make plans for a Hopper GPU."""
    monkeypatch.setattr("granite_paged.layers.attention.multiprocessors", lambda device: HOPPER)


PRODUCTS = {
    "in_proj": (6448, 1536, False),
    "out_proj": (1536, 3072, False),
    "gated": (4096, 1536, True),
    "output": (1536, 4096, False),
}
"""Columns, depth and gating of granite-4.0-h-1b's products."""


# -- what the rules give for granite-4.0-h-1b on a Hopper GPU: update these with the constants ----

ONE_ROW = {
    "in_proj": (4, 2048, 4),
    "out_proj": (2, 4096, 4),
    "gated": (2, 2048, 8),
    "output": (2, 4096, 4),
}
"""COLUMNS, DEPTH, warps."""

FEW_ROWS = {
    (16, "in_proj"): (64, 128, 1, 6),
    (16, "out_proj"): (64, 128, 4, 6),
    (16, "gated"): (64, 128, 2, 4),
    (16, "output"): (64, 128, 4, 6),
    (32, "in_proj"): (64, 256, 1, 3),
    (32, "out_proj"): (64, 128, 4, 6),
    (32, "gated"): (64, 128, 2, 4),
    (32, "output"): (64, 128, 4, 6),
    (64, "in_proj"): (64, 128, 1, 4),
    (64, "out_proj"): (64, 128, 4, 6),
    (64, "gated"): (64, 128, 1, 4),
    (64, "output"): (64, 128, 4, 6),
}
"""COLUMNS, DEPTH, SPLITS, stages."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_one_row_tiles_are_the_measured_ones(name: str) -> None:
    found = product_tiles(1, name)
    assert found == dict(zip(("COLUMNS", "DEPTH", "num_warps"), ONE_ROW[name], strict=True))


@pytest.mark.parametrize(("rows", "name"), FEW_ROWS, ids=str)
def test_few_rows_tiles_are_the_measured_ones(rows: int, name: str) -> None:
    names = ("COLUMNS", "DEPTH", "SPLITS", "num_stages")
    expected = dict(zip(names, FEW_ROWS[rows, name], strict=True))
    assert product_tiles(rows, name) == {"ROWS": rows, **expected, "num_warps": 4}


@pytest.mark.parametrize(
    ("batch", "pages", "parts", "splits"),
    [
        (1, 4, 33, 4),
        (1, 1024, 33, 33),
        (8, 32, 33, 4),
        (8, 2, 33, 2),
        (32, 32, 256, 1),
        (128, 1024, 256, 1),
    ],
)
def test_decode_plans_are_the_measured_ones(
    batch: int, pages: int, parts: int, splits: int
) -> None:
    plan = DecodePlan.choose(GEOMETRY, batch, pages, CPU, most=256)
    assert plan == DecodePlan(parts=parts, splits=splits, block=128, warps=4, stages=3)


def product_tiles(rows: int, name: str) -> dict[str, int]:
    return tiles.tiles(rows, *PRODUCTS[name], HOPPER)


# -- the rules, whatever the constants ----------------------------------------------------------


@pytest.mark.parametrize(("rows", "tile"), [(2, 16), (17, 32), (33, 64), (65, 64), (200, 64)])
def test_rows_take_the_smallest_sufficient_tile(rows: int, tile: int) -> None:
    assert product_tiles(rows, "in_proj")["ROWS"] == tile


def test_a_shallow_product_is_not_split() -> None:
    constants = replace(TUNED.few_rows[0], DEPTH=256, SPLITS=4)
    found = [tiles.few_rows_tiles(constants, depth)["SPLITS"] for depth in (200, 300, 5000)]
    assert found == [1, 2, 4]


def test_a_deep_row_takes_fewer_columns() -> None:
    constants = replace(TUNED.one_row[0], COLUMNS=4)
    depths = (4096, 8192, 32768)
    found = [tiles.one_row_tiles(constants, depth)["COLUMNS"] for depth in depths]
    assert found == [4, 2, 1]


@pytest.mark.parametrize(
    ("parts_per_multiprocessor", "batch", "pages", "splits"),
    [(1, 1, 1024, 33), (2, 1, 1024, 66), (0.5, 1, 1024, 16), (1, 1, 3, 3), (0.5, 32, 64, 1)],
)
def test_splits_occupy_multiprocessors_with_at_least_one_page_each(
    parts_per_multiprocessor: float, batch: int, pages: int, splits: int
) -> None:
    constants = replace(TUNED.decode[0], parts_per_multiprocessor=parts_per_multiprocessor)
    plan = DecodePlan.from_constants(constants, GEOMETRY, batch, pages, CPU, batch)
    assert plan.splits == splits


@pytest.mark.parametrize("page_size", [16, 64, 128, 256])
def test_a_block_of_a_plan_is_at_most_a_page(page_size: int) -> None:
    constants = replace(TUNED.decode[0], block=128)
    geometry = replace(GEOMETRY, page_size=page_size)
    plan = DecodePlan.from_constants(constants, geometry, 1, 8, CPU, 1)
    assert plan.block == min(128, page_size)


# -- prefill ------------------------------------------------------------------------------------


class Mask:
    """The part of a BlockMask that the rule reads."""

    def __init__(self, folded_rows: int, page_size: int) -> None:
        self.shape = (1, 1, folded_rows, 2**20)
        self.BLOCK_SIZE = (128, page_size)


def options(dtype: torch.dtype, head_dim: int, *, rows: int = 6144, page: int = 128) -> Any:
    pool = torch.empty(1, 4, 1024, head_dim, dtype=dtype, device="meta")
    return kernel_options(Mask(rows, page), pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_precision_prefill_sets_every_option(dtype: torch.dtype, head_dim: int) -> None:
    expected = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    assert options(dtype, head_dim) == expected


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 64), (torch.bfloat16, 256)], ids=str
)
def test_other_prefills_keep_default_warps_and_stages(dtype: torch.dtype, head_dim: int) -> None:
    assert options(dtype, head_dim) == {"BLOCK_M": 64, "BLOCK_N": 64}


def test_few_folded_rows_take_the_smallest_block() -> None:
    assert options(torch.bfloat16, 64, rows=12) == {"BLOCK_M": 16, "BLOCK_N": 64}


def test_options_can_be_chosen_inside_a_traced_region() -> None:
    """If a caller compiles a model, dynamo traces the rule, so it must not read a file there."""
    pool = torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16)

    def block_of(x: torch.Tensor) -> torch.Tensor:
        chosen = kernel_options(Mask(64, 32), x)
        return x * chosen["BLOCK_M"] + chosen["num_warps"]

    compiled = torch.compile(block_of, fullgraph=True, backend="eager")
    assert torch.equal(compiled(pool), torch.full_like(pool, TUNED.prefill.warps))


# -- the file -----------------------------------------------------------------------------------


def test_the_packaged_file_names_its_origin() -> None:
    assert read_tuned(PATH) == TUNED
    assert TUNED.device
    assert TUNED.torch
    assert TUNED.triton


def test_a_batch_takes_the_constants_of_the_next_smaller_one(tmp_path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["decode"] = [{**data["decode"][0], "batch": b, "warps": b} for b in (1, 2, 8, 32)]

    tuned = read_tuned(edited(tmp_path, edit))
    found = {batch: tuned.for_batch(batch).batch for batch in (0, 1, 7, 8, 31, 32, 500)}
    assert found == {0: 1, 1: 1, 7: 2, 8: 8, 31: 8, 32: 32, 500: 32}


@pytest.mark.parametrize("rows", [1, 2, 64, 1000])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("few_columns", [False, True])
def test_every_product_has_constants(rows: int, gated: bool, few_columns: bool) -> None:
    assert TUNED.for_one_row(gated=gated, few_columns=few_columns).gated is gated
    found = TUNED.for_few_rows(rows, gated=gated, few_columns=few_columns)
    assert found.rows in ROW_TILES


Edit = Callable[[dict[str, Any]], Any]
BROKEN: dict[str, tuple[Edit, str]] = {
    "a missing field": (lambda d: d.pop("device"), "device is missing"),
    "an unknown field": (lambda d: d.update(cpu=1), "cpu is not a field of this format"),
    "a field of another type": (
        lambda d: d["one_row"][1].update(gated=1),
        r"one_row\[1\]\.gated must be true or false, got 1",
    ),
    "an odd block": (
        lambda d: d["prefill"].update(BLOCK_N=48),
        r"prefill\.BLOCK_N must be a power of two of at least 16, got 48",
    ),
    "a block too small": (
        lambda d: d["few_rows"][3].update(DEPTH=32),
        r"few_rows\[3\]\.DEPTH must be a power of two of at least 64, got 32",
    ),
    "no stages": (
        lambda d: d["decode"][0].update(stages=0),
        r"decode\[0\]\.stages must be above 0, got 0",
    ),
    "no batch of 1": (lambda d: d["decode"].pop(0), "decode must ascend from batch 1 on"),
    "a missing case": (
        lambda d: d["few_rows"].pop(),
        "few_rows must have each of the 12 cases once",
    ),
    "a case twice": (
        lambda d: d["one_row"].append(d["one_row"][0]),
        "one_row must have each of the 4 cases once",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_names_the_file_and_broken_field(name: str, tmp_path: Path) -> None:
    edit, problem = BROKEN[name]
    with pytest.raises(TunedFileError, match=rf"tuned\.json: {problem}.*tune --write"):
        read_tuned(edited(tmp_path, edit))


SMALLEST = [
    *(("decode", name, least) for name, least in (("block", 16), ("warps", 1))),
    *(("prefill", name, least) for name, least in (("BLOCK_M", 16), ("BLOCK_N", 16), ("warps", 1))),
    *(("one_row", name, least) for name, least in (("COLUMNS", 1), ("warps", 1))),
    *(("few_rows", name, least) for name, least in (("COLUMNS", 16), ("DEPTH", 64), ("warps", 1))),
]


@pytest.mark.parametrize(("place", "name", "least"), SMALLEST)
def test_a_constant_may_be_as_small_as_the_kernels_accept(
    place: str, name: str, least: int, tmp_path: Path
) -> None:
    def put(value: int) -> Edit:
        return lambda d: (d[place] if place == "prefill" else d[place][0]).update({name: value})

    found = getattr(read_tuned(edited(tmp_path, put(least))), place)
    assert getattr(found if place == "prefill" else found[0], name) == least
    with pytest.raises(TunedFileError, match=f"{name} must be a power of two of at least {least},"):
        read_tuned(edited(tmp_path, put(least // 2)))


def test_a_missing_tuned_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TunedFileError, match=r"tuned\.json cannot be read: No such file"):
        read_tuned(tmp_path / "tuned.json")


def edited(folder: Path, edit: Edit) -> Path:
    data = json.loads(PATH.read_text(encoding="utf-8"))
    edit(data)
    path = folder / "tuned.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
