"""Kernels of exact mode: right as defined, and on a GPU with bits that depend on nothing else.

The interpreter adds products in numpy's order, so it can show values but not bits.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from granite_paged.layers.mamba import (
    EXACT_CHUNK,
    MambaSizes,
    MambaState,
    ScanWeights,
    mamba_forward,
    norm_groups,
)
from tests.helpers.mamba_layers import mamba_layer
from tests.helpers.tolerance import assert_as_defined

pytest.importorskip("triton")

from granite_paged.layers.triton import (
    exact_attention,
    exact_linear,
    exact_scan,
    exact_step,
    pointwise,
)
from granite_paged.layers.triton.mamba import conv_weight, convolution

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FLOAT32 = 2e-6
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="the interpreter has other bits than a GPU")
HALF = [torch.bfloat16, torch.float16]


def normed(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


# -- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 20, 130])
def test_products_are_as_defined(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = (torch.randn(n, 72, device=DEVICE) for n in (rows, 40))
    product = x.double() @ weight.double().T
    halves = silu(product[:, :20]) * product[:, 20:]

    assert_as_defined(exact_linear.product(x, weight), product, FLOAT32)
    assert_as_defined(exact_linear.fused_product(x, weight, scale=0.5), product / 2, FLOAT32)
    assert_as_defined(exact_linear.gated_product(x, weight), halves, FLOAT32)


@pytest.mark.parametrize("rows", [1, 140])
def test_a_sum_is_normed(rows: int) -> None:
    torch.manual_seed(rows)
    x, hidden, norm = (torch.randn(n, 48, device=DEVICE) for n in (rows, rows, 1))
    expected = hidden.double() + 0.3 * x.double()

    after = exact_linear.add_norm(hidden, x, norm[0], scale=0.3, eps=1e-5)

    assert_as_defined(hidden, expected, FLOAT32)
    assert_as_defined(after, normed(expected, norm[0]), FLOAT32)
    assert_as_defined(pointwise.rms_norm(hidden, norm[0], 1e-5), after, FLOAT32)


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("columns", "depth"), [(1536, 3072), (1536, 4096), (6448, 1536)])
def test_a_product_has_the_same_bits_in_any_company(
    columns: int, depth: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(700, depth, device=DEVICE).to(dtype)
    weight = (torch.randn(columns, depth, device=DEVICE) / depth**0.5).to(dtype)
    hidden, norm = (torch.randn(n, columns, device=DEVICE).to(dtype) for n in (700, 1))

    def run(rows: int) -> tuple[Tensor, ...]:
        held, mine = hidden[:rows].clone(), x[:rows].contiguous()
        found = exact_linear.product(mine, weight)
        after = exact_linear.add_norm(held, found, norm[0], scale=0.22, eps=1e-5)
        return found, held, after, exact_linear.gated_product(mine, weight)

    whole = run(700)
    for rows in (1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512):
        for mine, expected in zip(run(rows), whole, strict=True):
            assert torch.equal(mine, expected[:rows]), rows
    assert exact_linear._agrees(512, depth, columns, dtype, x.device)


@needs_gpu
def test_a_library_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (torch.randn(n, 256, device=DEVICE).bfloat16() for n in (300, 80))
    exact_linear._agrees.cache_clear()
    real = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b: real(a[:, ::2], b[::2]) + real(a[:, 1::2], b[1::2])
    )
    assert torch.equal(exact_linear.product(x, weight), exact_linear.fused_product(x, weight))
    exact_linear._agrees.cache_clear()


# -- Mamba --------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "one group": {},
    "two groups": {"mamba_n_groups": 2},
    "wide": {"mamba_n_heads": 2, "mamba_d_head": 24, "mamba_d_state": 16, "mamba_chunk_size": 64},
    "odd": {"mamba_n_heads": 3, "mamba_d_head": 16, "mamba_d_state": 5, "mamba_d_conv": 3},
}


def cuts(chunk: int) -> dict[str, list[int]]:
    """Return ways to cut 3 * chunk + 8 tokens into steps, by name."""
    return {
        "whole": [3 * chunk + 8],
        "at chunks": [chunk, chunk, chunk + 8],
        "anywhere": [5, chunk - 6, 1, 1, chunk - 2, chunk + 7, 2],  # a token ends a chunk
        "token by token": [2 * chunk + 2, *[1] * (chunk + 6)],
    }


class Layer:
    """A Mamba layer whose first of three rows runs one sequence in pieces.

    Args:
        dtype: of the weights.
        chunk: tokens between two stored states.
        sizes: of the layer.
    """

    def __init__(self, dtype: torch.dtype, chunk: int = EXACT_CHUNK, **sizes: Any) -> None:
        self.chunk = chunk
        self.mixer = mamba_layer(**sizes)[0].to(DEVICE, dtype)
        self.sizes = MambaSizes.of(self.mixer)

    def empty(self) -> MambaState:
        """Return the states of three rows."""
        sizes, dtype = self.sizes, self.mixer.in_proj.weight.dtype
        rows = torch.tensor([1], device=DEVICE)
        state = sizes.empty_state(3, dtype, DEVICE)
        shape = (3, self.chunk, sizes.channels + sizes.heads)
        stale = torch.full(shape, 7.0, device=DEVICE, dtype=dtype)
        return state._replace(rows=rows, recent=stale)

    def run(self, projected: Tensor, pieces: list[int], pad: int = 0) -> tuple[Tensor, MambaState]:
        """Return the gated outputs of all tokens [tokens, inner], and the states."""
        state = self.empty()
        out, ends = [], list(itertools.accumulate([0, *pieces]))
        for start, end in itertools.pairwise(ends):
            if end - start == 1:
                gated = self.step(projected[start], start, state)
            else:
                positions = [*range(start, end), *[-1] * pad]
                piece = torch.nn.functional.pad(projected[start:end], (0, 0, 0, pad))
                gated = exact_scan.scan(
                    self.sizes,
                    piece.contiguous(),
                    torch.tensor([positions], device=DEVICE, dtype=torch.int32),
                    conv_weight(self.mixer),
                    self.mixer.conv1d.bias,
                    ScanWeights.of(self.mixer),
                    state,
                )
            out.append(gated[: end - start])
        return torch.cat(out), state

    def step(self, projected: Tensor, position: int, state: MambaState) -> Tensor:
        """Run one token. projected: [inner + channels + heads], computed by a unit matrix."""
        newest = torch.tensor([position], device=DEVICE, dtype=torch.int32)
        weights, conv = ScanWeights.of(self.mixer), convolution(self.mixer, newest, state)
        unit = torch.eye(len(projected), device=DEVICE, dtype=projected.dtype)
        convolved = exact_linear.fused_product(projected[None], unit, conv=conv)
        gated = exact_step.step(self.sizes, convolved, newest, weights, state)
        assert state.rows is not None
        assert state.recent is not None
        layer = (state.ssm[None], state.recent[None], weights.dt_bias[None], weights.a_log[None])
        exact_step.close_chunks(self.sizes, newest, state.rows, *layer)
        return gated


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ("one group", "whole"),
        ("two groups", "at chunks"),
        ("two groups", "token by token"),
        ("odd", "token by token"),
        *((shape, "anywhere") for shape in SHAPES),
    ],
)
@torch.inference_mode()
def test_the_scan_is_as_defined(shape: str, cut: str) -> None:
    """The chunks are short: a kernel's formulas do not depend on their length."""
    chunk, tokens = 16, 56
    layer = Layer(torch.float32, chunk, **SHAPES[shape])
    mixer, sizes = layer.mixer, layer.sizes
    hidden = torch.randn(tokens, 24, device=DEVICE)
    defined = sizes.empty_state(1, torch.float32, DEVICE)
    at = torch.arange(tokens, device=DEVICE)[None]
    expected = mamba_forward(mixer, hidden[None], at, defined)[0]

    gated, state = layer.run(mixer.in_proj(hidden), cuts(chunk)[cut], pad=3)

    norm = mixer.norm
    by_group = (tokens, norm_groups(mixer), -1)
    after = normed(gated.view(by_group), norm.weight.view(by_group[1:]), norm.variance_epsilon)
    mixed = mixer.out_proj(after.view(tokens, -1).float())
    assert_as_defined(mixed, expected, 20 * FLOAT32)
    assert_as_defined(state.conv[1:2], defined.conv, FLOAT32)
    whole = tokens // chunk * chunk
    stored = sizes.empty_state(1, torch.float32, DEVICE)
    mamba_forward(mixer, hidden[None, :whole], at[:, :whole], stored)
    assert_as_defined(state.ssm[1:2], stored.ssm, 20 * FLOAT32)


@torch.inference_mode()
def test_a_product_of_the_library_is_convolved_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows = Layer(torch.float32, 16), torch.tensor([2, -1, 0], device=DEVICE)
    weight = layer.mixer.in_proj.weight
    hidden = torch.randn(3, weight.shape[1], device=DEVICE)
    positions = torch.tensor([5, -1, 0], device=DEVICE, dtype=torch.int32)
    found = []
    for library in (False, True):
        monkeypatch.setattr(exact_linear, "_library_has", lambda x, w, has=library: has)
        state = layer.sizes.empty_state(3, torch.float32, DEVICE)._replace(rows=rows)
        state.conv.copy_(torch.linspace(-1, 1, state.conv.numel()).view(state.conv.shape))
        conv = convolution(layer.mixer, positions, state)
        projected = exact_linear.convolved_product(hidden, weight, conv)
        found.append((projected[[0, 2]], state.conv))
    for ours, theirs in zip(*found, strict=True):
        assert_as_defined(theirs, ours, FLOAT32)


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
@torch.inference_mode()
def test_a_scan_has_the_same_bits_wherever_it_is_cut(dtype: torch.dtype) -> None:
    sizes = {"mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "hidden_size": 1536}
    layer = Layer(dtype, **sizes)
    projected = torch.randn(200, layer.mixer.in_proj.out_features, device=DEVICE, dtype=dtype)
    whole, state = layer.run(projected, [200])
    assert whole.isfinite().all()
    for pieces in cuts(EXACT_CHUNK).values():
        out, after = layer.run(projected, pieces, pad=5)
        assert torch.equal(out, whole), (pieces, (out != whole).nonzero()[:3])
        assert torch.equal(after.ssm, state.ssm)
        assert torch.equal(after.conv, state.conv)


# -- attention ----------------------------------------------------------------------------------


def pool(dtype: torch.dtype, tokens: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and the page table of one sequence of `tokens` tokens, 16 per page.

    The memory of the keys is larger, as after a growth that failed.
    """
    torch.manual_seed(2)
    pages = -(-tokens // 16)
    keys, values = (
        torch.randn(1, 2, 16 * (pages + more), head_dim, device=DEVICE).to(dtype) for more in (5, 3)
    )
    keys = keys[:, :, : values.shape[2]]
    order = torch.randperm(pages + 2, device=DEVICE)[:pages] + 1
    table = torch.zeros(3, pages + 1, dtype=torch.int32, device=DEVICE)
    table[2, :pages] = order
    return keys, values, table


def attended(
    query: Tensor, start: int, parts: tuple[Tensor, Tensor, Tensor], padding: int = 0
) -> Tensor:
    """Attend from positions `start` on. query: [S, Hq * D]."""
    keys, values, table = parts
    positions = [*range(start, start + len(query)), *[-1] * padding]
    out = exact_attention.attend(
        torch.nn.functional.pad(query, (0, 0, 0, padding)).contiguous(),
        keys,
        values,
        torch.tensor([2], device=DEVICE),
        torch.tensor([positions], dtype=torch.int32, device=DEVICE),
        table,
        head_dim=keys.shape[3],
        page_size=16,
        scale=0.2,
    )
    return out[: len(query)]


@pytest.mark.parametrize(("start", "tokens"), [(0, 150), (100, 50), (149, 1), (0, 1)])
def test_attention_is_as_defined(start: int, tokens: int) -> None:
    parts = keys, values, table = pool(torch.float32, 150, 24)
    query = torch.randn(tokens, 6 * 24, device=DEVICE)
    slots = (table[2, :10, None].long() * 16 + torch.arange(16, device=DEVICE)).flatten()[:150]
    k, v = (part[0].index_select(1, slots).double() for part in (keys, values))
    by_head = query.view(tokens, 2, 3, 24).double()
    score = torch.einsum("shgd,htd->hgst", by_head, k) * 0.2
    seen = torch.arange(150, device=DEVICE) <= start + torch.arange(tokens, device=DEVICE)[:, None]
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("hgst,htd->shgd", weight, v).reshape(tokens, -1)

    assert_as_defined(attended(query, start, parts, padding=2), expected, 10 * FLOAT32)


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
def test_attention_has_the_same_bits_wherever_it_is_cut(dtype: torch.dtype) -> None:
    parts = pool(dtype, 500, 128)
    query = torch.randn(500, 6 * 128, device=DEVICE).to(dtype)
    whole = attended(query, 0, parts)
    for start, end in ((0, 7), (3, 300), (250, 500), (499, 500), (63, 64), (64, 65)):
        assert torch.equal(attended(query[start:end], start, parts, padding=9), whole[start:end])
