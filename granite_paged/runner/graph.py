"""A step of one shape, captured as a CUDA graph. Its inputs stay at fixed addresses.

::

    inputs    rows [B] | positions [B * S] | of a prefill also: tokens [B * S] | last [B]   int64
    hidden    [B, S, hidden], of a prefill
    logits    [B, vocabulary], of the last token of each row

One copy brings the inputs to the device. Nothing in the step depends on the host.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from granite_paged.layers.attention import DecodePlan
from granite_paged.layers.backend import COMPILING
from granite_paged.paging.masks import PADDING, paged_block_mask
from granite_paged.runner.memory_plan import memory_refused
from granite_paged.runner.model import EagerModel, ModelStep
from granite_paged.runner.storage import Storage

if TYPE_CHECKING:
    from granite_paged.layers.triton.masks import QueryBlockMask, SplitMask


class Inputs(NamedTuple):
    """A step's inputs on the host, padding until the caller writes them.

    Attributes:
        flat: [n] int64, all inputs; the others are views of it.
        rows: [B], state rows.
        positions: [B, S].
        tokens: [B, S], empty for a decode step.
        last: [B], index of each row's last token in [B * S]; empty for a decode step.
    """

    flat: Tensor
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]
    last: NDArray[np.int64]


class CapturedStep:
    """A step of one shape.

    Args:
        model: runs the layers.
        storage: the runner's buffers. A decode step reads its input tokens from `storage.tokens`
            and writes each row's argmax there.
        batch: rows (B).
        length: tokens per row (S).
        decodes: whether this is a decode step; its length is 1.
        prefill_mask: the mask of a prefill step whose query blocks attend separately, which steps
            share; None for a step with a mask of its own.
        split: how a decode step splits its rows, and its mask, which steps share; None if it does
            not.

    Attributes:
        hidden: [B, S, hidden], of the last prefill.
        logits: [B, vocabulary], of each row's last token.
    """

    hidden: Tensor
    logits: Tensor

    def __init__(
        self,
        model: EagerModel,
        storage: Storage,
        batch: int,
        length: int,
        decodes: bool,
        prefill_mask: QueryBlockMask | None = None,
        split: tuple[DecodePlan, SplitMask] | None = None,
    ) -> None:
        self._model, self._storage, self._tokens = model, storage, storage.tokens
        self._batch, self._length, self._decodes = batch, length, decodes
        self._device = storage.tokens.device
        of_prefill = [0, 0] if decodes else [batch * length, batch]
        ends = list(accumulate([batch, batch * length, *of_prefill]))
        self._spans = list(pairwise([0, *ends]))
        self._inputs = torch.zeros(ends[-1], dtype=torch.int64, device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prefill_mask, self._split = prefill_mask, split

    def padding(self) -> Inputs:
        """Return inputs that are all padding, for the caller to fill."""
        pinned = self._graph is not None
        flat = torch.zeros(len(self._inputs), dtype=torch.int64, pin_memory=pinned)
        numbers, shape = flat.numpy(), (self._batch, -1)
        rows, positions, tokens, last = (numbers[start:end] for start, end in self._spans)
        positions.fill(PADDING)
        return Inputs(flat, rows, positions.reshape(shape), tokens.reshape(shape), last)

    def run(self, inputs: Inputs) -> None:
        """Copy the inputs to the device, and compute."""
        self._inputs.copy_(inputs.flat, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
            return
        with memory_refused(self._device, "a step"), torch.inference_mode():
            self._compute()

    def compile(self, stream: Any) -> None:
        """Compute padding once on this stream, which compiles everything.

        Raises:
            OutOfMemory: if the step does not fit into the memory that is free.
        """
        self._inputs.copy_(self.padding().flat)
        what = f"a step of {self._batch} x {self._length} tokens"
        with COMPILING, memory_refused(self._device, what), torch.inference_mode():
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                self._compute()
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def capture(self, pool: Any, stream: Any) -> None:
        """Compile the step, then capture it. Raises as `compile` does.

        Args:
            pool: graph memory pool that all steps share.
            stream: where both run.
        """
        what = f"a step of {self._batch} x {self._length} tokens"
        with COMPILING, memory_refused(self._device, what), torch.inference_mode():
            self.compile(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: threads of other GPUs go on allocating memory while this one records
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._compute()
            self._graph = graph
            self.run(self.padding())  # the first replay takes longer: it sends the graph

    def _compute(self) -> None:
        rows, positions, tokens, last = (self._inputs[start:end] for start, end in self._spans)
        positions = positions.view(self._batch, self._length).int()
        step = self._with_mask(ModelStep(rows, rows - 1, positions, None))
        if self._decodes:
            self.logits = self._model.decode(self._tokens, step)
            self._model.write_argmax(self.logits, rows)
            return
        self.hidden = self._model.forward(tokens.view(self._batch, self._length), step)
        self.logits = self._model.logits(self.hidden.flatten(0, 1).index_select(0, last))

    def _with_mask(self, step: ModelStep) -> ModelStep:
        if not self._model.reads_mask:
            return step
        if self._split is not None:
            plan, mask = self._split
            filled = mask.fill(step.rows, step.positions[:, 0], plan.splits)
            return step._replace(block_mask=filled, plan=plan)
        if self._prefill_mask is not None:
            filled = self._prefill_mask.fill(step.rows, step.positions)
            return step._replace(block_mask=filled, in_blocks=True)
        store = self._storage.pages
        plain = paged_block_mask(
            store.table.physical.index_select(0, step.rows),
            store.table.logical,
            step.positions,
            page_size=store.geometry.page_size,
            group=store.geometry.group,
            gathers=self._model.gathers,
        )
        return step._replace(block_mask=plain)
