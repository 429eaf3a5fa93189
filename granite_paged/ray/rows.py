"""Rows of a dataset as lines of a batch file, and answers as columns. Without torch.

A task of Ray that only orders or converts rows imports this module, and starts in a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from granite_paged.batch.lines import Line, prefix_key
from granite_paged.ray.groups import Columns

if TYPE_CHECKING:
    from granite_paged.batch.answer import Answer

COUNTS = ("prompt_tokens", "completion_tokens")
"""Columns of whole numbers."""


def by_prefix(batch: Columns) -> Columns:
    """Order the rows of a large batch so that prompts with a common beginning are neighbours.

    For `Dataset.map_batches`, before the smaller batches of `Answers`. The order of rows changes.
    """
    name = "prompt" if "prompt" in batch else "messages"
    keys = [prefix_key(line_of({name: value})) for value in batch[name]]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return {name: np.asarray(column)[order] for name, column in batch.items()}


def line_of(row: dict[str, Any]) -> Line:
    """Return the line of a batch file that a row of a dataset is."""
    plain = {name: _plain(value) for name, value in row.items()}
    return Line(0, json.dumps(plain, sort_keys=True).encode(), plain)


def _plain(value: Any) -> Any:
    """Return a value of numpy as JSON has it. A missing number is NaN there."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value


def row_of(answer: Answer | None) -> dict[str, Any]:
    """Return the columns that an answer adds to its row; their defaults without an answer."""
    row = {"text": "", "finish_reason": "", "prompt_tokens": 0, "completion_tokens": 0}
    row |= {"error": "", "response": ""}
    if answer is None:
        return row
    if answer.error:
        return {**row, "error": answer.error.removeprefix("line 0: ")}
    body = json.loads(answer.content)["response"]["body"]
    first = body["choices"][0]
    text = first["message"]["content"] if "message" in first else first["text"]
    counts = {name: body["usage"][name] for name in COUNTS}
    finish = first["finish_reason"]
    return row | counts | {"text": text, "finish_reason": finish, "response": json.dumps(body)}


def objects(values: Sequence[Any]) -> Any:
    """Return an array of objects; numpy would make texts of fixed width otherwise."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
