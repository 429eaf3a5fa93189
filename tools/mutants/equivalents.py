"""The list of mutants that no test can kill, because they change nothing: `equivalent.toml`.

An entry names mutants by texts, not by line numbers: the module, the function around them, the line
as it stands and as each mutant has it. It gives the reason why they do the same.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

EQUIVALENTS = Path(__file__).with_name("equivalent.toml")


class Equivalent(NamedTuple):
    """One entry of the list. `function` is empty for code at module level."""

    module: str
    function: str
    line: str
    mutant: str
    reason: str


def read_equivalents(path: Path = EQUIVALENTS) -> list[Equivalent]:
    """Read the list, an entry for each mutant. Raises TypeError or KeyError for other fields."""
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("equivalent", [])
    return [
        Equivalent(mutant=mutant, **{k: v for k, v in entry.items() if k != "mutants"})
        for entry in entries
        for mutant in entry["mutants"]
    ]


def stale(root: Path, equivalents: Iterable[Equivalent]) -> list[str]:
    """Say which entries no longer match the code: their line is not in their function."""
    problems = []
    for entry in equivalents:
        path = root / entry.module
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [line.strip() for line in _function(source, entry.function)]
        if entry.line not in lines:
            place = f"{entry.module}:{entry.function or 'module'}"
            problems.append(f"{place}: is listed, and has no line `{entry.line}`")
    return problems


def _function(source: str, name: str) -> Sequence[str]:
    """Return the lines of a function or class; of the module without a name."""
    node: ast.AST = ast.parse(source)
    lines = source.split("\n")
    for part in name.split(".") if name else ():
        found = [n for n in ast.walk(node) if getattr(n, "name", None) == part]
        if not found:
            return ()
        node = found[0]
        assert isinstance(node, ast.stmt)
        lines = source.split("\n")[node.lineno - 1 : node.end_lineno]
    return lines
