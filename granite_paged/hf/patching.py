"""Paged attention for a live transformers model, added by `patch` and removed by `unpatch`.

No other module touches transformers' registries, hooks and instances. `patch` changes this on one
model, and `unpatch` restores it:

- Attention layers get a copy of the config that names our attention implementation.
- A pre-hook and a hook on the decoder open and close a step of a `PagedCache`.
- Mamba layers run in inference form (`mamba_forward`) while a step is open.
- `generate()` makes a `PagedCache` instead of a `DynamicCache`.
- `set_attn_implementation()` refuses to run.
- In exact mode, norms, projections and MLPs run in exact form (`exact.py`).

All of these are attributes of instances, and each is put back to the object that was there. What
the user puts on top of ours while the model is patched stays; ours, below it, then does nothing.

Weights, module classes, the model's config and every other model stay as they are. The first
`patch` adds our names to a registry of transformers. They stay there, because copies of a patched
model use them too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import eager_attention_forward

from granite_paged.device import finite_rows
from granite_paged.errors import (
    AlreadyPatched,
    GeometryError,
    InferenceOnly,
    InvalidRequest,
    NonFinite,
    NotPatched,
    PromptError,
    check_token_range,
)
from granite_paged.geometry import ATTENTION_KINDS, Backend, CacheGeometry, PagedConfig
from granite_paged.hf import exact
from granite_paged.hf.cache import PagedCache
from granite_paged.hf.compat import CACHE, rename_cache
from granite_paged.hf.step import CacheStep, TokenPages
from granite_paged.layers.attention import paged_attention
from granite_paged.layers.backend import check_exact, kernel_refusal, warn_if_slow
from granite_paged.layers.mamba import Kept, MambaRows, MambaSizes, mamba_forward, mixers
from granite_paged.layers.modules import changed_operator, check_supported

BACKENDS: tuple[Backend, ...] = get_args(Backend)

_PATCH = "_granite_paged"
_PLAIN_ATTENTION = "_granite_paged_plain_attention"

FIRST_RESERVE = 2048
"""Most new tokens per row that `generate()` reserves pages for before its first step."""


@dataclass(frozen=True, eq=False)
class _Patch:
    """State of a patched model, for `unpatch`.

    Attributes:
        config: how to page.
        attention: the model's own attention implementation.
        hooks: handles of our hooks on the decoder.
        replaced: (instance, attribute, our value, {attribute: value before} or {} if absent).
    """

    config: PagedConfig
    attention: str
    hooks: list[Any] = field(default_factory=list)
    replaced: list[tuple[Any, str, Any, dict[str, Any]]] = field(default_factory=list)

    def put(self, owner: Any, name: str, ours: Any) -> None:
        """Set an attribute of one instance, and remember what the instance itself had there."""
        before = {key: value for key, value in vars(owner).items() if key == name}
        self.replaced.append((owner, name, ours, before))
        vars(owner)[name] = ours

    def undo(self) -> None:
        """Put back what was there, except below what was put on top of ours."""
        for hook in self.hooks:
            hook.remove()
        for owner, name, ours, before in self.replaced:
            if vars(owner).get(name) is ours:
                del vars(owner)[name]
                vars(owner).update(before)

    def is_active(self, model: Any) -> bool:
        """Return whether the model, or its decoder, is still patched by this."""
        return vars(model.base_model).get(_PATCH) is self


def patch(model: Any, config: PagedConfig | None = None) -> None:
    """Make a model's attention paged, for inference, until `unpatch(model)`.

    Args:
        model: a `GraniteMoeHybridForCausalLM` on one device.
        config: page size, memory and so on; see `PagedConfig`.

    Raises:
        UnsupportedModel: for any other model, or one on several devices.
        CannotBeExact: in exact mode, for a model that cannot be exact.
        GeometryError: for sizes that cannot be paged.
        AlreadyPatched: if the model is patched.
    """
    config = PagedConfig.checked(config)
    check_supported(model)
    if is_patched(model):
        raise AlreadyPatched("this model is patched already; call unpatch(model) first")
    CacheGeometry.from_config(model.config, page_size=config.page_size, dtype=model.dtype)
    if config.exact:
        check_exact(model, config.backend)
    _register()
    decoder, state = model.base_model, _Patch(config, model.config._attn_implementation)
    state.put(decoder, _PATCH, state)
    state.hooks.append(decoder.register_forward_pre_hook(_open_step, with_kwargs=True))
    state.hooks.append(
        decoder.register_forward_hook(_close_step, with_kwargs=True, always_call=True)
    )
    state.hooks.append(model.register_forward_hook(_check_logits, with_kwargs=True))
    paged_config = copy.copy(model.config)
    paged_config._attn_implementation = _implementation(config.backend)
    setattr(paged_config, _PLAIN_ATTENTION, state.attention)
    for layer in decoder.layers:
        if layer.self_attn is not None:
            state.put(layer.self_attn, "config", paged_config)
    if config.exact:
        state.hooks.append(model.register_forward_pre_hook(exact.check_unchanged))
        for module, forward in exact.forwards(model):
            state.put(module, "forward", forward)
    for mixer in mixers(model).values():
        state.put(mixer, "forward", functools.partial(_forward_mamba, mixer, mixer.forward))
    for owner, name, ours in (
        (model, "_prepare_cache_for_generation", _prepare_cache),
        (model, "set_attn_implementation", _set_attention),
        (decoder, "set_attn_implementation", _set_attention),
    ):
        state.put(owner, name, functools.partial(ours, owner, getattr(owner, name), state))


def unpatch(model: Any) -> None:
    """Undo `patch(model)`, and nothing else: the user's own changes stay.

    Where there are none, the model's logits are bit-identical to those before.

    Raises:
        NotPatched: if the model is not patched.
    """
    if not is_patched(model):
        raise NotPatched("this model is not patched (or was unpatched already)")
    getattr(model.base_model, _PATCH).undo()


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
    attention_mask: Tensor | CacheStep | None,
    scaling: float,
    *,
    backend: Backend = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend over a pool in a paged step, as the model otherwise does in any other.

    transformers calls this.

    Args:
        module: the attention layer.
        query: [B, Hq, S, D].
        key, value: [1, Hkv, slots, D] in a paged step; original what another cache returned.
        attention_mask: the step, if it is a paged one.
        scaling: of the scores.
        backend: how FlexAttention runs.
        kwargs: for a step that is not paged.

    Returns:
        [B, S, Hq, D], and None for the attention weights.
    """
    if isinstance(attention_mask, CacheStep):
        if attention_mask.tokens is not None:
            return exact.attention(query, key, value, attention_mask.tokens, scaling), None
        mask = attention_mask.block_mask
        attended = paged_attention(query, key, value, mask, scale=scaling, backend=backend)
        return attended.transpose(1, 2), None
    plain = getattr(module.config, _PLAIN_ATTENTION)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(plain, eager_attention_forward)
    out: tuple[Tensor, Tensor | None] = attend(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return out


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
    step = cache.step
    kept = Kept.CHUNK if isinstance(step.tokens, TokenPages) else Kept.NOTHING
    state = rows.state(MambaSizes.of(mixer), len(hidden_states), hidden_states, kept)
    forward, backend = mamba_forward, cache.config.backend
    device, dtype = hidden_states.device, hidden_states.dtype
    if step.tokens is not None:
        forward, state = exact.mamba, state._replace(rows=step.rows)
    elif changed := changed_operator(mixer):
        warn_if_slow(f"{changed}, so it is called", device, dtype)
    elif not kernel_refusal(backend, device, dtype, activation=mixer.activation):
        from granite_paged.layers.triton import mamba  # needs Triton

        forward, state = mamba.mamba_forward, state._replace(rows=step.rows)
    mixed: Tensor = forward(mixer, hidden_states, step.since_start, state, step.columns.mask)
    if mixer.layer_idx > cache.geometry.attention_layers[-1]:  # no K or V will show it
        _note(cache, f"Mamba layer {mixer.layer_idx}", mixed)
    return mixed


def _open_step(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Open a step before the decoder runs: allocate pages and pass the step's masks."""
    kwargs = {**dict(zip(_parameters(decoder.__class__), args, strict=False)), **kwargs}
    rename_cache(kwargs)
    _check_inference(decoder)
    state: _Patch = getattr(decoder, _PATCH)
    _check_attention(state.attention, decoder.config._attn_implementation)
    cache = kwargs.get(CACHE)
    if cache is None and _option(decoder, kwargs, "use_cache"):
        cache = kwargs[CACHE] = PagedCache.for_model(decoder, state.config)
    exact.check_step(decoder, cache, exact=state.config.exact)
    if isinstance(cache, PagedCache):
        _check_same_model(decoder, cache)
        if _option(decoder, kwargs, "output_attentions"):
            raise InvalidRequest(
                "a paged step computes no attention weights: leave out output_attentions, "
                "or unpatch the model"
            )
        if cache.config.exact and _option(decoder, kwargs, "output_router_logits"):
            raise InvalidRequest("exact mode gives no router logits: leave out the option")
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
        _note(cache, "the last norm, after the last layer", output[0])
        cache.end_step()


def _check_logits(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Refuse logits that are not finite, after a paged step. Waits for the device."""
    given = {**dict(zip(_parameters(model.__class__), args, strict=False)), **kwargs}
    rename_cache(given)
    cache = getattr(output, CACHE, given.get(CACHE))
    place = 0 if given.get("labels") is None else 1  # in a tuple, after the loss
    logits = output.logits if hasattr(output, "logits") else output[place]
    if not isinstance(cache, PagedCache) or not cache.config.check_finite:
        return
    if not finite_rows(logits.reshape(1, -1)):
        cache.fail_step("a step met NaN or infinity")
        raise NonFinite([], "the logits")


def _prepare_cache(
    model: Any,
    original: Any,
    state: _Patch,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Replace `generate()`'s method: make a PagedCache unless the user chose another cache."""
    user_cache = model_kwargs.get(CACHE) is not None
    dynamic = generation_config.cache_implementation in (None, "dynamic")
    uncached = not dynamic or generation_config.use_cache is False
    if user_cache or uncached or not state.is_active(model):
        original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    else:
        model_kwargs[CACHE] = PagedCache.for_model(model, state.config)
    cache = model_kwargs.get(CACHE)
    if isinstance(cache, PagedCache):
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache.reserve(_tokens_expected(model_kwargs, batch_size * copies, max_cache_length))


def _set_attention(
    model: Any, original: Any, state: _Patch, attn_implementation: Any, *args: Any, **kwargs: Any
) -> None:
    """Replace `set_attn_implementation`: refuse another implementation while patched."""
    if state.is_active(model):
        _check_attention(state.attention, attn_implementation)
    original(attn_implementation, *args, **kwargs)


# -- details ------------------------------------------------------------------------------------


def _implementation(backend: Backend) -> str:
    """Return the name of our attention function in transformers' registries."""
    return f"granite_paged_{backend}"


def _register() -> None:
    for backend in BACKENDS:
        forward = functools.partial(paged_attention_forward, backend=backend)
        AttentionInterface.register(_implementation(backend), forward)


@functools.cache
def _parameters(decoder_class: type) -> tuple[str, ...]:
    return tuple(inspect.signature(decoder_class.forward).parameters)[1:]  # type: ignore[attr-defined]


def _option(decoder: Any, kwargs: dict[str, Any], name: str) -> bool:
    """Return an option of a call, or the config's where the call does not say."""
    value = kwargs.get(name)
    return bool(getattr(decoder.config, name, False) if value is None else value)


def _check_attention(own: str, asked: Any) -> None:
    if asked != own:
        raise AlreadyPatched(
            f"the attention implementation of a patched model cannot become {asked!r}: "
            f"call unpatch(model) first, or keep {own!r}"
        )


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


def _note(cache: PagedCache, part: str, numbers: Tensor) -> None:
    """Let the step refuse NaN and infinity that no K or V shows."""
    if cache.config.check_finite:
        cache.step.finite[part] = finite_rows(numbers.reshape(1, -1))[0]


def _by_layer_kind(decoder: Any, step: CacheStep) -> dict[str, CacheStep | None]:
    """Return the step in place of masks; Mamba layers get it from the cache."""
    return {
        kind: step if kind in ATTENTION_KINDS else None for kind in decoder.config.layers_block_type
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
