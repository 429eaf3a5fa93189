"""Sizes are read from the model's config and validated once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GraniteMoeHybridConfig, LlamaConfig

from granite_paged.errors import GeometryError, UnsupportedModel
from granite_paged.geometry import CacheGeometry, PagedConfig, bucket
from tests.helpers.strategies import make_geometry
from tests.helpers.tiny_models import SIZES


def from_config(**sizes: object) -> CacheGeometry:
    config = GraniteMoeHybridConfig(**{**SIZES, **sizes})
    return CacheGeometry.from_config(config, page_size=16, dtype=torch.bfloat16)


# -- PagedConfig --------------------------------------------------------------------------------


def test_no_config_means_the_documented_defaults() -> None:
    assert PagedConfig.checked(None) == PagedConfig(
        page_size=128,
        memory_fraction=0.5,
        max_tokens=None,
        max_sequences=None,
        chunk_tokens=2048,
        backend="auto",
        check_finite=True,
        exact=False,
    )


def test_a_config_of_another_type_is_refused() -> None:
    assert PagedConfig.checked(PagedConfig(page_size=16)).page_size == 16
    with pytest.raises(GeometryError, match="config"):
        PagedConfig.checked({"page_size": 16})


def test_the_bounds_of_each_field_are_valid() -> None:
    least = PagedConfig(page_size=1, max_tokens=1, max_sequences=1, chunk_tokens=16)
    assert (least.max_tokens, least.max_sequences, least.chunk_tokens) == (1, 1, 16)
    assert PagedConfig(memory_fraction=1).memory_fraction == 1


@pytest.mark.parametrize("page_size", [1, 2, 16, 1024])
def test_every_power_of_two_is_a_valid_page_size(page_size: int) -> None:
    assert PagedConfig(page_size=page_size).page_size == page_size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("page_size", size) for size in (0, -1, -16, 3, 12, 96, 100, None)],
        *[(name, value) for name in ("check_finite", "exact") for value in (1, "yes", None)],
        *[("chunk_tokens", tokens) for tokens in (0, 8, 15, 17, 24, 48, 1000, None)],
        *[("memory_fraction", part) for part in (0.0, -0.1, 1.01, float("nan"), float("inf"))],
        *[("max_tokens", tokens) for tokens in (0, -1, 127)],
        *[("max_sequences", rows) for rows in (0, -1)],
        *[("backend", name) for name in ("", "Eager", "triton", None)],
    ],
)
def test_an_invalid_value_is_refused_with_its_field(field: str, value: object) -> None:
    with pytest.raises(GeometryError, match=field):
        PagedConfig(**{field: value})


def test_max_tokens_may_be_one_page() -> None:
    assert PagedConfig(page_size=128, max_tokens=128).max_tokens == 128


@pytest.mark.parametrize(
    ("sizes", "field"), [(PagedConfig(), "page_size"), (make_geometry(), "head_dim")]
)
def test_validated_sizes_are_frozen(sizes: object, field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(sizes, field, 3)


# -- CacheGeometry, from a model's config ---------------------------------------------------------


def test_a_hybrid_config_gives_its_layers_and_heads() -> None:
    assert from_config() == CacheGeometry(
        page_size=16,
        attention_layers=(1, 3),
        mamba_layers=(0, 2),
        query_heads=6,
        kv_heads=2,
        head_dim=8,
        dtype=torch.bfloat16,
    )


class RawConfig:
    """A config as older or newer checkpoints have it."""

    model_type = "granitemoehybrid"
    num_attention_heads = 6
    num_key_value_heads = 2
    hidden_size = 48

    def __init__(self, kinds: list[str], **more: object) -> None:
        self.layers_block_type = kinds
        vars(self).update(more)


def from_raw(*kinds: str, **more: object) -> CacheGeometry:
    config = RawConfig(list(kinds), **more)
    return CacheGeometry.from_config(config, page_size=16, dtype=torch.float32)


@pytest.mark.parametrize(
    "kinds", [("mamba", "attention"), ("linear_attention", "full_attention")], ids=str
)
def test_layer_kinds_are_read_under_old_and_new_names(kinds: tuple[str, str]) -> None:
    geometry = from_raw(*kinds)
    assert (geometry.mamba_layers, geometry.attention_layers) == ((0,), (1,))


def test_an_explicit_head_dim_is_used() -> None:
    assert from_raw("attention", head_dim=96).head_dim == 96


@pytest.mark.parametrize("absent", [{}, {"head_dim": None}], ids=["missing", "none"])
def test_head_dim_defaults_to_hidden_size_over_heads(absent: dict[str, None]) -> None:
    assert from_raw("attention", **absent).head_dim == 8


def test_an_unknown_layer_kind_is_refused_by_name() -> None:
    with pytest.raises(GeometryError, match="sliding_window"):
        from_raw("attention", "sliding_window")


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(GeometryError, match="no attention layer"):
        from_raw("mamba", "mamba")


def test_another_model_type_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="llama"):
        CacheGeometry.from_config(LlamaConfig(), page_size=16, dtype=torch.float32)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(6, 4), (2, 4), (6, 0), (6, -2), (0, 2)])
def test_query_heads_must_divide_by_kv_heads(query_heads: int, kv_heads: int) -> None:
    with pytest.raises(GeometryError, match=f"{query_heads} query heads"):
        dataclasses.replace(make_geometry(), query_heads=query_heads, kv_heads=kv_heads)


def test_one_head_of_each_kind_is_enough() -> None:
    assert dataclasses.replace(make_geometry(), query_heads=1, kv_heads=1).group == 1


def test_a_page_holds_a_token() -> None:
    assert make_geometry(page_size=1).pages_for(3) == 3
    with pytest.raises(GeometryError, match="page_size"):
        make_geometry(page_size=0)


# -- derived sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "pages"),
    [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (2**40 + 1, 2**36 + 1)],
)
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert make_geometry(page_size=16).pages_for(tokens) == pages


def test_a_bucket_is_a_power_of_two_by_default() -> None:
    assert [bucket(count) for count in range(10)] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 16]


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_bucket_is_slightly_larger_than_its_count(steps: int) -> None:
    for count in range(1, 5000):
        size = bucket(count, steps=steps)
        assert count <= size < count + max(1, count / steps), f"{size} for {count}"
        assert bucket(size, steps=steps) == size
    assert len({bucket(count, steps=steps) for count in range(1025, 2049)}) == steps


@pytest.mark.parametrize(
    ("dtype", "itemsize"),
    [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)],
)
def test_bytes_per_token_count_every_attention_layer(dtype, itemsize) -> None:
    geometry = dataclasses.replace(
        make_geometry(page_size=32, kv_heads=4, head_dim=64, dtype=dtype),
        attention_layers=(5, 15, 25, 35),
    )
    assert geometry.bytes_per_token == 2 * 4 * 4 * 64 * itemsize
    assert geometry.bytes_per_page == 32 * geometry.bytes_per_token


def test_group_is_query_heads_over_kv_heads() -> None:
    assert make_geometry(group=5, kv_heads=3).group == 5
