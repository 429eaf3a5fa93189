"""Where `generate` takes its prompts from: an argument, standard input or a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from granite_paged.errors import DataError, GranitePagedError

if TYPE_CHECKING:
    from granite_paged.engine.request import Output
    from granite_paged.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Source:
    """What the command line says about prompts. Raises UsageError where it contradicts itself."""

    text: str | None
    file: str | None
    chat: bool
    system: str | None

    def __post_init__(self) -> None:
        if self.text is not None and self.file is not None:
            raise click.UsageError("TEXT and --file exclude each other")
        if self.text is None and self.file is None and not self.chat:
            raise click.UsageError("nothing to continue: pass TEXT, --file PATH or --chat")
        if self.system is not None and not self.chat:
            raise click.UsageError("--system needs --chat")

    @property
    def single(self) -> bool:
        """Whether there is one prompt, and not one per line."""
        return self.file is None

    @property
    def interactive(self) -> bool:
        """Whether messages are typed one by one."""
        return self.text is None and self.file is None

    def given(self) -> Iterator[tuple[str, Any]]:
        """Yield each prompt, text or messages, with its name in error messages.

        Raises:
            DataError: for a line that is neither. It names the line.
        """
        if self.file is not None:
            yield from self._lines(self.file)
        else:
            text = sys.stdin.read().removesuffix("\n") if self.text == "-" else self.text
            yield "the prompt", self._with_template(text)

    def _lines(self, file: str) -> Iterator[tuple[str, Any]]:
        name = "standard input" if file == "-" else file
        is_json = file.endswith(".jsonl")
        for number, line in enumerate(_read(file, name), start=1):
            if line.strip():
                prompt = _from_json(line, name, number) if is_json else line
                yield f"{name}, line {number}", self._with_template(prompt)

    def _with_template(self, prompt: Any) -> Any:
        """Return messages if they are wanted, or given; else the text."""
        if isinstance(prompt, str) and not self.chat:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return messages_of(self.system) + messages


def messages_of(system: str | None) -> list[dict[str, str]]:
    """Return what a chat begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def _read(file: str, name: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(name, f"cannot be read as UTF-8 text: {error}") from None
    return text.split("\n")


def _from_json(line: str, name: str, number: int) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(name, f"is no JSON: {error}", line=number) from None
    prompt = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt):
        return prompt
    raise DataError(name, 'must be {"prompt": TEXT} or {"messages": [...]}', line=number)


@dataclass(slots=True)
class AskedPrompt:
    """One prompt: as it was given, as token ids, and its answers or what refused it."""

    name: str
    given: Any
    tokens: tuple[int, ...] = ()
    error: GranitePagedError | None = None
    outputs: list[Output] = field(default_factory=list)


def read_prompts(source: Source, loaded: LoadedModel) -> list[AskedPrompt]:
    """Return the prompts of a source as token ids, each with what refuses it, if anything does.

    Raises:
        GranitePagedError: what refuses the only prompt.
        DataError: for a line that is no prompt.
    """
    from granite_paged.engine.prompts import PromptEncoder

    encoder = PromptEncoder(loaded.tokenizer, loaded.model.config.vocab_size)
    prompts = [AskedPrompt(name, given) for name, given in source.given()]
    if not prompts:
        raise DataError(str(source.file), "holds no prompt")
    for prompt in prompts:
        try:
            prompt.tokens = _encoded(encoder, prompt.given, loaded)
        except GranitePagedError as error:
            if source.single:
                raise
            prompt.error = error
    return prompts


def _encoded(encoder: Any, given: Any, loaded: LoadedModel) -> tuple[int, ...]:
    """Encode a prompt. An empty text is the beginning-of-text token, if the model has one."""
    tokenizer: Any = loaded.tokenizer
    if given == "" and not tokenizer("")["input_ids"]:
        for config in (loaded.model.generation_config, loaded.model.config):
            if config.bos_token_id is not None:
                given = [config.bos_token_id]
                break
    tokens: tuple[int, ...] = encoder.encode(given)
    return tokens
