"""Exact mode of a patched model. On the CPU its parts are called for one token at a time.

On a GPU they run the kernels of exact mode (`exact_kernels.py`). Sums and products of single
elements, such as residuals, round once and need no care. Everything else that a layer computes on
the CPU is called in shapes of one token, as `runner/exact_model.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from granite_paged.errors import CannotBeExact
from granite_paged.hf.cache import PagedCache
from granite_paged.hf.step import TokenPages, TokenSlots
from granite_paged.layers.backend import check_exact, uses_exact_kernels
from granite_paged.layers.mamba import MambaState, mamba_forward
from granite_paged.layers.one_token import RotaryByToken, TokenByToken, attend_one_token


def check_unchanged(module: Any, args: tuple[Any, ...]) -> None:
    """Raise CannotBeExact if the model, or its decoder, changed so that it cannot be exact."""
    check_exact(module, "auto")


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
    """Yield modules of a `GraniteMoeHybridForCausalLM`, and the exact `forward` of each."""
    if uses_exact_kernels(model.device):
        from granite_paged.hf import exact_kernels  # needs Triton

        yield from exact_kernels.forwards(model)
        return
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
    query: Tensor, keys: Tensor, values: Tensor, tokens: TokenSlots | TokenPages, scale: float
) -> Tensor:
    """Attend to the tokens of a step.

    Args:
        query: [B, Hq, S, D].
        keys, values: [1, Hkv, slots, D], the pool.
        tokens: what each token attends to.
        scale: factor on the scores.

    Returns:
        [B, S, Hq, D]; zeros for padding.
    """
    if isinstance(tokens, TokenPages):
        from granite_paged.hf import exact_kernels  # needs Triton

        return exact_kernels.attention(query, keys, values, tokens, scale)
    out = torch.zeros_like(query).transpose(1, 2)
    for row, column in tokens.tokens():
        one = query[row : row + 1, :, column : column + 1]
        slots = tokens.attended(row, column)
        attended = attend_one_token(one, keys, values, slots, scale)
        out[row, column] = attended.reshape(out.shape[2:])
    return out


def mamba(
    mixer: Any,
    hidden: Tensor,
    positions: Tensor,
    state: MambaState,
    mask: Tensor | None = None,
) -> Tensor:
    """Run a Mamba layer; see `mamba_forward`. Zeros before a row's first token."""
    if state.recent is not None:
        from granite_paged.hf import exact_kernels  # needs Triton

        return exact_kernels.mamba(mixer, hidden, positions, state, mask)
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
