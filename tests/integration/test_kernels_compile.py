"""Triton kernels compile for every supported GPU architecture, on a machine without a GPU.

Other tests run them in Triton's interpreter, which has no layouts, registers or assembly.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

ROOT = Path(__file__).parents[2]

SHARED = {80: 163, 89: 99, 90: 227}
"""Shared memory per program in KiB by compute capability (CUDA C++ programming guide, 16.2)."""


def launched() -> set[str]:
    """Return the kernels that Python launches; other kernels are called by these."""
    found: set[str] = set()
    for path in (ROOT / "granite_paged" / "layers" / "triton").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        launches = [call.value for call in calls if isinstance(call, ast.Subscript)]
        found |= {kernel.id for kernel in launches if isinstance(kernel, ast.Name)}
    return found


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability: int) -> None:
    limit = SHARED[capability] * 1024
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_kernels", str(capability), str(limit)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == launched()
    assert {name: size for name, size in found.items() if size > limit} == {}
