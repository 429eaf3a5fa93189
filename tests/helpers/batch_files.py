"""Files of requests for the embedded checkpoint, and what its engine answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SIZES = ["--device", "cpu", "--rows", "8", "--max-tokens", "1024"]
"""Options that keep `granite-paged batch` small."""

ADJECTIVES = ("red", "green", "blue", "silver", "pine", "marble", "copper", "glass", "iron")
NOUNS = ("fox", "wolf", "boat", "bell", "bowl", "drum", "basket")


def recall_requests(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draw requests in OpenAI's format, each with an answer of 1 to 6 tokens."""
    draw = random.Random(seed)

    def thing() -> str:
        return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"

    requests = []
    for number in range(count):
        keys = [thing() for _ in range(draw.randint(1, 4))]
        facts = " and ".join(f"{key} {thing()}" for key in keys)
        prompt = f"<bos> <plain> {facts} while {draw.choice(keys)} <ask>"
        body = {"prompt": prompt, "max_tokens": draw.randint(1, 6)}
        requests.append({"custom_id": f"r{number}", "body": body})
    return requests


def write_requests(path: Path, requests: list[Any]) -> str:
    """Write one request per line; text is written as it is. Return the path."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in requests]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def read_answers(path: Path | str) -> list[dict[str, Any]]:
    """Return the objects of an output file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def texts(path: Path | str) -> list[str]:
    """Return the text of each answer's first sample, or its error."""
    return [
        row["error"]["message"] if row["error"] else row["response"]["body"]["choices"][0]["text"]
        for row in read_answers(path)
    ]
