"""A decoder layer's forward pass in half precision on a GPU, by Triton kernels.

A decode step of few rows is a chain of fused kernels, five per layer; each writes the input of the
next. Prompts and larger batches use cuBLAS for matrix products, with small kernels around them.
Mamba layers use Triton in both cases. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import apply_rotary_pos_emb

from granite_paged.layers.attention import (
    Queries,
    block_attention,
    block_queries,
    split_attention,
    split_queries,
)
from granite_paged.layers.mamba import MambaSizes, MambaState, ScanWeights, norm_groups
from granite_paged.layers.triton import mamba, pages, pointwise
from granite_paged.layers.triton.linear import (
    MOST_ROWS,
    DeferredNorm,
    Scratch,
    linear,
    prenorm,
    scratch,
)
from granite_paged.layers.triton.tokens import embed, write_argmax
from granite_paged.runner.model import EagerModel, ModelStep, by_head

Rotary = tuple[Tensor, Tensor] | None


class TritonModel(EagerModel):
    """The model in half precision on a GPU. Hidden states are [B * S, hidden] inside.

    `layers/backend.py` decides which models run so; the others run as `EagerModel`.
    """

    # allocated by the first step with several rows; its graphs keep using it
    _scratch: Scratch | None = None

    def forward(self, tokens: Tensor, step: ModelStep) -> Tensor:
        """See `EagerModel.forward`."""
        hidden = self._embedded(tokens)
        rotary = self._rotary(hidden, step.positions)
        for index, layer in enumerate(self._decoder.layers):
            normed = _normalised(hidden, layer.input_layernorm)
            self._mixer(index, layer, hidden, normed, step, rotary)
            normed = _normalised(hidden, layer.post_attention_layernorm)
            routed = self._routed(layer, normed, tokens.shape)
            fed = pointwise.silu_mul(normed @ layer.shared_mlp.input_linear.weight.T)
            _add(hidden, fed, layer.shared_mlp.output_linear.weight, layer.residual_multiplier)
            if routed is not None:
                hidden.add_(routed, alpha=layer.residual_multiplier)
        return hidden.view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `EagerModel.logits`."""
        norm = self._decoder.norm
        if len(hidden) == 1:
            return self._one_row_logits(prenorm(hidden.contiguous(), norm.weight))
        rows = _normalised(hidden.contiguous(), norm)
        unused = rows.new_empty(1, 1)  # with beta 0: cuBLAS applies alpha within the product
        scale = 1 / self._config.logits_scaling
        return torch.addmm(unused, rows, self._head.weight.T, beta=0, alpha=scale)

    def decode(self, tokens: Tensor, step: ModelStep) -> Tensor:
        """See `EagerModel.decode`."""
        rows = len(step.rows)
        if rows > MOST_ROWS:
            return super().decode(tokens, step)
        if rows > 1 and self._scratch is None:
            self._scratch = scratch(tokens.device)
        layers, last = list(self._decoder.layers), self._decoder.norm
        hidden, normed = embed(
            tokens,
            step.rows,
            self._decoder.embed_tokens.weight,
            self._config.embedding_multiplier,
            layers[0].input_layernorm.weight,
        )
        rotary = self._rotary(hidden, step.positions)
        norms = [*(layer.input_layernorm for layer in layers[1:]), last]
        for index, (layer, next_norm) in enumerate(zip(layers, norms, strict=True)):
            normed = self._decode_mixer(index, layer, hidden, normed, step, rotary)
            normed = self._decode_mlp(layer, hidden, normed, next_norm.weight)
        return self._one_row_logits(normed) if rows == 1 else self.logits(hidden)

    def write_argmax(self, logits: Tensor, rows: Tensor) -> None:
        """See `EagerModel.write_argmax`."""
        write_argmax(logits, rows, self._storage.tokens, self._storage.nonfinite)

    # -- few rows: each product also writes its `DeferredNorm` -----------------------------------

    def _one_row_logits(self, normed: DeferredNorm) -> Tensor:
        eps, scale = self._decoder.norm.variance_epsilon, 1 / self._config.logits_scaling
        return linear(normed, self._head.weight, eps=eps, scale=scale)[0]

    def _decode_mixer(
        self,
        index: int,
        layer: Any,
        hidden: Tensor,
        normed: DeferredNorm,
        step: ModelStep,
        rotary: Rotary,
    ) -> DeferredNorm:
        eps, out_eps = layer.input_layernorm.variance_epsilon, 0.0
        if layer.mamba is not None:
            mixer, newest = layer.mamba, step.positions.flatten()
            state = self._state(index, step)
            conv = mamba.convolution(mixer, newest, state)
            projected = linear(normed, mixer.in_proj.weight, eps=eps, conv=conv)[0]
            mixed = self._recur(mixer, projected, newest, state)
            weight, out_eps = mixer.out_proj.weight, mixer.norm.variance_epsilon
        else:
            attention = layer.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = (part.weight for part in parts)
            projected = linear(normed, (query, key, value), eps=eps)[0]
            columns = torch.split(projected, [len(query), len(key), len(value)], dim=1)
            mixed = self._attention_of(index, attention, columns, step, rotary)
            weight = attention.o_proj.weight
        norm = layer.post_attention_layernorm.weight
        return self._onto(hidden, mixed, weight, layer, norm, eps=out_eps)

    def _recur(
        self, mixer: Any, projected: Tensor, newest: Tensor, state: MambaState
    ) -> Tensor | DeferredNorm:
        """Return [B, inner], gated and normed; a `DeferredNorm` if the norm has one group."""
        sizes, weights, groups = MambaSizes.of(mixer), ScanWeights.of(mixer), norm_groups(mixer)
        norm = mixer.norm.weight if groups == 1 else None
        gated = mamba.step(sizes, projected, newest, weights, state, norm)
        return gated if isinstance(gated, DeferredNorm) else _normalised(gated, mixer.norm, groups)

    def _decode_mlp(
        self, layer: Any, hidden: Tensor, normed: DeferredNorm, next_norm: Tensor
    ) -> DeferredNorm:
        mlp, eps = layer.shared_mlp, layer.post_attention_layernorm.variance_epsilon
        routed = None
        if layer.has_experts:
            whole = _normalised(hidden, layer.post_attention_layernorm)
            routed = self._routed(layer, whole, (len(hidden), 1))
        fed = linear(normed, mlp.input_linear.weight, eps=eps, gated=True)[0]
        after = self._onto(hidden, fed, mlp.output_linear.weight, layer, next_norm)
        if routed is None:
            return after
        hidden.add_(routed, alpha=layer.residual_multiplier)
        return prenorm(hidden, next_norm)

    def _onto(
        self,
        hidden: Tensor,
        mixed: Tensor | DeferredNorm,
        weight: Tensor,
        layer: Any,
        norm: Tensor,
        *,
        eps: float = 0.0,
    ) -> DeferredNorm:
        """Add scaled mixed W^T to `hidden` in place; return its `DeferredNorm` for `norm`."""
        _, after = linear(
            mixed,
            weight,
            eps=eps,
            residual=hidden,
            scale=layer.residual_multiplier,
            norm=norm,
            out=hidden,
        )
        assert after is not None
        return after

    # -- many rows -------------------------------------------------------------------------------

    def _mixer(
        self,
        index: int,
        layer: Any,
        hidden: Tensor,
        normed: Tensor,
        step: ModelStep,
        rotary: Rotary,
    ) -> None:
        if layer.mamba is not None:
            mixer = layer.mamba
            projected = normed @ mixer.in_proj.weight.T
            gated = mamba.gated_scan(mixer, projected, step.positions, self._state(index, step))
            mixed = _normalised(gated, mixer.norm, norm_groups(mixer))
            weight = mixer.out_proj.weight
        else:
            attention = layer.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            projected = [normed @ part.weight.T for part in parts]
            mixed = self._attention_of(index, attention, projected, step, rotary)
            weight = attention.o_proj.weight
        _add(hidden, mixed, weight, layer.residual_multiplier)

    # -- both ------------------------------------------------------------------------------------

    def _embedded(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [B * S, hidden]"""
        hidden: Tensor = self._decoder.embed_tokens(tokens.flatten())
        return hidden.mul(self._config.embedding_multiplier)

    def _routed(self, layer: Any, normed: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Return the experts' output [B * S, hidden]; None without experts."""
        if not layer.has_experts:
            return None
        routed: Tensor = layer.block_sparse_moe(normed.view(*shape, -1)).view(normed.shape)
        return routed

    def _state(self, index: int, step: ModelStep) -> MambaState:
        return self._storage.states[index]._replace(rows=step.states)

    def _attention_of(
        self,
        index: int,
        attention: Any,
        projected: Sequence[Tensor],
        step: ModelStep,
        rotary: Rotary,
    ) -> Tensor:
        """Query, key and value [B * S, heads * D] -> [B * S, Hq * D]"""
        query, key, value = projected
        if rotary is not None:
            query, key = self._rotated(query, key, attention.head_dim, step, rotary)
        if step.plan is None and not step.in_blocks:
            self._write_pages(index, key, value, step)
            return self._attend(index, attention, query, step)
        queries = self._room(query, attention.head_dim, step)
        self._write_pages(index, key, value, step, (query, queries.places))
        return self._attend_placed(index, attention, queries, step).view(query.shape)

    def _rotated(
        self,
        query: Tensor,
        key: Tensor,
        head_dim: int,
        step: ModelStep,
        rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        shape = (*step.positions.shape, -1)
        turned = apply_rotary_pos_emb(
            by_head(query.view(shape), head_dim), by_head(key.view(shape), head_dim), *rotary
        )
        query, key = (part.transpose(1, 2).flatten(2).flatten(0, 1) for part in turned)
        return query, key

    def _room(self, query: Tensor, head_dim: int, step: ModelStep) -> Queries:
        """Return where the attention of a captured step reads its queries. They are not written."""
        kv_heads = self._storage.pages.geometry.kv_heads
        if step.plan is not None:
            return split_queries(query.view(len(query), -1, head_dim), step.plan, kv_heads=kv_heads)
        assert step.block_mask is not None
        heads = query.view(*step.positions.shape, -1, head_dim)
        return block_queries(heads, step.block_mask, kv_heads=kv_heads)

    def _write_pages(
        self,
        index: int,
        key: Tensor,
        value: Tensor,
        step: ModelStep,
        queries: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        storage = self._storage
        pool = storage.pages.pools[index]
        pages.write_pages(
            key,
            value,
            (pool.keys, pool.values),
            step.rows,
            step.positions,
            storage.pages.table.physical,
            storage.nonfinite,
            storage.pages.geometry.page_size,
            queries,
        )

    def _attend_placed(
        self, index: int, attention: Any, queries: Queries, step: ModelStep
    ) -> Tensor:
        """Attend over the pool of a layer: [B, Hq, D], or [B, S, Hq, D] of a prefill step."""
        pool, mask, scale = self._storage.pages.pools[index], step.block_mask, attention.scaling
        assert mask is not None
        if step.plan is None:
            return block_attention(queries, pool.keys, pool.values, mask, scale=scale)
        return split_attention(queries, pool.keys, pool.values, mask, scale=scale, plan=step.plan)

    def _attend(self, index: int, attention: Any, query: Tensor, step: ModelStep) -> Tensor:
        """[B * S, Hq * D] -> the same, by the mask of a step that is not captured"""
        heads = by_head(query.view(*step.positions.shape, -1), attention.head_dim)
        out = self._attend_pages(index, heads, step, attention.scaling)
        return out.transpose(1, 2).reshape(query.shape)


def _normalised(x: Tensor, norm: Any, groups: int = 1) -> Tensor:
    return pointwise.rms_norm(x, norm.weight, norm.variance_epsilon, groups)


def _add(hidden: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    """Add scale * x W^T to `hidden` in place, in one cuBLAS kernel."""
    hidden.addmm_(x, weight.T, alpha=scale)
