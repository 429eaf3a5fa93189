"""The notebook shows its pictures where people look; `nox -s notebook` runs it."""

from __future__ import annotations

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "profile.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
OUTPUTS = [cell["outputs"] for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_keeps_a_picture_wherever_it_draws() -> None:
    """Kernels by kind of layer, a timeline, and memory."""
    drawing = [place for place, source in enumerate(CODE) if "plt.show()" in source]
    pictures = [
        place
        for place, outputs in enumerate(OUTPUTS)
        if any("image/png" in one.get("data", {}) for one in outputs)
    ]
    assert pictures == drawing
    assert len(pictures) == 3
    assert NOTEBOOK.stat().st_size < 200_000


def test_the_notebook_keeps_no_errors() -> None:
    kinds = {(one["output_type"], one.get("name")) for outputs in OUTPUTS for one in outputs}
    assert kinds == {("display_data", None), ("stream", "stdout")}


def test_the_notebook_says_that_its_times_are_of_a_cpu() -> None:
    first = "".join(CELLS[0]["source"])
    assert "**The outputs below were stored on a CPU**" in first
