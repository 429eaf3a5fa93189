"""lm-eval's model in two processes that torch launches: results equal those of one process."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tolerance import LOGITS_FLOAT32

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: `nox -s eval_parity` runs this"
)
pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate")

FACTS = "red-fox copper-bell and green-wolf iron-boat while"
LARGEST = 20  # logits of the embedded model are smaller; other batches round otherwise
QUESTIONS = 7  # an odd number: one process has a request less than the other


def evaluate(folder: Path) -> None:
    """Evaluate three kinds of task on the questions in `folder`; rank 0 writes the results."""
    from accelerate.state import AcceleratorState  # noqa: PLC0415

    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before the fork
    (folder / f"rank{os.environ.get('RANK', '')}").touch()
    files = {"data_files": {"test": str(folder / "questions.jsonl")}}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {**files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    limits = {"until": [], "max_gen_toks": 3}
    answer = {"task": "answer", "output_type": "generate_until", "generation_kwargs": limits}
    document = {"task": "document", "output_type": "loglikelihood_rolling", "doc_to_target": ""}
    tasks = [
        {**common, **choice, "doc_to_target": "{{label}}"},
        {**common, **answer, "doc_to_target": "{{choices[0]}}"},
        {**common, **document, "doc_to_target": "{{text}}", "doc_to_text": ""},
    ]
    sizes = {"device": "cpu", "page_size": 16, "max_length": 64}
    found = lm_eval.evaluator.simple_evaluate(
        "granite_paged",
        model_args=sizes,
        tasks=tasks,
        bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),  # reads no other task
    )
    if found:  # on rank 0 only
        samples = {
            # lm-eval pads the shorter share with copies of its last request, which answer again
            task: sorted([each["doc_id"], [first for first, *_ in each["resps"]]] for each in some)
            for task, some in found["samples"].items()
        }
        whole = [found["results"], found["n-samples"], samples]
        (folder / "results.json").write_text(json.dumps(whole, default=str))


def evaluate_on_two_ranks(folder: Path) -> None:
    """Do it in two processes, as `accelerate launch` does for several GPUs.

    With --cpu, accelerate 1.15 starts one process.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    sizes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2}
    config = LaunchConfig(
        **sizes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", run_id="two"
    )
    elastic_launch(config, evaluate)(folder)


def results(function: Callable[[Path], None], folder: Path) -> Any:
    """Run the function in a fork of this process, which has loaded lm-eval; return the results."""
    process = multiprocessing.get_context("fork").Process(target=function, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
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
    import datasets  # noqa: F401, PLC0415
    import lm_eval.evaluator  # noqa: F401, PLC0415

    import granite_paged.evaluate.lm  # noqa: F401, PLC0415  # once, and not in each fork

    questions = [
        {"text": f"{FACTS} " * (n + 1), "choices": ["red-fox", "iron-boat"], "label": n % 2}
        for n in range(QUESTIONS)
    ]
    lines = "\n".join(map(json.dumps, questions))
    (tmp_path / "questions.jsonl").write_text(lines + "\n")
    alone = results(evaluate, tmp_path)
    (tmp_path / "results.json").unlink()
    shared = results(evaluate_on_two_ranks, tmp_path)
    assert shared[1] == alone[1]
    assert leaves(shared) == [
        pytest.approx(leaf, rel=LOGITS_FLOAT32, abs=LARGEST * LOGITS_FLOAT32)
        if isinstance(leaf, float)
        else leaf
        for leaf in leaves(alone)
    ]
    assert {"rank", "rank0", "rank1"} <= {path.name for path in tmp_path.iterdir()}
    assert {each["effective"] for each in alone[1].values()} == {QUESTIONS}
