"""Lines answered on one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from granite_paged.batch.answer import Answer, answer_line, error_line
from granite_paged.batch.lines import Line
from granite_paged.batch.request import BatchRequest, Defaults, request_of
from granite_paged.device import dtype_name
from granite_paged.digests import config_digest, sha256, tokenizer_digest, weights_digest
from granite_paged.engine.engine import Engine
from granite_paged.engine.prompts import PromptEncoder
from granite_paged.engine.request import Request
from granite_paged.environment import bits_place
from granite_paged.errors import GranitePagedError, QueueFull
from granite_paged.geometry import PagedConfig
from granite_paged.models import LoadedModel
from granite_paged.progress import Progress, silent

INVALID, FAILED = "invalid_request", "request_failed"
"""Codes of errors: the line is at fault, or its request failed."""


_CPU_ROWS = 32  # more rows wait longer for each other than they save


def batch_engine(
    loaded: LoadedModel, config: PagedConfig, rows: int | None, progress: Progress = silent
) -> Engine:
    """Return an engine for many sequences at once.

    Args:
        rows: most sequences at once. None: as many as the engine's default, or 32 on a CPU.
        progress: called while the engine warms up.
    """
    if rows is None and loaded.model.device.type == "cpu":
        rows = _CPU_ROWS
    config = replace(config, max_sequences=rows or config.max_sequences)
    return Engine(loaded.model, config, tokenizer=loaded.tokenizer, progress=progress)


@dataclass(slots=True)
class Pending:
    """A line that was taken: its request on the engine, or its answer already."""

    line: Line
    asked: BatchRequest | None = None
    request: Request | None = None
    refused: Answer | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer can be written."""
        return self.request is None or self.request.finished


class Answering:
    """Answers lines on an engine. No line raises: an error is its answer.

    Args:
        engine: the engine of `loaded.model`.
        loaded: the model and its tokenizer.
        defaults: what lines do not say.
        aliases: further names that a line may call the model by.

    Attributes:
        run: digest of the model, its tokenizer and the settings: what answers depend on.
    """

    def __init__(
        self,
        engine: Engine,
        loaded: LoadedModel,
        defaults: Defaults,
        aliases: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        place = bits_place(loaded.model.device) if engine.runner.config.exact else None
        self.run = run_digest(loaded, defaults, place)
        self._defaults = defaults
        self._model = loaded.name
        short = loaded.name.rstrip("/").rpartition("/")[2]
        self._names = (loaded.name, short, *aliases)
        self._tokenizer = loaded.tokenizer
        self._encoder = PromptEncoder(loaded.tokenizer, engine.runner.vocabulary)
        self._texts: dict[int, str] = {}

    def take(self, line: Line) -> Pending | None:
        """Submit a line. Return None if the engine's queue is full now: step it first."""
        if line.problem:
            return Pending(line, refused=self._error(line, INVALID, line.problem))
        try:
            asked = request_of(line, self._names)
            tokens = self._encoder.encode(asked.prompt)
            params = asked.params(self._defaults, len(tokens))
            return Pending(line, asked, self.engine.submit(tokens, params))
        except QueueFull:
            return None
        except GranitePagedError as error:
            return Pending(line, refused=self._error(line, INVALID, str(error)))
        except Exception as error:  # whatever it is, it concerns this line only
            return Pending(line, refused=self._error(line, FAILED, _unexpected(error)))

    def answer(self, pending: Pending) -> Answer:
        """Return the output line of a finished line."""
        if pending.refused is not None or pending.request is None or pending.asked is None:
            return pending.refused or self._error(pending.line, FAILED, "it was not asked")
        outputs = pending.request.outputs
        for output in outputs:
            if output.error is not None:
                return self._error(pending.line, FAILED, _described(output.error))
        try:
            return answer_line(
                self.run, pending.line, pending.asked, outputs, model=self._model, text=self._text
            )
        except Exception as error:  # of the tokenizer, for a token among the log-probabilities
            return self._error(pending.line, FAILED, _unexpected(error))

    def answer_all(self, lines: Sequence[Line]) -> list[Answer]:
        """Answer lines, and return the answers in the same order. Any thread may call it."""
        waiting: list[Pending] = []
        for line in lines:
            while (pending := self.take(line)) is None:
                self.engine.step()
            waiting.append(pending)
        for pending in waiting:
            while not pending.finished:
                self.engine.step()
        return [self.answer(pending) for pending in waiting]

    # -- details --------------------------------------------------------------------------------

    def _error(self, line: Line, code: str, message: str) -> Answer:
        return error_line(self.run, line, code, message)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            if self._tokenizer is None:
                self._texts[token] = f"token_id:{token}"
            else:
                self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts[token]


def run_digest(loaded: LoadedModel, defaults: Defaults, place: dict[str, str] | None = None) -> str:
    """Return a digest of what answers depend on.

    place: device and versions, where bits must be equal; else the device is not part of it.
    """
    settings: dict[str, Any] = {
        "weights": weights_digest(loaded.model),
        "config": config_digest(loaded.model.config),
        "dtype": dtype_name(loaded.model.dtype),
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "template": getattr(loaded.tokenizer, "chat_template", None),
        "defaults": defaults.to_json(),
        "name": loaded.name,
        **({"place": place} if place else {}),
    }
    return sha256(settings)


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _described(error: Exception) -> str:
    """Return a message without the number of the request, which another run does not repeat."""
    number = getattr(error, "request", None)
    message = str(error)
    return message if number is None else message.replace(f"request {number}", "the request")
