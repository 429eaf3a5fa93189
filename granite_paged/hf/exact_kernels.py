"""Exact mode of a patched model on a GPU: its parts run the Triton kernels of exact mode.

The bits are not those of an engine: transformers rounds a residual twice, the engine's kernels
once. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from granite_paged.errors import CannotBeExact
from granite_paged.hf.step import TokenPages
from granite_paged.layers.mamba import MambaSizes, MambaState, ScanWeights, norm_groups
from granite_paged.layers.one_token import ExactForward
from granite_paged.layers.triton import exact_attention, exact_scan, exact_step
from granite_paged.layers.triton.exact_linear import gated_product, product
from granite_paged.layers.triton.pointwise import rms_norm


class ByKernel(ExactForward):
    """A module's `forward`, computed by a function of the module and its input [rows, width]."""

    def __init__(self, module: nn.Module, compute: Callable[[Any, Tensor], Tensor]) -> None:
        self._module, self._compute = module, compute

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Map [B, S, width] to [B, S, other width]."""
        flat = hidden_states.flatten(0, -2).contiguous()
        return self._compute(self._module, flat).view(*hidden_states.shape[:-1], -1)


def forwards(model: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield modules of a `GraniteMoeHybridForCausalLM`, and the `forward` of each by kernels."""
    decoder = model.base_model
    yield model.lm_head, ByKernel(model.lm_head, _linear)
    yield decoder.norm, ByKernel(decoder.norm, _norm)
    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            yield norm, ByKernel(norm, _norm)
        yield layer.shared_mlp, ByKernel(layer.shared_mlp, _feed_forward)
        if (attention := layer.self_attn) is not None:
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                yield part, ByKernel(part, _linear)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, tokens: TokenPages, scale: float
) -> Tensor:
    """Attend over a pool. Shapes as in `exact.attention`."""
    batch, heads, columns, head_dim = query.shape
    out = exact_attention.attend(
        query.transpose(1, 2).reshape(batch * columns, heads * head_dim),
        keys,
        values,
        tokens.rows,
        tokens.positions,
        tokens.table,
        head_dim=head_dim,
        page_size=tokens.page_size,
        scale=scale,
    )
    return out.view(batch, columns, heads, head_dim)


def mamba(
    mixer: Any,
    hidden: Tensor,
    positions: Tensor,
    state: MambaState,
    mask: Tensor | None = None,
) -> Tensor:
    """Run a Mamba layer; see `mamba_forward`. Zeros before a row's first token.

    state: with the inputs of `Kept.CHUNK`.

    Raises:
        CannotBeExact: for padding inside a sequence.
    """
    if mask is not None:
        raise CannotBeExact("padding inside a sequence has no exact kernel on a GPU")
    batch, columns, _ = hidden.shape
    flat = hidden.flatten(0, 1)
    if columns == 1:
        gated = _step(mixer, flat, positions.flatten().int(), state)
    else:
        gated = _scan(mixer, flat, positions, state)
    normed = rms_norm(gated, mixer.norm.weight, mixer.norm.variance_epsilon, norm_groups(mixer))
    mixed = product(normed, mixer.out_proj.weight).view(batch, columns, -1)
    return mixed.where((positions >= 0)[..., None], 0)


def _step(mixer: Any, hidden: Tensor, positions: Tensor, state: MambaState) -> Tensor:
    sizes, weights = MambaSizes.of(mixer), ScanWeights.of(mixer)
    gated = exact_step.gated_step(mixer, hidden, positions, state)
    assert state.rows is not None
    assert state.recent is not None
    layer = (state.ssm[None], state.recent[None], weights.dt_bias[None], weights.a_log[None])
    exact_step.close_chunks(sizes, positions, state.rows, *layer)
    return gated


def _scan(mixer: Any, hidden: Tensor, positions: Tensor, state: MambaState) -> Tensor:
    """Scan with each row's padding moved to its right: the kernels take it nowhere else."""
    order = (positions < 0).long().argsort(dim=1, stable=True)  # [B, S], tokens first
    place = order + torch.arange(len(order), device=order.device)[:, None] * order.shape[1]
    moved = hidden.index_select(0, place.flatten())
    at = positions.gather(1, order).int()
    gated = exact_scan.gated_scan(mixer, moved, at, state)
    return torch.empty_like(gated).index_copy_(0, place.flatten(), gated)


def _linear(module: Any, x: Tensor) -> Tensor:
    return product(x, module.weight)


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    return product(gated_product(x, module.input_linear.weight), module.output_linear.weight)
