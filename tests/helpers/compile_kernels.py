"""Compile every Triton kernel for a GPU that need not be present.

    python -m tests.helpers.compile_kernels CAPABILITY SHARED_BYTES

SHARED_BYTES is the shared memory that a program may use on that GPU. Prints one JSON object that
maps each kernel to the most shared memory, in bytes, that one of its programs takes. The calls are
those of granite-4.0-h-1b's layers in bfloat16; nothing is launched.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from granite_paged.layers.mamba import MambaSizes, MambaState
from granite_paged.layers.triton import linear, mamba, pages, pointwise, tokens
from granite_paged.models import geometry_config

ROWS = (1, 5, 20, 40)
"""Rows of the decode steps: one row, and one number per tile size."""


class AbsentGpu:
    """The part of Triton's driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def compile_all() -> None:
    config = geometry_config("granite-4.0-h-1b")
    mixer = GraniteMoeHybridMambaLayer(config, 0).to(torch.bfloat16)
    sizes, hidden = MambaSizes.of(mixer), config.hidden_size
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    for rows in ROWS:
        conv, ssm, _ = sizes.empty_state(rows, torch.bfloat16, torch.device("cpu"))
        state = MambaState(conv, ssm, torch.arange(rows))
        newest = torch.zeros(rows, dtype=torch.int32)
        x = linear.prenorm(random(rows, hidden), norm)
        convolution = mamba.convolution(mixer, newest, state)
        projected, _ = linear.linear(x, mixer.in_proj.weight, eps=1e-5, conv=convolution)
        mamba.step(sizes, projected, newest, mamba.ScanWeights.of(mixer), state, mixer.norm.weight)
        linear.linear(x, (random(1536, hidden), random(512, hidden), random(512, hidden)))
        linear.linear(x, random(8192, hidden), eps=1e-5, gated=True)
        held = random(rows, hidden)
        linear.linear(random(rows, 4096), random(hidden, 4096), residual=held, norm=norm, out=held)
        for length in (1, 40, 600):
            at = torch.arange(length, dtype=torch.int32).repeat(rows, 1)
            whole = random(rows * length, sizes.inner + sizes.channels + sizes.heads)
            mamba.gated_scan(mixer, whole, at, state)
    pool = (random(1, 4, 20 * 128, 128), random(1, 4, 20 * 128, 128))
    table, newest = torch.zeros(3, 9, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    rows, bad = torch.arange(2), torch.zeros(3, dtype=torch.uint8)
    key = random(2, 512)
    pages.write_pages(key, key, pool, rows, newest[:, None], table, bad, 128)
    counts, listed = torch.zeros(2 * 33, dtype=torch.int32), torch.zeros(66, 9, dtype=torch.int32)
    pages.split_pages(rows, newest, table, (counts, listed, counts, listed), 33, 128)
    pointwise.rms_norm(key, norm[:512], 1e-5)
    pointwise.silu_mul(random(2, 8192))
    fed = torch.zeros(3, dtype=torch.int64)
    tokens.embed(fed, rows, random(config.vocab_size, hidden), 12.0, norm)
    tokens.write_argmax(random(2, config.vocab_size), rows, fed)


def main(capability: int, shared_bytes: int) -> None:
    found: dict[str, int] = defaultdict(int)
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **options)
        found[self.__name__] = max(found[self.__name__], made.metadata.shared)
        return made

    JITFunction.run = compiled
    driver.set_active(AbsentGpu(capability))
    early = {"EARLY": True, "launch_pdl": True} if capability >= 90 else {"EARLY": False}
    for module in (linear, mamba, tokens):
        module.early = lambda device: early
    linear.shared_memory = lambda device: shared_bytes
    with torch.inference_mode():
        compile_all()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
