"""Paged attention for a live transformers model, added by `patch` and removed by `unpatch`.

No other module touches transformers' registries, hooks and instances. `patch` changes this on one
model, and `unpatch` restores it:

- The model gets its own copy of its config, which names our attention implementation.
- A pre-hook and a hook on the decoder open and close a step of a `PagedCache`.
- Mamba layers run in inference form (`mamba_forward`) while a step is open.
- `generate()` makes a `PagedCache` instead of a `DynamicCache`.

Weights, module classes and every other model stay as they are. The first `patch` adds our names to
two registries of transformers. They stay there, because copies of a patched model use them too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import GraniteMoeHybridForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from granite_paged.errors import (
    AlreadyPatched,
    GeometryError,
    InferenceOnly,
    InvalidRequest,
    NotPatched,
    PromptError,
    UnsupportedModel,
    check_token_range,
)
from granite_paged.geometry import ATTENTION_KINDS, Backend, CacheGeometry, PagedConfig
from granite_paged.hf.cache import CacheStep, PagedCache
from granite_paged.hf.compat import CACHE, rename_cache
from granite_paged.layers.attention import paged_attention
from granite_paged.layers.backend import kernel_refusal
from granite_paged.layers.mamba import MambaRows, MambaSizes, mamba_forward, mixers

BACKENDS: tuple[Backend, ...] = get_args(Backend)

_PATCH = "_granite_paged"
_PREPARE_CACHE = "_prepare_cache_for_generation"

FIRST_RESERVE = 2048
"""Most new tokens per row that `generate()` reserves pages for before its first step."""


@dataclass(frozen=True)
class _Patch:
    """State of a patched model, for `unpatch`."""

    paged_config: PagedConfig
    model_config: Any
    own_config: Any
    hooks: tuple[Any, ...]


def patch(model: Any, config: PagedConfig | None = None) -> None:
    """Make a model's attention paged, for inference, until `unpatch(model)`.

    Args:
        model: a `GraniteMoeHybridForCausalLM` on one device.
        config: page size, memory and so on; see `PagedConfig`.

    Raises:
        UnsupportedModel: for any other model, or one on several devices.
        GeometryError: for sizes that cannot be paged.
        AlreadyPatched: if the model is patched.
    """
    config = config or PagedConfig()
    _check_supported(model)
    if is_patched(model):
        raise AlreadyPatched("this model is patched already; call unpatch(model) first")
    CacheGeometry.from_config(model.config, page_size=config.page_size, dtype=model.dtype)
    _register()
    shared = model.config
    own = copy.deepcopy(shared)
    own._attn_implementation = _implementation(config.backend)
    _share_config(model, shared, own)
    hooks = (
        model.base_model.register_forward_pre_hook(_open_step, with_kwargs=True),
        model.base_model.register_forward_hook(_close_step, with_kwargs=True, always_call=True),
    )
    state = _Patch(config, shared, own, hooks)
    setattr(model.base_model, _PATCH, state)
    prepare = functools.partial(_prepare_cache, model, getattr(model, _PREPARE_CACHE), config)
    setattr(model, _PREPARE_CACHE, prepare)
    for mixer in mixers(model).values():
        mixer.forward = functools.partial(_forward_mamba, mixer, mixer.forward)


def unpatch(model: Any) -> None:
    """Undo `patch(model)`. The model's logits are bit-identical to those before.

    Raises:
        NotPatched: if the model is not patched.
    """
    if not is_patched(model):
        raise NotPatched("this model is not patched (or was unpatched already)")
    state: _Patch = getattr(model.base_model, _PATCH)
    for hook in state.hooks:
        hook.remove()
    _share_config(model, state.own_config, state.model_config)
    delattr(model, _PREPARE_CACHE)  # of the instance, which hid the method of the class
    delattr(model.base_model, _PATCH)
    for mixer in mixers(model).values():
        del mixer.forward


@contextlib.contextmanager
def paged(model: Any, config: PagedConfig | None = None) -> Iterator[Any]:
    """Patch a model on entry, and unpatch it on exit.

    For example::

        with paged(model, PagedConfig(page_size=128)):
            model.generate(**inputs, max_new_tokens=64)
    """
    patch(model, config)
    try:
        yield model
    finally:
        unpatch(model)


def is_patched(model: Any) -> bool:
    """Return whether this model is patched."""
    return hasattr(getattr(model, "base_model", None), _PATCH)


# -- what transformers calls --------------------------------------------------------------------


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    backend: Backend = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over a pool in a paged step, with SDPA in any other; transformers calls this.

    Args:
        module: the attention layer.
        query: [B, Hq, S, D].
        key, value: [1, Hkv, slots, D] in a paged step; original what another cache returned.
        attention_mask: a BlockMask in a paged step.
        scaling: of the scores.
        dropout: for SDPA.
        backend: how FlexAttention runs.

    Returns:
        [B, S, Hq, D], and None for the attention weights.
    """
    if not isinstance(attention_mask, BlockMask):
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    attended = paged_attention(query, key, value, attention_mask, scale=scaling, backend=backend)
    return attended.transpose(1, 2), None


def _forward_mamba(
    mixer: Any,
    original: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Replace a Mamba layer's `forward`: in a paged step, run it in inference form."""
    cache = kwargs.pop("cache_params", cache)  # the argument's name up to transformers 5.23
    if not isinstance(cache, PagedCache) or not cache.in_step:
        out: Tensor = original(hidden_states, cache, attention_mask, **kwargs)
        return out
    rows: MambaRows = cache.layers[mixer.layer_idx]
    state = rows.state(MambaSizes.of(mixer), len(hidden_states), hidden_states)
    step = cache.step
    forward, backend = mamba_forward, cache.config.backend
    device, dtype = hidden_states.device, hidden_states.dtype
    if not kernel_refusal(backend, device, dtype, activation=mixer.activation):
        from granite_paged.layers.triton import mamba  # needs Triton

        forward, state = mamba.mamba_forward, state._replace(rows=step.rows)
    return forward(mixer, hidden_states, step.since_start, state, step.columns.mask)


def _open_step(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Open a step before the decoder runs: allocate pages and pass the step's masks."""
    kwargs = {**dict(zip(_parameters(decoder.__class__), args, strict=False)), **kwargs}
    rename_cache(kwargs)
    _check_inference(decoder)
    state: _Patch = getattr(decoder, _PATCH)
    cache = kwargs.get(CACHE)
    if cache is None and _wants_cache(decoder, kwargs):
        cache = kwargs[CACHE] = PagedCache.for_model(decoder, state.paged_config)
    if isinstance(cache, PagedCache):
        _check_same_model(decoder, cache)
        batch, columns = _check_tokens(decoder, kwargs, cache)
        step = cache.begin_step(batch, columns, _plain_mask(kwargs))
        kwargs["attention_mask"] = _by_layer_kind(decoder, step)
    return (), kwargs


def _close_step(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Close the step after the decoder; `output` is None if the decoder raised."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, PagedCache) or not cache.in_step:
        return
    if output is None:
        cache.fail_step("a step of this cache failed before it ended")
    else:
        cache.end_step()


def _prepare_cache(
    model: Any,
    original: Any,
    config: PagedConfig,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Replace `generate()`'s method: make a PagedCache unless the user chose another cache."""
    user_cache = model_kwargs.get(CACHE) is not None
    dynamic = generation_config.cache_implementation in (None, "dynamic")
    if user_cache or not dynamic or generation_config.use_cache is False:
        original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    else:
        model_kwargs[CACHE] = PagedCache.for_model(model, config)
    cache = model_kwargs.get(CACHE)
    if isinstance(cache, PagedCache):
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache.reserve(_tokens_expected(model_kwargs, batch_size * copies, max_cache_length))


# -- details ------------------------------------------------------------------------------------


def _implementation(backend: Backend) -> str:
    """Return the name of our attention function in transformers' registries."""
    return f"granite_paged_{backend}"


def _register() -> None:
    for backend in BACKENDS:
        name = _implementation(backend)
        AttentionInterface.register(
            name, functools.partial(paged_attention_forward, backend=backend)
        )
        # Steps that are not paged need a mask function: without one, padding is lost silently.
        AttentionMaskInterface.register(name, sdpa_mask)


def _share_config(model: Any, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


@functools.cache
def _parameters(decoder_class: type) -> tuple[str, ...]:
    return tuple(inspect.signature(decoder_class.forward).parameters)[1:]  # type: ignore[attr-defined]


def _wants_cache(decoder: Any, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(decoder.config.use_cache if use_cache is None else use_cache)


def _check_supported(model: Any) -> None:
    if not isinstance(model, GraniteMoeHybridForCausalLM):
        raise UnsupportedModel(type(model).__name__)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise UnsupportedModel(f"a model on {', '.join(sorted(devices))} instead of one device")


def _check_inference(decoder: Any) -> None:
    if decoder.training:
        raise InferenceOnly("a patched model runs inference only: call model.eval(), or unpatch it")
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        raise InferenceOnly(
            "a patched model computes no gradients: run it under torch.inference_mode() or "
            "torch.no_grad(), or unpatch it"
        )


def _check_same_model(decoder: Any, cache: PagedCache) -> None:
    """Check that the cache was made for this model, once per config object and dtype."""
    config, dtype = decoder.config, decoder.dtype
    known_config, known_dtype = cache.checked_for
    fits = config is known_config and dtype == known_dtype
    if not fits:
        geometry = CacheGeometry.from_config(config, page_size=cache.config.page_size, dtype=dtype)
        fits = geometry == cache.geometry
    if not fits or decoder.device != cache.device:
        raise GeometryError(
            "this PagedCache was made for another model, dtype or device: "
            "make one with PagedCache.for_model(model)"
        )
    cache.checked_for = (config, dtype)


def _check_tokens(decoder: Any, kwargs: dict[str, Any], cache: PagedCache) -> tuple[int, int]:
    """Check the step's input, and return its numbers of rows and columns."""
    token_ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    tokens = token_ids if token_ids is not None else embeddings
    if tokens is None:
        raise PromptError("got neither input_ids nor inputs_embeds: pass one of them")
    if tokens.ndim != (2 if token_ids is not None else 3):
        raise InvalidRequest(
            "input_ids must be [batch, tokens] and inputs_embeds [batch, tokens, hidden], "
            f"got {list(tokens.shape)}"
        )
    batch, columns = tokens.shape[:2]
    prompt = columns > 1 or not cache.is_initialized  # sampled tokens are in the vocabulary
    if prompt and token_ids is not None and token_ids.numel():
        lowest, highest = token_ids.aminmax()
        check_token_range(int(lowest), int(highest), decoder.config.vocab_size)
    return batch, columns


def _plain_mask(kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    raise InvalidRequest("a paged step takes a 2-D attention_mask of zeros and ones, or None")


def _by_layer_kind(decoder: Any, step: CacheStep) -> dict[str, BlockMask | None]:
    """Return the step's masks as the model takes them; Mamba layers get theirs from the cache."""
    return {
        kind: step.block_mask if kind in ATTENTION_KINDS else None
        for kind in decoder.config.layers_block_type
    }


def _tokens_expected(model_kwargs: dict[str, Any], rows: int, columns: int) -> list[int]:
    """Estimate the tokens that each row of a `generate()` call will hold."""
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is not None:
        prompt, tokens = mask.shape[1], mask.count_nonzero(dim=1).tolist()
        if not all(tokens):
            raise PromptError(f"empty prompt: row {tokens.index(0)} is all padding")
    else:
        prompt = columns if positions is None else positions.shape[-1]
        tokens = [prompt] * rows
    new = min(max(columns - prompt, 0), FIRST_RESERVE)
    return [n + new for n in tokens]
