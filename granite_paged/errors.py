"""Every error that granite_paged raises on purpose, in four families by cause.

`PagingError` concerns pages and memory, `RequestError` one request, `ModelError` the model and
`FileError` a file; the few others concern the machine, its packages or an argument. A message is
one line that says what was wrong, what was found and what to do. A refused call changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


class GranitePagedError(Exception):
    """Base of every error that granite_paged raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, pickle passes the message to __init__, which takes other arguments.
        return _restored, (type(self), self.args, self.__dict__)


# -- pages and memory ---------------------------------------------------------------------------


class PagingError(GranitePagedError):
    """Pages, rows or memory ran out, or were used in a way that would mix up sequences."""


class OutOfPages(PagingError):
    """The pool has fewer free pages than a call needs."""

    def __init__(self, *, needed: int, free: int, advice: str = "") -> None:
        self.needed = needed
        self.free = free
        super().__init__(f"out of pages: {needed} needed, {free} free{_then(advice)}")


class OutOfRows(PagingError):
    """A batch has more sequences than the cache has rows."""

    def __init__(self, *, needed: int, rows: int) -> None:
        self.needed = needed
        self.rows = rows
        super().__init__(
            f"out of rows: the batch has {needed} sequences, the cache {rows} rows; "
            "raise PagedConfig.max_sequences or send fewer sequences"
        )


class OutOfMemory(PagingError):
    """A step or a runner needs more memory than the device has free."""

    def __init__(self, *, what: str, free: int, advice: str) -> None:
        self.what = what
        self.free = free
        super().__init__(f"out of memory: {what}, {free / 1e9:.2f} GB free; {advice}")


class UnknownSequence(PagingError, KeyError):
    """The allocator never issued this sequence id."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        super().__init__(f"sequence {sequence} was never opened by this allocator")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


class DoubleFree(PagingError):
    """A sequence was released twice, possibly within one call."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        super().__init__(
            f"sequence {sequence} released twice: its pages may have other owners by now"
        )


class CacheReleased(PagingError):
    """A failed step released the sequences of this cache; `reset()` makes it usable again."""


class BrokenInvariant(PagingError, AssertionError):
    """`check_valid()` found that allocator, page tables and pools disagree."""


# -- requests -----------------------------------------------------------------------------------


class RequestError(GranitePagedError):
    """One request cannot be run, or failed. Other requests are unaffected."""


class InvalidRequest(RequestError, ValueError):
    """A request with impossible inputs, such as a negative count or a batch of another shape."""


class InvalidSampling(InvalidRequest):
    """A sampling parameter that is out of range, or that contradicts another one."""


class PromptError(RequestError, ValueError):
    """A prompt that is empty, or has tokens outside the vocabulary."""


class PaddingError(RequestError, ValueError):
    """Padding on the right, or a mask that reveals padding of earlier steps."""


class RequestTooLarge(OutOfPages, RequestError):
    """A request that would not fit even if it ran alone."""


class QueueFull(RequestError):
    """The engine's queue has no room now for the sequences of a request; a step makes room."""

    def __init__(self, *, waiting: int, limit: int) -> None:
        self.waiting = waiting
        self.limit = limit
        super().__init__(
            f"queue full: {waiting} sequences are waiting, the limit is {limit}; "
            "step() the engine first, or raise its queue"
        )


class EngineLost(RequestError):
    """An engine of a group failed, and another one failed at the same work; see `__cause__`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(
            f"two engines failed at this work, the last one with {type(cause).__name__}: {cause}"
        )
        self.__cause__ = cause


class EngineClosed(RequestError):
    """The engine was closed before the call, or while the request ran."""


class RequestCancelled(RequestError):
    """The request was cancelled."""

    def __init__(self, request: int) -> None:
        self.request = request
        super().__init__(f"request {request} was cancelled")


class EngineBusy(RequestError):
    """A callback called a method that runs a step of the engine that called it."""

    def __init__(self, method: str) -> None:
        self.method = method
        super().__init__(
            f"{method}() was called while a step of this engine runs: "
            "call it after the callback returned"
        )


class TokenizerFailed(RequestError):
    """The tokenizer raised when it decoded the request's tokens; see `__cause__`."""

    def __init__(self, request: int, cause: Exception) -> None:
        self.request = request
        self.__cause__ = cause
        super().__init__(
            f"the tokenizer raised {_described(cause)} on tokens of request {request}: "
            "the request was ended"
        )


class CallbackFailed(RequestError):
    """The request's own callback raised; see `__cause__`."""

    def __init__(self, request: int, cause: Exception) -> None:
        self.request = request
        self.__cause__ = cause
        super().__init__(
            f"the callback of request {request} raised {_described(cause)}: the request was ended"
        )


class StepFailed(RequestError):
    """A step of this request raised, and again when the request ran alone; see `__cause__`."""

    def __init__(self, request: int, cause: Exception) -> None:
        self.request = request
        self.__cause__ = cause
        super().__init__(
            f"a step of request {request} raised {_described(cause)}: the request was ended"
        )


class NonFinite(RequestError, ArithmeticError):
    """A step of `PagedCache` met NaN or infinity. Names the layers.

    Attributes:
        layers: attention layers whose K or V were not finite.
        part: what was not finite after the last of them, such as a Mamba layer or the logits.
    """

    def __init__(self, layers: Sequence[int], part: str = "") -> None:
        self.layers = tuple(layers)
        self.part = part
        names = ", ".join(map(str, self.layers))
        super().__init__(
            f"NaN or infinity in {part or f'K or V of attention layer {names}'}: "
            "the sequences of this cache were released; check the weights and the dtype"
        )


class NonFiniteRequest(RequestError, ArithmeticError):
    """The numbers of one request became NaN or infinite."""

    def __init__(self, request: int) -> None:
        self.request = request
        super().__init__(
            f"NaN or infinity in keys, values or logits: request {request} was ended; "
            "check the weights and the dtype"
        )


# -- models -------------------------------------------------------------------------------------


class ModelError(GranitePagedError):
    """A model that cannot be loaded, patched or paged, or that is used in an unsupported way."""


class GeometryError(ModelError, ValueError):
    """A size that cannot work: page size, head counts, memory, or two caches that do not match."""


class UnsupportedModel(ModelError, TypeError):
    """A model with an architecture that granite_paged does not page."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(
            f"{what} is not supported: granite_paged pages the attention layers of "
            f"GraniteMoeHybridForCausalLM (model_type 'granitemoehybrid') only{_then(advice)}"
        )


class CannotBeExact(UnsupportedModel):
    """Exact mode was asked for, and this model, device or use cannot run in it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        ModelError.__init__(
            self,
            f"exact mode is not possible here: {reason}; "
            "run without it (PagedConfig.exact, --exact)",
        )


class CheckpointError(ModelError):
    """A checkpoint that is missing, incomplete or corrupt."""


class TokenizerError(ModelError, ValueError):
    """A tokenizer that is needed and missing, or that belongs to another model."""


class AlreadyPatched(ModelError):
    """`patch`, or a change of its attention implementation, was called on a patched model."""


class NotPatched(ModelError):
    """`unpatch` was called without `patch`, or a PagedCache was used on an unpatched model."""


class InferenceOnly(ModelError):
    """A patched model was run in training mode or with gradients."""


# -- files --------------------------------------------------------------------------------------


class FileError(GranitePagedError, ValueError):
    """A file that cannot be used. Names the file and, where one is to blame, the field."""

    advice = ""

    def __init__(self, path: str, field: str, problem: str) -> None:
        self.path = path
        self.field = field
        where = f"{path}: {field}" if field else path
        super().__init__(f"{where} {problem}{_then(self.advice)}")


class ResultFileError(FileError):
    """A file of results that cannot be read."""

    advice = "write such files with --json of `granite-paged bench` and `granite-paged eval`"


class BitsFileError(FileError):
    """A file of digests that cannot be read."""

    advice = "write such files with `granite-paged verify --bits-out`"


class TunedFileError(FileError):
    """A file of tuned constants that cannot be used."""

    advice = "write such files with `granite-paged tune --write`"


class DataError(FileError):
    """Evaluation data or answers that are missing or in another format. Names the line."""

    def __init__(self, path: str, problem: str, *, line: int | None = None) -> None:
        self.line = line
        place = path if line is None else f"{path}, line {line}"
        super().__init__(f"{place}:", "", problem)
        self.path = path


class CannotWrite(FileError):
    """A file or folder that cannot be written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot write {path}:", "", reason)
        self.path = path


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Raise CannotWrite, naming the file or folder `path`, where the block raises OSError."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(str(path), str(error.strerror)) from None


# -- arguments, packages and the machine --------------------------------------------------------


class InvalidArgument(GranitePagedError, ValueError):
    """An argument or option whose value is unknown, out of range or contradicts another one."""


class UnknownName(InvalidArgument):
    """A name that is not one of the known ones. Lists those."""

    def __init__(self, what: str, name: object, known: Sequence[str]) -> None:
        self.name = name
        super().__init__(f"unknown {what} {name!r}: use one of {', '.join(known)}")


class MissingExtra(GranitePagedError, ImportError):
    """A package that only an extra installs is missing."""

    def __init__(self, package: str, *, extra: str) -> None:
        self.extra = extra
        super().__init__(
            f"{package} is not installed: install granite-paged with its extra {extra}"
        )


class DeviceError(GranitePagedError):
    """A device that is unknown, absent, or too small for the model."""


class ClusterError(GranitePagedError):
    """A Ray cluster that is absent or too small, or whose workers fail."""


class Unsupported(GranitePagedError):
    """A benchmark mode cannot run this case or shape."""


class CannotJudge(GranitePagedError):
    """A gate or tuning run would measure no fast path here: no GPU, or a fallback is in use."""


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


def _described(error: Exception) -> str:
    return f"{type(error).__name__} ({error})" if str(error) else type(error).__name__


def _then(advice: str) -> str:
    return f"; {advice}" if advice else ""
