"""Runs a model over pages and state rows, by fixed shapes.

A runner owns device memory and no policy: who owns which page is its caller's `PageAllocator`,
which row a sequence has is its caller's too. Pages, rows and tables are allocated when it is made.
What callers say of pages is gathered on the host, and crosses in one copy when a step needs it.

::

    row 0, page 0     take padding; never anybody's. Row 0 has no Mamba state
    tokens[row]       what the row is fed by its next decode step. The last one left the likeliest
                      token there; a sampler writes another over it
    nonfinite[row]    whether NaN or infinity was met since the row was cleared

On a GPU every step is the replay of a CUDA graph (`program.py`): a decode step for each power of
two of rows, a prefill for few shapes of chunks. No call waits for the device. On the CPU, and where
the kernels cannot run, the same steps run as they are, in the shape they come in.

Rows are named by every step, so running sequences need not be moved to be dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from granite_paged.device import available_bytes, host_copy, to_device
from granite_paged.errors import InvalidRequest, PromptError
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.layers.attention import DecodePlan
from granite_paged.layers.backend import triton_refusal, warn_if_slow
from granite_paged.layers.mamba import MambaSizes, MambaState, mixers
from granite_paged.paging.allocator import AppendPlan
from granite_paged.paging.store import PageContents, PageStore
from granite_paged.progress import Progress, silent
from granite_paged.runner.graph import NULL_ROW, CapturedStep, Inputs
from granite_paged.runner.memory_plan import (
    SCORED_AT_ONCE,
    MemoryPlan,
    choose_sizes,
    memory_refused,
    plan_memory,
    row_bytes,
)
from granite_paged.runner.model import EagerModel, Storage
from granite_paged.runner.shapes import Batch, Shapes


class Chunk(NamedTuple):
    """New tokens of one row, beginning at position `start`."""

    row: int
    start: int
    tokens: Sequence[int]


class Scores(NamedTuple):
    """logprobs [tokens of all chunks] float32; greedy [the same] bool: the target was likeliest."""

    logprobs: Tensor
    greedy: Tensor


class RowSnapshot(NamedTuple):
    """A row's Mamba states, of all layers: a snapshot.

    conv [layers, channels, width]; ssm [layers, heads, head_dim, state_size].
    """

    conv: Tensor
    ssm: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return self.conv.nbytes + self.ssm.nbytes


class Runner:
    """One model on one device. Make it with `Runner.for_model`.

    Attributes:
        rows: usable rows, 1 to `rows`.
        pages: of each pool, the null page included: a `PageAllocator`'s `pages`.
        longest: most tokens a sequence may hold.
        chunk_tokens: most tokens a prefill computes at once.
        shapes: of its steps, and what they take.
        alignment: chunks that start at its multiples are computed as one long prompt is.
        plan: of memory.
        row_bytes: of a row's Mamba states, as `save_row` copies them.
        fallback: why steps run without kernels and graphs; empty where they do not.
        tokens: [rows + 1] int64, on the device.
        nonfinite: [rows + 1] uint8, on the device.
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
        self.row_bytes = row_bytes(model)
        layers = mixers(model)
        self.alignment = max((mixer.chunk_size for mixer in layers.values()), default=1)
        self.shapes = Shapes(
            config.chunk_tokens, self.rows, captured=not fallback, alignment=self.alignment
        )
        with memory_refused(self.device, "the pools and rows"):
            self._storage = self._make_storage(layers)
        self.tokens = torch.zeros(self.rows + 1, dtype=torch.int64, device=self.device)
        self._model = _model(model, self._storage, fallback, config)
        self._captured: dict[tuple[int, int, bool], CapturedStep] = {}
        self._graphs = torch.cuda.graph_pool_handle() if self._captures else None
        self._stream = _capture_stream(self.device) if self._captures else None

    @classmethod
    def for_model(cls, model: Any, config: PagedConfig | None = None) -> Runner:
        """A runner for a live, unpatched `GraniteMoeHybridForCausalLM` in eval mode.

        Raises:
            OutOfMemory: with what was asked for and there.
            UnsupportedModel, GeometryError: see `CacheGeometry.from_config`.
        """
        config = config or PagedConfig()
        geometry = CacheGeometry.from_config(
            model.config, page_size=config.page_size, dtype=model.dtype
        )
        fallback = triton_refusal(model, config.backend)
        warn_if_slow(fallback, model.device, model.dtype)
        return cls(model, config, geometry, fallback)

    @property
    def nonfinite(self) -> Tensor:
        """[rows + 1] uint8: whether NaN or infinity was met since the row was cleared."""
        return self._storage.nonfinite

    @property
    def storage(self) -> Storage:
        """Page tables, pools and states, for tests and profilers."""
        self._storage.pages.table.settle()
        return self._storage

    # -- steps ----------------------------------------------------------------------------------

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute new tokens of some rows, whose pages were written before.

        Returns:
            [chunks, vocabulary], logits of each chunk's last token; overwritten by the next step.

        Raises:
            InvalidRequest: for a chunk that is too long, or a row or position that is not there.
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
        """Compute new tokens as `prefill` does, and the log-probability of what follows each.

        Args:
            chunks: as for `prefill`.
            targets: for each token of each chunk, the token whose log-probability is wanted.

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
            scores = self._scored(hidden.flatten(0, 1).index_select(0, at), after)
            by_chunk = (torch.split(part, counts) for part in scores)
            found.update(zip(members, map(Scores, *by_chunk), strict=True))
        in_order = [found[i] for i in range(len(chunks))]
        return Scores(*(torch.cat(parts) for parts in zip(*in_order, strict=True)))

    def decode(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Feed each row its token of `tokens`, at a position whose page was written before.

        The likeliest token by the new logits is left in its place.

        Returns:
            [rows, vocabulary] logits; overwritten by the next step.

        Raises:
            InvalidRequest: for a row that is not there, or a position beyond `longest`.
        """
        if not rows or len(rows) != len(positions):
            raise InvalidRequest(
                f"decode needs one position per row, got {len(positions)} for {len(rows)} rows"
            )
        self._check_rows(rows)
        if max(positions) >= self.longest or min(positions) < 0:
            raise InvalidRequest(
                f"positions must be below {self.longest}, got {min(positions)} to {max(positions)}"
            )
        program = self._program(self.shapes.decode_batch(len(rows)), 1, decodes=True)
        inputs = program.padding()
        inputs.rows[: len(rows)] = rows
        inputs.positions[: len(rows), 0] = positions
        self._run(program, inputs)
        return program.logits[: len(rows)]

    def warm_up(
        self,
        progress: Progress = silent,
        *,
        wanted: Callable[[int, int], bool] = lambda batch, length: True,
    ) -> None:
        """Compile and capture shapes now; otherwise each waits for its first use.

        wanted: which, by rows and tokens of each; 1 token: a decode step.
        """
        shapes = [shape for shape in self.shapes.all() if wanted(*shape)]
        for done, (batch, length) in enumerate(shapes):
            what = "decode" if length == 1 else "prefill"
            progress(f"{what} {batch} x {length}", done, len(shapes))
            self._program(batch, length, decodes=length == 1)
        progress("ready", len(shapes), len(shapes))

    def forget_programs(self) -> None:
        """Drop what was recorded: each shape is recorded anew when it is used next."""
        self._captured.clear()

    def close(self) -> None:
        """Give the memory back; the runner is of no use afterwards."""
        self.forget_programs()
        self._storage.pages.pools.clear()
        self._storage.states.clear()
        self._storage.stacked.clear()
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
        """The row's first logical pages become these."""
        self._check_rows([row])
        for logical_page, physical_page in enumerate(pages):
            self._storage.pages.table.write(row, logical_page, physical_page)

    def fork_row(self, source: int, *targets: int) -> None:
        """Each target becomes a copy of the source: its pages' names, its states, its token."""
        self._check_rows([source, *targets])
        (index,) = to_device(self.device, torch.tensor(targets))
        self._storage.pages.table.copy_row(source, index)
        for tensor in (self.nonfinite, self.tokens):
            tensor[index] = tensor[source].clone()
        for states in self._storage.stacked:
            for target in targets:  # one by one: no copy of the source beside it
                states[:, target - 1].copy_(states[:, source - 1])

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Make rows as new, before they are given to other sequences."""
        if rows:
            self._check_rows(rows)
            (index,) = to_device(self.device, torch.tensor(rows))
            self._storage.pages.table.clear_rows(rows, index)
            for tensor in (self.nonfinite, self.tokens):
                tensor.index_fill_(0, index, 0)
            for states in self._storage.stacked:
                states.index_fill_(1, index - 1, 0)

    def save_row(self, row: int, *, to_host: bool = False) -> RowSnapshot:
        """A snapshot of the row's Mamba states, on the device or in host memory."""
        self._check_rows([row])
        save = host_copy if to_host else torch.clone
        return RowSnapshot(*(save(states[:, row - 1]) for states in self._storage.stacked))

    def load_row(self, row: int, state: RowSnapshot) -> None:
        """Put a snapshot into a row."""
        self._check_rows([row])
        for own, saved in zip(self._storage.stacked, state, strict=True):
            own[:, row - 1].copy_(saved, non_blocking=True)

    def save_pages(self, pages: Sequence[int]) -> PageContents:
        """Copy K and V of these pages to host memory."""
        return self._storage.pages.save(pages)

    def load_pages(self, pages: Sequence[int], contents: PageContents) -> None:
        """Put saved K and V into these pages."""
        self._storage.pages.load(pages, contents)

    # -- details --------------------------------------------------------------------------------

    @property
    def _captures(self) -> bool:
        return not self.fallback

    def _make_storage(self, layers: Mapping[int, Any]) -> Storage:
        rows, device = self.rows + 1, self.device
        return Storage(
            pages=PageStore(
                self.geometry,
                self.pages,
                device,
                rows=rows,
                width=self.geometry.pages_for(self.longest),
            ),
            **_make_states(layers, self.rows, self.dtype, device),
            nonfinite=torch.zeros(rows, dtype=torch.uint8, device=device),
        )

    def _check_rows(self, rows: Sequence[int]) -> None:
        if min(rows) <= NULL_ROW or max(rows) > self.rows:
            raise InvalidRequest(f"rows must be 1 to {self.rows}, got {min(rows)} to {max(rows)}")

    def _check_chunk(self, chunk: Chunk) -> None:
        if not chunk.tokens:
            raise PromptError("empty chunk: give every row at least one token")
        if len(chunk.tokens) > self.chunk_tokens or chunk.start < 0:
            raise InvalidRequest(
                f"a chunk of {len(chunk.tokens)} tokens from {chunk.start} on: a runner takes "
                f"{self.chunk_tokens} at once (PagedConfig.chunk_tokens)"
            )
        if chunk.start + len(chunk.tokens) > self.longest:
            raise InvalidRequest(
                f"{chunk.start + len(chunk.tokens)} tokens in row {chunk.row}: a sequence holds "
                f"{self.longest} at most"
            )

    def _arranged(self, chunks: Sequence[Chunk], *, cut: bool) -> Sequence[Batch]:
        """Share checked chunks out over steps."""
        self._check_rows([chunk.row for chunk in chunks] or [NULL_ROW])
        for chunk in chunks:
            self._check_chunk(chunk)
        return self.shapes.arrange([len(chunk.tokens) for chunk in chunks], cut=cut)

    def _run_chunks(self, chunks: Sequence[Chunk], step: Batch) -> CapturedStep:
        program = self._program(step.batch, step.length)
        inputs = program.padding()
        for place, piece in enumerate(step.pieces):
            row, start, tokens = chunks[piece.chunk]
            count = piece.end - piece.start
            inputs.rows[place] = row
            inputs.positions[place, :count] = range(start + piece.start, start + piece.end)
            inputs.tokens[place, :count] = tokens[piece.start : piece.end]
            inputs.last[place] = place * step.length + count - 1
        self._run(program, inputs)
        return program

    def _run(self, program: CapturedStep, inputs: Inputs) -> None:
        self._storage.pages.table.settle()
        program.run(inputs)

    def _program(self, batch: int, length: int, *, decodes: bool = False) -> CapturedStep:
        shape = (batch, length, decodes)
        program = self._captured.get(shape)
        if program is None:
            program = CapturedStep(
                self._model, self._storage, self.tokens, *shape, self._layout(batch)
            )
            if self._stream is not None:
                program.capture(self._graphs, self._stream)
                self._captured[shape] = program
        return program

    def _layout(self, batch: int) -> DecodePlan | None:
        """How a decode step of so many rows splits them; None where it does not."""
        if not self._captures:
            return None
        pages = self._storage.pages.table.physical.shape[1]
        return DecodePlan.choose(self.geometry, batch, pages, self.device)

    @torch.inference_mode()
    def _scored(self, hidden: Tensor, targets: Tensor) -> Scores:
        """hidden [n, hidden], targets [n]"""
        logprobs, greedy = [], []
        for part, wanted in zip(
            torch.split(hidden, SCORED_AT_ONCE), torch.split(targets, SCORED_AT_ONCE), strict=True
        ):
            scores = scores_of(self._model.logits(part), wanted)
            logprobs.append(scores.logprobs)
            greedy.append(scores.greedy)
        return Scores(torch.cat(logprobs), torch.cat(greedy))


def scores_of(logits: Tensor, targets: Tensor, rows: Tensor | None = None) -> Scores:
    """Of targets [n] after logits [n, V], or each after the row of logits that `rows` [n] names."""
    at = torch.arange(len(targets), device=targets.device) if rows is None else rows
    logprobs = logits.log_softmax(dim=1, dtype=torch.float32)
    return Scores(logprobs[at, targets], logits.argmax(dim=1)[at] == targets)


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """One for all graphs: the matrix library keeps a workspace for every stream, for ever."""
    make_stream: Any = torch.cuda.Stream
    return make_stream(device)


def _model(model: Any, storage: Storage, fallback: str, config: PagedConfig) -> EagerModel:
    if fallback:
        return EagerModel(model, storage, config.backend)
    from granite_paged.runner.triton_model import TritonModel  # needs Triton

    return TritonModel(model, storage, config.backend)


def _make_states(
    mixers: Mapping[int, Any], rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """`stacked` and `states` of a `Storage`. Layers of a model are all of one size."""
    if not mixers:
        return {"stacked": [torch.zeros(0, rows, device=device) for _ in range(2)], "states": {}}
    sizes = MambaSizes.of(next(iter(mixers.values())))
    conv, ssm, _ = sizes.empty_state(len(mixers) * rows, dtype, device)
    stacked = [part.view(len(mixers), rows, *part.shape[1:]) for part in (conv, ssm)]
    layers = zip(mixers, *stacked, strict=True)
    return {"stacked": stacked, "states": {i: MambaState(c, s, None) for i, c, s in layers}}
