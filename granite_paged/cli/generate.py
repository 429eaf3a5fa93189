"""The command `generate`: continue texts or answer chats, once or line by line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from granite_paged.cli.options import (
    NATURAL,
    OK,
    POSITIVE,
    SETTINGS,
    USAGE,
    ModelChoice,
    exact_option,
    json_option,
    model_options,
    option,
    options,
    progress,
    write_json,
)
from granite_paged.cli.prompt_source import Source, read_prompts
from granite_paged.cli.serve import sized
from granite_paged.errors import TokenizerError

if TYPE_CHECKING:
    from granite_paged.engine.request import Output, SamplingParams
    from granite_paged.models import LoadedModel

_MOST_ROWS = 64  # answers that run at once
_CHAT_TOKENS = 8192  # of a conversation, unless --max-tokens says another number

_ParamsOf = Callable[[int], "SamplingParams"]
"""Returns the params of a prompt with this many tokens."""

_source_options = options(
    option(
        "--file",
        "Read one prompt per line; - reads standard input. The lines of a .jsonl file are "
        '{"prompt": TEXT} or {"messages": [...]}.',
        click.Path(exists=True, dir_okay=False, allow_dash=True),
        metavar="PATH",
    ),
    option(
        "--chat",
        "Write each prompt with the tokenizer's chat template, as a message of the user. Without "
        "TEXT and --file: chat, line by line, until the input ends.",
        is_flag=True,
    ),
    option("--system", "Begin each chat with this system message.", metavar="TEXT"),
    option("--tokenizer", "Use this tokenizer, for a model that has none.", metavar="ID_OR_PATH"),
)

_sampling_options = options(
    option(
        "--max-new-tokens",
        "Stop after this many new tokens.  [default: the generation config's, else 64]",
        POSITIVE,
    ),
    option(
        "--temperature",
        "Sample at this temperature; 0 always takes the most likely token.  [default: the "
        "generation config's if it samples, else 0]",
        click.FloatRange(min=0),
    ),
    option(
        "--top-k",
        "Sample from this many of the most likely tokens; 0 from all.  [default: the generation "
        "config's, else 50 if it samples, else 0]",
        NATURAL,
    ),
    option(
        "--top-p",
        "Sample from the most likely tokens that together have this probability.  [default: the "
        "generation config's, else 1]",
        click.FloatRange(0, 1, min_open=True),
    ),
    option(
        "--repetition-penalty",
        "Above 1, make tokens of the prompt and the answer less likely.  [default: the generation "
        "config's, else 1]",
        click.FloatRange(min=0, min_open=True),
    ),
    option(
        "--stop stop_strings",
        "End an answer before this text; may be repeated.  [default: the generation config's]",
        multiple=True,
        metavar="TEXT",
    ),
    option("--n", "Give this many answers per prompt.", POSITIVE, default=1, metavar="N"),
    option(
        "--logprobs",
        "Show each token's log-probability, and the N most likely tokens in its place.",
        NATURAL,
        metavar="N",
    ),
)


@click.command(context_settings=SETTINGS)
@click.argument("text", required=False)
@_source_options
@_sampling_options
@model_options
@exact_option
@json_option
def generate(
    text: str | None,
    choice: ModelChoice,
    file: str | None,
    chat: bool,
    system: str | None,
    tokenizer: str | None,
    json_file: str | None,
    stop_strings: tuple[str, ...],
    **sampling: Any,
) -> int:
    """Continue TEXT, and print the answer as it is generated.

    TEXT is one prompt; - reads it from standard input, and "" begins with the model's
    beginning-of-text token alone. Sampling follows the model's generation config, as
    transformers' generate() does, with all of its stop tokens; an option given here wins.

    \b
    granite-paged generate --model ibm-granite/granite-4.0-h-1b "Paged attention is"
    granite-paged generate --model ibm-granite/granite-4.0-h-1b --chat --system "Be brief."
    granite-paged generate --model ./my-checkpoint --file prompts.txt --n 2 --json answers.json
    granite-paged generate "<bos> <plain> red-fox copper-bell and red-fox <ask>" --max-new-tokens 1
    """  # noqa: D301
    from granite_paged.engine.request import SamplingParams

    source = Source(text, file, chat=chat, system=system)
    loaded = _with_tokenizer(choice.load(), tokenizer)
    options = {"seed": choice.seed, "stop_strings": stop_strings or None, **sampling}
    config = loaded.model.generation_config

    def params_of(prompt_tokens: int) -> SamplingParams:
        return SamplingParams.from_generation_config(config, prompt_tokens=prompt_tokens, **options)

    _note_ignored(config)
    if source.interactive:
        from granite_paged.cli.chat import converse

        if json_file or sampling["n"] > 1 or sampling["logprobs"] is not None:
            raise click.UsageError("a chat in the terminal takes no --json, --n and --logprobs")
        return converse(loaded, choice.config, params_of, system, _CHAT_TOKENS)
    return _answer(loaded, choice, params_of, source, json_file)


def _with_tokenizer(loaded: LoadedModel, tokenizer: str | None) -> LoadedModel:
    from granite_paged.models import load_tokenizer

    if tokenizer:
        return replace(loaded, tokenizer=load_tokenizer(tokenizer))
    if loaded.tokenizer is None:
        raise TokenizerError(f"{loaded.name} has no tokenizer: pass --tokenizer ID_OR_PATH")
    return loaded


def _note_ignored(config: Any) -> None:
    from granite_paged.engine.defaults import ignored_fields

    if ignored := ignored_fields(config):
        click.echo(f"note: {', '.join(ignored)} of the generation config: ignored", err=True)


# -- answers ------------------------------------------------------------------------------------


def _answer(
    loaded: LoadedModel,
    choice: ModelChoice,
    params_of: _ParamsOf,
    source: Source,
    json_file: str | None,
) -> int:
    """Answer every prompt of the source. One that is refused has an error, and the others go on."""
    from granite_paged.engine.engine import Engine

    prompts = read_prompts(source, loaded)
    asked = [prompt for prompt in prompts if prompt.error is None]
    params = [params_of(len(prompt.tokens)) for prompt in asked]
    samples = sum(each.n for each in params)
    longest = [len(p.tokens) + each.max_new_tokens for p, each in zip(asked, params, strict=True)]
    config = sized(
        choice.config,
        loaded.model,
        rows=min(max(samples, 1), _MOST_ROWS),
        tokens=max(longest, default=1),
    )
    with Engine(loaded.model, config, tokenizer=loaded.tokenizer, warmup="lazy") as engine:
        if source.single and samples == 1 and params[0].logprobs is None and not json_file:
            for piece in engine.stream(asked[0].tokens, params[0]):
                click.echo(piece.text, nl=False)
            click.echo()
            return OK
        with progress("generate", time_left=True) as report_progress:
            outputs = engine.generate(
                [prompt.tokens for prompt in asked], params, progress=report_progress
            )
    for prompt, each in zip(asked, params, strict=True):
        prompt.outputs, outputs = outputs[: each.n], outputs[each.n :]
    if json_file:
        answers = [_record(prompt, loaded.tokenizer) for prompt in prompts]
        write_json(json_file, {"model": loaded.name, "prompts": answers})
    return _show(prompts, loaded.tokenizer, source, quiet=json_file == "-")


def _show(prompts: list[Any], tokenizer: Any, source: Source, *, quiet: bool) -> int:
    """Print answers to standard output and errors to standard error. Return the exit status."""
    status = OK
    for prompt in prompts:
        for output in prompt.outputs:
            if output.error is None and not quiet:
                if not source.single or len(prompt.outputs) > 1:
                    click.echo(f"--- {prompt.name}, answer {output.index + 1} ---")
                click.echo(output.text)
                _show_logprobs(output, tokenizer)
        errors = [prompt.error, *(output.error for output in prompt.outputs)]
        for error in errors:
            if error is not None:
                click.echo(f"granite-paged: error: {prompt.name}: {error}", err=True)
                status = USAGE
    return status


def _show_logprobs(output: Output, tokenizer: Any) -> None:
    for each in output.logprobs:
        top = "  ".join(f"{tokenizer.decode([t])!r} {value:.4f}" for t, value in each.top)
        click.echo(f"{tokenizer.decode([each.token])!r}\t{each.logprob:.4f}\t{top}".rstrip())


def _record(prompt: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "prompt": prompt.given,
        "prompt_tokens": len(prompt.tokens),
        "error": None if prompt.error is None else str(prompt.error),
        "answers": [_answer_record(output, tokenizer) for output in prompt.outputs],
    }


def _answer_record(output: Output, tokenizer: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": output.text,
        "tokens": output.tokens,
        "finish": output.finish,
        "error": None if output.error is None else str(output.error),
    }
    if output.logprobs:
        record["logprobs"] = [
            {
                "text": tokenizer.decode([each.token]),
                "logprob": each.logprob,
                "top": [[tokenizer.decode([token]), value] for token, value in each.top],
            }
            for each in output.logprobs
        ]
    return record
