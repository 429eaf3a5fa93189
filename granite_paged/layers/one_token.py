"""One token at a time: the same bits whatever else is computed, for exact mode on the CPU.

Libraries choose kernels, and the order of their sums, by shape. So a call that holds one token, in
fresh memory, gives the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_one_token(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Compute attention of one query over some tokens of a pool.

    Their K and V are copied to contiguous memory, in the order of `slots`. So shapes and strides
    depend on their number alone: not on the pages that hold them, on what else these pages hold,
    or on the size of the pool.

    Args:
        query: [1, Hq, 1, D].
        keys, values: [1, Hkv, slots of the pool, D], finite.
        slots: [n] int64, the tokens to attend to.
        scale: factor on the scores.

    Returns:
        [1, Hq, 1, D] in the query's dtype, computed in single precision at least.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    own_keys, own_values = (
        pool[0].index_select(1, slots)[None].to(dtype) for pool in (keys, values)
    )
    out = scaled_dot_product_attention(
        query.to(dtype).clone(memory_format=torch.contiguous_format),
        own_keys,
        own_values,
        scale=scale,
        enable_gqa=True,
    )
    return out.to(query.dtype)


class ExactForward:
    """A module's `forward` in exact mode: what `patch` puts there, and no user."""


class TokenByToken(ExactForward):
    """A module's `forward`, called for one token at a time."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Map [B, S, width] to [B, S, other width]."""
        tokens = torch.split(hidden_states.reshape(-1, 1, 1, hidden_states.shape[-1]), 1)
        out = torch.cat([self._forward(token[0].clone()) for token in tokens])
        return out.view(*hidden_states.shape[:-1], -1)


class RotaryByToken(ExactForward):
    """The `forward` of a rotary embedding, called for one position at a time."""

    def __init__(self, forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._forward = forward

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, S, D]. x: for its dtype; position_ids: [B, S]."""
        one = x[:1, :1].clone()
        pairs = [self._forward(one, each.view(1, 1).clone()) for each in position_ids.flatten()]
        cos, sin = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
        shape = (*position_ids.shape, -1)
        return cos.view(shape), sin.view(shape)
