"""A chat in the terminal: one message per line, until the input ends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from granite_paged.cli.options import OK, USAGE
from granite_paged.cli.prompt_source import messages_of
from granite_paged.errors import GranitePagedError

if TYPE_CHECKING:
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.request import SamplingParams
    from granite_paged.geometry import PagedConfig
    from granite_paged.models import LoadedModel


def converse(
    loaded: LoadedModel,
    config: PagedConfig,
    params_of: Callable[[int], SamplingParams],
    system: str | None,
    most_tokens: int,
) -> int:
    """Answer each line with all earlier ones as its context. Return the exit status.

    A message that is refused is left out of the conversation, which continues.

    Raises:
        PromptError: if the tokenizer has no chat template.
    """
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.prompts import PromptEncoder

    encoder = PromptEncoder(loaded.tokenizer, loaded.model.config.vocab_size)
    encoder.check_chat()
    tokens = min(most_tokens, loaded.model.config.max_position_embeddings)
    config = replace(
        config,
        max_sequences=config.max_sequences or 2,
        max_tokens=config.max_tokens or -(-tokens // config.page_size) * config.page_size,
    )
    status = OK
    history: list[dict[str, str]] = messages_of(system)
    with Engine(loaded.model, config, tokenizer=loaded.tokenizer, warmup="lazy") as engine:
        for line in _lines():
            asked = [*history, {"role": "user", "content": line}]
            try:
                prompt = encoder.encode(asked)
                text = _streamed(engine, prompt, params_of(len(prompt)))
            except GranitePagedError as error:
                click.echo(f"granite-paged: error: {error}", err=True)
                status = USAGE
            else:
                history = [*asked, {"role": "assistant", "content": text}]
    return status


def _streamed(engine: Engine, prompt: tuple[int, ...], params: SamplingParams) -> str:
    """Print an answer as it is generated. Return it."""
    text = ""
    try:
        for piece in engine.stream(prompt, params):
            click.echo(piece.text, nl=False)
            text += piece.text
    finally:
        click.echo()
    return text


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty; on a terminal, with a prompt."""
    read: Any = sys.stdin
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets input() edit its line
        read = _typed()
    for line in read:
        if line.strip():
            yield line.strip()


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
