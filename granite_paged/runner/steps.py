"""The steps of a runner, one for each shape, compiled and captured when they are first needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.layers.attention import DecodePlan
from granite_paged.progress import Progress
from granite_paged.runner.exact_model import ExactModel
from granite_paged.runner.graph import CapturedStep
from granite_paged.runner.model import EagerModel
from granite_paged.runner.precompile import StepShape, compiled_ahead
from granite_paged.runner.storage import Storage


class Steps:
    """Makes steps, and keeps those that are captured.

    Pickled, it is what another process needs to compile them: the model and the buffers.

    Args:
        live: the model, a `GraniteMoeHybridForCausalLM`.
        storage: the runner's buffers.
        config, geometry: of the runner.
        fallback: why steps are not captured; empty if they are.

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
        fallback: str,
    ) -> None:
        self._parts = (live, storage, config, geometry, fallback)
        self._storage, self._geometry = storage, geometry
        self._device = storage.tokens.device
        self.model = _model(live, storage, config, fallback)
        self.late = 0
        self._captured: dict[tuple[int, int, bool], CapturedStep] = {}
        self._graphs = None if fallback else torch.cuda.graph_pool_handle()
        self._stream = None if fallback else _capture_stream(self._device)

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
        plan = None
        if self._stream is not None and self.model.reads_mask:
            pages = self._storage.pages.table.physical.shape[1]
            plan = DecodePlan.choose(self._geometry, batch, pages, self._device)
        return CapturedStep(self.model, self._storage, batch, length, decodes, plan)

    def _capture(self, batch: int, length: int, decodes: bool) -> CapturedStep:
        step = self._made(batch, length, decodes)
        if self._stream is not None:
            step.capture(self._graphs, self._stream)
            self._captured[batch, length, decodes] = step
        return step


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """Return one stream for all graphs: the matrix library keeps a workspace per stream."""
    make_stream: Any = torch.cuda.Stream
    return make_stream(device)


def _model(model: Any, storage: Storage, config: PagedConfig, fallback: str) -> EagerModel:
    if config.exact:
        return _exact_model(model, storage, config)
    if fallback:
        return EagerModel(model, storage, config.backend)
    from granite_paged.runner.triton_model import TritonModel  # needs Triton

    return TritonModel(model, storage, config.backend)


def _exact_model(model: Any, storage: Storage, config: PagedConfig) -> EagerModel:
    if model.device.type == "cpu":
        return ExactModel(model, storage, config.backend)
    from granite_paged.runner.exact_triton_model import ExactTritonModel  # needs Triton

    return ExactTritonModel(model, storage, config.backend)
