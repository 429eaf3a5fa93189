"""lm-eval's model in two processes that torch launches: results equal those of one process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tolerance import LOGITS_FLOAT32

pytest.importorskip("lm_eval", reason="lm-eval is not installed: `nox -s eval_parity` runs this")
pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate")

FACTS = "red-fox copper-bell and green-wolf iron-boat while"
LARGEST = 20  # logits of the embedded model are smaller; other batches round otherwise
QUESTIONS = 7  # an odd number: one process has a request less than the other

SCRIPT = """
import json, os, sys
from pathlib import Path
import lm_eval
import granite_paged.evaluate.lm

folder = Path(sys.argv[1])
Path(folder, "rank" + os.environ.get("RANK", "")).touch()
common = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
    "test_split": "test",
    "doc_to_text": "{{text}}",
}
choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
answer = {"task": "answer", "output_type": "generate_until", "generation_kwargs": {"until": []}}
answer["generation_kwargs"]["max_gen_toks"] = 3
document = {"task": "document", "output_type": "loglikelihood_rolling", "doc_to_target": ""}
tasks = [
    {**common, **choice, "doc_to_target": "{{label}}"},
    {**common, **answer, "doc_to_target": "{{choices[0]}}"},
    {**common, **document, "doc_to_target": "{{text}}", "doc_to_text": ""},
]
sizes = {"device": "cpu", "page_size": 16, "max_length": 64}
found = lm_eval.simple_evaluate("granite_paged", model_args=sizes, tasks=tasks, bootstrap_iters=0)
if found:  # on rank 0 only
    samples = {
        # lm-eval pads the shorter share with copies of its last request, which answer again
        task: sorted([each["doc_id"], [first for first, *_ in each["resps"]]] for each in several)
        for task, several in found["samples"].items()
    }
    name = folder / "results.json"
    name.write_text(json.dumps([found["results"], found["n-samples"], samples], default=str))
"""


def results(folder: Path, *launcher: str) -> Any:
    """Run the script in processes of its own, and return what rank 0 wrote."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, *launcher, str(script), str(folder)]
    subprocess.run(command, check=True, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=300)
    return json.loads((folder / "results.json").read_text())


def leaves(tree: Any) -> list[Any]:
    """Return the numbers and texts of nested JSON, in order; numbers in texts are numbers."""
    if isinstance(tree, dict):
        tree = [tree[name] for name in sorted(tree)]
    if isinstance(tree, list):
        return [leaf for branch in tree for leaf in leaves(branch)]
    with contextlib.suppress(TypeError, ValueError):
        return [float(tree)]
    return [tree]


def test_two_processes_have_the_results_of_one(tmp_path: Path) -> None:
    questions = [
        {"text": f"{FACTS} " * (n + 1), "choices": ["red-fox", "iron-boat"], "label": n % 2}
        for n in range(QUESTIONS)
    ]
    lines = "\n".join(map(json.dumps, questions))
    (tmp_path / "questions.jsonl").write_text(lines + "\n")
    # what `accelerate launch` runs for several GPUs; with --cpu, accelerate 1.15 starts one process
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    alone = results(tmp_path)
    (tmp_path / "results.json").unlink()
    shared = results(tmp_path, *launch)
    assert shared[1] == alone[1]
    assert leaves(shared) == [
        pytest.approx(leaf, rel=LOGITS_FLOAT32, abs=LARGEST * LOGITS_FLOAT32)
        if isinstance(leaf, float)
        else leaf
        for leaf in leaves(alone)
    ]
    assert {"rank", "rank0", "rank1"} <= {path.name for path in tmp_path.iterdir()}
    assert {each["effective"] for each in alone[1].values()} == {QUESTIONS}
