"""Errors: typed, one line each, with their numbers in the message."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest

from granite_paged import errors
from granite_paged.errors import (
    CallbackFailed,
    CannotBeExact,
    CannotWrite,
    CheckpointError,
    DataError,
    DoubleFree,
    FileError,
    GeometryError,
    GranitePagedError,
    InvalidRequest,
    MissingExtra,
    ModelError,
    NonFinite,
    NonFiniteRequest,
    OutOfPages,
    OutOfRows,
    PaddingError,
    PagingError,
    PromptError,
    QueueFull,
    RequestCancelled,
    RequestError,
    RequestTooLarge,
    ResultFileError,
    StepFailed,
    UnknownName,
    UnknownSequence,
    UnsupportedModel,
    writing,
)

EXAMPLES = [
    OutOfPages(needed=5, free=3),
    OutOfPages(needed=5, free=3, advice="raise max_tokens"),
    OutOfRows(needed=9, rows=8),
    UnknownSequence(41),
    DoubleFree(7),
    NonFinite([2, 6]),
    UnsupportedModel("model type 'llama'"),
    CannotBeExact("experts have no exact kernel"),
    GeometryError("page_size must be a power of two, got 12"),
    InvalidRequest("sequence 3 cannot grow by -1 tokens"),
    CheckpointError("model.safetensors is missing"),
    RequestTooLarge(needed=25, free=20, advice="raise max_tokens"),
    QueueFull(waiting=2, limit=3),
    RequestCancelled(4),
    CallbackFailed(4, ZeroDivisionError("division by zero")),
    StepFailed(4, RuntimeError("device lost")),
    NonFiniteRequest(4),
    ResultFileError("r.json", "rows[0].mode", "is missing"),
    DataError("mmlu.jsonl", "not a JSON object", line=3),
    CannotWrite("r.json", "No space left on device"),
    UnknownName("case", "speed", ["batch", "decode"]),
    MissingExtra("wandb", extra="wandb"),
]


def names(error: GranitePagedError) -> str:
    return type(error).__name__


def error_types() -> list[type[Exception]]:
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return [kind for kind in found if issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", error_types(), ids=lambda kind: kind.__name__)
def test_every_error_derives_from_the_base(kind: type[Exception]) -> None:
    assert issubclass(kind, GranitePagedError)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (GeometryError, ValueError),
        (InvalidRequest, ValueError),
        (PaddingError, ValueError),
        (PromptError, ValueError),
        (UnknownSequence, KeyError),
        (UnsupportedModel, TypeError),
        (NonFinite, ArithmeticError),
    ],
)
def test_an_error_is_also_the_expected_builtin(kind, builtin) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize(
    ("family", "member"),
    [
        (PagingError, OutOfPages),
        (PagingError, UnknownSequence),
        (RequestError, PromptError),
        (RequestError, NonFinite),
        (RequestError, RequestTooLarge),
        (PagingError, RequestTooLarge),
        (ModelError, CheckpointError),
        (ModelError, GeometryError),
        (FileError, DataError),
        (FileError, CannotWrite),
    ],
)
def test_an_error_belongs_to_the_family_of_its_cause(family, member) -> None:
    assert issubclass(member, family)


@pytest.mark.parametrize("error", EXAMPLES, ids=names)
def test_a_message_is_one_plain_line(error: GranitePagedError) -> None:
    message = str(error)
    assert message
    assert "\n" not in message
    assert not message.startswith(("'", '"')), (
        "the message is shown as a repr, as that of KeyError is"
    )


@pytest.mark.parametrize(
    ("error", "numbers"),
    [
        (OutOfPages(needed=5, free=3), {"needed": 5, "free": 3}),
        (OutOfRows(needed=9, rows=8), {"needed": 9, "rows": 8}),
        (UnknownSequence(41), {"sequence": 41}),
        (DoubleFree(7), {"sequence": 7}),
    ],
    ids=lambda value: names(value) if isinstance(value, Exception) else "",
)
def test_numbers_are_attributes_and_in_the_message(error, numbers) -> None:
    assert vars(error) == numbers
    assert all(str(number) in str(error) for number in numbers.values())


def test_non_finite_names_every_layer() -> None:
    error = NonFinite([2, 6])
    assert error.layers == (2, 6)
    assert "layer 2, 6" in str(error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ResultFileError("r.json", "rows[0].mode", "is missing"),
            "r.json: rows[0].mode is missing; write such files with --json of "
            "`granite-paged bench` and `granite-paged eval`",
        ),
        (DataError("d.jsonl", "not UTF-8 text", line=3), "d.jsonl, line 3: not UTF-8 text"),
        (CannotWrite("r.json", "it is a folder"), "cannot write r.json: it is a folder"),
    ],
    ids=["results", "data", "write"],
)
def test_a_file_error_names_the_file(error: FileError, message: str) -> None:
    assert str(error) == message
    assert error.path == message.removeprefix("cannot write ").split(":")[0].split(",")[0]


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match=r"^cannot write .*: Is a directory$"), writing(tmp_path):
        tmp_path.write_text("x")


def test_advice_ends_the_message() -> None:
    assert str(OutOfPages(needed=2, free=1, advice="wait")).endswith("; wait")


@pytest.mark.parametrize("error", EXAMPLES, ids=names)
@pytest.mark.parametrize(
    "through", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"]
)
def test_an_error_can_be_pickled_and_copied(error, through) -> None:
    """concurrent.futures pickles what a worker raises; if that fails, the pool breaks."""
    arrived = through(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
