"""Triton kernels for half precision on a GPU: what Inductor leaves far from the memory floor.

Each does what a plain PyTorch function of the package defines (`mamba.py`, `masks.py`, `pool.py`)
and is tested against it, on the CPU under Triton's interpreter and on a GPU. Nothing here is
imported before a runner asks for it.
"""

from __future__ import annotations

SCRATCH_NUMBERS, SCRATCH_TILES = 2**21, 2**12
"""float32 and int32 that products of few rows share while their depth is split: 8.4 MB."""
