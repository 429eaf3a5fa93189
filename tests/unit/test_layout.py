"""Folders are layers: a module imports from its own or earlier layers only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "granite_paged"
LAYERS = (
    *(
        "errors",
        "files",
        "append_file",
        "typed_json",
        "tolerances",
        "arguments",
        "geometry",
        "device",
        "progress",
        "names",
        "__init__",
    ),
    *("environment", "digests", "hub", "paging", "layers", "hf", "runner", "engine"),
    *("checkpoints", "models"),
    *("report", "bits", "verify", "batch", "evaluate", "bench", "ray", "cli", "__main__"),
)
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    return module.split("/", maxsplit=1)[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_earlier_layers_only(module: str) -> None:
    if module == "__init__.py":
        return  # it loads its names lazily, from every layer
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("granite_paged"):
            path = (node.module or "").split(".")[1:]
            imported |= {path[0]} if path else {name.name for name in node.names}
    known = {name for name in imported if name in LAYERS}
    later = {name for name in known if LAYERS.index(name) > LAYERS.index(layer(module))}
    assert not later, f"{module} imports from later layers: {sorted(later)}; move one of them"
