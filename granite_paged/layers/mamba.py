"""Mamba-2 for inference: one state per row, updated in place; padding leaves no trace.

::

    conv      [rows, channels, width]              model dtype; a ring: slot `position % width`
                                                   holds the input at that position
    ssm       [rows, heads, head_dim, state_size]  float32

A row's state has a fixed size, however long its sequence is, so it needs no pages. All functions
take `positions` [B, S], the position of each token in its sequence, -1 for padding. Padding on
either side leaves a row unchanged: dt is 0, and the convolution skips it. transformers' own forward
would let padding on the right decay the state.

This file defines the computation in plain PyTorch, for any device and float dtype. In half
precision on a GPU, `triton/mamba.py` and `triton/scan.py` compute the same. Formulas: Dao and Gu
2024, "Transformers are SSMs", section 6 (chunk scan) and section 2.1 (recurrence).
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, softplus
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    apply_mask_to_padding_states,
)

EXACT_CHUNK = 64
"""Tokens between two stored states in exact mode on a GPU."""

REPLAYED = 8
"""Tokens between two stored states while Triton kernels decode. Every step reads a row's state, one
in eight writes it."""


class Kept(Enum):
    """The inputs that a row keeps beside its state, so that not every step has to store the state.

    NOTHING: none; the state is of the last token.
    REPLAY: those that a step of one token left to be replayed (`MambaState.times`).
    CHUNK: those since the last multiple of `EXACT_CHUNK` tokens (`triton/exact_chunk.py`).
    """

    NOTHING = "nothing"
    REPLAY = "replay"
    CHUNK = "chunk"


_STATE = 0  # a Granite Mamba layer has one state; transformers' cache allows for several


class MambaState(NamedTuple):
    """The states of one layer, and the rows of them that belong to the batch.

    conv: [rows, channels, width].
    ssm: [rows, heads, head_dim, state_size].
    rows: [B] int64; None if the batch is all rows in order.
    recent: the inputs since `ssm` was stored. `Kept.REPLAY`: [rows, REPLAYED, inner + groups *
        state_size], x and B; slot `position % REPLAYED`. `Kept.CHUNK`: [rows, EXACT_CHUNK, channels
        + heads]. None for `Kept.NOTHING`, where `ssm` is of the last token.
    times: [rows, REPLAYED, 2, heads] float32, for `Kept.REPLAY`: their dt, and the sum of dt since
        `ssm` was stored; 0 where `ssm` has the token already. Before a token at position p, the
        slots below p % REPLAYED are to be replayed.
    """

    conv: Tensor
    ssm: Tensor
    rows: Tensor | None
    recent: Tensor | None = None
    times: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        """States, and inputs where they are kept, as `RowSnapshot` lists them."""
        parts = (self.conv, self.ssm, self.recent, self.times)
        return [part for part in parts if part is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, over all rows."""
        return sum(part.nbytes for part in self.parts)


class MambaSizes(NamedTuple):
    """Sizes of a Mamba layer."""

    heads: int
    head_dim: int
    state_size: int
    groups: int
    conv_width: int
    chunk_size: int
    time_step_limit: tuple[float, float]

    @classmethod
    def of(cls, mixer: Any) -> MambaSizes:
        """Read the sizes of a `GraniteMoeHybridMambaLayer`."""
        low, high = mixer.time_step_limit
        return cls(
            heads=mixer.num_heads,
            head_dim=mixer.head_dim,
            state_size=mixer.ssm_state_size,
            groups=mixer.n_groups,
            conv_width=mixer.conv_kernel_size,
            chunk_size=mixer.chunk_size,
            time_step_limit=(float(low), float(high)),
        )

    @property
    def inner(self) -> int:
        """Channels of x, the gate and the output."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_size

    @property
    def ssm_elements(self) -> int:
        """Elements of one row's recurrent state."""
        return self.inner * self.state_size

    def state_bytes(self, dtype: torch.dtype, kept: Kept = Kept.NOTHING) -> int:
        """Return the bytes of one row's states, and of the inputs that it keeps beside them.

        dtype: of the model.
        """
        return self.empty_state(1, dtype, torch.device("meta"), kept).nbytes

    def empty_state(
        self, rows: int, dtype: torch.dtype, device: torch.device, kept: Kept = Kept.NOTHING
    ) -> MambaState:
        """Return states of `rows` rows, all zero, as every sequence starts."""
        shared = self.groups * self.state_size
        recent = times = None
        if kept is Kept.REPLAY:
            recent = torch.zeros(rows, REPLAYED, self.inner + shared, dtype=dtype, device=device)
            times = torch.zeros(rows, REPLAYED, 2, self.heads, device=device)
        elif kept is Kept.CHUNK:
            columns = self.channels + self.heads
            recent = torch.zeros(rows, EXACT_CHUNK, columns, dtype=dtype, device=device)
        return MambaState(
            torch.zeros(rows, self.channels, self.conv_width, dtype=dtype, device=device),
            torch.zeros(rows, self.heads, self.head_dim, self.state_size, device=device),
            None,
            recent,
            times,
        )


class ScanWeights(NamedTuple):
    """A layer's parameters of the recurrence, [heads] each: bias of dt, log of -A, and D."""

    dt_bias: Tensor
    a_log: Tensor
    skip: Tensor

    @classmethod
    def of(cls, mixer: Any) -> ScanWeights:
        """Take the parameters of a `GraniteMoeHybridMambaLayer`."""
        return cls(mixer.dt_bias, mixer.A_log, mixer.D)


class MambaRows(LinearAttentionLayer):  # type: ignore[misc]  # transformers is untyped here
    """One layer's states in a transformers cache, whose rows can be selected and reset."""

    is_compileable = False

    _recent: Tensor | None = None

    def state(
        self, sizes: MambaSizes, batch: int, like: Tensor, kept: Kept = Kept.NOTHING
    ) -> MambaState:
        """Return the states of a batch of `batch` rows, zero at first.

        Args:
            sizes: the layer's sizes.
            batch: rows of the first call; later calls have as many as were selected.
            like: a tensor of the states' dtype and device.
            kept: `Kept.CHUNK` in exact mode on a GPU.
        """
        if self.recurrent_states[_STATE] is None:
            empty = sizes.empty_state(batch, like.dtype, like.device, kept)
            self.conv_states[_STATE], self.recurrent_states[_STATE] = empty.conv, empty.ssm
            self._recent = empty.recent
            self.has_previous_state[_STATE] = True
        states = (self.conv_states[_STATE], self.recurrent_states[_STATE])
        return MambaState(*states, None, self._recent)

    def select_rows(self, rows: Tensor) -> None:
        """Replace row i by a copy of row `rows[i]`. rows: [n] int64, repeats allowed."""
        for states in (self.conv_states, self.recurrent_states):
            if states[_STATE] is not None:
                states[_STATE] = states[_STATE].index_select(0, rows)
        if self._recent is not None:
            self._recent = self._recent.index_select(0, rows)

    def reset(self) -> None:
        """Drop all rows."""
        for by_state, unset in (
            (self.conv_states, None),
            (self.recurrent_states, None),
            (self.is_conv_states_initialized, False),
            (self.is_recurrent_states_initialized, False),
            (self.has_previous_state, False),
        ):
            by_state[_STATE] = unset
        self._recent = None

    @property
    def nbytes(self) -> int:
        """Bytes of the states, and of the inputs kept beside them."""
        states = (self.conv_states[_STATE], self.recurrent_states[_STATE], self._recent)
        return sum(state.nbytes for state in states if state is not None)


def norm_groups(mixer: Any) -> int:
    """Return the parts of a row that the mixer's gated norm normalises separately.

    transformers 5.17 has one.
    """
    channels = mixer.norm.weight.numel()
    return int(channels // getattr(mixer.norm, "group_size", channels))


def mixers(model: Any) -> dict[int, Any]:
    """Return layer index -> Mamba module of a `GraniteMoeHybridForCausalLM`."""
    layers = enumerate(model.base_model.layers)
    return {index: layer.mamba for index, layer in layers if layer.mamba is not None}


def mamba_forward(
    mixer: Any, hidden: Tensor, positions: Tensor, state: MambaState, mask: Tensor | None = None
) -> Tensor:
    """Run a Mamba layer on new tokens; update the state in place.

    Args:
        mixer: a `GraniteMoeHybridMambaLayer`, for its weights.
        hidden: [B, S, hidden].
        positions: [B, S] int; -1 for padding.
        state: the layer's states.
        mask: [B, S], zero at tokens that have a position but only let the state decay, as padding
            inside a sequence does in transformers. None if no token is such padding.

    Returns:
        [B, S, hidden]; arbitrary finite values at padding.
    """
    sizes = MambaSizes.of(mixer)
    if state.times is not None:
        store_replayed(sizes, positions, mixer.A_log, state)
    hidden = apply_mask_to_padding_states(hidden, mask)
    gate, convolved, dt = mixer.in_proj(hidden).split(
        [sizes.inner, sizes.channels, sizes.heads], dim=-1
    )
    weight, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    convolved = mixer.act(causal_conv(convolved, positions, weight, bias, state))
    convolved = apply_mask_to_padding_states(convolved, mask)
    form = recurrent_step if hidden.shape[1] == 1 else chunk_scan
    scanned = form(sizes, convolved, dt, ScanWeights.of(mixer), positions, state)
    mixed: Tensor = mixer.out_proj(mixer.norm(scanned, gate).to(hidden.dtype))
    return mixed


# -- convolution --------------------------------------------------------------------------------


def causal_conv(
    inputs: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, state: MambaState
) -> Tensor:
    """Convolve causally and depthwise, continuing from the inputs in the ring.

    Args:
        inputs: [B, S, channels], before the activation.
        positions: [B, S] int; -1 for padding, on either side.
        weight: [channels, width]; the last tap is for the token itself.
        bias: [channels] or None.
        state: the layer's states; the ring is read and updated.

    Returns:
        [B, S, channels], before the activation.
    """
    width = weight.shape[1]
    extended, first_column = _with_history(inputs, positions, width, state)
    if inputs.is_cuda:
        convolved = conv1d(extended.mT, weight[:, None], bias, groups=inputs.shape[2]).mT
    else:
        convolved = _sum_of_taps(extended, weight, bias)
    _store_last(extended, first_column, positions, width, state)
    return convolved


def _sum_of_taps(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as `conv1d` does, faster on a CPU.

    With 96 and 1,792 channels and 1 to 512 tokens it took a third to two thirds of conv1d's time in
    float32, and an eighth or less in float64. Products and sums are separate operations, so an
    element's bits do not depend on its place in a vector of the processor.

    Args:
        extended: [B, width - 1 + S, channels], the earlier inputs and the new ones.
        weight: [channels, width].
        bias: [channels] or None.

    Returns:
        [B, S, channels] in extended's dtype; half precision is summed in float32.
    """
    width = weight.shape[1]
    tokens = extended.shape[1] - width + 1
    wide = torch.promote_types(extended.dtype, torch.float32)
    inputs, weight = extended.to(wide), weight.to(wide)
    total = inputs[:, :tokens] * weight[:, 0]
    for tap in range(1, width):
        total += inputs[:, tap : tap + tokens] * weight[:, tap]
    if bias is not None:
        total += bias
    return total.to(extended.dtype)


def _with_history(
    inputs: Tensor, positions: Tensor, width: int, state: MambaState
) -> tuple[Tensor, Tensor]:
    """Insert the `width - 1` earlier inputs of each row before its first token.

    Returns [B, width - 1 + S, channels], and the column of each row's first token [B].
    """
    token = positions >= 0
    first_column = token.int().argmax(dim=1)
    first = positions.gather(1, first_column[:, None])[:, 0].clamp(min=0)
    extended = pad(inputs.where(token[..., None], 0), (0, 0, width - 1, 0))
    back = torch.arange(1 - width, 0, device=inputs.device)  # of the tokens before the first
    before = first[:, None] + back  # [B, width - 1]
    ring = _of_batch(state.conv, state.rows).mT  # [B, width, channels]
    history = ring.gather(1, _spread(before % width, ring)).where((before >= 0)[..., None], 0)
    column = first_column[:, None] + (back + width - 1)
    return extended.scatter(1, _spread(column, extended), history.to(inputs.dtype)), first_column


def _store_last(
    extended: Tensor, first_column: Tensor, positions: Tensor, width: int, state: MambaState
) -> None:
    """Store each row's last `width` inputs in its ring; leave the ring of a row without tokens."""
    tokens = (positions >= 0).sum(dim=1)
    last_column = first_column + tokens - 1
    position = positions.gather(1, last_column.clamp(min=0)[:, None])  # [B, 1]
    age = torch.arange(width, device=extended.device)
    column = (last_column[:, None] + width - 1 - age).clamp(min=0)
    newest = extended.gather(1, _spread(column, extended))  # [B, width, channels]
    ring = _of_batch(state.conv, state.rows).mT
    slot = (position - age) % width
    moved = ring.scatter(1, _spread(slot, ring), newest.to(ring.dtype))
    _put(state.conv, state.rows, moved.where((tokens > 0)[:, None, None], ring).mT)


# -- state space --------------------------------------------------------------------------------


def recurrent_step(
    sizes: MambaSizes,
    convolved: Tensor,
    dt: Tensor,
    weights: ScanWeights,
    positions: Tensor,
    state: MambaState,
) -> Tensor:
    """Advance by one token per row: state <- exp(dt A) state + (dt x) B, y = state C + D x.

    As in transformers, `time_step_limit` applies to the scan only. transformers also uses the scan
    for a first token that comes alone, so the limit applies at position 0.

    Args:
        sizes: the layer's sizes.
        convolved: [B, 1, channels], after the activation.
        dt: [B, 1, heads], before bias and softplus.
        weights: the layer's parameters of the recurrence.
        positions: [B, 1] int; -1 for padding.
        state: the layer's states; ssm is updated.

    Returns:
        [B, 1, inner] float32.
    """
    x, b, c = _split(sizes, convolved.float())
    step = softplus(dt.float() + weights.dt_bias.float())[:, 0]  # [B, heads]
    step = step.where(positions > 0, step.clamp(*sizes.time_step_limit))
    step = step.where(positions >= 0, 0)[..., None]
    decay = torch.exp(step * -weights.a_log.float().exp()[:, None])[..., None]  # [B, heads, 1, 1]
    b, c = (_per_head(sizes, part)[:, 0, :, None] for part in (b, c))  # [B, heads, 1, state_size]
    x = x[:, 0]
    moved = _of_batch(state.ssm, state.rows) * decay + (step * x)[..., None] * b
    _put(state.ssm, state.rows, moved)
    out = (moved * c).sum(dim=-1) + weights.skip.float()[:, None] * x
    return out.reshape(out.shape[0], 1, -1)


def chunk_scan(
    sizes: MambaSizes,
    convolved: Tensor,
    dt: Tensor,
    weights: ScanWeights,
    positions: Tensor,
    state: MambaState,
) -> Tensor:
    """Advance by S tokens per row: products inside each chunk, a recurrence from chunk to chunk.

    Decays are differences of cumulative sums, computed in float64 because the sums grow with the
    chunk. Arguments and result are those of `recurrent_step`, with S tokens per row.
    """
    batch, tokens = positions.shape
    size = min(sizes.chunk_size, tokens)
    step = softplus(dt.float() + weights.dt_bias.float()).clamp(*sizes.time_step_limit)
    step = step.where((positions >= 0)[..., None], 0)
    x, b, c = _split(sizes, convolved.float())
    scaled, b, c, step = (_chunks(part, size) for part in (step[..., None] * x, b, c, step))
    decay = (step.double() * -weights.a_log.double().exp()).cumsum(dim=2)
    out = _inside(sizes, scaled, b, c, decay) + _across(sizes, scaled, b, c, decay, state)
    out = out.reshape(batch, -1, sizes.heads, sizes.head_dim)[:, :tokens]
    return (out + weights.skip.float()[:, None] * x).reshape(batch, tokens, -1)


def store_replayed(sizes: MambaSizes, positions: Tensor, a_log: Tensor, state: MambaState) -> None:
    """Store the states before the batch's first tokens, so that no input is left to be replayed.

    Rows that are padding from end to end keep their states and inputs.

    Args:
        sizes: the layer's sizes.
        positions: [B, S] int, of the next tokens; -1 for padding, on the right only.
        a_log: [heads], the log of -A.
        state: the layer's states, with the inputs of `Kept.REPLAY`.
    """
    assert state.recent is not None
    assert state.times is not None
    rows = state.rows
    slot = torch.arange(REPLAYED, device=positions.device)[None, :, None]
    behind = positions[:, :1, None].clamp(min=0) % REPLAYED
    times = _of_batch(state.times, rows)
    dt = times[:, :, 0].where(slot < behind, 0)  # [B, REPLAYED, heads]
    x, b = _of_batch(state.recent, rows).float().tensor_split([sizes.inner], dim=-1)
    x = x.reshape(*dt.shape, sizes.head_dim)
    b = _per_head(sizes, b.reshape(*b.shape[:2], sizes.groups, sizes.state_size))
    rate = -a_log.float().exp()
    whole = dt.sum(dim=1, keepdim=True)
    scaled = x * (dt * torch.exp((whole - dt.cumsum(dim=1)) * rate))[..., None]
    decay = torch.exp(whole[:, 0] * rate)[..., None, None]
    added = torch.einsum("zlhp,zlhn->zhpn", scaled, b)
    _put(state.ssm, rows, _of_batch(state.ssm, rows) * decay + added)
    is_padding = positions[:, :1, None, None] < 0
    _put(state.times, rows, times.where(is_padding, 0))


def _inside(sizes: MambaSizes, scaled: Tensor, b: Tensor, c: Tensor, decay: Tensor) -> Tensor:
    """Return each token's share from its own chunk: (masked, decayed C B^T) (dt x).

    scaled [B, chunks, size, heads, head_dim]; b, c [B, chunks, size, groups, state_size]; decay
    [B, chunks, size, heads] float64. Returns the shape of `scaled`.
    """
    size = decay.shape[2]
    later = decay[:, :, :, None] - decay[:, :, None]  # [B, chunks, to, from, heads]
    causal = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril()[..., None]
    weights = later.where(causal, -torch.inf).exp().float()
    similar = torch.einsum("zclgn,zcsgn->zclsg", c, b)
    weights = weights * similar.repeat_interleave(sizes.heads // sizes.groups, dim=4)
    return torch.einsum("zclsh,zcshp->zclhp", weights, scaled)


def _across(
    sizes: MambaSizes, scaled: Tensor, b: Tensor, c: Tensor, decay: Tensor, state: MambaState
) -> Tensor:
    """Return each token's share from earlier chunks: decayed C . state. Shapes as in `_inside`."""
    whole = decay[:, :, -1]  # [B, chunks, heads]
    to_end = (whole[:, :, None] - decay).exp().float()[..., None]
    added = torch.einsum("zclhn,zclhp->zchpn", _per_head(sizes, b), scaled * to_end)
    entering = _pass_on(added, whole.exp().float(), state)
    carried = torch.einsum("zclhn,zchpn->zclhp", _per_head(sizes, c), entering)
    return carried * decay.exp().float()[..., None]


def _pass_on(added: Tensor, decay: Tensor, state: MambaState) -> Tensor:
    """Return the state that enters each chunk; store the state after the last one.

    added [B, chunks, heads, head_dim, state_size]; decay [B, chunks, heads].
    """
    current = _of_batch(state.ssm, state.rows)
    entering = []
    for chunk in range(added.shape[1]):
        entering.append(current)
        current = current * decay[:, chunk, :, None, None] + added[:, chunk]
    stacked = torch.stack(entering, dim=1)  # a copy: the state itself is overwritten next
    _put(state.ssm, state.rows, current)
    return stacked


# -- shapes -------------------------------------------------------------------------------------


def _split(sizes: MambaSizes, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [B, S, heads, head_dim], B and C [B, S, groups, state_size] each."""
    shared = sizes.groups * sizes.state_size
    x, b, c = torch.split(convolved, [sizes.inner, shared, shared], dim=-1)
    grouped = (*x.shape[:-1], sizes.groups, sizes.state_size)
    x = x.reshape(*x.shape[:-1], sizes.heads, sizes.head_dim)
    return x, b.reshape(grouped), c.reshape(grouped)


def _per_head(sizes: MambaSizes, shared: Tensor) -> Tensor:
    """[..., groups, state_size] -> [..., heads, state_size]"""
    return shared.repeat_interleave(sizes.heads // sizes.groups, dim=-2)


def _chunks(tensor: Tensor, size: int) -> Tensor:
    """[B, S, ...] -> [B, chunks, size, ...], padded with zeros at the end"""
    missing = -tensor.shape[1] % size
    padded = pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing))
    return padded.view(len(tensor), -1, size, *tensor.shape[2:])


def _spread(index: Tensor, over: Tensor) -> Tensor:
    """[B, n] int -> [B, n, channels of `over`] int64"""
    return index.long()[..., None].expand(-1, -1, over.shape[2])


def _of_batch(states: Tensor, rows: Tensor | None) -> Tensor:
    return states if rows is None else states.index_select(0, rows)


def _put(states: Tensor, rows: Tensor | None, new: Tensor) -> None:
    if rows is None:
        states.copy_(new)
    else:
        states.index_copy_(0, rows, new)
