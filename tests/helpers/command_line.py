"""The commands, and checks of what they print."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

Capture = pytest.CaptureFixture[str]


def assert_one_line(capsys: Capture, reason: str) -> None:
    """Check that a command printed one line of error, with `reason` in it, and nothing else."""
    shown = capsys.readouterr()
    assert shown.err.startswith("granite-paged: error: ")
    assert reason in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command that can be run, as its words and itself."""
    for name, command in group.commands.items():
        words = (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, words)
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield " ".join(words), command
