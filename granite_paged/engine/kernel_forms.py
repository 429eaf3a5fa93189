"""A decoder layer's forward pass in half precision on a GPU: see `forms.py`.

Products of few rows take what surrounds them along, Mamba is Triton, and what is left of a layer of
a decode step is five kernels. Importing this needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import apply_rotary_pos_emb

from granite_paged.attention import paged_attention, split_attention
from granite_paged.engine.forms import PlainForms, Step, by_head
from granite_paged.kernels import linear, mamba, pages, pointwise
from granite_paged.mamba import MambaSizes


class KernelForms(PlainForms):
    """Half precision on a GPU. Hidden states are [B * S, hidden] inside.

    What `forms.why_not` names runs as `PlainForms`.
    """

    def forward(self, tokens: Tensor, step: Step) -> Tensor:
        """See `PlainForms.forward`."""
        batch, count = tokens.shape
        hidden: Tensor = torch.nn.functional.embedding(
            tokens.flatten(), self._decoder.embed_tokens.weight
        )
        hidden = hidden * self._config.embedding_multiplier
        rotary = self._rotary(hidden, step.positions)
        for index, layer in enumerate(self._decoder.layers):
            if layer.mamba is not None:
                self._add_mamba(index, layer, hidden, step)
            else:
                self._add_attention(index, layer, hidden, step, rotary)
            self._add_mlp(layer, hidden, batch)
        return hidden.view(batch, count, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `PlainForms.logits`."""
        norm = self._decoder.norm
        return product(
            hidden,
            self._head.weight,
            norm=norm.weight,
            eps=norm.variance_epsilon,
            scale=1 / self._config.logits_scaling,
        )

    def _add_mamba(self, index: int, layer: Any, hidden: Tensor, step: Step) -> None:
        mixer, norm = layer.mamba, layer.input_layernorm
        projected = product(
            hidden, mixer.in_proj.weight, norm=norm.weight, eps=norm.variance_epsilon
        )
        sizes = MambaSizes.of(mixer)
        one = step.positions.shape[1] == 1
        gated = (mamba.step if one else mamba.scan)(
            sizes,
            projected,
            step.positions[:, 0] if one else step.positions,
            mixer.conv1d.weight.view(sizes.channels, sizes.conv_width),
            mixer.conv1d.bias,
            mixer.dt_bias,
            mixer.A_log,
            mixer.D,
            self._storage.states[index]._replace(rows=step.rows),
        )
        product(
            gated,
            mixer.out_proj.weight,
            norm=mixer.norm.weight,
            eps=mixer.norm.variance_epsilon,
            groups=sizes.groups,
            scale=layer.residual_multiplier,
            onto=hidden,
        )

    def _add_attention(
        self,
        index: int,
        layer: Any,
        hidden: Tensor,
        step: Step,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> None:
        attention, norm = layer.self_attn, layer.input_layernorm
        eps = norm.variance_epsilon
        weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        query, key, value = products(hidden, weights, norm=norm.weight, eps=eps)
        if rotary is not None:
            query, key = self._rotated(query, key, attention.head_dim, step, rotary)
        self._write_pages(index, key, value, step)
        out = self._attend(index, attention, query, step)
        product(out, attention.o_proj.weight, scale=layer.residual_multiplier, onto=hidden)

    def _rotated(
        self,
        query: Tensor,
        key: Tensor,
        head_dim: int,
        step: Step,
        rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        shape = (*step.positions.shape, -1)
        turned = apply_rotary_pos_emb(
            by_head(query.view(shape), head_dim), by_head(key.view(shape), head_dim), *rotary
        )
        query, key = (part.transpose(1, 2).flatten(2).flatten(0, 1) for part in turned)
        return query, key

    def _write_pages(self, index: int, key: Tensor, value: Tensor, step: Step) -> None:
        storage = self._storage
        pool = storage.pools[index]
        pages.write_pages(
            key,
            value,
            (pool.keys, pool.values),
            step.rows,
            step.positions,
            storage.table.physical,
            storage.nonfinite,
            pool.page_size,
        )

    def _attend(self, index: int, attention: Any, query: Tensor, step: Step) -> Tensor:
        """[B * S, Hq * D] -> the same"""
        pool, scale = self._storage.pools[index], attention.scaling
        if step.plan is not None:
            heads = query.view(len(query), -1, attention.head_dim)
            out = split_attention(
                heads, pool.keys, pool.values, step.block_mask, scale=scale, plan=step.plan
            )
            return out.view(query.shape)
        heads = by_head(query.view(*step.positions.shape, -1), attention.head_dim)
        out = paged_attention(
            heads, pool.keys, pool.values, step.block_mask, scale=scale, backend="compiled"
        )
        return out.transpose(1, 2).reshape(query.shape)

    def _add_mlp(self, layer: Any, hidden: Tensor, batch: int) -> None:
        norm, mlp, scale = (
            layer.post_attention_layernorm,
            layer.shared_mlp,
            layer.residual_multiplier,
        )
        eps = norm.variance_epsilon
        routed = None
        if layer.has_experts:
            normed = norm(hidden).view(batch, -1, hidden.shape[1])
            routed = layer.block_sparse_moe(normed).view(hidden.shape)
        fed = product(hidden, mlp.input_linear.weight, norm=norm.weight, eps=eps, gated=True)
        product(fed, mlp.output_linear.weight, scale=scale, onto=hidden)
        if routed is not None:
            hidden.add_(routed, alpha=scale)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    groups: int = 1,
    scale: float = 1.0,
    gated: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """scale * f(norm(x) W^T), added in place to `onto` where that is given.

    Few rows take one fused kernel, many rows the library's product with small kernels around it.
    x [rows, depth]; groups: equal parts of a row that are normalised separately.
    """
    if norm is not None and (groups > 1 or len(x) > linear.MOST_ROWS):
        x, norm = pointwise.rms_norm(x, norm, eps, groups), None
    if len(x) <= linear.MOST_ROWS:
        return linear.linear(
            x, weight, norm=norm, eps=eps, residual=onto, scale=scale, gated=gated, out=onto
        )
    if onto is not None:
        onto.addmm_(x, weight.T, alpha=scale)
        return onto
    out = torch.mm(x, weight.T)
    out = pointwise.silu_mul(out) if gated else out
    if scale != 1.0:
        out.mul_(scale)
    return out


def products(
    x: Tensor, weights: tuple[Tensor, ...], *, norm: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """Several products of one normalised x, which is normalised once where rows are many."""
    if len(x) > linear.MOST_ROWS:
        normed = pointwise.rms_norm(x, norm, eps)
        return tuple(product(normed, weight) for weight in weights)
    return tuple(product(x, weight, norm=norm, eps=eps) for weight in weights)
