"""Workers on a real Ray cluster answer as one process does, and survive what happens to workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.cli.main import run
from granite_paged.cli.options import FAILED, OK, USAGE
from granite_paged.errors import CannotBeExact, ClusterError
from granite_paged.ray import Answers, by_prefix, exact
from granite_paged.ray.groups import read_groups
from granite_paged.ray.workers import LineWorker, ModelSpec, WorkerOptions, attempts
from tests.helpers.batch_files import (
    SIZES,
    read_answers,
    recall_requests,
    write_requests,
)
from tests.helpers.command_line import Capture, assert_one_line
from tests.helpers.tolerance import LOGITS_FLOAT32

parquet = pytest.importorskip("pyarrow.parquet")
ray = pytest.importorskip("ray", reason="ray[data] is not installed")
RAY = ["--ray=local", "--workers", "1"]
LARGEST_LOGIT = 20  # of the embedded checkpoint: its largest is about 19
REQUESTS = [*recall_requests(150), "{broken", *recall_requests(3, seed=1)]  # r0 to r2 are repeated


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Start one cluster for all tests of this file; its four CPUs are a count, not cores."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    small = {"num_cpus": 4, "object_store_memory": 80 << 20, "include_dashboard": False}
    for more_tries in (2, 1, 0):  # a busy machine may not start it in Ray's half a minute
        try:
            ray.init(**small, logging_level="CRITICAL", log_to_driver=False)
            break
        except Exception:
            ray.shutdown()
            if not more_tries:
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return what one process answers to REQUESTS."""
    folder = tmp_path_factory.mktemp("one")
    source = write_requests(folder / "in.jsonl", REQUESTS)
    assert run(["batch", source, str(folder / "out.jsonl"), *SIZES]) == FAILED
    return (folder / "out.jsonl").read_bytes()


def batch(folder: Path, *more: str) -> int:
    source = write_requests(folder / "in.jsonl", REQUESTS)
    return run(["batch", source, str(folder / "out.jsonl"), *SIZES, *RAY, *more])


def spoil(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    monkeypatch.setattr("granite_paged.ray.batch.LineWorker", kind)


# -- files --------------------------------------------------------------------------------------


def test_killed_and_slow_workers_complete_a_partial_output_as_one_process_does(
    tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process began the file, and was killed in the middle of a line.

    The file has a broken line and three repeated ids; each gets its error, in its place.
    """
    died, again = tmp_path / "died", tmp_path / "again"
    held = expected[: len(expected) // 3]
    first = held.count(b"\n")

    class Troubled(LineWorker):
        def _answered(self, group: Any) -> bytes:
            if any(index == first for index, _ in group):
                time.sleep(2)
            elif not died.exists():
                died.touch()
                os._exit(1)
            if attempts() == 1:
                again.touch()
            return super()._answered(group)

    spoil(monkeypatch, Troubled)
    (tmp_path / "out.jsonl").write_bytes(held)
    assert batch(tmp_path, "--workers", "2") == FAILED
    assert died.exists()
    assert again.exists(), "no group knows that a worker died with it"
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert sum(bool(row["error"]) for row in read_answers(tmp_path / "out.jsonl")) == 4


def test_a_line_that_kills_every_worker_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Poisoned(LineWorker):
        most_deaths = 1

        def _answered(self, group: Any) -> bytes:
            if not attempts():
                os._exit(1)
            return super()._answered(group)

    spoil(monkeypatch, Poisoned)
    capsys.readouterr()
    assert batch(tmp_path) == USAGE
    assert_one_line(capsys, "workers died 1 times while they answered lines between")


def only_group(source: str) -> Any:
    """Return the one group of a short file, as a worker gets it."""
    (group,) = read_groups({"item": [source]}, held=0, lines=64)
    return group


def test_a_group_is_answered_until_several_workers_died_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = only_group(write_requests(tmp_path / "in.jsonl", recall_requests(3)))
    spec = ModelSpec(device="cpu", config=PagedConfig(page_size=16))
    worker = LineWorker(spec, WorkerOptions(rows=4, max_new_tokens=4))
    deaths = LineWorker.most_deaths
    monkeypatch.setattr("granite_paged.ray.workers.attempts", lambda: deaths - 1)
    assert len(worker(group)["answers"]) == 1
    monkeypatch.setattr("granite_paged.ray.workers.attempts", lambda: deaths)
    with pytest.raises(ClusterError, match=r"workers died 5 times .* lines between 1 and 3"):
        worker(group)


def test_an_output_of_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The worker answers in this process: it is the same object that Ray would call."""

    def here(ray: Any, items: Any, worker: Any, arguments: Any, *_: Any, **__: Any) -> Any:
        answered = worker(*arguments)(only_group(*items))
        yield {name: column[0] for name, column in answered.items()}

    monkeypatch.setattr("granite_paged.ray.batch.answered_rows", here)
    source = write_requests(tmp_path / "in.jsonl", recall_requests(3))
    output = str(tmp_path / "out.jsonl")
    short = write_requests(tmp_path / "short.jsonl", recall_requests(2))
    assert run(["batch", short, output, *SIZES, "--seed", "5"]) == OK
    capsys.readouterr()
    assert run(["batch", source, output, *SIZES, *RAY]) == USAGE
    assert_one_line(capsys, "was written with another model, tokenizer or other settings")
    assert len(read_answers(output)) == 2


# -- one line each ------------------------------------------------------------------------------


def test_a_worker_that_cannot_load_its_model_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert batch(tmp_path, "--model", str(tmp_path)) == USAGE
    assert_one_line(capsys, "is no checkpoint: it holds no config.json")


def test_a_cluster_that_is_too_small_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert batch(tmp_path, "--gpus-per-worker", "1") == USAGE
    assert_one_line(
        capsys, "the cluster has 0 GPUs, the workers need 1: lower --workers or --gpus-"
    )
    assert batch(tmp_path, "--workers", "5") == USAGE
    assert_one_line(capsys, "the cluster has 4 CPUs, the workers need 5: lower --workers")


def test_a_worker_that_asks_for_a_gpu_and_has_none_is_named() -> None:
    with pytest.raises(Exception, match="CUDA"):
        LineWorker(ModelSpec(device="cuda"), WorkerOptions())


def test_standard_input_is_refused(tmp_path: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert run(["batch", "-", str(tmp_path / "out"), *RAY]) == USAGE
    assert_one_line(capsys, "name a file, got -")


# -- eval ---------------------------------------------------------------------------------------


def test_eval_on_ray_answers_as_one_process_does(tmp_path: Path, capsys: Capture) -> None:
    """Each worker answers shares of the questions, and each answer is in the journal once."""
    command = ["eval", "--device", "cpu", "--limit", "8", "--json", "-"]
    assert run(command) == OK
    alone = json.loads(capsys.readouterr().out)
    journal = tmp_path / "answers.jsonl"
    assert run([*command, "--output", str(journal), "--ray=local", "--workers", "2"]) == OK
    spread = json.loads(capsys.readouterr().out)
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 8
    for result in (alone, spread):
        for mode in result["tasks"]["recall"]["modes"].values():
            for name in [name for name in mode if name not in ("accuracy", "stderr", "refused")]:
                del mode[name]
        for agreement in result["tasks"]["recall"]["agreement"].values():
            del agreement["latency_ratio"]
            assert agreement.pop("largest_difference") <= LOGITS_FLOAT32 * LARGEST_LOGIT
        del result["command"]
    assert spread == alone
    keys = [json.loads(line)["key"] for line in lines[1:] if '"paged"' in line]
    assert len(set(keys)) == 8


def test_workers_whose_bits_differ_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for gpu in ("H100", "H100", "H200"):
        monkeypatch.setattr(exact, "bits_place", lambda device, gpu=gpu: {"device": gpu})
        if gpu == "H200":
            with pytest.raises(CannotBeExact, match="H100 and H200"):
                exact.join(cpu)
        else:
            exact.join(cpu)


# -- datasets -----------------------------------------------------------------------------------


def test_answers_is_a_callable_class_and_rays_checkpoint_skips_written_rows(
    tmp_path: Path,
) -> None:
    checkpoint = pytest.importorskip("ray.data.checkpoint")
    requests = recall_requests(12)
    rows = [{"id": n, "temperature": 0.0, **r["body"]} for n, r in enumerate(requests)]
    rows[3]["temperature"] = -1.0
    # JSON: to read Parquet, Ray starts six processes, each time
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    context = ray.data.DataContext.get_current().copy()
    context.checkpoint_config = checkpoint.CheckpointConfig(
        id_column="id",
        checkpoint_path=str(tmp_path / "checkpoint"),
        delete_checkpoint_on_success=False,
    )
    sizes = {"device": "cpu", "config": PagedConfig(page_size=16, max_tokens=1024), "rows": 4}

    class Nothing:
        """A worker that imports no torch, which takes seconds."""

        def __init__(self, **_: Any) -> None:
            pass

        def __call__(self, batch: Any) -> Any:
            raise AssertionError("a row that was written is answered again")

    def answer(worker: type) -> list[dict[str, Any]]:
        dataset = ray.data.read_json(str(source))
        dataset.map_batches(by_prefix, batch_size=12, num_cpus=0.1).map_batches(
            worker,
            fn_constructor_kwargs=sizes,
            compute=ray.data.ActorPoolStrategy(size=1),
            batch_size=4,
            num_cpus=0.5,
        ).write_parquet(str(tmp_path / "out"))
        tables = [parquet.read_table(path) for path in (tmp_path / "out").rglob("*.parquet")]
        return [row for table in tables for row in table.to_pylist()]

    with ray.data.DataContext.current(context):
        answered = answer(Answers)
        assert answer(Nothing) == answered
    columns = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    alone = Answers(**sizes)(columns)
    assert sorted(row["id"] for row in answered) == list(range(12))
    for row in answered:
        if row["id"] == 3:
            assert "temperature must be a finite number" in row["error"]
        else:
            assert row["text"] == alone["text"][row["id"]]
            assert json.loads(row["response"])["usage"]["completion_tokens"] > 0
