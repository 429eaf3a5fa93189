"""Print an answer token by token. Leaving the loop early would cancel the request."""

import sys

from granite_paged import Engine, GranitePagedError, PagedConfig, SamplingParams, load

loaded = load()
prompt = "<bos> <plain> red-fox copper-bell and green-wolf iron-boat while red-fox <ask>"
sizes = PagedConfig(page_size=16, max_tokens=1024, max_sequences=8)

with Engine(loaded.model, sizes, tokenizer=loaded.tokenizer) as engine:
    try:
        for piece in engine.stream(prompt, SamplingParams(max_new_tokens=4)):
            print(piece.text, end="", flush=True)
    except GranitePagedError as error:  # what ended the request early
        sys.exit(f"\nended early: {error}")
print()
