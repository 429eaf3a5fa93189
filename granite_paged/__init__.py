"""Paged attention on PyTorch FlexAttention for IBM Granite-4 hybrid models, for inference.

Importing compiles, registers and patches nothing.
"""

from granite_paged.cache import PagedCache
from granite_paged.geometry import PagedConfig
from granite_paged.integrate import is_patched, paged, patch, unpatch

__all__ = ["PagedCache", "PagedConfig", "is_patched", "paged", "patch", "unpatch"]

__version__ = "0.1.0"
