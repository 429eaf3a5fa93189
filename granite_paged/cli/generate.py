"""The command `generate`."""

from __future__ import annotations

import click

from granite_paged.cli.options import OK, POSITIVE, SETTINGS, ModelChoice, model_options, option
from granite_paged.cli.serve import sized
from granite_paged.errors import TokenizerError


@click.command(context_settings=SETTINGS)
@click.argument("text")
@model_options
@option("--tokenizer", "Use this tokenizer; needed where the model has none.", metavar="ID_OR_PATH")
@option("--max-new-tokens", "Stop after this many new tokens.", POSITIVE, default=64)
@option(
    "--temperature",
    "Sample at this temperature; 0 always takes the most likely token.",
    click.FloatRange(min=0),
    default=0.0,
)
@option(
    "--top-p",
    "Sample from the most likely tokens that together have this probability.",
    click.FloatRange(0, 1, min_open=True),
    default=1.0,
)
def generate(
    text: str,
    choice: ModelChoice,
    tokenizer: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> int:
    """Continue TEXT, and print the answer as it is generated.

    \b
    granite-paged generate --model ibm-granite/granite-4.0-h-1b "Paged attention is"
    granite-paged generate "<bos> <plain> red-fox copper-bell and red-fox <ask>" --max-new-tokens 1
    """  # noqa: D301
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.prompts import check_tokens
    from granite_paged.engine.request import SamplingParams
    from granite_paged.models import load_tokenizer

    loaded = choice.load()
    tokens = load_tokenizer(tokenizer) if tokenizer else loaded.tokenizer
    if tokens is None:
        raise TokenizerError(f"{loaded.name} has no tokenizer: pass --tokenizer ID_OR_PATH")
    prompt = check_tokens(tokens(text)["input_ids"], loaded.model.config.vocab_size, "prompt")
    config = sized(choice.config, loaded.model, rows=1, tokens=len(prompt) + max_new_tokens)
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=choice.seed
    )
    with Engine(loaded.model, config, tokenizer=tokens) as engine:
        for piece in engine.stream(prompt, params):
            click.echo(piece.text, nl=False)
    click.echo()
    return OK
