"""The oracle: causal attention from its formula, in float64, one sequence at a time.

softmax(q k^T * scale) v over keys at or before the query's position (Vaswani et al. 2017, eq. 1).
Imports nothing of the package under test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float) -> Tensor:
    """Attend from the query tokens `first, first + 1, ...` of one sequence to all its keys.

    query [Hq, S, D]; keys, values [Hkv, n, D] with n >= first + S. Returns [Hq, S, D] float64.
    """
    group = query.shape[0] // keys.shape[0]
    q, k, v = query.double(), keys.double(), values.double()
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    at = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
    visible = torch.arange(k.shape[1], device=q.device)[None] <= at
    scores = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1) @ v


def sdpa(query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float) -> Tensor:
    """Compute the same by PyTorch's SDPA in the inputs' dtype, to know its error."""
    group = query.shape[0] // keys.shape[0]
    k, v = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    at = torch.arange(first, first + query.shape[1], device=query.device)[:, None]
    visible = torch.arange(k.shape[1], device=query.device)[None] <= at
    out = torch.nn.functional.scaled_dot_product_attention(
        query[None], k[None], v[None], attn_mask=visible, scale=scale
    )
    return out[0]
