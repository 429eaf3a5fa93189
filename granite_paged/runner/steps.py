"""The steps of a runner, one for each shape, compiled and captured when they are first needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from granite_paged.geometry import CacheGeometry, PagedConfig, bucket
from granite_paged.layers.attention import DecodePlan
from granite_paged.paging.masks import blocks_of
from granite_paged.progress import Progress
from granite_paged.runner.exact_model import ExactModel
from granite_paged.runner.graph import CapturedStep
from granite_paged.runner.model import EagerModel
from granite_paged.runner.precompile import StepShape, compiled_ahead
from granite_paged.runner.shapes import FEW_TOKENS, Shapes
from granite_paged.runner.storage import Storage

if TYPE_CHECKING:
    from granite_paged.layers.triton.masks import QueryBlockMask, SplitMask

FEW_ROWS = 64
"""Decode steps of up to this many rows compute attention for no more rows than this."""


class Steps:
    """Makes steps, and keeps those that are captured.

    Pickled, it is what another process needs to compile them: the model and the buffers.

    Args:
        live: the model, a `GraniteMoeHybridForCausalLM`.
        storage: the runner's buffers.
        config, geometry, shapes: of the runner.

    Attributes:
        model: runs the layers.
        late: number of steps that were captured outside of `warm_up`.
    """

    def __init__(
        self,
        live: Any,
        storage: Storage,
        config: PagedConfig,
        geometry: CacheGeometry,
        shapes: Shapes,
    ) -> None:
        self._parts = (live, storage, config, geometry, shapes)
        self._storage, self._geometry, self._shapes = storage, geometry, shapes
        self._device = storage.tokens.device
        self.model = _model(live, storage, config, captured=shapes.captured)
        self.late = 0
        self._captured: dict[tuple[int, int, bool], CapturedStep] = {}
        self._prefill_masks: dict[int, QueryBlockMask] = {}
        self._split_masks: dict[int, SplitMask] = {}
        self._graphs = torch.cuda.graph_pool_handle() if shapes.captured else None
        self._stream = _capture_stream(self._device) if shapes.captured else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, self._parts

    def step(self, batch: int, length: int, *, decodes: bool = False) -> CapturedStep:
        """Return the step of `batch` rows with `length` tokens each."""
        step = self._captured.get((batch, length, decodes))
        if step is None:
            step = self._capture(batch, length, decodes)
            self.late += self._stream is not None
        return step

    def warm_up(self, shapes: Sequence[StepShape], progress: Progress) -> None:
        """Compile steps of these shapes in several processes, and capture them here."""
        missing = [shape for shape in shapes if (*shape, shape[1] == 1) not in self._captured]
        with compiled_ahead(self, missing) as wait:
            for done, (batch, length) in enumerate(missing, len(shapes) - len(missing)):
                what = "decode" if length == 1 else "prefill"
                progress(f"{what} {batch} x {length}", done, len(shapes))
                wait((batch, length))
                self._capture(batch, length, length == 1)
        progress("ready", len(shapes), len(shapes))

    def compile(self, batch: int, length: int) -> None:
        """Compile what a step launches, and capture nothing."""
        self._made(batch, length, length == 1).compile(self._stream)

    def forget(self) -> None:
        """Discard the captured steps. Each is captured again at its next use."""
        self._captured.clear()

    def content(self) -> list[Any]:
        """Return what the kernels depend on, apart from code, versions and the device."""
        live, storage, config, geometry, _ = self._parts
        tensors = [*storage.stacked, storage.pages.table.physical, storage.pages.table.logical]
        return [live.config.to_dict(), geometry, config, [tuple(each.shape) for each in tensors]]

    # -- details --------------------------------------------------------------------------------

    def _made(self, batch: int, length: int, decodes: bool) -> CapturedStep:
        step = (self.model, self._storage, batch, length, decodes)
        if self._stream is None or not self.model.reads_mask:
            return CapturedStep(*step)
        if not decodes:
            blocks = query_blocks(self._shapes, batch, length, self._geometry.group)
            return CapturedStep(*step, prefill_mask=self._prefill_mask(blocks))
        pages, most = self._storage.pages.table.physical.shape[1], most_rows(self._shapes, batch)
        plan = DecodePlan.choose(self._geometry, batch, pages, self._device, most)
        return CapturedStep(*step, split=(plan, self._split_mask(plan.parts)))

    def _prefill_mask(self, blocks: int) -> QueryBlockMask:
        """Return the mask that all prefill steps with this number of query blocks share."""
        from granite_paged.layers.triton.masks import QueryBlockMask  # needs Triton

        if blocks not in self._prefill_masks:
            self._prefill_masks[blocks] = QueryBlockMask(self._storage.pages, blocks)
        return self._prefill_masks[blocks]

    def _split_mask(self, parts: int) -> SplitMask:
        """Return the mask that all decode steps with this number of parts share."""
        from granite_paged.layers.triton.masks import SplitMask  # needs Triton

        if parts not in self._split_masks:
            self._split_masks[parts] = SplitMask(self._storage.pages, parts)
        return self._split_masks[parts]

    def _capture(self, batch: int, length: int, decodes: bool) -> CapturedStep:
        step = self._made(batch, length, decodes)
        if self._stream is not None:
            step.capture(self._graphs, self._stream)
            self._captured[batch, length, decodes] = step
        return step


def most_rows(shapes: Shapes, batch: int) -> int:
    """Return the rows of the largest decode step that shares its compiled attention with this one.

    FlexAttention is compiled for each number of rows, so there are only two. Rows of padding end
    at once.
    """
    most = bucket(shapes.rows)
    return min(most, FEW_ROWS) if batch <= FEW_ROWS else most


def query_blocks(shapes: Shapes, batch: int, length: int, group: int) -> int:
    """Return the query blocks that attention of a captured prefill step computes.

    FlexAttention is compiled for each number of them, so there are only two: what the largest step
    of up to `FEW_TOKENS` tokens needs, and what the largest step needs. Blocks of padding end at
    once.

    group: query heads per KV head.
    """
    few = batch * length <= FEW_TOKENS
    return max(
        rows * blocks_of(tokens, group)
        for rows, tokens in shapes.all()
        if tokens > 1 and (rows * tokens <= FEW_TOKENS) == few
    )


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """Return one stream for all graphs: the matrix library keeps a workspace per stream."""
    make_stream: Any = torch.cuda.Stream
    return make_stream(device)


def _model(model: Any, storage: Storage, config: PagedConfig, *, captured: bool) -> EagerModel:
    if config.exact:
        return _exact_model(model, storage, config)
    if not captured:
        return EagerModel(model, storage, config.backend)
    from granite_paged.runner.triton_model import TritonModel  # needs Triton

    return TritonModel(model, storage, config.backend)


def _exact_model(model: Any, storage: Storage, config: PagedConfig) -> EagerModel:
    if model.device.type == "cpu":
        return ExactModel(model, storage, config.backend)
    from granite_paged.runner.exact_triton_model import ExactTritonModel  # needs Triton

    return ExactTritonModel(model, storage, config.backend)
