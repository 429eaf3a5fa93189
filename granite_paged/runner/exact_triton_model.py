"""A decoder layer's forward pass in exact mode, in half precision on a GPU, by Triton kernels.

Each kernel computes an output element from its own row, in an order that follows from the weights
and the token's position alone: not from the other rows, the step's shape, or where the prompt was
cut. Decode and prefill use the same kernels, in tiles of other sizes, so a token that was decoded
has the bits that it would have as part of a prompt. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from granite_paged.layers.mamba import MambaSizes, norm_groups
from granite_paged.layers.triton import exact_attention, exact_scan, exact_step
from granite_paged.layers.triton.exact_linear import (
    add_norm,
    fused_product,
    gated_product,
    product,
)
from granite_paged.layers.triton.pointwise import rms_norm
from granite_paged.runner.model import ModelStep
from granite_paged.runner.triton_model import Rotary, TritonModel


class ExactTritonModel(TritonModel):
    """`TritonModel` whose bits for a token depend on its own sequence only."""

    reads_mask = False

    def forward(self, tokens: Tensor, step: ModelStep) -> Tensor:
        """See `EagerModel.forward`."""
        hidden, _ = self._layers(self._embedded(tokens), step)
        return hidden.view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `EagerModel.logits`."""
        norm = self._decoder.norm
        normed = rms_norm(hidden.contiguous(), norm.weight, norm.variance_epsilon)
        return self._head_product(normed)

    def decode(self, tokens: Tensor, step: ModelStep) -> Tensor:
        """See `EagerModel.decode`."""
        fed = tokens.index_select(0, step.rows)
        _, normed = self._layers(self._embedded(fed), step)
        self._close_chunks(step)
        return self._head_product(normed)

    def _head_product(self, normed: Tensor) -> Tensor:
        return fused_product(normed, self._head.weight, scale=1 / self._config.logits_scaling)

    def _layers(self, hidden: Tensor, step: ModelStep) -> tuple[Tensor, Tensor]:
        """Return hidden states after the last layer, and their norm, [B * S, hidden] each."""
        rotary = self._rotary(hidden, step.positions)
        layers = list(self._decoder.layers)
        norms = [*(layer.input_layernorm for layer in layers[1:]), self._decoder.norm]
        first = layers[0].input_layernorm
        normed = rms_norm(hidden, first.weight, first.variance_epsilon)
        for index, (layer, after) in enumerate(zip(layers, norms, strict=True)):
            mixed, weight = self._mixed(index, layer, normed, step, rotary)
            scale, between = layer.residual_multiplier, layer.post_attention_layernorm
            normed = _add(hidden, mixed, weight, scale, between)
            fed = gated_product(normed, layer.shared_mlp.input_linear.weight)
            normed = _add(hidden, fed, layer.shared_mlp.output_linear.weight, scale, after)
        return hidden, normed

    def _mixed(
        self, index: int, layer: Any, normed: Tensor, step: ModelStep, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """Return the input of a layer's mixer's last product, and the weight of that product."""
        if layer.mamba is None:
            attention = layer.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            projected = [product(normed, part.weight) for part in parts]
            mixed = self._attention_of(index, attention, projected, step, rotary)
            return mixed, attention.o_proj.weight
        mixer, norm = layer.mamba, layer.mamba.norm
        state, positions = self._state(index, step), step.positions
        if positions.shape[1] == 1:
            gated = exact_step.gated_step(mixer, normed, positions.flatten(), state)
        else:
            gated = exact_scan.gated_scan(mixer, normed, positions, state)
        mixed = rms_norm(gated, norm.weight, norm.variance_epsilon, norm_groups(mixer))
        return mixed, mixer.out_proj.weight

    def _close_chunks(self, step: ModelStep) -> None:
        mixers = [layer.mamba for layer in self._decoder.layers if layer.mamba is not None]
        if not mixers:
            return
        # stacked in every step: a live model's weights may be written to
        rates = (torch.stack(part) for part in zip(*map(_rates, mixers), strict=True))
        _, ssm, recent = self._storage.stacked
        newest, sizes = step.positions.flatten(), MambaSizes.of(mixers[0])
        exact_step.close_chunks(sizes, newest, step.states, ssm, recent, *rates)

    def _attend(self, index: int, attention: Any, query: Tensor, step: ModelStep) -> Tensor:
        pages, pool = self._storage.pages, self._storage.pages.pools[index]
        return exact_attention.attend(
            query.contiguous(),
            pool.keys,
            pool.values,
            step.rows,
            step.positions,
            pages.table.physical,
            head_dim=attention.head_dim,
            page_size=pages.geometry.page_size,
            scale=attention.scaling,
        )


def _add(hidden: Tensor, x: Tensor, weight: Tensor, scale: float, norm: Any) -> Tensor:
    """Add scale * x W^T to `hidden` in place; return the norm of the sum."""
    mixed = product(x, weight)
    return add_norm(hidden, mixed, norm.weight, scale=scale, eps=norm.variance_epsilon)


def _rates(mixer: Any) -> tuple[Tensor, Tensor]:
    return mixer.dt_bias, mixer.A_log
