"""Griffe extension: docstrings mark literal blocks with `::`, which Markdown does not know."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class LiteralBlocks(Extension):
    """Turn `text::` into `text:`, and a `::` on a line of its own into nothing."""

    def on_object(self, *, obj: Object, **others: Any) -> None:
        """Rewrite one docstring; the indented block below it is code in Markdown too."""
        if obj.docstring is not None:
            value = re.sub(r"^::$", "", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"::$", ":", value, flags=re.MULTILINE)
