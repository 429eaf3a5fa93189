"""Every refusal of this package, by name, with the numbers in it.

Each message is one line and ends with what the caller can do. A refused call leaves everything
as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class GranitePagedError(Exception):
    """Base of every error that granite_paged raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # by default the message would be handed to __init__, and an error lost between processes
        return _restored, (type(self), self.args, self.__dict__)


class GeometryError(GranitePagedError, ValueError):
    """A size that cannot work: page size, head counts, budget, or two caches that do not match."""


class OutOfPages(GranitePagedError):
    """The pool cannot hold what was asked for."""

    def __init__(self, *, needed: int, free: int, advice: str = "") -> None:
        self.needed = needed
        self.free = free
        super().__init__(f"out of pages: {needed} needed, {free} free{_then(advice)}")


class OutOfRows(GranitePagedError):
    """More sequences at once than the cache has rows for."""

    def __init__(self, *, needed: int, rows: int) -> None:
        self.needed = needed
        self.rows = rows
        super().__init__(
            f"out of rows: a batch of {needed} was asked for, {rows} fit; "
            "raise PagedConfig.max_sequences or send fewer sequences"
        )


class OutOfMemory(GranitePagedError):
    """The device has less memory than a step or a runner needs."""

    def __init__(self, *, what: str, free: int, advice: str) -> None:
        self.what = what
        self.free = free
        super().__init__(f"out of memory: {what}, {free / 1e9:.2f} GB free; {advice}")


class UnknownSequence(GranitePagedError, KeyError):
    """A sequence id that this allocator never issued."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        super().__init__(f"sequence {sequence} was never opened by this allocator")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


class DoubleFree(GranitePagedError):
    """A sequence released twice, or twice in one call."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        super().__init__(
            f"sequence {sequence} released twice: its pages may have other owners by now"
        )


class InvalidRequest(GranitePagedError, ValueError):
    """A request that means nothing: a negative count, a bad batch, an impossible argument."""


class UnsupportedModel(GranitePagedError, TypeError):
    """A model that granite_paged does not know how to page."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is not supported: granite_paged pages the attention layers of "
            "GraniteMoeHybridForCausalLM (model_type 'granitemoehybrid') only"
        )


class AlreadyPatched(GranitePagedError):
    """`patch` was called on a model that is patched."""


class NotPatched(GranitePagedError):
    """`unpatch` without `patch`, or one of our caches on a model that is not patched."""


class InferenceOnly(GranitePagedError):
    """A patched model was run in training mode or with gradients."""


class PaddingError(GranitePagedError, ValueError):
    """Padding on the right, or a mask that changed its mind about the past."""


class PromptError(GranitePagedError, ValueError):
    """A prompt that cannot be run: empty, or with tokens outside the vocabulary."""


class FieldError(GranitePagedError, ValueError):
    """A file of ours that cannot be read. Names the file and the field."""

    advice = "write it anew"

    def __init__(self, path: str, field: str, problem: str) -> None:
        self.path = path
        self.field = field
        where = f"{path}: {field}" if field else path
        super().__init__(f"{where} {problem}; {self.advice}")


class ResultFileError(FieldError):
    """A file of benchmark results that cannot be read."""

    advice = "write such files with `granite-paged bench --json`"


class TunedFileError(FieldError):
    """A file of tuned constants that cannot be used."""

    advice = "write such files with `granite-paged tune --write`"


class CannotJudge(GranitePagedError):
    """A gate that would say nothing about the fast path here: no GPU, or a fallback."""


class Unsupported(GranitePagedError):
    """A mode cannot run this case or shape."""


class NonFinite(GranitePagedError, ArithmeticError):
    """NaN or infinity was about to enter the cache. Names the layers."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        names = ", ".join(map(str, self.layers))
        super().__init__(
            f"NaN or infinity in K or V of attention layer {names}: "
            "the sequences of this cache were released; check the weights and the dtype"
        )


class RequestTooLarge(OutOfPages):
    """A request that would not fit if it were alone."""


class QueueFull(GranitePagedError):
    """As many requests are waiting as the engine lets wait."""

    def __init__(self, *, waiting: int, limit: int) -> None:
        self.waiting = waiting
        self.limit = limit
        super().__init__(
            f"queue full: {waiting} sequences wait, {limit} may; "
            "step() the engine first, or raise its queue"
        )


class EngineClosed(GranitePagedError):
    """The engine was closed: before the call, or while the request ran."""


class RequestCancelled(GranitePagedError):
    """The request was cancelled."""

    def __init__(self, request: int) -> None:
        self.request = request
        super().__init__(f"request {request} was cancelled")


class InvalidSampling(InvalidRequest):
    """A sampling parameter that means nothing."""


class CallbackFailed(GranitePagedError):
    """What the caller gave to be told of new tokens raised; see `__cause__`."""

    def __init__(self, request: int, cause: str) -> None:
        self.request = request
        super().__init__(f"the callback of request {request} raised {cause}: the request was ended")


class StepFailed(GranitePagedError):
    """A step of this request raised, and again when the request ran alone; see `__cause__`."""

    def __init__(self, request: int, cause: str) -> None:
        self.request = request
        super().__init__(f"a step of request {request} raised {cause}: the request was ended")


class NonFiniteRequest(GranitePagedError, ArithmeticError):
    """The numbers of one request became NaN or infinite."""

    def __init__(self, request: int) -> None:
        self.request = request
        super().__init__(
            f"NaN or infinity in request {request}: it was ended, others go on; "
            "check the weights and the dtype"
        )


class BrokenInvariant(GranitePagedError, AssertionError):
    """What `check_valid()` found: allocator, page tables and pools do not agree."""


class CacheReleased(GranitePagedError):
    """The cache lost its sequences to a failed step; `reset()` makes it usable again."""


class CheckpointError(GranitePagedError):
    """A checkpoint that is missing, incomplete or corrupt."""


class DeviceError(GranitePagedError):
    """A device that is unknown or not there."""


class DataError(GranitePagedError, ValueError):
    """Evaluation data that is missing or of another format. Names file, line and field."""

    def __init__(self, file: str, problem: str, *, line: int | None = None) -> None:
        self.file = file
        self.line = line
        place = file if line is None else f"{file}, line {line}"
        super().__init__(f"{place}: {problem}")


class MissingExtra(GranitePagedError, ImportError):
    """A package that only an extra brings is not installed."""

    def __init__(self, package: str, *, extra: str) -> None:
        self.extra = extra
        super().__init__(
            f"{package} is not installed: pip install 'granite-paged[{extra}]' brings it"
        )


class ResultsError(GranitePagedError):
    """Results that cannot be written, or that another run left behind."""


def require(holds: bool, invariant: str) -> None:
    """Raise BrokenInvariant unless it holds; unlike `assert`, under `python -O` as well."""
    if not holds:
        raise BrokenInvariant(invariant)


def check_token_range(lowest: int, highest: int, vocabulary: int) -> None:
    """Raise PromptError unless token ids from `lowest` to `highest` are in the vocabulary."""
    if lowest < 0 or highest >= vocabulary:
        raise PromptError(
            f"token {lowest if lowest < 0 else highest} is outside the vocabulary of "
            f"{vocabulary}: use the model's own tokenizer"
        )


def _restored(
    kind: type[GranitePagedError], args: tuple[Any, ...], numbers: dict[str, Any]
) -> GranitePagedError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(numbers)
    return error


def _then(advice: str) -> str:
    return f"; {advice}" if advice else ""
