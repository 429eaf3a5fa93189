"""Exact mode of a patched model, on the CPU: its parts are called for one token at a time.

Sums and products of single elements, such as residuals, round once and need no care. Everything
else that a layer computes is called in shapes of one token, as `runner/exact_model.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from granite_paged.errors import CannotBeExact
from granite_paged.geometry import Backend
from granite_paged.hf.cache import PagedCache
from granite_paged.hf.step import TokenSlots
from granite_paged.layers.backend import check_exact
from granite_paged.layers.mamba import MambaState, mamba_forward
from granite_paged.layers.one_token import RotaryByToken, TokenByToken, attend_one_token


def check_patchable(model: Any, backend: Backend = "auto") -> None:
    """Raise CannotBeExact for a model whose `generate()` cannot be exact."""
    check_exact(model, backend)
    if model.device.type != "cpu":
        raise CannotBeExact(f"generate() has no exact form on {model.device.type}, an Engine has")


def check_unchanged(module: Any, args: tuple[Any, ...]) -> None:
    """Raise CannotBeExact if the model, or its decoder, changed so that it cannot be exact."""
    check_patchable(module)


def check_step(decoder: Any, cache: Any, *, exact: bool) -> None:
    """Raise CannotBeExact for a step of which only a part would be exact.

    exact: whether the model was patched in exact mode.
    """
    cached = isinstance(cache, PagedCache) and cache.config.exact
    if exact and not cached:
        raise CannotBeExact("a step needs an exact PagedCache, not use_cache=False or another one")
    if cached and not exact:
        raise CannotBeExact("an exact PagedCache needs a model that was patched in exact mode")
    if exact:
        check_unchanged(decoder, ())


def forwards(model: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield modules of a `GraniteMoeHybridForCausalLM`, and the `forward` of each by tokens."""
    decoder = model.base_model
    for module in [model.lm_head, decoder.norm, *_parts(decoder)]:
        yield module, TokenByToken(module.forward)
    if decoder.rotary_emb is not None:
        yield decoder.rotary_emb, RotaryByToken(decoder.rotary_emb.forward)


def _parts(decoder: Any) -> Iterator[Any]:
    for layer in decoder.layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm, layer.shared_mlp)
        if layer.has_experts:
            yield layer.block_sparse_moe
        if layer.self_attn is not None:
            attention = layer.self_attn
            yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, tokens: TokenSlots, scale: float
) -> Tensor:
    """Attend token by token.

    Args:
        query: [B, Hq, S, D].
        keys, values: [1, Hkv, slots, D], the pool.
        tokens: what each token attends to.
        scale: factor on the scores.

    Returns:
        [B, S, Hq, D]; zeros for padding.
    """
    out = torch.zeros_like(query).transpose(1, 2)
    for row, column in tokens.tokens():
        one = query[row : row + 1, :, column : column + 1]
        slots = tokens.attended(row, column)
        out[row, column] = attend_one_token(one, keys, values, slots, scale)[0, :, 0]
    return out


def mamba(
    mixer: Any,
    hidden: Tensor,
    positions: Tensor,
    state: MambaState,
    mask: Tensor | None = None,
) -> Tensor:
    """Run a Mamba layer token by token; see `mamba_forward`. Zeros before a row's first token."""
    out = torch.zeros_like(hidden)
    for row, column in (positions >= 0).nonzero().tolist():
        at = (slice(row, row + 1), slice(column, column + 1))
        out[at] = mamba_forward(
            mixer,
            hidden[at].clone(),
            positions[at].clone(),
            state._replace(rows=torch.tensor([row])),
            None if mask is None else mask[at].clone(),
        )
    return out
