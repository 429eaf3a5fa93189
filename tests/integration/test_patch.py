"""Unpatching restores everything that patching changes, and nothing else is touched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
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
    InvalidRequest,
    NotPatched,
    UnsupportedModel,
)
from granite_paged.hf.compat import with_cache
from granite_paged.layers.mamba import mixers
from tests.helpers.tiny_models import PAD, VOCABULARY, cache_of, prompts, tiny_model
from tests.helpers.tolerance import assert_same_logits, largest_error

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


def put(owner: str, name: str) -> Callable[[Any], Any]:
    """Put a method on one instance, over the one that is there, as accelerate does."""

    def add(model: Any) -> None:
        module = model.get_submodule(owner)
        inner = getattr(module, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        setattr(module, name, outer)

    return add


def hook(owner: str, register: str) -> Callable[[Any], Any]:
    return lambda model: getattr(model.get_submodule(owner), register)(lambda *args: None)


def edit_configs(model: Any) -> None:
    model.config.edited = object()
    model.generation_config.edited = object()


def replace_mamba_layer(model: Any) -> None:
    old, layer = model.model.layers[2].mamba, model.model.layers[2]
    layer.mamba = type(old)(model.config, 2).requires_grad_(False).eval()
    layer.mamba.load_state_dict(old.state_dict())


ADDITIONS: dict[str, Callable[[Any], Any]] = {
    "cache method": put("", "_prepare_cache_for_generation"),
    "attention method": put("", "set_attn_implementation"),
    "attention method of the decoder": put("model", "set_attn_implementation"),
    "forward of the model": put("", "forward"),
    "forward of the decoder": put("model", "forward"),
    "forward of a layer": put("model.layers.2", "forward"),
    "forward of a Mamba layer": put("model.layers.0.mamba", "forward"),
    "forward of an attention layer": put("model.layers.1.self_attn", "forward"),
    "hook of the decoder": hook("model", "register_forward_hook"),
    "pre-hook of the decoder": hook("model", "register_forward_pre_hook"),
    "pre-hook of a Mamba layer": hook("model.layers.0.mamba", "register_forward_pre_hook"),
    "config edits": edit_configs,
    "resized embeddings": lambda model: model.resize_token_embeddings(VOCABULARY + 8),
    "another Mamba layer": replace_mamba_layer,
}


def contents(model: Any) -> dict[tuple[str, Any], Any]:
    """Return every attribute, submodule and hook of every module, and every setting."""
    members: dict[str, dict[Any, Any]] = {
        "config": vars(model.config),
        "generation_config": vars(model.generation_config),
    }
    for path, module in model.named_modules():
        hooks = {**module._forward_hooks, **module._forward_pre_hooks}
        members[path] = {**vars(module), **module._modules, **hooks}
    return {(path, name): value for path, own in members.items() for name, value in own.items()}


@settings(max_examples=15)
@given(
    before=st.lists(st.sampled_from(list(ADDITIONS)), max_size=4),
    during=st.lists(st.sampled_from(list(ADDITIONS)), max_size=4),
)
@example(before=list(ADDITIONS), during=[])
@example(before=[], during=list(ADDITIONS))
@example(before=list(ADDITIONS), during=list(ADDITIONS))
def test_unpatching_restores_the_same_objects(before: list[str], during: list[str]) -> None:
    """What was there before is there after, and what the user added while patched stays."""
    model, ids = tiny_model().requires_grad_(False), prompts((9,))[0]

    def answer() -> Any:
        return model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=PAD)

    for kind in before:
        ADDITIONS[kind](model)
    answer()
    untouched = contents(model)
    patch(model, PAGES)
    assert isinstance(cache_of(answer()), PagedCache)
    patched = contents(model)
    for kind in during:
        ADDITIONS[kind](model)
    edited = contents(model)
    unpatch(model)
    actual = contents(model)
    expected = {place: untouched[place] for place in untouched if place in edited} | {
        place: value
        for place, value in edited.items()
        if place not in patched or patched[place] is not value
    }
    assert set(actual) == set(expected)
    assert [place for place, value in actual.items() if value is not expected[place]] == []
    plain = answer()
    assert type(cache_of(plain)) is DynamicCache
    with paged(model, PAGES):
        again = answer()
    assert isinstance(cache_of(again), PagedCache)
    assert again.sequences.tolist() == plain.sequences.tolist()


def test_hooks_of_accelerate_run_again_after_unpatching(model: Any) -> None:
    """accelerate PR #1971: its hooks replace the forward of the instance."""
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Count(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    mixer = model.model.layers[0].mamba
    hooks.add_hook_to_module(mixer, Count())
    with paged(model, PAGES):
        logits(model)
    logits(model)
    assert calls == [mixer]


def test_a_mamba_layer_that_lost_its_paged_forward_is_refused(model: Any) -> None:
    """Its own forward would read our states in another layout."""
    model.requires_grad_(False)
    with paged(model, PAGES):
        del model.model.layers[0].mamba.forward
        with pytest.raises(NotPatched, match="layer 0"):
            logits(model)


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_another_attention_is_refused_while_patched(model: Any, part: str) -> None:
    owner, expected = model if part == "model" else model.model, logits(model)
    with paged(model, PAGES):
        with pytest.raises(AlreadyPatched, match=r"'eager'.*unpatch\(model\)"):
            owner.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model), expected)
    owner.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_an_edited_attention_is_refused_while_patched(model: Any) -> None:
    with paged(model, PAGES):
        model.config._attn_implementation = "eager"
        with pytest.raises(AlreadyPatched, match="'eager'"):
            logits(model)
        model.config._attn_implementation = "sdpa"
        logits(model)
        model.config._attn_implementation = "eager"
    assert model.config._attn_implementation == "eager", "an edit by the user must survive"


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["paged", "without a cache"])
def test_every_attention_of_transformers_can_be_patched(attention: str, options: Any) -> None:
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation(attention)
    token = prompts()[1].bool()
    expected = logits(model, use_cache=False)[token]
    with paged(model, PAGES):
        torch.testing.assert_close(logits(model, **options)[token], expected)
        assert model.config._attn_implementation == attention
    assert torch.equal(logits(model, use_cache=False)[token], expected)


def test_attention_weights_are_refused(model: Any) -> None:
    model.set_attn_implementation("eager")
    with paged(model, PAGES), pytest.raises(InvalidRequest, match="attention weights"):
        logits(model, output_attentions=True)


def test_unpatching_a_copy_leaves_the_model_patched(model: Any) -> None:
    untouched = {place for place, _ in contents(model).items()}
    with paged(model, PAGES):
        twin = copy.deepcopy(model)
        unpatch(twin)
        assert is_patched(model)
        assert set(contents(twin)) == untouched
        out = twin.generate(prompts((9,))[0], max_new_tokens=2, return_dict_in_generate=True)
        assert type(cache_of(out)) is DynamicCache


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


def test_left_padding_stays_out_of_states_with_a_projection_bias() -> None:
    """In transformers, padding is zero before a Mamba layer's projection and its bias after it."""
    model = tiny_model(mamba_proj_bias=True)
    for mixer in mixers(model).values():
        torch.nn.init.normal_(mixer.in_proj.bias)
    ids, mask = prompts((21, 19, 8))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": True}
    with paged(model, PagedConfig(page_size=16)):
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    fed, width = out.sequences[:, :-1], ids.shape[1]
    for row, tokens in enumerate(mask.sum(dim=1).tolist()):
        with torch.inference_mode():
            alone = model(fed[row : row + 1, width - tokens :]).logits[0, tokens - 1 :]
        ours = torch.stack([logits[row] for logits in out.logits])
        assert_same_logits(ours, alone)
    with torch.inference_mode():
        padded = model(ids[2:], attention_mask=mask[2:]).logits[0, -1]
    assert largest_error(padded, out.logits[0][2]) > 1e-3  # so transformers' padding does count
