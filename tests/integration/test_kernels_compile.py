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
    """Return the kernels that Python launches, as MODULE.NAME; these call the others."""
    found: set[str] = set()
    for path in (ROOT / "granite_paged" / "layers" / "triton").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        launches = [call.value for call in calls if isinstance(call, ast.Subscript)]
        found |= {f"{path.stem}.{kernel.id}" for kernel in launches if isinstance(kernel, ast.Name)}
    return found


def test_every_kernel_compiles_and_fits() -> None:
    limits = {capability: kib * 1024 for capability, kib in SHARED.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_kernels", json.dumps(limits)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for capability, limit in limits.items():
        sizes = found[str(capability)]
        assert set(sizes) == launched(), f"sm_{capability}"
        too_large = {name: size for name, size in sizes.items() if size > limit}
        assert not too_large, f"sm_{capability} allows {limit} bytes"
