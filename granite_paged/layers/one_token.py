"""Attention of one token over its sequence, the same to the bit wherever the pages lie."""

from __future__ import annotations

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
        query.to(dtype).contiguous(), own_keys, own_values, scale=scale, enable_gqa=True
    )
    return out.to(query.dtype)
