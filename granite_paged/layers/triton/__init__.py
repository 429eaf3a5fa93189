"""fp16 and bf16 Triton kernels where torch.compile stays far above the bandwidth bound.

Each kernel computes what a plain PyTorch function of the package defines (`layers/mamba.py`,
`paging/masks.py`, `paging/pool.py`). It is tested against that function, on the CPU under Triton's
interpreter and on a GPU. Nothing imports these modules until `layers/backend.py` finds that the
kernels can run.
"""

from __future__ import annotations

SCRATCH_NUMBERS, SCRATCH_TILES = 2**21, 2**12
"""Numbers (float32) and tiles (int32) of the scratch that products with a split depth share; 8.4 MB
in all."""
