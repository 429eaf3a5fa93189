"""A Ray that is missing or does not answer is one line, at once."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from granite_paged.cli.main import run
from granite_paged.cli.options import USAGE
from granite_paged.errors import ClusterError
from granite_paged.ray.cluster import connected, described
from tests.helpers.batch_files import write_requests
from tests.helpers.command_line import Capture, assert_one_line


def test_a_missing_ray_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = write_requests(tmp_path / "in.jsonl", [{"prompt": "x"}])
    assert run(["batch", source, str(tmp_path / "out"), "--ray"]) == USAGE
    assert_one_line(capsys, "ray is not installed: install granite-paged with its extra ray")


@pytest.mark.parametrize("name", ["--workers", "--gpus-per-worker", "--cpus-per-worker"])
def test_the_ray_options_need_ray(name: str, tmp_path: Path, capsys: Capture) -> None:
    source = write_requests(tmp_path / "in.jsonl", [{"prompt": "x"}])
    assert run(["batch", source, str(tmp_path / "out"), name, "1"]) == USAGE
    assert_one_line(capsys, "--workers, --gpus-per-worker and --cpus-per-worker need --ray")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "host:port"])
def test_an_unreachable_address_is_refused_at_once(address: str) -> None:
    pytest.importorskip("ray")
    started = time.monotonic()
    expected = f"no Ray cluster at {address}: .*; give the host:port"
    with pytest.raises(ClusterError, match=expected), connected(address):
        pass
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "\x1b[36mray::Map()\x1b[39m\n  File x\ngranite_paged.errors.CheckpointError: none at x",
            "a worker failed: none at x",
        ),
        ("The actor died.\nmore", "a worker failed: The actor died."),
        ("", "a worker failed: Exception"),
    ],
)
def test_an_error_of_ray_is_described_by_its_reason(text: str, line: str) -> None:
    assert described(Exception(text)) == line


def test_the_environment_names_the_cluster_where_no_address_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"no Ray cluster at 127\.0\.0\.1:1"), connected(""):
        pass
