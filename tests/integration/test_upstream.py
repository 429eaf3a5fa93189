"""`tools.upstream` on a checkout of three tests: models are patched, and failures are judged."""

from __future__ import annotations

import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tools.upstream import __main__ as upstream
from tools.upstream.__main__ import FAILED, MODULE, NEEDED, UNUSABLE, Outcome, main, run_tests

TESTS = textwrap.dedent(
    """
    import unittest
    import torch
    from granite_paged.hf.patching import is_patched
    from tests.helpers.tiny_models import tiny_model

    class Tester:
        def prepare_config_and_inputs(self):
            return None, torch.full((2, 5), 7), torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])

    class GraniteMoeHybridModelTest(unittest.TestCase):
        model_tester_class = Tester

        def test_generate(self):
            _, token_ids, mask = Tester().prepare_config_and_inputs()
            tiny_model().generate(token_ids, attention_mask=mask, max_new_tokens=2)

        def test_training(self):
            tiny_model().train()(torch.full((1, 5), 7))

        def test_patched(self):
            model = tiny_model()
            model(torch.full((1, 5), 7))
            self.assertFalse(is_patched(model))

        def test_broken(self):
            self.fail("broken anyway")
    """
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in NEEDED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / MODULE).write_text(TESTS)
    (tmp_path / NEEDED[-1]).write_text(f'__version__ = "{version("transformers")}"\n')
    return tmp_path


def test_models_run_on_pages_and_only_what_is_not_listed_counts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two claims in one test, since each run of the checkout loads torch in a new process."""
    runs = []

    def noted(*args: Any, **options: Any) -> dict[str, Outcome]:
        runs.append(run_tests(*args, **options))
        return runs[-1]

    monkeypatch.setattr(upstream, "run_tests", noted)
    assert main([str(checkout)]) == FAILED
    printed = capsys.readouterr().out
    assert "4 tests, 2 on pages" in printed
    assert "refused as documented: 1\n" in printed
    assert "fail without pages too: test_broken\n" in printed
    assert "test_patched: fails on pages only: AssertionError: True is not false" in printed
    assert "test_custom_4d_attention_mask: is on the list, and there is no such test" in printed
    assert "test_training: " not in printed
    on_pages = runs[0]
    assert on_pages["test_generate"].failures == ()
    assert on_pages["test_generate"].paged_steps == 2, "inputs are padded on the left"
    assert "a patched model runs inference only" in on_pages["test_training"].failures[0]


def test_a_run_without_pages_is_unusable(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passed = Outcome("GraniteMoeHybridModelTest::test_training", (), False, paged_steps=0)
    monkeypatch.setattr(upstream, "run_tests", lambda *args, **options: {"test_training": passed})
    assert main([str(checkout)]) == UNUSABLE
    assert capsys.readouterr().err.count("\n") == 1
