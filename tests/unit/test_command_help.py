"""One name for one thing: options that several commands have, and what they say."""

from __future__ import annotations

import click
import pytest

from granite_paged.cli.main import cli, run
from tests.helpers.command_line import Capture, assert_one_line, commands

OPTIONS = {
    f"{words} {param.opts[0]}": param
    for words, command in commands(cli)
    for param in command.params
    if isinstance(param, click.Option)
}
OUT = {name for name in OPTIONS if name.endswith(" --out")}


def test_the_commands_that_write_a_folder_name_it_alike() -> None:
    assert {name.split()[0] for name in OUT} == {"bench", "eval", "plot", "profile", "report"}
    for name in OUT:
        assert OPTIONS[name].metavar == "DIR"
        assert str(OPTIONS[name].help).startswith("Write ")
        assert str(OPTIONS[name].help).endswith(" to this folder.")


def test_no_other_option_writes_a_folder() -> None:
    """`--records` is read, except by `gate`; `--tensorboard` is TensorBoard's own."""
    folders = {name for name, option in OPTIONS.items() if option.metavar == "DIR"}
    others = {name.split()[-1] for name in folders - OUT}
    assert others == {"--data", "--records", "--tensorboard"}


@pytest.mark.parametrize("old", ["bench --profile", "eval --report", "tune --out"])
def test_a_former_name_is_no_such_option(old: str, capsys: Capture) -> None:
    assert run([*old.split(), "x"]) == 2
    assert_one_line(capsys, f"No such option '{old.rsplit(maxsplit=1)[-1]}'")
