"""Compile every Triton kernel for GPUs that need not be present.

    python -m tests.helpers.compile_kernels '{"80": 166912, "90": 232448}'

The argument is JSON: compute capabilities, and the shared memory in bytes that a program may use
on each. Prints a JSON object of the same keys, which maps each kernel, as MODULE.NAME, to the most
shared memory, in bytes, that one of its programs takes. The calls are those of granite-4.0-h-1b's
layers in bfloat16; nothing is launched.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from granite_paged.layers.mamba import EXACT_CHUNK, Kept, MambaSizes, MambaState, ScanWeights
from granite_paged.layers.triton import (
    combine,
    exact_attention,
    exact_linear,
    exact_scan,
    exact_step,
    linear,
    mamba,
    masks,
    pages,
    pointwise,
    scan,
    tokens,
)
from granite_paged.models import geometry_config


class Tiles(NamedTuple):
    """Rows of decode steps, tokens of scans, rows of exact mode's products: one per tile size."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    products: tuple[int, ...]


EVERY_TILE = Tiles((1, 5, 20, 40), (40, 600), (1, 20, 40, 100, 130))
LARGEST_TILES = Tiles((1, 40), (600,), (40, 130))
"""For older devices: smaller tiles of the same kernels need less shared memory."""


class AbsentGpu:
    """The part of Triton's driver that compiling needs. Each capability is a device."""

    def __init__(self, capability: int) -> None:
        self._device = capability
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def unset(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def compile_all(tiles: Tiles = EVERY_TILE) -> None:
    config = geometry_config("granite-4.0-h-1b")
    mixer = GraniteMoeHybridMambaLayer(config, 0).to(torch.bfloat16)
    sizes, hidden = MambaSizes.of(mixer), config.hidden_size
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    for rows in tiles.rows:
        newest, cpu = torch.zeros(rows, dtype=torch.int32), torch.device("cpu")
        states = [
            sizes.empty_state(rows, torch.bfloat16, cpu, kept)._replace(rows=torch.arange(rows))
            for kept in (Kept.NOTHING, Kept.REPLAY)
        ]
        x = linear.prenorm(unset(rows, hidden), norm)
        convolution, weights = mamba.convolution(mixer, newest, states[0]), ScanWeights.of(mixer)
        projected, _ = linear.linear(x, mixer.in_proj.weight, eps=1e-5, conv=convolution)
        mamba.step(sizes, projected, newest, weights, states[1], mixer.norm.weight)
        linear.linear(x, (unset(1536, hidden), unset(512, hidden), unset(512, hidden)))
        linear.linear(x, unset(8192, hidden), eps=1e-5, gated=True)
        held = unset(rows, hidden)
        linear.linear(unset(rows, 4096), unset(hidden, 4096), residual=held, norm=norm, out=held)
        for length in (1, *tiles.tokens):
            at = torch.arange(length, dtype=torch.int32).repeat(rows, 1)
            whole = unset(rows * length, sizes.inner + sizes.channels + sizes.heads)
            for state in states:
                mamba.gated_scan(mixer, whole, at, state)
    many = linear.MOST_ROWS + 1
    at, whole = torch.zeros(many, 1, dtype=torch.int32), unset(many, whole.shape[1])
    for state in states:
        mamba.gated_scan(mixer, whole, at, state._replace(rows=torch.arange(many)))
    pool = (unset(1, 4, 20 * 128, 128), unset(1, 4, 20 * 128, 128))
    table, newest = torch.zeros(3, 9, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    rows, bad = torch.arange(2), torch.zeros(3, dtype=torch.uint8)
    key = unset(2, 512)
    pages.write_pages(key, key, pool, rows, newest[:, None], table, bad, 128)
    queries = unset(2, 1536), unset(2, 1, 33, 4, 3, 128)
    pages.write_pages(key, key, pool, rows, newest[:, None], table, bad, 128, queries)
    maps = SimpleNamespace(physical=table, logical=torch.zeros(20, dtype=torch.int32))
    store: Any = SimpleNamespace(
        table=maps, pages=20, geometry=SimpleNamespace(page_size=128, group=3)
    )
    combine.combine(unset(67, 4, 3, 128), torch.zeros(67, 4, 3), 2, 33)
    combine.combine(unset(67, 1, 4, 256), torch.zeros(67, 1, 4), 1, 66)
    masks.SplitMask(store, 67).fill(rows, newest, 33)
    masks.QueryBlockMask(store, 48).fill(rows, newest[:, None])
    pointwise.rms_norm(key, norm[:512], 1e-5)
    pointwise.silu_mul(unset(2, 8192))
    fed = torch.zeros(3, dtype=torch.int64)
    tokens.embed(fed, rows, unset(config.vocab_size, hidden), 12.0, norm)
    tokens.write_argmax(unset(2, config.vocab_size), rows, fed, torch.zeros(3, dtype=torch.uint8))
    compile_exact(mixer, tiles.products)


def compile_exact(mixer: Any, products: Iterable[int]) -> None:
    """Call the kernels of exact mode. products: rows of products."""
    sizes, weights, hidden = MambaSizes.of(mixer), ScanWeights.of(mixer), 1536
    width = sizes.channels + sizes.heads
    conv, ssm, *_ = sizes.empty_state(1, torch.bfloat16, torch.device("cpu"))
    state = MambaState(conv, ssm, torch.arange(1), unset(1, EXACT_CHUNK, width))
    newest = torch.zeros(1, dtype=torch.int32)
    narrow, wide, norm = unset(hidden, hidden), unset(8192, hidden), unset(hidden)
    for rows in products:
        x = pointwise.rms_norm(unset(rows, hidden), norm, 1e-5)
        exact_linear.product(x, narrow)
        exact_linear.product(x, wide)
        exact_linear.gated_product(x, wide)
        exact_linear.add_norm(x, x, norm, scale=0.2, eps=1e-5)
    convolution = mamba.convolution(mixer, newest, state)
    projected = exact_linear.fused_product(x[:1], mixer.in_proj.weight, conv=convolution)
    exact_step.step(sizes, projected, newest, weights, state)
    layers = (ssm[None], unset(1, 1, EXACT_CHUNK, width), weights.dt_bias[None])
    exact_step.close_chunks(sizes, newest, torch.arange(1), *layers, weights.a_log[None])
    pool, table = (unset(1, 4, 3 * 128, 128), unset(1, 4, 3 * 128, 128)), torch.ones(1, 2).int()
    several = torch.arange(40, dtype=torch.int32)[None]
    whole, conv_weight = unset(40, sizes.inner + width), mamba.conv_weight(mixer)
    exact_scan.scan(sizes, whole, several, conv_weight, mixer.conv1d.bias, weights, state)
    for at in (newest[None], several):
        exact_attention.attend(
            unset(at.numel(), hidden), *pool, torch.arange(1), at, table,
            head_dim=128, page_size=128, scale=0.1,
        )  # fmt: skip


def main(limits: dict[str, int]) -> None:
    found: dict[str, dict[str, int]] = {capability: defaultdict(int) for capability in limits}
    run = JITFunction.run
    for capability, shared_bytes in limits.items():
        JITFunction.run = noting(run, found[capability])
        driver.set_active(AbsentGpu(int(capability)))
        prepare(int(capability), shared_bytes)
        newest = capability == max(limits, key=int)
        with torch.inference_mode():
            compile_all(EVERY_TILE if newest else LARGEST_TILES)
    print(json.dumps(found))


def noting(run: Callable[..., Any], sizes: dict[str, int]) -> Callable[..., Any]:
    """Return `JITFunction.run` that compiles only, and notes the shared memory of each kernel."""

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        name = f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}"
        sizes[name] = max(sizes[name], made.metadata.shared)
        return made

    return compiled


def prepare(capability: int, shared_bytes: int) -> None:
    """Give the kernels' modules the options of a GPU."""
    early = {"EARLY": True, "launch_pdl": True} if capability >= 90 else {"EARLY": False}
    for module in (exact_linear, exact_step, linear, mamba, pointwise, scan, tokens):
        module.early = lambda device: early
    for module in (exact_linear, linear):
        module.shared_memory = lambda device: shared_bytes


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
