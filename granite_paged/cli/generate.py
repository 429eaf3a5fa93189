"""The command `generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from granite_paged.cli.options import (
    NATURAL,
    OK,
    POSITIVE,
    SETTINGS,
    ModelChoice,
    json_option,
    model_options,
    option,
    options,
    report_console,
    write_json,
)
from granite_paged.cli.serve import sized
from granite_paged.errors import TokenizerError

if TYPE_CHECKING:
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.prompts import Message, Prompt
    from granite_paged.engine.request import Output, SamplingParams
    from granite_paged.models import LoadedModel

_CONVERSATION = 8192
"""Tokens of a conversation in the terminal, answers included."""

_sampling_options = options(
    option(
        "--max-new-tokens",
        "Stop after this many new tokens.  [default: the generation config's, else 64]",
        POSITIVE,
        metavar="N",
    ),
    option(
        "--temperature",
        "Sample at this temperature; 0 always takes the most likely token.",
        click.FloatRange(min=0),
    ),
    option("--top-k", "Sample from this many of the most likely tokens; 0 takes all.", NATURAL),
    option(
        "--top-p",
        "Sample from the most likely tokens that together have this probability.",
        click.FloatRange(0, 1, min_open=True),
    ),
    option(
        "--repetition-penalty",
        "Divide the logits of tokens that occurred by this; 1 changes nothing.",
        click.FloatRange(min=0, min_open=True),
    ),
    option(
        "--stop stop_strings",
        "Stop at this text, which the answer leaves out. May be repeated.",
        multiple=True,
        metavar="TEXT",
    ),
    option("--n", "Draw this many answers.", POSITIVE),
    option(
        "--logprobs", "Add this many of the most likely tokens at each place to --json.", NATURAL
    ),
)


@click.command(context_settings=SETTINGS)
@click.argument("text", required=False)
@model_options
@option("--tokenizer", "Use this tokenizer; needed where the model has none.", metavar="ID_OR_PATH")
@option("--chat", "Take TEXT as a user's message, written by the chat template.", is_flag=True)
@option("--system", "Put this system message before it; implies --chat.", metavar="TEXT")
@_sampling_options
@json_option
def generate(
    text: str | None,
    choice: ModelChoice,
    tokenizer: str | None,
    chat: bool,
    system: str | None,
    json_file: str | None,
    **sampling: Any,
) -> int:
    """Continue TEXT, and print the answer as it is generated.

    TEXT may be -: standard input. With --chat and no TEXT, a conversation starts: each line of
    standard input is a message, until the end of input.

    Options win over the model's generation config, and that over the defaults: the most likely
    token each time, 64 new tokens. Several answers (--n) are printed when all are complete.

    \b
    granite-paged generate --model ibm-granite/granite-4.0-h-1b "Paged attention is"
    granite-paged generate --model DIR --chat --system "Be brief." "What is a page table?"
    granite-paged generate - --model DIR --n 3 --temperature 0.8 --json - < prompt.txt
    granite-paged generate "<bos> <plain> red-fox copper-bell and red-fox <ask>" --max-new-tokens 1
    """  # noqa: D301
    chat = chat or system is not None
    if text is None and not chat:
        raise click.UsageError("Missing argument 'TEXT'. Or start a conversation: --chat.")
    if text == "-":
        text = sys.stdin.read()
    loaded, tokens = _load(choice, tokenizer)
    given = {name: value for name, value in sampling.items() if value not in (None, ())}
    opening: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    if text is None:
        _converse(loaded, tokens, choice, given, opening)
    else:
        messages = [*opening, {"role": "user", "content": text}]
        _answer(loaded, tokens, choice, given, messages if chat else text, json_file)
    return OK


def _load(choice: ModelChoice, tokenizer: str | None) -> tuple[LoadedModel, Any]:
    from granite_paged.models import load_tokenizer

    loaded = choice.load()
    tokens = load_tokenizer(tokenizer) if tokenizer else loaded.tokenizer
    if tokens is None:
        raise TokenizerError(f"{loaded.name} has no tokenizer: pass --tokenizer ID_OR_PATH")
    return loaded, tokens


def _params(loaded: LoadedModel, seed: int, given: dict[str, Any], tokens: int) -> SamplingParams:
    """Return what was given on the command line, over the generation config of the model."""
    from granite_paged.engine.request import SamplingParams

    config = loaded.model.generation_config
    return SamplingParams.from_generation_config(config, prompt_tokens=tokens, seed=seed, **given)


def _answer(
    loaded: LoadedModel,
    tokenizer: Any,
    choice: ModelChoice,
    given: dict[str, Any],
    said: Prompt,
    json_file: str | None,
) -> None:
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.prompts import PromptEncoder

    prompt = PromptEncoder(tokenizer, loaded.model.config.vocab_size).encode(said)
    params = _params(loaded, choice.seed, given, len(prompt))
    longest = len(prompt) + params.max_new_tokens
    config = sized(choice.config, loaded.model, rows=params.n, tokens=longest)
    with Engine(loaded.model, config, tokenizer=tokenizer) as engine:
        if params.n == 1 and json_file is None:
            _print_stream(engine, prompt, params)
        else:
            _print_all(engine.generate(prompt, params), loaded.name, json_file)


def _print_stream(engine: Engine, prompt: Prompt, params: SamplingParams) -> str:
    answer = ""
    for piece in engine.stream(prompt, params):
        click.echo(piece.text, nl=False)
        answer += piece.text
    click.echo()
    return answer


def _print_all(outputs: list[Output], model: str, json_file: str | None) -> None:
    """Print complete answers, numbered if there are several, and write them as JSON."""
    for output in outputs:
        if output.error is not None:
            raise output.error
    console = report_console(json_file)
    for number, output in enumerate(outputs, start=1):
        mark = f"[{number}] " if len(outputs) > 1 else ""
        console.print(mark + output.text, markup=False, highlight=False, soft_wrap=True)
    answers = [
        {
            "text": output.text,
            "tokens": output.tokens,
            "finish": output.finish,
            "logprobs": [asdict(each) for each in output.logprobs],
        }
        for output in outputs
    ]
    prompt = list(outputs[0].prompt)
    write_json(json_file, {"model": model, "prompt": prompt, "answers": answers})


def _converse(
    loaded: LoadedModel,
    tokenizer: Any,
    choice: ModelChoice,
    given: dict[str, Any],
    messages: list[Message],
) -> None:
    """Answer each line of standard input as a message of one conversation."""
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.prompts import PromptEncoder

    encoder = PromptEncoder(tokenizer, loaded.model.config.vocab_size)
    encoder.check_chat()
    if given.get("n", 1) > 1:
        raise click.UsageError("a conversation has one answer per message: leave --n out")
    config = sized(choice.config, loaded.model, rows=1, tokens=_CONVERSATION)
    with Engine(loaded.model, config, tokenizer=tokenizer) as engine:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.rstrip("\n")})
            prompt = encoder.encode(messages)
            params = _params(loaded, choice.seed, given, len(prompt))
            answer = _print_stream(engine, prompt, params)
            messages.append({"role": "assistant", "content": answer})
