"""The step of the `serve` case: a whole workload, served by the engine or in batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from granite_paged.bench.cases import Shape, workload_of
from granite_paged.bench.measure import Prepared
from granite_paged.bench.serving import Batches, serve
from granite_paged.bench.workload import arrivals
from granite_paged.engine.engine import Engine
from granite_paged.geometry import PagedConfig, pages_for

_BATCH = 32
"""Batch size of transformers' modes, as `bench serve` has it."""


def prepare_engine(model: Any, config: PagedConfig, shape: Shape, seed: int) -> Prepared:
    """Prepare to serve the shape's workload with an engine of a row for every request.

    Prefixes are not shared, and all requests arrive at once, so that a repeat takes the steps of
    the first run, which compiled them.
    """
    coming = arrivals(workload_of(shape), model.config.vocab_size, seed)
    tokens = shape.batch * pages_for(shape.context, config.page_size) * config.page_size
    sized = replace(config, max_sequences=shape.batch, max_tokens=tokens)
    engine = Engine(model, sized, queue=shape.batch, state_bytes=0, warmup="lazy")
    own = not engine.runner.fallback
    return Prepared(lambda: serve(engine, coming), close=engine.close, own_workspace=own)


def prepare_batches(model: Any, shape: Shape, seed: int, *, static: bool) -> Prepared:
    """Prepare to serve the shape's workload with `generate()`, in left-padded batches."""
    coming = arrivals(workload_of(shape), model.config.vocab_size, seed)
    batches = Batches(model, coming, min(_BATCH, shape.batch), static=static)
    return Prepared(lambda: batches.serve("static" if static else "default"))
