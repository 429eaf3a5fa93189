"""Exact mode of `generate()` by the kernels of a GPU, interpreted.

The interpreter's products follow the shape of a tile, so here values are compared, within float32's
bounds; `tests/gpu/test_exact.py` compares bits.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.errors import CannotBeExact
from granite_paged.hf import exact, step
from granite_paged.hf.compat import CACHE
from granite_paged.layers import backend
from granite_paged.layers.mamba import Kept, MambaSizes
from tests.helpers.exact_bits import generated_logits
from tests.helpers.tiny_models import prompts as padded_prompts
from tests.helpers.tiny_models import shortest_model, tiny_model
from tests.helpers.tolerance import assert_same_logits

pytest.importorskip("triton")

from granite_paged.hf import exact_kernels  # needs Triton

CONFIG = PagedConfig(page_size=16, max_tokens=1024, exact=True)
LENGTHS = (66, 3)  # the first crosses a chunk
DENSE: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["attention"]}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exact mode take its kernels, which a GPU has."""
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted here; tests/gpu runs them")
    for module in (backend, exact, step):
        monkeypatch.setattr(module, "uses_exact_kernels", lambda device: True)
    monkeypatch.setattr(backend, "triton_refusal", lambda model, backend: "")


def generated(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return generated_logits(model, ids, mask, CONFIG, 2)


def alone(model: Any, row: int) -> Tensor:
    ids, mask = padded_prompts(LENGTHS)
    length = LENGTHS[row]
    return generated(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:])[0]


def test_a_row_in_company_has_the_logits_that_it_has_alone() -> None:
    model = shortest_model()
    found = generated(model, *padded_prompts(LENGTHS))
    for row in range(len(LENGTHS)):
        assert_same_logits(found[row], alone(model, row))


@torch.inference_mode()
def test_decoded_and_prefilled_tokens_have_the_same_logits() -> None:
    model = shortest_model()
    ids = padded_prompts((68,))[0]
    with paged(model, CONFIG):
        whole = model(ids, use_cache=True).logits
        cache = PagedCache.for_model(model, CONFIG)
        pieces = ids.split([61, 1, 1, 1, 1, 3], dim=1)  # single tokens end a chunk of 64
        parts = [model(part, **{CACHE: cache}).logits for part in pieces]
    assert_same_logits(torch.cat(parts, dim=1)[0], whole[0])


@torch.inference_mode()
@pytest.mark.parametrize("flavour", ["hybrid", "dense"])
def test_logits_are_those_of_sdpa(flavour: str) -> None:
    model = shortest_model() if flavour == "hybrid" else tiny_model(flavour, **DENSE)
    ids = padded_prompts((21,))[0]
    expected = model(ids, use_cache=False).logits[0]
    with paged(model, CONFIG):
        assert_same_logits(model(ids, use_cache=True).logits[0], expected)


@torch.inference_mode()
def test_rows_that_are_reordered_keep_their_inputs() -> None:
    """As beam search does: row 0 continues what row 1 was."""
    model = shortest_model()
    ids, mask = padded_prompts((9, 5))
    with paged(model, CONFIG):
        cache = PagedCache.for_model(model, CONFIG)
        model(ids, attention_mask=mask, **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 1]))
        mask = torch.cat([mask[[1, 1]], torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        logits = model(torch.tensor([[7], [7]]), attention_mask=mask, **{CACHE: cache}).logits
    assert torch.equal(logits[0], logits[1])


@torch.inference_mode()
def test_tokens_that_a_mask_hides_are_refused() -> None:
    model = shortest_model()
    ids, shown = padded_prompts((9,))
    with paged(model, CONFIG):
        cache = PagedCache.for_model(model, CONFIG)
        model(ids, **{CACHE: cache})
        later = torch.cat([shown, shown[:, :5]], dim=1)
        later[0, 3] = 0
        with pytest.raises(CannotBeExact, match="hides have no exact kernel"):
            model(ids[:, :5], attention_mask=later, **{CACHE: cache})
        after = model(ids[:, :1], **{CACHE: cache}).logits
        untouched = PagedCache.for_model(model, CONFIG)
        model(ids, **{CACHE: untouched})
        assert torch.equal(after, model(ids[:, :1], **{CACHE: untouched}).logits)


def test_every_part_that_computes_runs_a_kernel() -> None:
    model = shortest_model()
    names = {module: name for name, module in model.named_modules()}
    found = {names[module] for module, _ in exact_kernels.forwards(model)}
    each = ("input_layernorm", "post_attention_layernorm", "shared_mlp")
    attention = (f"self_attn.{kind}_proj" for kind in "qkvo")
    expected = {"lm_head", "model.norm", *(f"model.layers.1.{part}" for part in attention)}
    assert found == expected | {f"model.layers.{n}.{part}" for n in (0, 1) for part in each}


@torch.inference_mode()
@pytest.mark.parametrize(("columns", "kind"), [(1, "_step"), (2, "_scan"), (3, "_scan")])
def test_a_mamba_layer_takes_a_step_for_one_token_and_gives_zeros_at_padding(
    columns: int, kind: str
) -> None:
    mixer = shortest_model().model.layers[0].mamba
    sizes, rows = MambaSizes.of(mixer), torch.arange(2)
    state = sizes.empty_state(2, torch.float32, rows.device, Kept.CHUNK)._replace(rows=rows)
    positions = torch.stack([torch.arange(columns), torch.full((columns,), -1)])
    hidden = torch.randn(2, columns, 48, generator=torch.Generator().manual_seed(0))
    kernel = getattr(exact_kernels, kind)
    with mock.patch.object(exact_kernels, kind, wraps=kernel) as taken:
        out = exact_kernels.mamba(mixer, hidden, positions, state)
    assert taken.call_count == 1
    assert out[0].all()
    assert not out[1].any()
