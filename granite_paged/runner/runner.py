"""Run a model over pages and state rows, in steps of fixed shapes.

A runner owns device memory and no policy: its caller decides, with a `PageAllocator`, which
sequence has which pages and which row. All memory is allocated when the runner is made. Changes of
pages are gathered on the host and cross to the device in one copy, when a step needs them.

::

    row 0, page 0     take padding and belong to no sequence
    tokens[row]       next input token of the row; a decode step stores its argmax here, sampling
                      overwrites it
    nonfinite[row]    whether the row met NaN or infinity since it was cleared

On a GPU, every step replays a CUDA graph (`graph.py`): there is one decode step for each power of
two of rows, and a prefill for a few shapes of chunks. No such step waits for the device. On the
CPU, and where the kernels cannot run, the same steps run eagerly in the shape of their inputs.

Every step names its rows, so running sequences never move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from granite_paged.device import available_bytes, to_device
from granite_paged.errors import InvalidRequest, PromptError, UnsupportedModel
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.hf.patching import is_patched
from granite_paged.layers.backend import check_exact, triton_refusal, warn_if_slow
from granite_paged.layers.logprobs import log_probabilities
from granite_paged.layers.mamba import mixers
from granite_paged.layers.modules import check_model
from granite_paged.paging.allocator import AppendPlan
from granite_paged.paging.store import PageContents, PageStore
from granite_paged.progress import Progress, silent
from granite_paged.runner.graph import CapturedStep, Inputs
from granite_paged.runner.memory_plan import (
    SCORED_AT_ONCE,
    MemoryPlan,
    choose_sizes,
    kept_inputs,
    memory_refused,
    plan_memory,
    row_bytes,
)
from granite_paged.runner.model import EagerModel
from granite_paged.runner.shapes import Batch, Shapes
from granite_paged.runner.steps import Steps
from granite_paged.runner.storage import NULL_ROW, RowSnapshot, Storage, make_storage
from granite_paged.runner.watch import Look


class Chunk(NamedTuple):
    """New tokens of one row, beginning at position `start`."""

    row: int
    start: int
    tokens: Sequence[int]


class Scores(NamedTuple):
    """Scores of target tokens, in the order of the chunks.

    Attributes:
        logprobs: [tokens of all chunks] float32.
        greedy: [tokens of all chunks] bool, whether the target was the argmax.
    """

    logprobs: Tensor
    greedy: Tensor


class Runner:
    """One model on one device. Make it with `Runner.for_model`.

    Attributes:
        rows: number of rows for sequences; they are rows 1 to `rows`.
        pages: pages of each pool, the null page included.
        longest: most tokens of a sequence.
        chunk_tokens: most tokens that a prefill computes at once.
        shapes: shapes of the steps, and their costs.
        alignment: chunks that start at a multiple of it give the same results as one long prompt.
        plan: bytes of memory, by purpose.
        row_bytes: bytes of a row's Mamba states, as `save_row` copies them.
        fallback: why steps run without kernels and graphs; empty if they run with them.
        tokens: [rows + 1] int64 on the device, each row's next input token.
        nonfinite: [rows + 1] uint8 on the device, whether a row met NaN or infinity since it was
            cleared.
    """

    def __init__(
        self, model: Any, config: PagedConfig, geometry: CacheGeometry, fallback: str
    ) -> None:
        self.config, self.geometry = config, geometry
        self.device, self.dtype = model.device, model.dtype
        self.vocabulary = int(model.config.vocab_size)
        self.fallback = fallback
        self.chunk_tokens = config.chunk_tokens
        sizes = choose_sizes(model, config, geometry, available_bytes(self.device))
        self.plan: MemoryPlan = plan_memory(model, config, geometry, sizes)
        self.rows, self.pages, self.longest = sizes.rows, sizes.pages, sizes.longest
        self.row_bytes = row_bytes(model, config)
        layers = mixers(model)
        self.alignment = max((mixer.chunk_size for mixer in layers.values()), default=1)
        if config.exact and self.device.type == "cpu":
            self.alignment = 1  # each token is computed by itself
        self.shapes = self._shapes()
        with memory_refused(self.device, "the pools and rows"):
            width = geometry.pages_for(self.longest)
            pages = PageStore(geometry, self.pages, self.device, rows=self.rows + 1, width=width)
            self._storage = make_storage(
                pages,
                layers,
                self.rows,
                self.dtype,
                self.device,
                kept=kept_inputs(model, config),
            )
        self.tokens, self.nonfinite = self._storage.tokens, self._storage.nonfinite
        self._live, self._look = model, Look(model)
        self._steps = Steps(model, self._storage, config, geometry, self.shapes)

    @classmethod
    def for_model(cls, model: Any, config: PagedConfig | None = None) -> Runner:
        """Make a runner for a live, unpatched `GraniteMoeHybridForCausalLM` in eval mode.

        Raises:
            OutOfMemory: with the bytes needed and free.
            UnsupportedModel, GeometryError: see `check_model` and `CacheGeometry.from_config`.
            CannotBeExact: see `check_exact`.
        """
        check_model(model)
        config = PagedConfig.checked(config)
        geometry = CacheGeometry.from_config(
            model.config, page_size=config.page_size, dtype=model.dtype
        )
        if config.exact:
            check_exact(model, config.backend)
        fallback = triton_refusal(model, config.backend)
        warn_if_slow(fallback, model.device, model.dtype)
        return cls(model, config, geometry, fallback)

    @property
    def storage(self) -> Storage:
        """Page table, pools and states, settled, for tests and profilers."""
        self._storage.settle()
        return self._storage

    # -- steps ----------------------------------------------------------------------------------

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute new tokens of some rows. Their pages must be written first.

        Returns:
            [chunks, vocabulary] logits of each chunk's last token. The next step overwrites them.

        Raises:
            InvalidRequest: for a chunk that is too long, or a row or position outside the runner.
            PromptError: for an empty chunk.
        """
        aligned = all(chunk.start % self.alignment == 0 for chunk in chunks)
        steps = self._arranged(chunks, cut=aligned)
        if len(steps) == 1:
            return self._run_chunks(chunks, steps[0]).logits[: len(chunks)]
        logits = torch.empty(len(chunks), self.vocabulary, dtype=self.dtype, device=self.device)
        for step in steps:
            done = self._run_chunks(chunks, step)
            ended = {
                piece.chunk: place
                for place, piece in enumerate(step.pieces)
                if piece.end == len(chunks[piece.chunk].tokens)
            }
            if ended:
                which, places = map(torch.tensor, (list(ended), list(ended.values())))
                to, source = to_device(self.device, which, places)
                logits.index_copy_(0, to, done.logits.index_select(0, source))
        return logits

    def score(self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]) -> Scores:
        """Compute new tokens as `prefill` does, and the log-probability of a target after each.

        Args:
            chunks: as for `prefill`.
            targets: one target token for each token of each chunk.

        Raises:
            InvalidRequest: also where a chunk and its targets differ in length.
        """
        if [len(chunk.tokens) for chunk in chunks] != [len(each) for each in targets]:
            raise InvalidRequest("score needs one target for each token of each chunk")
        found: dict[int, Scores] = {}
        for step in self._arranged(chunks, cut=False):
            members = [piece.chunk for piece in step.pieces]
            counts = [len(targets[member]) for member in members]
            places = [place * step.length + i for place, n in enumerate(counts) for i in range(n)]
            wanted = [target for member in members for target in targets[member]]
            at, after = to_device(self.device, torch.tensor(places), torch.tensor(wanted))
            hidden = self._run_chunks(chunks, step).hidden
            at_targets = hidden.flatten(0, 1).index_select(0, at)
            scores = _scored(self._steps.model, at_targets, after, exact=self.config.exact)
            by_chunk = (torch.split(part, counts) for part in scores)
            found.update(zip(members, map(Scores, *by_chunk), strict=True))
        in_order = [found[i] for i in range(len(chunks))]
        return Scores(*(torch.cat(parts) for parts in zip(*in_order, strict=True)))

    def decode(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Compute each row's token from `tokens`, and store the argmax of its logits there.

        Args:
            rows: rows to run.
            positions: position of each row's token. Its page must be written first.

        Returns:
            [rows, vocabulary] logits. The next step overwrites them.

        Raises:
            InvalidRequest: for a row outside the runner, or a position not below `longest`.
        """
        if not rows or len(rows) != len(positions):
            raise InvalidRequest(
                f"decode needs one position per row, got {len(positions)} for {len(rows)} rows"
            )
        self._check_rows(rows)
        first, last = min(positions), max(positions)
        if first < 0 or last >= self.longest:
            raise InvalidRequest(f"positions must be below {self.longest}, got {first} to {last}")
        step = self._steps.step(self.shapes.decode_batch(len(rows)), 1, decodes=True)
        inputs = step.padding()
        inputs.rows[: len(rows)] = rows
        inputs.positions[: len(rows), 0] = positions
        self._run(step, inputs)
        return step.logits[: len(rows)]

    def warm_up(
        self,
        progress: Progress = silent,
        *,
        wanted: Callable[[int, int], bool] = lambda batch, length: True,
    ) -> None:
        """Compile and capture shapes now instead of at their first use.

        Several processes compile what no start before has compiled. Called again after an
        interrupt, it goes on with what is missing.

        Args:
            progress: called with each shape.
            wanted: whether to prepare a shape, by rows and tokens per row (1: a decode step).
        """
        self._steps.warm_up([shape for shape in self.shapes.all() if wanted(*shape)], progress)

    @property
    def late_captures(self) -> int:
        """Number of steps that were compiled and captured while a caller waited for them."""
        return self._steps.late

    def forget_captured_steps(self) -> None:
        """Discard the captured steps. Each is captured again at its next use."""
        self._steps.forget()

    def notice_changes(self, *, idle: bool) -> bool:
        """Return whether the live model changed since the last call, and run what it is now.

        Args:
            idle: whether no step runs on the device, so that waiting for it costs nothing.

        Raises:
            UnsupportedModel: if it cannot be run any more, or has another dtype or device.
            CannotBeExact: if it cannot be run in exact mode any more.
        """
        model, idle = self._live, idle or self.device.type == "cpu"
        has_moved = self._look.has_moved()
        if not has_moved and not self._look.was_written(compare=idle):
            return False
        if has_moved:
            if not is_patched(model):  # patches do not concern a runner
                check_model(model)
            if (model.dtype, model.device) != (self.dtype, self.device):
                what = f"a model that became {model.dtype} on {model.device}"
                raise UnsupportedModel(what, "make another engine for it")
            if self.config.exact:
                check_exact(model, self.config.backend)
            self.fallback = self.fallback or triton_refusal(model, self.config.backend)
            self.shapes = self._shapes()
            parts = (self._storage, self.config, self.geometry, self.shapes)
            late = self._steps.late
            self._steps = Steps(model, *parts)  # the captured ones read the old places
            self._steps.late = late
        self._look = Look(model)
        return True

    def close(self) -> None:
        """Free the memory. The runner cannot be used afterwards."""
        self.forget_captured_steps()
        self._storage.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- rows and pages -------------------------------------------------------------------------

    def write_pages(self, plan: AppendPlan, row_of: Mapping[int, int]) -> None:
        """Carry out what `PageAllocator.append` planned. row_of: sequence -> row."""
        self._storage.pages.apply(plan, row_of)

    def forget_pages(self, pages: Sequence[int]) -> None:
        """Take note that no sequence holds these pages: what `PageAllocator.release` returned."""
        self._storage.pages.forget(pages)

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """Let the row begin with these pages."""
        self._check_rows([row])
        for logical_page, physical_page in enumerate(pages):
            self._storage.pages.table.write(row, logical_page, physical_page)

    def fork_row(self, source: int, *targets: int) -> None:
        """Copy a row to others: its page table, token, flag and Mamba states."""
        self._check_rows([source, *targets])
        self._storage.copy_row(source, targets)

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Clear rows for their next sequences."""
        if rows:
            self._check_rows(rows)
            self._storage.clear_rows(rows)

    def save_row(self, row: int, *, to_host: bool = False) -> RowSnapshot:
        """Copy the row's Mamba states, on the device or to host memory."""
        self._check_rows([row])
        return self._storage.save_row(row, to_host=to_host)

    def load_row(self, row: int, state: RowSnapshot) -> None:
        """Put saved Mamba states into a row, before its next step at the latest."""
        self._check_rows([row])
        self._storage.load_row(row, state)

    def load_states(self, rows: Sequence[int]) -> None:
        """Carry out now what `load_row` deferred. If that raises, the rows must be cleared."""
        self._storage.load_states(rows)

    def save_pages(self, pages: Sequence[int]) -> PageContents:
        """Copy K and V of these pages to host memory."""
        return self._storage.pages.save(pages)

    def load_pages(self, pages: Sequence[int], contents: PageContents) -> None:
        """Put saved K and V into these pages."""
        self._storage.pages.load(pages, contents)

    # -- details --------------------------------------------------------------------------------

    def _check_rows(self, rows: Sequence[int]) -> None:
        if min(rows) <= NULL_ROW or max(rows) > self.rows:
            raise InvalidRequest(f"rows must be 1 to {self.rows}, got {min(rows)} to {max(rows)}")

    def _shapes(self) -> Shapes:
        captured = not self.fallback
        return Shapes(self.chunk_tokens, self.rows, captured=captured, alignment=self.alignment)

    def _arranged(self, chunks: Sequence[Chunk], *, cut: bool) -> Sequence[Batch]:
        """Check chunks, and arrange them in steps."""
        self._check_rows([chunk.row for chunk in chunks] or [NULL_ROW])
        for chunk in chunks:
            _check_chunk(chunk, self.chunk_tokens, self.longest)
        return self.shapes.arrange([len(chunk.tokens) for chunk in chunks], cut=cut)

    def _run_chunks(self, chunks: Sequence[Chunk], batch: Batch) -> CapturedStep:
        step = self._steps.step(batch.batch, batch.length)
        inputs = step.padding()
        for place, piece in enumerate(batch.pieces):
            row, start, tokens = chunks[piece.chunk]
            count = piece.end - piece.start
            inputs.rows[place] = row
            inputs.positions[place, :count] = np.arange(start + piece.start, start + piece.end)
            inputs.tokens[place, :count] = tokens[piece.start : piece.end]
            inputs.last[place] = place * batch.length + count - 1
        self._run(step, inputs)
        return step

    def _run(self, step: CapturedStep, inputs: Inputs) -> None:
        self._storage.settle()
        step.run(inputs)


@torch.inference_mode()
def _scored(model: EagerModel, hidden: Tensor, targets: Tensor, *, exact: bool) -> Scores:
    """Score targets [n] after hidden states [n, hidden], a part at a time."""
    logprobs, greedy = [], []
    for part, wanted in zip(
        torch.split(hidden, SCORED_AT_ONCE), torch.split(targets, SCORED_AT_ONCE), strict=True
    ):
        scores = scores_of(model.logits(part), wanted, exact=exact)
        logprobs.append(scores.logprobs)
        greedy.append(scores.greedy)
    return Scores(torch.cat(logprobs), torch.cat(greedy))


def _check_chunk(chunk: Chunk, chunk_tokens: int, longest: int) -> None:
    if not chunk.tokens:
        raise PromptError("empty chunk: give every row at least one token")
    if len(chunk.tokens) > chunk_tokens or chunk.start < 0:
        raise InvalidRequest(
            f"a chunk must start at 0 or later and have at most {chunk_tokens} tokens "
            f"(PagedConfig.chunk_tokens), got {len(chunk.tokens)} tokens from {chunk.start}"
        )
    if chunk.start + len(chunk.tokens) > longest:
        raise InvalidRequest(
            f"a sequence must have at most {longest} tokens, got "
            f"{chunk.start + len(chunk.tokens)} in row {chunk.row}"
        )


def scores_of(
    logits: Tensor, targets: Tensor, rows: Tensor | None = None, *, exact: bool = False
) -> Scores:
    """Score targets [n] after logits [n, V], or each after the row of logits that `rows` names.

    Args:
        rows: [n] int64.
        exact: give a row the same bits whatever the other rows are.
    """
    at = torch.arange(len(targets), device=targets.device) if rows is None else rows
    logprobs = log_probabilities(logits, exact=exact)
    return Scores(logprobs[at, targets], logits.argmax(dim=1)[at] == targets)
