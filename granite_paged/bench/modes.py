"""The three ways to run a model that are compared: `default`, `static` and `paged`.

Each prepares a step of one shape: a prefill, or one new token for each sequence of a batch. All
use the same random token ids. A decode step's cache is filled without running its whole context:
a prefix is run, and its K, V and Mamba states are repeated, which does not change a step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from granite_paged.bench.cases import Kind, Shape
from granite_paged.bench.measure import Prepared
from granite_paged.errors import Unsupported
from granite_paged.geometry import PagedConfig, pages_for
from granite_paged.hf.compat import with_cache
from granite_paged.layers.mamba import REPLAYED
from granite_paged.paging.allocator import PageAllocator
from granite_paged.runner.runner import Chunk, Runner

STRETCH = 64
"""Tokens that are really run to fill a cache; the rest of the cache repeats them."""

_COPIED_TOGETHER = 64  # times the stretch

_SPARE = 16  # slots of a StaticCache beyond the context, as in normal use


class Mode(Protocol):
    """One way of running a model."""

    def prepare(self, kind: Kind, shape: Shape) -> Prepared:
        """Prepare a step of this shape.

        Raises:
            Unsupported: this mode has no such step.
            torch.OutOfMemoryError: the step does not fit.
        """


def make_mode(name: str, model: Any, config: PagedConfig, seed: int) -> Mode:
    """Return the mode with this name; see `names.MODES`."""
    if name == "default":
        return Default(model, seed)
    return Static(model, seed) if name == "static" else Paged(model, config, seed)


def token_ids(model: Any, batch: int, tokens: int, seed: int) -> Tensor:
    """Return random token ids, [batch, tokens], on the model's device."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=draw)
    return ids.to(model.device)


# -- transformers -------------------------------------------------------------------------------


class Default:
    """transformers' default: SDPA, a DynamicCache, no compilation."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model, self._seed = model, seed

    def prepare(self, kind: Kind, shape: Shape) -> Prepared:
        """See `Mode.prepare`."""
        ids = token_ids(self._model, shape.batch, shape.context, self._seed)
        return self._prefill(ids) if kind == "prefill" else self._decode(ids)

    def _prefill(self, ids: Tensor) -> Prepared:
        model = self._model

        @torch.no_grad()
        def step() -> Any:
            cache = DynamicCache(config=model.config)
            return model(ids, **with_cache(cache), logits_to_keep=1).logits

        return Prepared(step)

    def _decode(self, ids: Tensor) -> Prepared:
        model, cache, token = self._model, DynamicCache(config=self._model.config), ids[:, :1]
        note = _fill(model, cache, ids)
        context = ids.shape[1]

        @torch.no_grad()
        def step() -> Any:
            return _next_token(model, token, cache)

        def reset() -> None:
            for layer in _attention_layers(cache):  # undo the token that the step appended
                layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]

        return Prepared(step, reset, note=note)


class Static:
    """transformers' fastest mode: a StaticCache, and each step under torch.compile."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model, self._seed = model, seed

    def prepare(self, kind: Kind, shape: Shape) -> Prepared:
        """See `Mode.prepare`."""
        model, context = self._model, shape.context
        ids = token_ids(model, shape.batch, context, self._seed)
        cache = StaticCache(config=model.config, max_cache_len=context + _SPARE)
        if kind == "prefill":
            return _static_prefill(model, cache, ids)
        token, note = ids[:, :1], _fill(model, cache, ids)

        def reset() -> None:
            for layer in _attention_layers(cache):
                layer.cumulative_length.fill_(context)

        return Prepared(_compiled(model, token, cache), reset, _forget_compiled_step, note)


@torch.no_grad()
def _static_prefill(model: Any, cache: Any, ids: Tensor) -> Prepared:
    model(ids[:, :1], **with_cache(cache), logits_to_keep=1)  # allocates the cache, uncompiled
    cache.reset()
    return Prepared(_compiled(model, ids, cache), cache.reset, _forget_compiled_step)


def _compiled(model: Any, tokens: Tensor, cache: Any) -> Callable[[], Any]:
    """Return a step that feeds these tokens, [B, S], under torch.compile with CUDA graphs."""
    compiled = torch.compile(_next_token, mode="reduce-overhead", dynamic=False)

    @torch.no_grad()
    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(model, tokens, cache)

    return step


def _next_token(model: Any, token: Tensor, cache: Any) -> Tensor:
    """Feed the tokens of each sequence, [B, S]; return the most likely next ones, [B]."""
    logits: Tensor = model(token, **with_cache(cache), logits_to_keep=1).logits
    return logits[:, -1].argmax(dim=-1)


def _forget_compiled_step() -> None:
    """Drop the compiled code and graphs of `static`, which keep its cache alive."""
    from torch._dynamo.eval_frame import reset_code  # type: ignore[attr-defined]
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_code(_next_token.__code__)
    reset_cudagraph_trees()


@torch.no_grad()
def _fill(model: Any, cache: Any, ids: Tensor) -> str:
    """Fill the cache with ids.shape[1] tokens; return a note on how."""
    context = ids.shape[1]
    stretch = min(context, STRETCH)
    model(ids[:, :stretch], **with_cache(cache), logits_to_keep=1)
    for layer in _attention_layers(cache):
        if layer.is_compileable:  # a StaticCache, which has its full size from the start
            for states in (layer.keys, layer.values):
                states[:, :, :context] = _repeat_to(states[:, :, :stretch], context)
            layer.cumulative_length.fill_(context)
        else:
            layer.keys = _repeat_to(layer.keys, context)
            layer.values = _repeat_to(layer.values, context)
    return _note(context, stretch)


def _attention_layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def _repeat_to(states: Tensor, tokens: int) -> Tensor:
    """Repeat states along the tokens: [B, Hkv, S, D] -> [B, Hkv, tokens, D]."""
    places = torch.arange(tokens, device=states.device) % states.shape[2]
    return states.index_select(2, places)


def _note(context: int, stretch: int) -> str:
    return f"cache: {stretch} tokens, repeated" if stretch < context else ""


# -- paged --------------------------------------------------------------------------------------


class Paged:
    """Ours: a `Runner` whose pools and rows are sized exactly for the shape."""

    def __init__(self, model: Any, config: PagedConfig, seed: int) -> None:
        self._model, self._config, self._seed = model, config, seed

    def prepare(self, kind: Kind, shape: Shape) -> Prepared:
        """See `Mode.prepare`."""
        runner = make_runner(self._model, config_for(self._config, shape))
        try:
            return self._prepared(runner, kind, shape)
        except BaseException:
            runner.close()
            raise

    def _prepared(self, runner: Runner, kind: Kind, shape: Shape) -> Prepared:
        tokens = shape.context + (REPLAYED if kind == "decode" else 0)
        if tokens > runner.longest:
            raise Unsupported(f"sequences have at most {runner.longest} tokens here, got {tokens}")
        ids = token_ids(self._model, shape.batch, shape.context, self._seed)
        sequences = Sequences(runner, shape.batch)
        if kind == "prefill":
            return _paged_prefill(runner, sequences, ids)
        return _paged_decode(runner, sequences, ids)


def make_runner(model: Any, config: PagedConfig) -> Runner:
    """Return a `Runner` over the model's weights."""
    return Runner.for_model(model, config)


def config_for(config: PagedConfig, shape: Shape) -> PagedConfig:
    """Return the config with rows for the batch, and pages for its contexts and `REPLAYED` more."""
    pages = shape.batch * pages_for(shape.context + REPLAYED, config.page_size)
    return replace(config, max_sequences=shape.batch, max_tokens=pages * config.page_size)


class Sequences:
    """A batch of sequences in rows 1 to `batch` of a runner, with their pages."""

    def __init__(self, runner: Runner, batch: int) -> None:
        self._runner = runner
        self._allocator = PageAllocator(runner.pages, runner.config.page_size)
        self.rows = list(range(1, batch + 1))
        self._row_of: dict[int, int] = {}

    def open(self, tokens: int) -> None:
        """Give each row pages for `tokens` tokens."""
        self._row_of = {self._allocator.open(): row for row in self.rows}
        plan = self._allocator.append(dict.fromkeys(self._row_of, tokens))
        self._runner.write_pages(plan, self._row_of)

    def close(self) -> None:
        """Release all pages, and clear the Mamba states."""
        freed = self._allocator.release(*self._row_of)
        self._runner.forget_pages(freed)
        self._runner.clear_rows(self.rows)
        self._row_of = {}

    def pages(self) -> list[int]:
        """Return the physical pages of all rows, row by row, in logical order."""
        return [page for sequence in self._row_of for page in self._allocator.pages_of(sequence)]


def _paged_prefill(runner: Runner, sequences: Sequences, ids: Tensor) -> Prepared:
    calls, context = prefill_calls(runner, ids.tolist()), ids.shape[1]

    def step() -> None:
        sequences.open(context)
        for chunks in calls:
            runner.prefill(chunks)

    return Prepared(step, sequences.close, runner.close, own_workspace=not runner.fallback)


def _paged_decode(runner: Runner, sequences: Sequences, ids: Tensor) -> Prepared:
    batch, context = ids.shape
    sequences.open(context + REPLAYED)
    stretch = _fill_pages(runner, sequences, ids)
    rows, turns = sequences.rows, count()
    runner.tokens[1 : batch + 1].copy_(ids[:, 0])

    def step() -> None:
        # rows store their states at every `REPLAYED`th token: with staggered positions, each step
        # stores as many as in real use
        turn = next(turns)
        positions = [context + (place + turn) % REPLAYED for place in range(batch)]
        runner.decode(rows, positions)  # also chooses each row's next token

    note = _note(context, stretch)
    return Prepared(step, close=runner.close, note=note, own_workspace=not runner.fallback)


def _fill_pages(runner: Runner, sequences: Sequences, ids: Tensor) -> int:
    """Run a prefix in row 1, and copy its pages and states to all rows; return its tokens."""
    page_size, pages = runner.geometry.page_size, sequences.pages()
    stretch = min(ids.shape[1], runner.geometry.pages_for(STRETCH) * page_size)
    runner.prefill([Chunk(1, 0, ids[0, :stretch].tolist())])
    source = pages[: runner.geometry.pages_for(stretch)]
    copied: list[int] = []
    for targets in _groups(pages[len(source) :], _COPIED_TOGETHER * len(source)):
        if len(targets) != len(copied):  # at first, and where the last are fewer
            copied = (source * _COPIED_TOGETHER)[: len(targets)]
            contents = runner.save_pages(copied)
        runner.load_pages(targets, contents)
    state = runner.save_row(1)
    for row in sequences.rows[1:]:
        runner.load_row(row, state)
    return stretch


def _groups(pages: Sequence[int], size: int) -> Iterator[list[int]]:
    rest = iter(pages)
    while group := list(islice(rest, size)):
        yield group


def prefill_calls(runner: Runner, prompts: Sequence[Sequence[int]]) -> list[list[Chunk]]:
    """Return the chunks of each call: all first pieces, then all second ones, as many as fit."""
    piece, calls = _piece(runner), [[]]  # type: int, list[list[Chunk]]
    for start in range(0, max(map(len, prompts)), piece):
        for row, prompt in enumerate(prompts, start=1):
            if start >= len(prompt):
                continue
            chunk = Chunk(row, start, prompt[start : start + piece])
            if not runner.shapes.fits([len(chunk.tokens)]):
                raise Unsupported(f"no compiled shape fits a chunk of {len(chunk.tokens)} tokens")
            lengths = [len(each.tokens) for each in (*calls[-1], chunk)]
            if not runner.shapes.fits(lengths):
                calls.append([])
            calls[-1].append(chunk)
        calls.append([])  # the next piece of a sequence needs its previous one
    return [chunks for chunks in calls if chunks]


def _piece(runner: Runner) -> int:
    """Return the tokens of one sequence per call: a multiple of the runner's alignment."""
    return int(runner.chunk_tokens // runner.alignment * runner.alignment or runner.chunk_tokens)
