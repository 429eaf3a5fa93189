"""The calls of a runner, over steps that record their inputs instead of running a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from granite_paged import PagedConfig, paged
from granite_paged.errors import CannotBeExact, InvalidRequest, PromptError, UnsupportedModel
from granite_paged.runner import runner as runner_module
from granite_paged.runner.graph import CapturedStep, Inputs
from granite_paged.runner.model import EagerModel
from granite_paged.runner.runner import Chunk, Runner, _check_chunk, _scored, scores_of
from granite_paged.runner.shapes import Shapes
from tests.helpers.tiny_models import VOCABULARY, shortest_model

CONFIG = PagedConfig(page_size=16, max_tokens=512, max_sequences=4, chunk_tokens=128)
V = VOCABULARY


def mark(row: int, position: int, token: int) -> float:
    return 10_000 * row + 100 * position + token


class MarkedStep(CapturedStep):
    """A step whose hidden state of a token, of one number, says which token it is."""

    def run(self, inputs: Inputs) -> None:
        self.seen = inputs
        rows, positions, tokens = (torch.tensor(part) for part in inputs[1:4])
        if self._decodes:
            fed = self._tokens[rows][:, None]
            self.logits = (10_000 * rows[:, None] + 100 * positions + fed).expand(-1, V).float()
            return
        hidden = 10_000 * rows[:, None] + 100 * positions + tokens
        self.hidden = hidden[..., None].float()
        self.logits = self.hidden.flatten(0, 1)[torch.tensor(inputs.last)].expand(-1, V)


class MarkedSteps:
    """Makes steps as `Steps` does, and lists them."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.made = runner, []
        self.model, self.late = mock.Mock(reads_mask=False), 0
        self.warm_up, self.forget = mock.Mock(), mock.Mock()

    def step(self, batch: int, length: int, *, decodes: bool = False) -> MarkedStep:
        step = MarkedStep(self.model, self.runner.storage, batch, length, decodes, None)
        self.made.append(step)
        return step


def small_model(**options: Any) -> Any:
    return shortest_model(**options).requires_grad_(False)


@pytest.fixture
def runner() -> Runner:
    """A runner whose steps do not run a model."""
    runner = Runner.for_model(small_model(), CONFIG)
    runner._steps = MarkedSteps(runner)  # type: ignore[assignment]
    return runner


def steps_of(runner: Runner) -> list[Any]:
    made: list[Any] = runner._steps.made  # type: ignore[attr-defined]
    return made


def shapes_of(runner: Runner) -> list[tuple[int, int, bool]]:
    return [(step._batch, step._length, step._decodes) for step in steps_of(runner)]


# -- sizes ----------------------------------------------------------------------------------------


def test_chunks_are_aligned_to_those_of_the_mamba_layers() -> None:
    assert Runner.for_model(small_model(), CONFIG).alignment == 16
    dense = small_model(layer_types=["attention"] * 2)
    assert Runner.for_model(dense, CONFIG).alignment == 1
    exact = PagedConfig(page_size=16, max_tokens=64, exact=True)
    assert Runner.for_model(small_model(), exact).alignment == 1


def test_buffers_have_a_null_row_and_rows_for_the_longest_sequence(runner: Runner) -> None:
    assert runner.rows == 4
    assert tuple(runner.storage.pages.table.physical.shape) == (5, runner.longest // 16)
    assert runner.tokens.shape == runner.nonfinite.shape == (5,)


def test_steps_on_the_cpu_are_not_captured_and_it_says_why(runner: Runner) -> None:
    assert "device cpu" in runner.fallback
    assert runner.shapes.captured is False
    able = mock.patch.object(runner_module, "triton_refusal", return_value="")
    with able, mock.patch.object(runner_module, "Steps"):
        assert Runner.for_model(small_model(), CONFIG).shapes.captured is True


def test_exact_mode_is_checked_and_nothing_else_is() -> None:
    compiled = PagedConfig(page_size=16, max_tokens=64, backend="compiled")
    Runner.for_model(small_model(), compiled)
    with pytest.raises(CannotBeExact):
        Runner.for_model(
            small_model(),
            PagedConfig(page_size=16, max_tokens=64, backend="compiled", exact=True),
        )


# -- prefill --------------------------------------------------------------------------------------


def test_chunks_run_in_one_step_with_padding_after_their_tokens(runner: Runner) -> None:
    chunks = [Chunk(3, 16, [5, 6, 7]), Chunk(1, 0, [8])]
    logits = runner.prefill(chunks)
    assert logits[:, 0].tolist() == [mark(3, 18, 7), mark(1, 0, 8)]
    assert logits.shape == (2, V)
    (step,) = steps_of(runner)
    assert logits.data_ptr() == step.logits.data_ptr(), "one step's logits need no copy"
    assert step.seen.rows.tolist() == [3, 1]
    assert step.seen.positions.tolist() == [[16, 17, 18], [0, -1, -1]]
    assert step.seen.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert step.seen.last.tolist() == [2, 3]


def capture_shapes(runner: Runner, rows: int = 2) -> None:
    runner.shapes = Shapes(128, rows, captured=True, alignment=16)


def test_chunks_that_take_several_steps_keep_their_order(runner: Runner) -> None:
    capture_shapes(runner)
    chunks = [Chunk(1, 16, range(20)), Chunk(2, 0, range(70)), Chunk(3, 32, range(9))]
    logits = runner.prefill(chunks)
    assert len(steps_of(runner)) > 1
    expected = [mark(1, 35, 19), mark(2, 69, 69), mark(3, 40, 8)]
    assert logits[:, 0].tolist() == expected
    assert logits.shape == (3, V)
    assert logits.dtype == runner.dtype


def test_a_chunk_in_pieces_counts_positions_on(runner: Runner) -> None:
    runner.chunk_tokens, runner.longest = 2048, 4096
    runner.shapes = Shapes(2048, 1, captured=True, alignment=16)
    logits = runner.prefill([Chunk(1, 32, range(1030))])
    first, second = steps_of(runner)
    assert first.seen.positions.tolist() == [list(range(32, 32 + 1024))]
    assert first.seen.last.tolist() == [1023]
    assert second.seen.positions[0, :7].tolist() == [*range(1056, 1062), -1]
    assert second.seen.tokens[0, :7].tolist() == [*range(1024, 1030), 0]
    assert second.seen.last.tolist() == [5]
    assert logits[:, 0].tolist() == [mark(1, 1061, 1029)]


def test_a_step_with_more_rows_than_chunks_returns_those_of_the_chunks(runner: Runner) -> None:
    capture_shapes(runner)
    assert runner.prefill([Chunk(2, 0, [5, 6])]).shape == (1, V)
    runner.prefill([Chunk(row, 0, [5]) for row in (1, 2)])
    assert shapes_of(runner)[-1][0] == 2


@pytest.mark.parametrize(("start", "cut"), [(0, True), (16, True), (1, False), (17, False)])
def test_only_chunks_that_start_aligned_are_cut(runner: Runner, start: int, cut: bool) -> None:
    with mock.patch.object(Shapes, "arrange", autospec=True, side_effect=Shapes.arrange) as arrange:
        runner.prefill([Chunk(1, 0, [5]), Chunk(2, start, [5])])
        assert arrange.call_args.kwargs == {"cut": cut}
        runner._steps.model.logits = lambda hidden: hidden.expand(-1, V)
        runner.score([Chunk(2, start, [5])], [[6]])
        assert arrange.call_args.kwargs == {"cut": False}


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        (Chunk(1, 0, []), PromptError),
        (Chunk(1, -1, [5]), InvalidRequest),
        (Chunk(1, 0, [5] * 33), InvalidRequest),
        (Chunk(1, 481, [5] * 32), InvalidRequest),
        (Chunk(1, 512, [5]), InvalidRequest),
    ],
)
def test_a_chunk_beyond_its_limits_is_refused(chunk: Chunk, error: type[Exception]) -> None:
    with pytest.raises(error):
        _check_chunk(chunk, 32, 512)


def test_a_chunk_may_have_all_its_tokens_and_end_with_the_longest_sequence() -> None:
    for chunk in (Chunk(1, 0, [5] * 32), Chunk(1, 480, [5] * 32), Chunk(1, 511, [5])):
        _check_chunk(chunk, 32, 512)


@pytest.mark.parametrize("row", [0, -1, 5])
def test_rows_outside_the_runner_are_refused_by_every_call(runner: Runner, row: int) -> None:
    state: Any = None
    for call in (
        lambda: runner.prefill([Chunk(row, 0, [5])]),
        lambda: runner.decode([1, row], [0, 0]),
        lambda: runner.set_pages(row, [1]),
        lambda: runner.fork_row(1, row),
        lambda: runner.fork_row(row, 1),
        lambda: runner.clear_rows([1, row]),
        lambda: runner.save_row(row),
        lambda: runner.load_row(row, state),
    ):
        with pytest.raises(InvalidRequest, match="rows must be 1 to 4"):
            call()
    assert steps_of(runner) == []


def test_the_first_and_the_last_row_are_taken(runner: Runner) -> None:
    assert runner.prefill([Chunk(1, 0, [5]), Chunk(4, 0, [6])]).shape == (2, V)
    with pytest.raises(InvalidRequest):
        runner.prefill([])


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
def test_a_score_is_of_the_target_after_each_token_in_the_order_of_the_chunks(
    runner: Runner, captured: bool
) -> None:
    if captured:
        capture_shapes(runner)
    chunks = [Chunk(3, 2, [4, 5, 6]), Chunk(1, 0, range(7, 47)), Chunk(2, 9, [8, 9])]
    targets = [[11, 12, 13], list(range(40)), [15, 16]]
    seen: list[Any] = []

    def scored(model: Any, hidden: Tensor, after: Tensor, *, exact: bool) -> Any:
        seen.append(exact)
        return runner_module.Scores(hidden[:, 0] + 0.5, after % 2 == 0)

    with mock.patch.object(runner_module, "_scored", scored):
        scores = runner.score(chunks, targets)
    expected = [
        mark(chunk.row, chunk.start + place, token) + 0.5
        for chunk in chunks
        for place, token in enumerate(chunk.tokens)
    ]
    assert scores.logprobs.tolist() == expected
    assert scores.greedy.tolist() == [t % 2 == 0 for each in targets for t in each]
    assert set(seen) == {False}


def test_targets_of_another_length_are_refused(runner: Runner) -> None:
    with pytest.raises(InvalidRequest, match="one target"):
        runner.score([Chunk(1, 0, [5, 6])], [[7]])
    with pytest.raises(InvalidRequest, match="one target"):
        runner.score([Chunk(1, 0, [5])], [[7], [8]])


def test_long_scores_are_computed_in_parts() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(600, V, generator=draw), torch.arange(600) % V
    model = mock.Mock(spec=EagerModel)
    model.logits.side_effect = lambda part: 2 * part
    found = _scored(model, hidden, targets, exact=False)
    assert [len(call.args[0]) for call in model.logits.call_args_list] == [256, 256, 88]
    expected = scores_of(2 * hidden, targets)
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    assert torch.equal(found.greedy, expected.greedy)


def test_a_target_is_scored_after_the_row_that_is_named() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, V, generator=draw)
    best = logits.argmax(dim=1)
    each = scores_of(logits, best)
    assert each.greedy.tolist() == [True] * 3
    named = scores_of(logits, best[[2, 0]], torch.tensor([2, 1]))
    assert named.greedy.tolist() == [True, False]
    expected = logits.log_softmax(1)
    torch.testing.assert_close(named.logprobs, expected[[2, 1], best[[2, 0]]])
    with mock.patch.object(runner_module, "log_probabilities", return_value=expected) as computed:
        scores_of(logits, best)
        scores_of(logits, best, exact=True)
    assert [call.kwargs["exact"] for call in computed.call_args_list] == [False, True]


# -- decode steps ---------------------------------------------------------------------------------


def test_a_decode_step_feeds_the_token_of_each_row(runner: Runner) -> None:
    runner.tokens[torch.tensor([4, 2])] = torch.tensor([7, 9])
    logits = runner.decode([4, 2], [0, 511])
    assert logits[:, 0].tolist() == [mark(4, 0, 7), mark(2, 511, 9)]
    assert shapes_of(runner) == [(2, 1, True)]
    (step,) = steps_of(runner)
    assert step.seen.positions.tolist() == [[0], [511]]


def test_a_captured_decode_step_is_padded_to_a_power_of_two(runner: Runner) -> None:
    capture_shapes(runner, rows=4)
    assert runner.decode([4, 2, 1], [5, 6, 7]).shape == (3, V)
    (step,) = steps_of(runner)
    assert step.seen.rows.tolist() == [4, 2, 1, 0]
    assert step.seen.positions.tolist() == [[5], [6], [7], [-1]]


@pytest.mark.parametrize("positions", [[-1], [512], [], [0, 1]])
def test_positions_outside_a_sequence_are_refused(runner: Runner, positions: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        runner.decode([1], positions)
    with pytest.raises(InvalidRequest):
        runner.decode([], [])


# -- changes of the model -------------------------------------------------------------------------


class Changes:
    """What `Look` says, and with which arguments it was asked."""

    def __init__(self, *, moved: bool = False, written: bool = False) -> None:
        self.moved, self.written, self.compared = moved, written, []

    def has_moved(self) -> bool:
        return self.moved

    def was_written(self, *, compare: bool) -> bool:
        self.compared.append(compare)
        return self.written


def look(runner: Runner, **what: bool) -> Changes:
    changes = Changes(**what)
    runner._look = changes  # type: ignore[assignment]
    return changes


@pytest.mark.parametrize(
    ("device", "idle", "compared"),
    [("cpu", False, True), ("cpu", True, True), ("cuda", False, False), ("cuda", True, True)],
)
def test_numbers_are_compared_where_that_does_not_wait(
    runner: Runner, device: str, idle: bool, compared: bool
) -> None:
    changes, runner.device = look(runner), torch.device(device)
    assert runner.notice_changes(idle=idle) is False
    assert changes.compared == [compared]
    assert runner._look is changes


def test_written_weights_need_no_other_steps(runner: Runner) -> None:
    changes, steps = look(runner, written=True), runner._steps
    assert runner.notice_changes(idle=False) is True
    assert runner._steps is steps
    assert runner._look is not changes, "it looks again"


def test_a_model_that_moved_gets_other_steps_and_keeps_its_count(runner: Runner) -> None:
    changes, steps = look(runner, moved=True), runner._steps
    steps.late = 3
    assert runner.notice_changes(idle=False) is True
    assert changes.compared == [], "nothing need be compared"
    assert runner._steps is not steps
    assert runner.late_captures == 3


def test_a_runner_that_falls_back_once_stays_so(runner: Runner) -> None:
    before = runner.fallback
    look(runner, moved=True)
    with mock.patch.object(runner_module, "triton_refusal", return_value="another reason"):
        runner.notice_changes(idle=False)
        assert runner.fallback == before
        runner.fallback = ""
        look(runner, moved=True)
        runner.notice_changes(idle=False)
    assert runner.fallback == "another reason"


def test_a_changed_frame_is_refused_unless_a_patch_changed_it(runner: Runner) -> None:
    model = runner._live
    with paged(model, PagedConfig(page_size=16)):
        look(runner, moved=True)
        assert runner.notice_changes(idle=False) is True
    model.model.layers[0].register_forward_hook(lambda *_: None)
    look(runner, moved=True)
    with pytest.raises(UnsupportedModel, match="has a hook"):
        runner.notice_changes(idle=False)


def test_a_model_of_another_dtype_needs_another_runner(runner: Runner) -> None:
    runner._live.double()
    with pytest.raises(UnsupportedModel, match="became torch"):
        runner.notice_changes(idle=False)


def test_a_model_that_cannot_be_exact_any_more_is_refused_in_exact_mode_only() -> None:
    exact = PagedConfig(page_size=16, max_tokens=64, exact=True)
    for config in (exact, PagedConfig(page_size=16, max_tokens=64)):
        runner = Runner.for_model(small_model(), config)
        runner._live.lm_head.register_forward_hook(lambda *_: None)
        if config.exact:
            with pytest.raises(CannotBeExact):
                runner.notice_changes(idle=False)
        else:
            assert runner.notice_changes(idle=False) is True


# -- rows and memory ------------------------------------------------------------------------------


def test_the_pages_of_a_row_are_named_in_order(runner: Runner) -> None:
    runner.set_pages(2, [7, 3, 5])
    assert runner.storage.pages.table.physical[2, :4].tolist() == [7, 3, 5, 0]


def test_clearing_no_rows_is_allowed(runner: Runner) -> None:
    storage = SimpleNamespace(clear_rows=mock.Mock())
    runner._storage = storage  # type: ignore[assignment]
    runner.clear_rows([])
    storage.clear_rows.assert_not_called()
    runner.clear_rows([2])
    storage.clear_rows.assert_called_once_with([2])


def test_a_row_is_saved_on_the_device_unless_asked_otherwise(runner: Runner) -> None:
    storage = SimpleNamespace(save_row=mock.Mock())
    runner._storage = storage  # type: ignore[assignment]
    runner.save_row(1)
    runner.save_row(1, to_host=True)
    assert [call.kwargs["to_host"] for call in storage.save_row.call_args_list] == [False, True]


def test_a_warm_up_takes_all_shapes_unless_some_are_wanted(runner: Runner) -> None:
    capture_shapes(runner)
    warm_up: Any = runner._steps.warm_up
    runner.warm_up()
    assert warm_up.call_args.args[0] == list(runner.shapes.all())
    runner.warm_up(wanted=lambda batch, length: length == 1)
    assert warm_up.call_args.args[0] == [(1, 1), (2, 1)]


@pytest.mark.parametrize(("device", "calls"), [("cpu", 0), ("cuda", 1)])
def test_closing_frees_what_the_allocator_of_a_gpu_keeps(
    runner: Runner, device: str, calls: int
) -> None:
    runner.device = torch.device(device)
    forget: Any = runner._steps.forget
    with mock.patch.object(torch.cuda, "empty_cache") as empty:
        runner.close()
    assert empty.call_count == calls
    forget.assert_called_once_with()
