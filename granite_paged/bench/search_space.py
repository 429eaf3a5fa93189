"""Candidates for kernel constants, and the shapes that time them.

Attention is timed alone. A shape has several copies of K and V, more than the device's cache
holds, and a CUDA graph uses them in turn, so that inputs come from memory. In a model they do too,
because everything else passes through the cache between two uses of a layer. Matrix products are
timed in whole decode steps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import FlexKernelOptions

from granite_paged.bench.cases import Shape
from granite_paged.bench.gate import no_gpu
from granite_paged.bench.kernel import KernelCase
from granite_paged.bench.measure import Clock, release_cached_memory
from granite_paged.bench.modes import Sequences, config_for, make_runner
from granite_paged.bench.tune import Group, Layout, Timer, TunedShape
from granite_paged.device import device_name, multiprocessors
from granite_paged.errors import CannotJudge
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.layers.attention import (
    WIDEST_TUNED_HEAD,
    DecodePlan,
    on_device,
    paged_attention,
    prefill_options,
)
from granite_paged.layers.backend import triton_refusal
from granite_paged.layers.mamba import REPLAYED
from granite_paged.layers.tuning import (
    ROW_TILES,
    TUNED,
    Constants,
    FewRowsConstants,
    OneRowConstants,
)
from granite_paged.paging.masks import paged_block_mask
from granite_paged.paging.store import PageStore
from granite_paged.quantiles import quantile

DECODE_CONTEXTS = {1: (512, 16384), 8: (512, 4096), 32: (512, 4096)}
"""Batch sizes that decode attention is tuned for -> tokens per sequence."""

PREFILL_TOKENS, PREFILL_PASTS = 2048, (0, 14336)
"""Tokens of a prefill chunk, and the numbers of cached tokens before it."""

DECODE_CHOICES: dict[str, tuple[Any, ...]] = {
    "parts_per_multiprocessor": (0.5, 1.0, 2.0),
    "block": (64, 128),
    "warps": (4, 8),
    "stages": (3, 4),
}
PREFILL_CHOICES: dict[str, tuple[Any, ...]] = {
    "BLOCK_M": (64, 128),
    "BLOCK_N": (64, 128),
    "warps": (4, 8),
    "stages": (2, 3),
}
ONE_ROW_CHOICES: dict[str, tuple[Any, ...]] = {"COLUMNS": (1, 2, 4, 8), "warps": (4, 8)}
FEW_ROWS_CHOICES: dict[str, tuple[Any, ...]] = {
    "COLUMNS": (64, 128),
    "DEPTH": (128, 256),
    "SPLITS": (1, 2, 3, 4, 5),
    "warps": (4,),
    "stages": (2, 3, 4),
}
LEFT_IF_QUICK = ("warps", "stages")
"""Constants that `--quick` leaves unchanged."""

STEP_CONTEXT, STEP_NOISE = 512, 0.004
"""Tokens per sequence in the decode steps that time products, and their relative timing noise."""

_STEPS, _STEP_REPEATS = 20, 5

_COLD_BYTES = 2**28  # several times the cache of any GPU
_MOST_COPIES = 128


@dataclass(frozen=True, slots=True)
class TuningTarget:
    """The model to tune for, on its device, and how it is paged."""

    model: Any
    config: PagedConfig
    seed: int = 0

    @property
    def clock(self) -> Clock:
        """Clock of the model's device."""
        return Clock(torch.device(self.model.device))

    @property
    def geometry(self) -> CacheGeometry:
        """Geometry of its cache."""
        return CacheGeometry.from_config(
            self.model.config, page_size=self.config.page_size, dtype=self.model.dtype
        )

    def random(self, *shape: int) -> Tensor:
        """Return random numbers in the model's dtype, on its device."""
        draw = torch.Generator(self.clock.device).manual_seed(self.seed)
        like = {"device": self.clock.device, "dtype": self.model.dtype}
        return torch.randn(*shape, generator=draw, **like)

    def copies(self, nbytes: int) -> int:
        """Return how many copies of `nbytes` exceed the device's cache; 1 on the CPU."""
        if not self.clock.gpu:
            return 1
        return max(2, min(_MOST_COPIES, -(-_COLD_BYTES // nbytes)))

    def fresh(self) -> None:
        """Release the last shape's tensors, and the code compiled for them."""
        torch.compiler.reset()
        release_cached_memory(self.clock.device)


def groups_of(
    target: TuningTarget, subjects: Sequence[str] = (), *, quick: bool = False
) -> list[Group]:
    """Return the groups of constants that this model's kernels use.

    No subjects, which are names from `SUBJECTS`, mean all. `quick` returns fewer candidates and
    shapes.

    Raises:
        CannotJudge: the kernels do not run here.
    """
    if not target.clock.gpu:
        raise no_gpu("tune")
    refusal = triton_refusal(target.model, target.config.backend)
    if refusal:
        raise CannotJudge(f"nothing to tune, because the kernels do not run here: {refusal}")
    return [group for name in subjects or SUBJECTS for group in SUBJECTS[name](target, quick)]


def environment(target: TuningTarget) -> dict[str, str]:
    """Return the names of device, torch and triton, as in `Tuned`."""
    import triton

    name = device_name(target.clock.device)
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


def candidates(
    rule: Constants, choices: dict[str, tuple[Any, ...]], quick: bool
) -> tuple[Constants, ...]:
    """Return the constants in use, then every other combination of the choices."""
    if quick:
        choices = {name: v for name, v in choices.items() if name not in LEFT_IF_QUICK}
    combined = (
        replace(rule, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    )
    return (rule, *(constants for constants in combined if constants != rule))


# -- attention ----------------------------------------------------------------------------------


def decode_groups(target: TuningTarget, quick: bool) -> Iterator[Group]:
    """Yield a group for each batch size of decode attention."""
    for batch, contexts in DECODE_CONTEXTS.items():
        rule = replace(TUNED.for_batch(batch), batch=batch)
        shapes = [Shape(batch, context) for context in (contexts[-1:] if quick else contexts)]
        yield Group(
            candidates(rule, DECODE_CHOICES, quick),
            tuple(_decode_shape(target, shape) for shape in shapes),
        )


def _decode_shape(target: TuningTarget, shape: Shape) -> TunedShape:
    g = target.geometry

    def layout(constants: Any) -> Layout:
        pages, device = g.pages_for(shape.context), target.clock.device
        plan = DecodePlan.from_constants(constants, g, shape.batch, pages, device, shape.batch)
        return asdict(plan)

    def prepare() -> Timer:
        target.fresh()
        case = KernelCase(target.model, target.config, shape, target.seed, target.clock.device)
        pools = case.copies(target.copies(case.kv_bytes))
        return lambda plan: target.clock.graph_seconds(case.split_calls(DecodePlan(**plan), pools))

    name = f"decode {shape.batch} x {shape.context}"
    return TunedShape(name, layout, prepare)


def prefill_groups(target: TuningTarget, quick: bool) -> Iterator[Group]:
    """Yield a group for prompt chunks; none for heads so wide that FlexAttention decides."""
    if target.geometry.head_dim > WIDEST_TUNED_HEAD:
        return
    pasts = PREFILL_PASTS[-1:] if quick else PREFILL_PASTS
    shapes = tuple(_prefill_shape(target, PREFILL_TOKENS, past) for past in pasts)
    yield Group(candidates(TUNED.prefill, PREFILL_CHOICES, quick), shapes)


def _prefill_shape(target: TuningTarget, tokens: int, past: int) -> TunedShape:
    def layout(constants: Any) -> Layout:
        options = prefill_options(constants, target.config.page_size)
        return dict(on_device(options, target.clock.device))

    def prepare() -> Timer:
        target.fresh()
        call = _prefill_call(target, tokens, past)
        return lambda options: target.clock.graph_seconds([functools.partial(call, options)])

    return TunedShape(f"prefill {tokens} of {past + tokens}", layout, prepare)


def _prefill_call(target: TuningTarget, tokens: int, past: int) -> Callable[[Layout], Tensor]:
    """Attention of the last `tokens` of one sequence whose pages lie in any order."""
    g, device = target.geometry, target.clock.device
    pages = g.pages_for(past + tokens)
    one_layer = replace(g, attention_layers=g.attention_layers[:1])
    store = PageStore(one_layer, pages + 1, device, width=pages)
    table = store.table
    for logical_page, page in enumerate(torch.randperm(pages, device=device).tolist()):
        table.write(0, logical_page, 1 + page)
    table.settle()
    positions = (past + torch.arange(tokens, device=device)[None]).int()
    mask = paged_block_mask(
        table.physical, table.logical, positions, page_size=g.page_size, group=g.group
    )
    query = target.random(1, g.query_heads, tokens, g.head_dim)
    (pool,) = store.pools.values()
    for numbers in (pool.keys, pool.values):
        numbers.copy_(target.random(*numbers.shape))
    scale, backend = float(target.model.config.attention_multiplier), target.config.backend

    def call(options: Layout) -> Tensor:
        chosen = cast("FlexKernelOptions", options)
        return paged_attention(
            query, pool.keys, pool.values, mask, scale=scale, backend=backend, options=chosen
        )

    return call


# -- products -----------------------------------------------------------------------------------
#
# A product cannot be timed alone. In a step it starts while the previous kernel ends, with its
# weights already being prefetched; its cost is the time that it adds to the step.


def product_kinds(model: Any, rows: int, multiprocessors: int) -> list[tuple[bool, bool]]:
    """Return the kinds of product, (gated, few columns), in a decode step of `rows` sequences.

    Only a step of one sequence uses our kernels for the head.
    """
    from granite_paged.layers.triton.tiles import has_few_columns

    layers = model.base_model.layers
    plain = {columns for layer in layers for columns in _plain_columns(layer)}
    if rows == 1:
        plain.add(len(model.get_output_embeddings().weight))
    gated = {len(layer.shared_mlp.input_linear.weight) // 2 for layer in layers}
    kinds = {(False, has_few_columns(columns, multiprocessors)) for columns in plain}
    return sorted(kinds | {(True, has_few_columns(columns, multiprocessors)) for columns in gated})


def _plain_columns(layer: Any) -> Iterator[int]:
    """Yield the columns of each product that is not gated; q, k and v are one product."""
    if layer.mamba is not None:
        yield from (len(layer.mamba.in_proj.weight), len(layer.mamba.out_proj.weight))
    else:
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield from (sum(len(part.weight) for part in parts), len(attention.o_proj.weight))
    yield len(layer.shared_mlp.output_linear.weight)


def product_groups(target: TuningTarget, quick: bool) -> Iterator[Group]:
    """Yield a group for each tile of rows and each kind of product."""
    processors = multiprocessors(target.clock.device)
    for rows in (1, *ROW_TILES):
        steps = DecodeSteps(target, rows)
        for gated, few in product_kinds(target.model, rows, processors):
            if rows == 1:
                one = TUNED.for_one_row(gated=gated, few_columns=few)
                choices = candidates(one, ONE_ROW_CHOICES, quick)
            else:
                several = TUNED.for_few_rows(rows, gated=gated, few_columns=few)
                choices = candidates(several, FEW_ROWS_CHOICES, quick)
            name = f"step of {rows}: {'gated' if gated else 'plain'}, {'few' if few else 'many'}"
            shape = TunedShape(name, asdict, steps.prepare)
            yield Group(choices, (shape,), noise=STEP_NOISE, settle=steps.settle)


class DecodeSteps:
    """Times whole decode steps of `rows` sequences with candidate constants.

    Constants that were settled stay in place while the next kind of product is timed.
    """

    def __init__(self, target: TuningTarget, rows: int) -> None:
        self._target, self._rows = target, rows
        self._tuned = TUNED
        self._kind = OneRowConstants if rows == 1 else FewRowsConstants

    def settle(self, constants: Constants) -> None:
        """Use these constants in all later steps."""
        self._tuned = self._tuned.having(constants)

    def prepare(self) -> Timer:
        """Return the timer, which all kinds of product share."""
        return self._timer

    @functools.cached_property
    def _timer(self) -> Timer:
        """Timer of a decode step, which is captured again with the constants of each layout."""
        from granite_paged.layers.triton.tiles import using

        self._target.fresh()
        shape, clock = Shape(self._rows, STEP_CONTEXT), self._target.clock
        runner = make_runner(self._target.model, config_for(self._target.config, shape))
        sequences = Sequences(runner, self._rows)
        sequences.open(STEP_CONTEXT + REPLAYED)
        positions = [STEP_CONTEXT + row % REPLAYED for row in sequences.rows]

        def steps() -> None:
            for _ in range(_STEPS):
                runner.decode(sequences.rows, positions)

        def seconds(layout: Layout) -> float:
            runner.forget_captured_steps()
            with using(self._tuned.having(self._kind(**layout))):
                steps()
            times = [clock.kernel_seconds(steps, None) for _ in range(_STEP_REPEATS)]
            return quantile(times, 0.5) / _STEPS

        return seconds


SUBJECTS = {"decode": decode_groups, "prefill": prefill_groups, "products": product_groups}
"""Name of what is tuned -> the function that yields its groups."""
