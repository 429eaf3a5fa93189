"""Exact mode of `generate()` under `paged()`: the bits of a row do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged import Engine, PagedCache, PagedConfig, SamplingParams, paged
from granite_paged.errors import CannotBeExact, InvalidRequest
from granite_paged.hf import exact
from granite_paged.hf.compat import CACHE
from granite_paged.layers.logprobs import log_probabilities
from granite_paged.layers.mamba import MambaSizes
from granite_paged.layers.modules import changed_part
from tests.helpers.exact_bits import generated_logits
from tests.helpers.tiny_models import FLAVOURS, tiny_model
from tests.helpers.tiny_models import prompts as padded_prompts
from tests.helpers.tolerance import assert_same_logits

CONFIG = PagedConfig(page_size=16, max_tokens=1024, exact=True)
INEXACT = PagedConfig(page_size=16, max_tokens=1024)
LENGTHS = (21, 1, 16, 8)


def generated(model: Any, ids: Tensor, mask: Tensor, config: PagedConfig = CONFIG) -> Any:
    return generated_logits(model, ids, mask, config, 6)


def alone(model: Any, row: int, config: PagedConfig = CONFIG) -> Tensor:
    ids, mask = padded_prompts(LENGTHS)
    length = LENGTHS[row]
    return generated(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:], config)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_row_has_the_bits_that_it_has_alone(flavour: str, dtype: torch.dtype) -> None:
    model = tiny_model(flavour).to(dtype)
    if flavour == "experts":
        model.set_experts_implementation("eager")  # the grouped kernel does not support float64
    found = generated(model, *padded_prompts(LENGTHS))
    for row in range(len(LENGTHS)):
        assert torch.equal(found[row], alone(model, row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_differ_without_exact_mode(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    found = generated(model, *padded_prompts(LENGTHS), INEXACT)
    assert not all(torch.equal(found[row], alone(model, row, INEXACT)) for row in range(4))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bits_are_those_of_an_engine(flavour: str) -> None:
    model = tiny_model(flavour)
    ids, _ = padded_prompts(LENGTHS)
    logits = alone(model, 0)
    params = SamplingParams(max_new_tokens=6, stop_tokens=(), logprobs=0)
    with Engine(model, config=CONFIG) as engine:
        (output,) = engine.generate(ids[0].tolist(), params)
    chosen = log_probabilities(logits).gather(1, torch.tensor(output.tokens)[:, None])[:, 0]
    assert output.tokens == logits.argmax(-1).tolist()
    assert [one.logprob for one in output.logprobs or ()] == chosen.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_logits_are_those_of_sdpa(flavour: str) -> None:
    model, ids = tiny_model(flavour), padded_prompts((21,))[0]
    expected = model(ids, use_cache=False).logits[0]
    with paged(model, CONFIG):
        assert_same_logits(model(ids, use_cache=True).logits[0], expected)


@torch.inference_mode()
def test_a_prompt_in_several_calls_has_the_bits_of_one_call() -> None:
    model = tiny_model()
    ids = padded_prompts((21,))[0]
    with paged(model, CONFIG):
        whole = model(ids, use_cache=True).logits
        cache = PagedCache.for_model(model, CONFIG)
        parts = [model(part, **{CACHE: cache}).logits for part in ids.split(8, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@torch.inference_mode()
def test_a_row_whose_mask_hides_tokens_has_the_bits_that_it_has_alone() -> None:
    """A later turn may hide tokens that a finished row was fed; other rows see all of theirs."""
    model, (ids, _) = tiny_model("rotary"), padded_prompts((21, 21))
    positions = torch.arange(21).expand(2, -1)
    shown = torch.ones_like(ids)
    shown[0, 3:6] = 0

    def last(rows: slice) -> Tensor:
        cache = PagedCache.for_model(model, CONFIG)
        model(ids[rows, :20], position_ids=positions[rows, :20], **{CACHE: cache})
        return model(
            ids[rows, 20:],
            position_ids=positions[rows, 20:],
            attention_mask=shown[rows],
            **{CACHE: cache},
        ).logits

    with paged(model, CONFIG):
        both = last(slice(0, 2))
        assert torch.equal(both, torch.cat([last(slice(0, 1)), last(slice(1, 2))]))
        shown[0] = 1
        assert not torch.equal(both[0], last(slice(0, 1))[0])


def test_unpatching_restores_the_bits_and_the_modules() -> None:
    model = tiny_model()
    ids = padded_prompts((21,))[0]
    with torch.inference_mode():
        before = model(ids).logits
        with paged(model, CONFIG):
            model(ids, use_cache=True)
            assert changed_part(model) == "", "our own forwards are no change"
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not any("forward" in vars(module) for module in model.modules())


# -- what is refused ----------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({CACHE: "dynamic"}, "exact PagedCache"),
        ({CACHE: "inexact"}, "exact PagedCache"),
    ],
)
def test_a_step_that_would_not_be_exact_is_refused(how: dict[str, Any], reason: str) -> None:
    from transformers import DynamicCache  # noqa: PLC0415

    model = tiny_model()
    made = {"dynamic": DynamicCache(config=model.config), "inexact": PagedCache.for_model(model)}
    how = {name: made.get(value, value) for name, value in how.items()}
    with paged(model, CONFIG), pytest.raises(CannotBeExact, match=reason):
        model(padded_prompts()[0], **how)


@torch.inference_mode()
def test_an_exact_cache_on_a_model_that_is_not_is_refused() -> None:
    model = tiny_model()
    cache = PagedCache.for_model(model, CONFIG)
    with paged(model), pytest.raises(CannotBeExact, match="patched in exact mode"):
        model(padded_prompts()[0], **{CACHE: cache})


@torch.inference_mode()
def test_router_logits_are_refused() -> None:
    model = tiny_model("experts")
    with paged(model, CONFIG), pytest.raises(InvalidRequest, match="router"):
        model(padded_prompts()[0], use_cache=True, output_router_logits=True)


@torch.inference_mode()
@pytest.mark.parametrize("part", ["lm_head", "model.norm", "model.layers.1.self_attn.q_proj"])
def test_a_module_that_changes_is_refused(part: str) -> None:
    model = tiny_model()
    ids = padded_prompts()[0]

    def hooked() -> Callable[[], None]:
        return model.get_submodule(part).register_forward_hook(lambda *_: None).remove

    remove = hooked()
    with pytest.raises(CannotBeExact, match=f"{part} has a hook"), paged(model, CONFIG):
        pass
    remove()
    with paged(model, CONFIG):
        model(ids, use_cache=True)
        remove = hooked()
        with pytest.raises(CannotBeExact, match=f"{part} has a hook"):
            model(ids, use_cache=True)
        remove()
        model(ids, use_cache=True)


@torch.inference_mode()
def test_a_decoder_that_changes_is_refused_when_it_is_called_by_itself() -> None:
    model, ids = tiny_model(), padded_prompts()[0]
    with paged(model, CONFIG):
        model.model(ids, use_cache=True)
        hook = model.model.norm.register_forward_hook(lambda *_: None)
        with pytest.raises(CannotBeExact, match="norm has a hook"):
            model.model(ids, use_cache=True)
        hook.remove()


@torch.inference_mode()
def test_a_mamba_layer_gives_zeros_at_padding() -> None:
    mixer = tiny_model().model.layers[0].mamba
    mixer.conv1d.bias.fill_(1)  # without inputs, a convolution gives its bias
    state = MambaSizes.of(mixer).empty_state(1, torch.float32, torch.device("cpu"))
    hidden = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0))
    out = exact.mamba(mixer, hidden, torch.tensor([[-1, 0, 1]]), state)
    assert out[0, 1:].all()
    assert not out[0, 0].any()
