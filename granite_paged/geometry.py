"""All sizes of a paged cache, from the model's config and the user's, validated once.

Heads, widths and layer kinds come from the config; no checkpoint is hard-coded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from granite_paged.arguments import instance, integer, number, one_of
from granite_paged.errors import GeometryError, UnsupportedModel

if TYPE_CHECKING:
    import torch  # the allocator and the scheduler import this module and run without it

Backend = Literal["auto", "eager", "compiled"]
"""How attention runs: `compiled`, FlexAttention as a fused kernel; `eager`, SDPA over gathered
pages; or `auto`: compiled on CUDA, eager on the CPU and for float64 (`layers/backend.py`)."""

MODEL_TYPE = "granitemoehybrid"

# transformers renamed the layer kinds; checkpoints with either name exist
ATTENTION_KINDS = frozenset({"attention", "full_attention"})
MAMBA_KINDS = frozenset({"mamba", "linear_attention"})


@dataclass(frozen=True, slots=True)
class PagedConfig:
    """The user's choices for a paged cache.

    Attributes:
        page_size: tokens per page, a power of two; at least 16 where FlexAttention is compiled.
            Smaller pages waste less memory; larger ones make page tables and block lists shorter.
        memory_fraction: most memory for all K and V pools, as a fraction of the memory that is
            free when the cache is made (on a CPU, of the host's whole memory). Sequences take pages
            only as they need them.
        max_tokens: fixed size of the pools in tokens, allocated at once. None: pools grow with
            the demand of `generate()`, up to `memory_fraction`.
        max_sequences: most sequences at once. None: bounded by memory alone under `generate()`;
            up to 256 in a runner, which allocates their rows at once.
        chunk_tokens: most prompt tokens that a runner computes in one step, a power of two.
        backend: see `Backend`.
        check_finite: raise `NonFinite`, which names the part, after a step of `PagedCache` with
            NaN or infinity in K or V, in a later layer, or in the logits. This waits for the device
            twice per step. If False, such numbers count as 0 in K and V.
        exact: give each request the same bits whatever else runs. Slower. Models and devices that
            cannot do it are refused.

    Raises:
        GeometryError: for a value of the wrong type or out of range.
    """

    page_size: int = 128
    memory_fraction: float = 0.5
    max_tokens: int | None = None
    max_sequences: int | None = None
    chunk_tokens: int = 2048
    backend: Backend = "auto"
    check_finite: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        for name, least, optional in (
            ("page_size", 1, False),
            ("max_tokens", 1, True),
            ("max_sequences", 1, True),
            ("chunk_tokens", 16, False),
        ):
            if not (optional and getattr(self, name) is None):
                checked = integer(name, getattr(self, name), least, error=GeometryError)
                object.__setattr__(self, name, checked)
        if self.page_size & (self.page_size - 1):
            raise GeometryError(f"page_size must be a power of two, got {self.page_size}")
        share = "be a number in (0, 1]"
        fraction = number(
            "memory_fraction", self.memory_fraction, _is_share, share, error=GeometryError
        )
        object.__setattr__(self, "memory_fraction", fraction)
        if self.max_tokens is not None and self.max_tokens < self.page_size:
            raise GeometryError(
                f"max_tokens must be at least page_size {self.page_size}, got {self.max_tokens}"
            )
        if self.chunk_tokens & (self.chunk_tokens - 1):
            raise GeometryError(f"chunk_tokens must be a power of two, got {self.chunk_tokens}")
        one_of("backend", self.backend, ("auto", "eager", "compiled"), error=GeometryError)
        for name in ("check_finite", "exact"):
            instance(name, getattr(self, name), bool, error=GeometryError)

    @classmethod
    def checked(cls, config: PagedConfig | None) -> PagedConfig:
        """Return the config, or the default one. Raises GeometryError for another type."""
        return cls() if config is None else instance("config", config, cls, error=GeometryError)


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """The sizes of a model that its cache depends on.

    Attributes:
        page_size: tokens per page.
        attention_layers: indices of the layers with K and V.
        mamba_layers: indices of the layers with a recurrent state.
        query_heads, kv_heads: heads of an attention layer.
        head_dim: elements per head.
        dtype: dtype of K and V.
    """

    page_size: int
    attention_layers: tuple[int, ...]
    mamba_layers: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise GeometryError(f"page_size must be at least 1, got {self.page_size}")
        if self.kv_heads < 1 or self.query_heads < 1 or self.query_heads % self.kv_heads:
            raise GeometryError(
                f"{self.query_heads} query heads are no multiple of {self.kv_heads} KV heads"
            )
        if not self.attention_layers:
            raise GeometryError("the model has no attention layer, so there is nothing to page")

    @classmethod
    def from_config(cls, config: Any, *, page_size: int, dtype: torch.dtype) -> CacheGeometry:
        """Read the sizes from a transformers config.

        Raises:
            UnsupportedModel: for a model type other than `granitemoehybrid`.
            GeometryError: for an unknown kind of layer, or query heads that are no multiple of the
                KV heads.
        """
        model_type = getattr(config, "model_type", type(config).__name__)
        if model_type != MODEL_TYPE:
            raise UnsupportedModel(f"model type {model_type!r}")
        kinds = list(config.layers_block_type)
        unknown = set(kinds) - ATTENTION_KINDS - MAMBA_KINDS
        if unknown:
            raise GeometryError(f"unknown layer kinds in the config: {', '.join(sorted(unknown))}")
        head_dim = getattr(config, "head_dim", None)
        return cls(
            page_size=page_size,
            attention_layers=tuple(i for i, kind in enumerate(kinds) if kind in ATTENTION_KINDS),
            mamba_layers=tuple(i for i, kind in enumerate(kinds) if kind in MAMBA_KINDS),
            query_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
        )

    @property
    def group(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.query_heads // self.kv_heads

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V, over all attention layers."""
        return 2 * len(self.attention_layers) * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page's K and V, over all attention layers."""
        return self.page_size * self.bytes_per_token

    def pages_for(self, tokens: int) -> int:
        """Return the pages that `tokens` tokens of one sequence take."""
        return pages_for(tokens, self.page_size)


def _is_share(value: float) -> bool:
    return 0 < value <= 1


def pages_for(tokens: int, page_size: int) -> int:
    """Return the pages that `tokens` tokens of one sequence take; the last may be partly filled."""
    return -(-tokens // page_size)


def bucket(count: int, *, steps: int = 1) -> int:
    """Round `count` up to one of `steps` sizes per octave, so that few shapes are compiled.

    With one step: 1, 2, 4, 8 ... With two: 1, 2, 3, 4, 6, 8, 12, 16 ... The excess is below
    1 / steps of `count`.
    """
    octave = 1 << max(0, count.bit_length() - 1)
    step = max(1, octave // steps)
    return -(-count // step) * step
