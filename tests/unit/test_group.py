"""A group of engines: how work is shared out, and what becomes of it when an engine fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged.engine import group as groups
from granite_paged.engine.group import EngineGroup
from granite_paged.engine.request import Output, SamplingParams
from granite_paged.errors import (
    BrokenInvariant,
    CannotBeExact,
    EngineClosed,
    EngineLost,
    InvalidArgument,
    PromptError,
)


class Engine:
    """An engine that answers at once with its name, and notes what it was asked.

    Attributes:
        fault: raised instead of an answer.
        ends: whether it closes under its work.
        work: the prompts, or items, of each call.
    """

    def __init__(self, name: str = "", *, load: float = 0, exact: bool = False) -> None:
        self.name, self.load = name, load
        config = SimpleNamespace(exact=exact)
        self.runner = SimpleNamespace(config=config, device=name)
        self.closed = self.ends = False
        self.busy: list[bool] = []
        self.fault: BaseException | None = None
        self.work: list[list[Any]] = []
        self.asked: list[Any] = []
        self.cancelled = self.closings = 0

    def submit(self, *asked: Any, on_token: Any) -> str:
        self.asked.append((*asked, on_token))
        return self.name

    def step(self) -> bool:
        if self.fault:
            raise self.fault
        return self.busy.pop(0)

    def generate_pairs(self, pairs: Sequence[tuple[Any, Any]]) -> list[Output]:
        self._called([prompt for prompt, _ in pairs])
        error = None
        if self.ends:
            self.closed, error = True, EngineClosed("closed")
        return [
            Output(0, index, (), text=f"{self.name} {prompt} {index}", error=error)
            for prompt, one in pairs
            for index in range(one.n if one else 1)
        ]

    def score(self, items: Sequence[Any]) -> list[Any]:
        self._called(items)
        return [[f"{self.name} {item}"] for item in items]

    def stats(self) -> str:
        return f"stats of {self.name}"

    def cancel_all(self) -> None:
        self.cancelled += 1

    def close(self) -> None:
        self.closings += 1
        self.closed = True
        if self.fault:
            raise self.fault

    def _called(self, work: Sequence[Any]) -> None:
        self.work.append(list(work))
        if self.fault:
            raise self.fault


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "Engine", Engine)


def make(*engines: Any) -> EngineGroup:
    return EngineGroup(engines)


def two(first: float = 0, second: float = 0) -> tuple[Any, Any, EngineGroup]:
    """Return two engines with these loads, and their group."""
    a, b = Engine("a", load=first), Engine("b", load=second)
    return a, b, make(a, b)


def texts(outputs: Sequence[Output]) -> list[str]:
    return [output.text for output in outputs]


GREEDY = SamplingParams(max_new_tokens=1)

# -- making -------------------------------------------------------------------------------------


def test_a_group_is_made_of_different_engines() -> None:
    a, b = Engine(), Engine()
    assert make(a, b).engines == [a, b]
    assert EngineGroup(iter([a])).engines == [a]  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="at least one Engine"):
        make()
    with pytest.raises(InvalidArgument, match="twice"):
        make(a, b, a)


@pytest.mark.parametrize("wrong", ["ab", 5, None], ids=repr)
def test_engines_of_another_form_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="engines must be a list of Engine"):
        EngineGroup(wrong)
    with pytest.raises(InvalidArgument, match="each of engines must be an Engine"):
        EngineGroup([wrong])


def test_engines_in_exact_mode_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "bits_place", lambda device: device[0])
    make(Engine("x1", exact=True), Engine("x2", exact=True))
    make(Engine("x"), Engine("y"))
    for other in (Engine("y", exact=True), Engine("x")):
        with pytest.raises(CannotBeExact, match="differ in exact mode or in their device"):
            make(Engine("x", exact=True), other)


class Replica(Engine):
    """An engine that was made for a model."""

    made: list[Replica]

    def __init__(self, model: Any, config: Any, **options: Any) -> None:
        super().__init__(model.device)
        self.model, self.config, self.options = model, config, options
        if model.device == "broken":
            raise MemoryError
        self.made.append(self)

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Model:
    device = "a"

    def to(self, device: str) -> Model:
        self.device = device
        return self


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineGroup]:
    monkeypatch.setattr(groups, "Engine", Replica)
    monkeypatch.setattr(groups, "resolve_device", lambda name: name)
    monkeypatch.setattr(Replica, "made", [], raising=False)
    return EngineGroup.replicas


def test_a_replica_is_a_copy_unless_the_model_is_there(replicas: Any) -> None:
    model, config = Model(), object()
    group = replicas(model, ["b", "a"], config, queue=7)
    there, here = group.engines
    assert here.model is model
    assert there.model is not model
    assert (there.model.device, model.device) == ("b", "a")
    assert [(each.config, each.options) for each in (there, here)] == [(config, {"queue": 7})] * 2
    assert (there.closed, here.closed) == (False, False)


def test_replicas_close_if_a_later_one_fails(replicas: Any) -> None:
    with pytest.raises(MemoryError):
        replicas(Model(), ["a", "b", "broken"])
    assert [each.closings for each in Replica.made] == [1, 1]


@pytest.mark.parametrize("wrong", ["cpu", 5, {"cpu": 1}], ids=repr)
def test_devices_of_another_form_are_refused(replicas: Any, wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="devices must be a list of names"):
        replicas(Model(), wrong)


# -- single calls -------------------------------------------------------------------------------


def test_a_request_goes_to_the_open_engine_with_the_lowest_load() -> None:
    a, b, group = two(5, 3)
    assert group.submit("prompt", GREEDY, on_token=print) == "b"
    assert b.asked == [("prompt", GREEDY, print)]
    b.closed = True
    assert group.submit("prompt") == "a"
    a.closed = True
    with pytest.raises(EngineClosed, match="make another group"):
        group.submit("prompt")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_step_is_one_of_each_open_engine(first: bool, second: bool) -> None:
    a, b, group = two()
    closed = Engine("closed")
    closed.closed = True
    group.engines.append(closed)  # type: ignore[arg-type]
    a.busy, b.busy = [first], [second]
    assert group.step() is (first or second)
    assert a.busy == b.busy == []


def test_a_step_raises_the_first_failure_when_all_have_stepped() -> None:
    a, b, group = two()
    c = Engine("c")
    group.engines.append(c)  # type: ignore[arg-type]
    a.fault, c.fault, b.busy = RuntimeError("of a"), RuntimeError("of c"), [True]
    with pytest.raises(RuntimeError, match="of a"):
        group.step()
    assert b.busy == []


def test_every_engine_closes_whatever_one_raises() -> None:
    a, b, group = two()
    b.fault = RuntimeError("stuck")
    with pytest.raises(RuntimeError, match="stuck"), group:
        assert group.stats() == ["stats of a", "stats of b"]
    assert (a.closings, b.closings) == (1, 1)


# -- shares -------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_prompts() -> None:
    a, b, group = two()
    params = [SamplingParams(max_new_tokens=1, n=n) for n in (2, 1, 2)]
    outputs = group.generate(["p", "q", "r"], params)
    assert texts(outputs) == ["a p 0", "a p 1", "b q 0", "b r 0", "b r 1"]
    assert (a.work, b.work) == ([["p"]], [["q", "r"]]), "and nothing is asked twice"


def test_scores_come_in_the_order_of_the_items() -> None:
    a, b, group = two()
    items = [("p", ["x"]), ("q", ["y"]), ("r", ["z"])]
    found = group.score(items)
    assert found == [[f"{name} {item}"] for name, item in zip("aba", items, strict=True)]
    assert (a.work, b.work) == ([[items[0], items[2]]], [[items[1]]])


def test_what_is_an_iterator_can_be_read_by_several_engines() -> None:
    a, b, group = two()
    a.fault = RuntimeError("gone")
    group.generate([iter([1, 2]), iter([3])], GREEDY)  # type: ignore[list-item]
    assert (a.work, b.work) == ([[[1, 2]]], [[[3]], [[1, 2]]])
    items: list[Any] = [(iter([1, 2]), map(iter, [[3], [4, 5]]))]
    group.score(items)
    assert b.work[-1] == [([1, 2], [[3], [4, 5]])]


def test_what_an_engine_refuses_is_left_to_it() -> None:
    engine, scalar = Engine("a"), torch.tensor(5)
    group = make(engine)
    prompts: list[Any] = [[1, 2], scalar]
    group.generate(prompts, GREEDY)
    items: list[Any] = [([1], [[2]]), (3,), (scalar, scalar), "ab"]
    group.score(items)
    assert engine.work == [prompts, items]


COSTS: dict[str, tuple[Any, SamplingParams | None, float]] = {
    "tokens": ([1, 2, 3], SamplingParams(max_new_tokens=5), 3 + 5),
    "samples": ([1, 2, 3], SamplingParams(max_new_tokens=5, n=4), 3 + 4 * 5),
    "defaults": ([1, 2, 3], None, 3 + 64),
    "something without a length": (None, SamplingParams(max_new_tokens=7), 1 + 7),
}


@pytest.mark.parametrize("kind", COSTS)
def test_a_prompt_counts_its_tokens_and_those_of_its_answers(kind: str) -> None:
    prompt, params, cost = COSTS[kind]
    for load, taker in ((cost, "a"), (cost - 0.5, "b")):
        a, b, group = two(0, load)
        group.generate([prompt, [1]], [params, GREEDY])
        assert {"a": a, "b": b}[taker].work[0][-1] == [1], f"with a load of {load} in b"


def test_an_item_counts_the_tokens_of_its_context_and_continuations() -> None:
    items = [([1, 2, 3], [[4], [5, 6]]), ([7], [[8]])]
    for load, taker in ((6, "a"), (5.5, "b")):
        a, b, group = two(0, load)
        group.score(items)
        assert {"a": a, "b": b}[taker].work[0][-1] == items[1]


# -- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [RuntimeError("gone"), EngineClosed("gone"), BrokenInvariant("gone")], ids=repr
)
def test_the_share_of_an_engine_that_fails_is_done_by_the_others(fault: Exception) -> None:
    a, b, group = two()
    a.fault = fault
    assert texts(group.generate(["p", "q", "r"], GREEDY)) == ["b p 0", "b q 0", "b r 0"]
    assert a.work == [["p", "r"]], "it is not asked again"
    assert b.work == [["q"], ["p", "r"]]


def test_the_share_of_an_engine_that_closes_is_done_by_the_others() -> None:
    a, b, group = two()
    a.ends = True
    assert texts(group.generate(["p", "q", "r"], GREEDY)) == ["b p 0", "b q 0", "b r 0"]
    assert b.work == [["q"], ["p", "r"]]


def test_what_two_engines_fail_at_is_lost_by_name() -> None:
    a, b, group = two()
    a.fault = b.fault = RuntimeError("gone")
    outputs = group.generate(["p", "q"], SamplingParams(max_new_tokens=1, n=2))
    assert [(o.request, o.index, o.refused) for o in outputs] == [
        (-1, 0, "p"), (-1, 1, "p"), (-1, 0, "q"), (-1, 1, "q"),
    ]  # fmt: skip
    for output in outputs:
        assert (output.prompt, output.finish) == ((), "error")
        assert isinstance(output.error, EngineLost)
    assert (len(a.work), len(b.work)) == (2, 2), "each gets two shares, and no third"
    with pytest.raises(EngineLost, match="gone"):
        group.score([("p", ["x"])])


def test_one_engine_gets_a_second_chance() -> None:
    class Once(Engine):
        def generate_pairs(self, pairs: Any) -> list[Output]:
            self.fault = None if self.work else RuntimeError("once")
            return super().generate_pairs(pairs)

    engine = Once("a")
    assert texts(make(engine).generate(["p"], GREEDY)) == ["a p 0"]


def test_a_refusal_of_the_work_is_raised_and_not_handed_over() -> None:
    a, b, group = two()
    a.fault = PromptError("no tokens")
    with pytest.raises(PromptError, match="no tokens"):
        group.score([("p", ["x"]), ("q", ["y"])])
    assert (len(a.work), len(b.work)) == (1, 1)


def test_an_interrupt_in_the_thread_of_an_engine_is_raised() -> None:
    a, b, group = two()
    a.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        group.generate(["p", "q"], GREEDY)
    assert (a.work, b.work) == ([["p"]], [["q"]]), "and nothing is handed over"


def test_a_closed_engine_gets_no_share() -> None:
    a, b, group = two()
    a.closed = True
    assert texts(group.generate(["p", "q"], GREEDY)) == ["b p 0", "b q 0"]
    assert a.work == []
    b.closed = True
    with pytest.raises(EngineClosed, match="every engine of the group is closed"):
        group.generate(["p"], GREEDY)


def test_an_interrupt_cancels_the_work_of_every_engine_until_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeouts: list[float] = []

    def wait(running: Any, timeout: float | None = None) -> Any:
        if timeout is None:
            raise KeyboardInterrupt
        timeouts.append(timeout)
        return SimpleNamespace(not_done=running if len(timeouts) < 3 else ())

    monkeypatch.setattr(groups, "wait", wait)
    a, b, group = two()
    with pytest.raises(KeyboardInterrupt):
        group.generate(["p", "q"], GREEDY)
    assert (a.cancelled, b.cancelled) == (2, 2)
    assert all(0 < timeout < 1 for timeout in timeouts), "soon again, and without spinning"
