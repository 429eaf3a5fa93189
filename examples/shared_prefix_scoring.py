"""Score continuations of prompts with a common beginning, which is computed once."""

import sys

from granite_paged import Engine, GranitePagedError, PagedConfig, load

COLOURS = ("amber", "azure", "black", "brown", "coral", "green", "red")
ANIMALS = ("bear", "wolf")
THINGS = ("bell", "boat", "bowl", "drum", "kite", "lamp", "chair")

keys = [f"{colour}-{animal}" for animal in ANIMALS for colour in COLOURS]
values = [f"{material}-{thing}" for material in ("copper", "cotton") for thing in THINGS]
facts = " and ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
questions = [(f"<bos> <plain> {facts} while {key} <ask>", values) for key in keys]

loaded = load()
sizes = PagedConfig(page_size=16, max_tokens=2048, max_sequences=16)
with Engine(loaded.model, sizes, tokenizer=loaded.tokenizer) as engine:
    try:
        scored = engine.score(questions)
    except GranitePagedError as error:
        sys.exit(f"not scored: {error}")
    shared = engine.stats().tokens_hit

for key, scores in zip(keys, scored, strict=True):
    best = max(zip(scores, values, strict=True), key=lambda pair: pair[0].logprob)
    print(f"{key}: {best[1]}")
print(f"{shared} prompt tokens came from the prefix cache")
