"""The workflows of GitHub Actions: what runs for whom, and what opens an issue."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).parents[2] / ".github" / "workflows"


def test_the_job_of_the_own_machine_runs_no_pull_request() -> None:
    """A pull request may come from a fork: its code must not run on a self-hosted machine."""
    ci = (WORKFLOWS / "ci.yml").read_text(encoding="utf-8")
    jobs = dict(re.findall(r"\n  (\w+):\n(    (?:.*\n?)+?)(?=\n  \w|\Z)", ci))
    own = [name for name, job in jobs.items() if "self-hosted" in job]
    assert own == ["gpu"]
    assert "if: vars.GPU_RUNNER != '' && github.event_name != 'pull_request'" in jobs["gpu"]
    assert "pull_request_target" not in ci
    assert "push:\n    branches: [main]\n" in ci


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_canary_passes_on_its_status_and_keeps_its_log(status: int, tmp_path: Path) -> None:
    canary = (WORKFLOWS / "canary.yml").read_text(encoding="utf-8")
    (script,) = re.findall(r"id: canary\n.*?run: \|\n(.*?)\n      - ", canary, re.DOTALL)
    nox, outputs = tmp_path / "nox", tmp_path / "outputs"
    nox.write_text(f"#!/bin/sh\necho moved\nexit {status}\n", encoding="utf-8")
    nox.chmod(0o755)
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(outputs),
        },
        check=False,
        capture_output=True,
    )
    assert done.returncode == status
    assert outputs.read_text(encoding="utf-8") == f"status={status}\n"
    assert (tmp_path / "canary.log").read_text(encoding="utf-8") == "moved\n"


def test_only_what_moved_opens_an_issue() -> None:
    """Not a failed install, which leaves no log, nor exit status 2: nothing was tried then."""
    canary = (WORKFLOWS / "canary.yml").read_text(encoding="utf-8")
    (condition,) = re.findall(r"name: Open an issue\n +if: (.*)\n", canary)
    assert condition == "failure() && steps.canary.outputs.status == '1'"
