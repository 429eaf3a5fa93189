"""Chat with a model: one message per line, until the input ends.

    python examples/chat.py [ID_OR_PATH]

Every turn sends the whole conversation. The engine computes only what it has not seen: the pages
of earlier turns are found in its prefix cache.
"""

import sys

from granite_paged import Engine, PagedConfig, SamplingParams, load

RECALL_TEMPLATE = (  # for the embedded model, which has none: the key that a message ends with
    "<bos> <plain>"
    "{% for message in messages %} {{ message.content }}"
    "{% if message.role == 'user' %} <ask>{% endif %}{% endfor %}"
)


def main(arguments: list[str]) -> None:
    """Answer each line of the standard input."""
    loaded = load(*arguments[:1])
    tokenizer, embedded = loaded.tokenizer, not arguments
    if tokenizer is None:
        sys.exit(f"{loaded.name} has no tokenizer")
    if embedded:
        tokenizer.chat_template = RECALL_TEMPLATE
    if not tokenizer.chat_template:
        sys.exit(f"the tokenizer of {loaded.name} has no chat template")
    params = SamplingParams(max_new_tokens=1 if embedded else 512)
    sizes = PagedConfig(page_size=16 if embedded else 128, max_tokens=8192, max_sequences=4)
    messages: list[dict[str, str]] = []
    with Engine(loaded.model, sizes, tokenizer=tokenizer) as engine:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            (answer,) = engine.generate([messages], params)  # by the tokenizer's chat template
            if answer.error is not None:
                sys.exit(f"no answer: {answer.error}")
            messages.append({"role": "assistant", "content": answer.text})
            print(answer.text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
