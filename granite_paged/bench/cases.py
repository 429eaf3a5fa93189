"""The benchmark's cases: what each runs, in which shapes, and in which modes.

::

    batch      prefill of batches of equally long prompts
    context    prefill of one prompt, for growing lengths
    decode     one new token for each sequence of a batch
    kernel     paged FlexAttention alone, compared with contiguous SDPA and the bandwidth bound
    memory     number of ragged sequences that fit a budget, in pages and padded
    coldstart  time from a loaded model to its first token, and to every shape compiled
    serve      a seeded workload of requests, all sent at once: the engine, and batches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from granite_paged.bench.roofline import ModelSizes, Work
from granite_paged.bench.workload import Workload
from granite_paged.errors import UnknownName
from granite_paged.names import MODES

Kind = Literal["prefill", "decode", "kernel", "memory", "coldstart", "serve"]


class Shape(NamedTuple):
    """Number of sequences and tokens of each; in a ragged batch, `shortest` to `context`."""

    batch: int
    context: int
    shortest: int | None = None

    @property
    def variant(self) -> str:
        """Description of the lengths in a result row; empty if they are equal."""
        return "" if self.shortest is None else f"ragged {self.shortest}-{self.context}"

    def lengths(self) -> list[int]:
        """Return the tokens of each sequence, evenly spread, longest last."""
        if self.shortest is None or self.batch == 1:
            return [self.context] * self.batch
        span = self.context - self.shortest
        return [self.shortest + span * row // (self.batch - 1) for row in range(self.batch)]


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One case of the benchmark.

    Attributes:
        name: value of `--case`.
        kind: what a step does.
        modes: modes that can run it.
        shapes: for a GPU.
        quick: for a GPU with `--quick`.
        small: for the CPU.
        on_request: modes that run only where they are named, since they compile for minutes.
    """

    name: str
    kind: Kind
    modes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    small: tuple[Shape, ...]
    on_request: tuple[str, ...] = ()

    def able(self, modes: Sequence[str] = ()) -> list[str]:
        """Return which of these modes can run the case, in the case's order.

        No modes mean all but those that run on request.
        """
        chosen = modes or [mode for mode in self.modes if mode not in self.on_request]
        return [mode for mode in self.modes if mode in chosen]

    def work(self, sizes: ModelSizes, shape: Shape) -> Work | None:
        """Return the minimum work of one step; None for a case without model steps."""
        if self.kind == "prefill":
            return sizes.prefill(shape.batch, shape.context)
        if self.kind == "decode":
            return sizes.decode(shape.batch, shape.context)
        if self.kind == "serve":
            return sizes.serve(workload_of(shape))
        return None

    def step_tokens(self, shape: Shape) -> int:
        """Return the tokens that one step processes; in `serve`, the expected new ones."""
        if self.kind == "serve":
            return round(workload_of(shape).expected_new)
        return shape.batch * shape.context if self.kind == "prefill" else shape.batch

    def choose(
        self, *, gpu: bool, quick: bool, batches: Sequence[int] = (), contexts: Sequence[int] = ()
    ) -> list[Shape]:
        """Return the shapes to run. `batches` and `contexts` replace the case's own."""
        usual = self.small if not gpu else self.quick if quick else self.shapes
        if not batches and not contexts:
            return list(usual)
        plain = [shape for shape in usual if shape.shortest is None]
        batches = batches or sorted({shape.batch for shape in plain})
        contexts = contexts or sorted({shape.context for shape in plain})
        return [Shape(batch, context) for batch in batches for context in contexts]


def _shapes(batches: Sequence[int], contexts: Sequence[int]) -> tuple[Shape, ...]:
    return tuple(Shape(batch, context) for batch in batches for context in contexts)


CASES = {
    case.name: case
    for case in (
        BenchCase(
            "batch",
            "prefill",
            MODES,
            _shapes((1, 2, 4, 8, 16, 32), (512,)),
            quick=_shapes((1, 8, 32), (512,)),
            small=_shapes((1, 2, 4), (64,)),
            on_request=("static",),
        ),
        BenchCase(
            "context",
            "prefill",
            MODES,
            _shapes((1,), (128, 256, 512, 1024, 2048, 4096, 16384, 32768, 131072)),
            quick=_shapes((1,), (128, 512, 2048, 4096, 16384)),
            small=_shapes((1,), (32, 128, 256)),
            on_request=("static",),
        ),
        BenchCase(
            "decode",
            "decode",
            MODES,
            _shapes((1, 8, 32, 128), (512, 1024, 4096, 32768)),
            quick=(Shape(1, 512), Shape(32, 512), Shape(32, 4096), Shape(128, 1024)),
            small=_shapes((1, 4), (64, 128)),
        ),
        BenchCase(
            "kernel",
            "kernel",
            ("paged",),
            (
                *(Shape(1, 4096), Shape(8, 4096), Shape(32, 4096), Shape(32, 4096, shortest=64)),
                *(Shape(8, 32768), Shape(1, 131072)),
            ),
            quick=(*_shapes((1, 8, 32), (4096,)), Shape(32, 4096, shortest=64)),
            small=(Shape(1, 128), Shape(4, 128), Shape(4, 128, shortest=16)),
        ),
        BenchCase(
            "memory",
            "memory",
            ("default", "paged"),
            (Shape(1, 4096, shortest=1),),
            quick=(Shape(1, 4096, shortest=1),),
            small=(Shape(1, 4096, shortest=1),),
        ),
        BenchCase(
            "coldstart",
            "coldstart",
            ("paged",),
            _shapes((1,), (512,)),
            quick=_shapes((1,), (512,)),
            small=_shapes((1,), (64,)),
        ),
        BenchCase(
            "serve",
            "serve",
            MODES,
            (Shape(64, 96), Shape(256, 192)),
            quick=(Shape(64, 96),),
            small=(Shape(4, 24),),
            on_request=("static",),
        ),
    )
}


def workload_of(shape: Shape) -> Workload:
    """Return the workload of a `serve` shape: `batch` requests of at most `context` tokens.

    Two thirds of a request's tokens at most are its prompt; the rest is its answer.
    """
    prompt = max(1, 2 * shape.context // 3)
    answer = max(1, shape.context - prompt)
    return Workload(
        requests=shape.batch,
        prompt_tokens=(min(8, prompt), prompt),
        new_tokens=(min(8, answer), answer),
    )


def chosen_cases(names: Sequence[str]) -> list[BenchCase]:
    """Return the named cases, in that order and once each; no names mean all cases.

    Raises:
        UnknownName: a name is not a case.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise UnknownName("case", unknown[0], tuple(CASES))
    return [CASES[name] for name in dict.fromkeys(names or CASES)]
