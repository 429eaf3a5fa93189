"""A decoder layer's forward pass over pages and state rows, around transformers' own modules.

transformers' decoder layer is a short frame around its parts: norm, mixer, scaled residual, norm,
MLP, scaled residual. Two models keep that frame and use the weights of the live modules.
`EagerModel` calls the modules themselves, on any device and dtype. `TritonModel`
(`triton_model.py`) computes in half precision on a GPU. `layers/backend.py` says which one runs. In
both, attention is FlexAttention over the pool. `ExactModel` (`exact_model.py`) is `EagerModel` for
exact mode on the CPU, one token at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import apply_rotary_pos_emb

from granite_paged.device import finite_rows
from granite_paged.geometry import Backend
from granite_paged.layers.attention import DecodePlan, paged_attention
from granite_paged.layers.backend import attention_backend
from granite_paged.layers.mamba import mamba_forward
from granite_paged.runner.storage import Storage


class ModelStep(NamedTuple):
    """Inputs that all layers of one step share.

    Attributes:
        rows: [B] int64, state rows.
        states: [B] int64, their indices into Mamba states: rows - 1, and -1 for the null row, which
            has no state.
        positions: [B, S] int32, -1 for padding.
        block_mask: mask of every attention layer; None for a model that reads none.
        plan: how a decode step splits the rows; None if it does not.
        in_blocks: whether blocks of queries of a prefill step attend separately, see
            `QueryBlockMask`.
    """

    rows: Tensor
    states: Tensor
    positions: Tensor
    block_mask: BlockMask | None
    plan: DecodePlan | None = None
    in_blocks: bool = False


class EagerModel:
    """transformers' own modules, over a runner's pages and rows.

    Args:
        model: a `GraniteMoeHybridForCausalLM` in eval mode.
        storage: the runner's buffers.
        backend: how FlexAttention runs.

    Attributes:
        reads_mask: whether attention reads a step's block mask, and not the page table itself.
    """

    reads_mask = True

    def __init__(self, model: Any, storage: Storage, backend: Backend) -> None:
        self._head, self._decoder = model.lm_head, model.base_model
        self._config = model.config
        self._storage = storage
        self._backend = backend

    @property
    def gathers(self) -> bool:
        """Whether plain PyTorch computes attention (`layers/gathered.py`)."""
        geometry, device = self._storage.pages.geometry, self._storage.tokens.device
        runs = attention_backend(self._backend, device, geometry.dtype, geometry.head_dim)
        return runs == "eager"

    def forward(self, tokens: Tensor, step: ModelStep) -> Tensor:
        """Return hidden states [B, S, hidden] before the last norm. tokens: [B, S] int64."""
        hidden: Tensor = self._decoder.embed_tokens(tokens) * self._config.embedding_multiplier
        rotary = self._rotary(hidden, step.positions)
        for index, layer in enumerate(self._decoder.layers):
            hidden = self._layer(index, layer, hidden, step, rotary)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, vocabulary]. hidden: [n, hidden], before the last norm."""
        logits: Tensor = self._head(self._decoder.norm(hidden)) / self._config.logits_scaling
        return logits

    def decode(self, tokens: Tensor, step: ModelStep) -> Tensor:
        """Return logits [B, vocabulary]. tokens: [rows] int64, next input token of each row."""
        fed = tokens.index_select(0, step.rows)
        return self.logits(self.forward(fed[:, None], step).flatten(0, 1))

    def write_argmax(self, logits: Tensor, rows: Tensor) -> None:
        """Feed row `rows[i]` the argmax of logits[i], the first among equals.

        A row whose logits have NaN or infinity is flagged.
        """
        self._storage.tokens.index_copy_(0, rows, logits.argmax(dim=-1))
        self._storage.nonfinite[rows] |= ~finite_rows(logits)

    def _rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._decoder.rotary_emb is None:
            return None
        cos_sin: tuple[Tensor, Tensor] = self._decoder.rotary_emb(hidden, positions.clamp(min=0))
        return cos_sin

    def _layer(
        self,
        index: int,
        layer: Any,
        hidden: Tensor,
        step: ModelStep,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        normed = layer.input_layernorm(hidden)
        if layer.mamba is not None:
            state = self._storage.states[index]._replace(rows=step.states)
            mixed = mamba_forward(layer.mamba, normed, step.positions, state)
        else:
            mixed = self._attention(index, layer.self_attn, normed, step, rotary)
        hidden = hidden + mixed * layer.residual_multiplier
        normed = layer.post_attention_layernorm(hidden)
        fed = layer.shared_mlp(normed)
        if layer.has_experts:
            fed = fed + layer.block_sparse_moe(normed)
        summed: Tensor = hidden + fed * layer.residual_multiplier
        return summed

    def _attention(
        self,
        index: int,
        attention: Any,
        normed: Tensor,
        step: ModelStep,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        projected = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        query, key, value = (by_head(part, attention.head_dim) for part in projected)
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        self._write(index, key, value, step)
        out = self._attend_pages(index, query, step, attention.scaling)
        attended: Tensor = attention.o_proj(out.transpose(1, 2).flatten(2))
        return attended

    def _attend_pages(self, index: int, query: Tensor, step: ModelStep, scale: float) -> Tensor:
        """Attend over the pool of a layer. query and result: [B, Hq, S, D]."""
        pool = self._storage.pages.pools[index]
        assert step.block_mask is not None
        return paged_attention(
            query, pool.keys, pool.values, step.block_mask, scale=scale, backend=self._backend
        )

    def _write(self, index: int, key: Tensor, value: Tensor, step: ModelStep) -> None:
        """Store new K and V, and flag the rows in which they were not finite."""
        store = self._storage.pages
        slots = store.table.slots(step.positions.long(), store.geometry.page_size, step.rows)
        finite = store.pools[index].write(slots.flatten(), key, value)
        bad = (~finite & (step.positions >= 0)).any(dim=1)
        self._storage.nonfinite[step.rows] |= bad.to(torch.uint8)


def by_head(projected: Tensor, head_dim: int) -> Tensor:
    """Split projected heads: [B, S, H * D] -> [B, H, S, D]."""
    return projected.view(*projected.shape[:2], -1, head_dim).transpose(1, 2)
