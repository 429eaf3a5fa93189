"""What importing the package loads and does, in a new process."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "code", ["import granite_paged; dir(granite_paged)", "from granite_paged.ray import by_prefix"]
)
def test_importing_the_package_does_not_import_torch(code: str) -> None:
    """A task of Ray that only orders rows would otherwise start ten seconds later."""
    code += "; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_loading_every_public_name_has_no_side_effects() -> None:
    """No kernel of Triton is loaded, which a machine may lack (docs/guides/kernel.md), nothing is
    registered with transformers, and nothing is printed.
    """
    code = (
        "import sys, granite_paged\n"
        "for name in granite_paged.__all__: getattr(granite_paged, name)\n"
        "loaded = sys.modules\n"
        "kernels = [name for name in loaded if name.startswith('granite_paged.layers.triton.')]\n"
        "assert not kernels, kernels\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry\n"
        "assert not [name for name in registry if 'granite' in name]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
