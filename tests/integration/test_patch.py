"""Unpatching restores everything that patching changes, and nothing else is touched."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeHybridForCausalLM,
)

from granite_paged import PagedCache, PagedConfig, is_patched, paged, patch, unpatch
from granite_paged.errors import (
    AlreadyPatched,
    GeometryError,
    InferenceOnly,
    NotPatched,
    UnsupportedModel,
)
from granite_paged.hf.compat import with_cache
from tests.helpers.tiny_models import cache_of, prompts, tiny_model

PAGES = PagedConfig(page_size=4)


@pytest.fixture
def model() -> Any:
    return tiny_model()


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    ids, mask = prompts()
    with torch.inference_mode():
        return model(ids, attention_mask=mask, **kwargs).logits


def test_unpatched_logits_are_bit_identical(model: Any) -> None:
    before = logits(model)
    with paged(model, PAGES):
        logits(model)
    assert torch.equal(logits(model), before)


def test_unpatching_restores_configs_and_hooks(model: Any) -> None:
    def state() -> tuple[Any, ...]:
        modules = [(name, id(module.config)) for name, module in model.named_modules()
                   if hasattr(module, "config")]  # fmt: skip
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return (
            modules,
            hooks,
            sorted(vars(model)),
            sorted(vars(model.model)),
        )

    before = state()
    patch(model, PAGES)
    assert state() != before
    unpatch(model)
    assert state() == before


def test_unpatching_restores_the_forward_of_mamba_layers(model: Any) -> None:
    mixers = [layer.mamba for layer in model.model.layers if layer.mamba is not None]
    with paged(model):
        assert all("forward" in vars(mixer) for mixer in mixers)
    assert not any("forward" in vars(mixer) for mixer in mixers)


def test_weights_are_untouched(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with paged(model, PAGES):
        logits(model)
        model.generate(prompts((9,))[0], max_new_tokens=3)
        during = model.state_dict()
        assert during.keys() == before.keys()
        assert all(torch.equal(during[name], tensor) for name, tensor in before.items())


def test_a_model_that_shares_the_config_is_untouched(model: Any) -> None:
    torch.manual_seed(1)
    other = GraniteMoeHybridForCausalLM(model.config).eval()
    before = logits(other)
    with paged(model, PAGES):
        out = other.generate(prompts((9,))[0], max_new_tokens=2, return_dict_in_generate=True)
        assert type(cache_of(out)) is DynamicCache
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(logits(other), before)


def test_two_models_are_patched_independently(model: Any) -> None:
    other = tiny_model(seed=1)
    with paged(model, PAGES):
        patch(other, PAGES)
        unpatch(other)
        assert is_patched(model)
        assert not is_patched(other)
        out = model.generate(prompts((9,))[0], max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(cache_of(out), PagedCache)


def test_a_forward_pass_without_a_cache_makes_a_paged_one(model: Any) -> None:
    expected = logits(model)
    with paged(model, PAGES):
        ids, mask = prompts()
        with torch.inference_mode():
            out = model(ids, attention_mask=mask)
    assert isinstance(cache_of(out), PagedCache)
    token = mask.bool()
    torch.testing.assert_close(out.logits[token], expected[token])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_decoder_receives_the_cache_under_either_name(model: Any, name: str) -> None:
    """transformers 5.24 renamed it, and its decorators run only after our hook."""
    ids, _ = prompts((9,))
    with paged(model, PAGES), torch.inference_mode():
        own = PagedCache.for_model(model, PAGES)
        by_name = model.base_model(ids, **{name: own}).last_hidden_state
        assert own.get_seq_length() == 9
        own = PagedCache.for_model(model, PAGES)
        in_place = model.base_model(ids, None, None, own).last_hidden_state
        assert own.get_seq_length() == 9
    assert torch.equal(by_name, in_place)


@pytest.mark.parametrize("cache", ["none", "dynamic"])
def test_a_patched_model_without_a_paged_cache_is_unchanged(model: Any, cache: str) -> None:
    def run() -> torch.Tensor:
        own = DynamicCache(config=model.config) if cache == "dynamic" else None
        return logits(model, **with_cache(own), use_cache=cache == "dynamic")

    expected = run()
    with paged(model, PAGES):
        assert torch.equal(run(), expected)


def test_a_patched_model_can_be_copied(model: Any) -> None:
    ids = prompts((9,))[0]
    with paged(model, PAGES):
        twin = copy.deepcopy(model)
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    out = twin.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(cache_of(out), PagedCache)
    assert out.sequences.tolist() == expected.tolist()


def test_importing_the_package_has_no_side_effects() -> None:
    code = (
        "import sys, granite_paged\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "from granite_paged import patch\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry\n"
        "assert not [name for name in registry if 'granite' in name]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


# -- refusals -----------------------------------------------------------------------------------


def test_another_architecture_is_refused_by_name() -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        patch(GPT2LMHeadModel(config))


def test_a_model_without_attention_is_refused() -> None:
    model = tiny_model(layer_types=["mamba"] * 4)
    with pytest.raises(GeometryError, match="no attention layer"):
        patch(model)
    assert not is_patched(model)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM(tiny_model().config)
    with pytest.raises(UnsupportedModel, match="meta"):
        patch(model)


def test_patching_twice_is_refused(model: Any) -> None:
    with paged(model, PAGES):
        with pytest.raises(AlreadyPatched):
            patch(model)
        assert is_patched(model)


def test_unpatching_twice_is_refused(model: Any) -> None:
    patch(model, PAGES)
    unpatch(model)
    with pytest.raises(NotPatched, match="already"):
        unpatch(model)


def test_an_exception_in_the_context_still_unpatches(model: Any) -> None:
    with pytest.raises(KeyError), paged(model, PAGES):
        raise KeyError
    assert not is_patched(model)


def test_training_mode_is_refused(model: Any) -> None:
    with paged(model.train(), PAGES), pytest.raises(InferenceOnly, match=r"eval\(\)"):
        model(prompts((9,))[0])


def test_gradients_are_refused(model: Any) -> None:
    with paged(model, PAGES), pytest.raises(InferenceOnly, match="no_grad"):
        model(prompts((9,))[0])


def test_frozen_weights_need_no_context_manager(model: Any) -> None:
    model.requires_grad_(False)
    with paged(model, PAGES):
        assert model(prompts((9,))[0]).logits.isfinite().all()
