"""Random traffic on the embedded model: every kind of request, of fault and of early end.

Requests come from a pool, so that each answer of a request that runs alone is computed once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from granite_paged.engine.request import Output, Request, SamplingParams, Scoring
from granite_paged.errors import (
    EngineBusy,
    EngineClosed,
    GranitePagedError,
    NonFiniteRequest,
    RequestCancelled,
)
from granite_paged.geometry import PagedConfig
from granite_paged.models import load
from granite_paged.runner.runner import Runner
from tests.helpers.call_sites import Broken
from tests.helpers.engine_harness import (
    EngineHarness,
    Interrupted,
    expected_beams,
    expected_logprobs,
    expected_tokens,
)
from tests.helpers.simulated_runner import ModelOracle
from tests.helpers.words import Words

NAN_TOKEN = 290
"""A token whose embedding is NaN: a prompt that has it ends by name."""

NOISE = 1e-4
"""A request is asked only if noise of this size in its logits changes no token: the engine adds
float32 numbers in another order than transformers."""

ONCE = (
    *("text", "unreadable_text", "undecodable", "not_finite", "search", "cancel", "evict"),
    *("device_fault", "stream", "generate", "async_streams"),
)
DECK = [*ONCE, *8 * ["sample"], *2 * ["score"], *3 * ["callback"]]
ACTS = 9
MOST_OPEN = 10
DEVICE_CALLS = ("decode", "prefill", "score")
PAGE, CHUNK = 16, 64


def soaked_model() -> Any:
    """Return the embedded model, whose embedding of `NAN_TOKEN` is NaN."""
    model = load(device="cpu", dtype="float32").model
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # tied before
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_TOKEN] = float("nan")
    return model


class NoisyOracle:
    """An oracle whose logits are off by at most `NOISE`."""

    def __init__(self, oracle: ModelOracle) -> None:
        self._oracle = oracle
        self.vocabulary = oracle.vocabulary

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        logits = self._oracle.logits(tokens)
        generator = torch.Generator().manual_seed(len(tokens))
        return logits + NOISE * (2 * torch.rand(logits.shape, generator=generator) - 1)

    def last(self, tokens: tuple[int, ...]) -> Tensor:
        return self.logits(tokens)[-1]


class Sample(NamedTuple):
    prompt: tuple[int, ...]
    params: SamplingParams


class Search(NamedTuple):
    prompt: tuple[int, ...]
    params: SamplingParams
    beams: int


class Scored(NamedTuple):
    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    namespace: str


class Pool:
    """Requests, and their answers when each runs alone.

    Args:
        size: number of requests to sample; there are a third as many searches and scorings.
    """

    def __init__(self, model: Any, chance: random.Random, size: int) -> None:
        self._chance = chance
        self._stems = [self._tokens(80) for _ in range(2)]
        self._answers: dict[tuple[Any, ...], Any] = {}
        self._oracle = ModelOracle(model)
        self.vocabulary = self._oracle.vocabulary
        self.samples: list[Sample] = []
        self.searches: list[Search] = []
        self.scored: list[Scored] = []
        while len(self.samples) < size:
            prompt, params = Sample(self._prompt(), self._params())
            asked = [(expected_tokens, prompt, params, index) for index in range(params.n)]
            if self._are_stable(asked):
                self.samples.append(Sample(prompt, params))
        while len(self.searches) < size // 3:
            params = SamplingParams(max_new_tokens=chance.randint(2, 4), stop_tokens=(5, 6, 7, 8))
            search = Search(self._prompt(), params, chance.randint(2, 3))
            if self._are_stable([(expected_beams, *search)]):
                self.searches.append(search)
        while len(self.scored) < size // 3:
            continuations = tuple(self._tokens(n) for n in chance.choice([(1, 3), (1, 1), (2, 5)]))
            one = Scored(self._prompt(), continuations, chance.choice(["", "a"]))
            for continuation in continuations:
                asked_score = (expected_logprobs, one.context, continuation)
                self._answers[asked_score] = expected_logprobs(self._oracle, *asked_score[1:])
            self.scored.append(one)
        self._oracle.logits.cache_clear()  # else it would be memory that a run lets go

    def alone(self, *asked: Any) -> Any:
        """Return the answer of a request that runs alone."""
        return [] if NAN_TOKEN in asked[1] else self._answers[asked]

    def answers(self, one: Sample) -> list[list[int]]:
        """Return the tokens of each sample of a request."""
        return [self.alone(expected_tokens, *one, index) for index in range(one.params.n)]

    # -- details --------------------------------------------------------------------------------

    def _are_stable(self, asked: Sequence[tuple[Any, ...]]) -> bool:
        """Compute answers, and return whether noise leaves them as they are."""
        for expected, *one in asked:
            try:
                answer = expected(self._oracle, *one)
                if expected(NoisyOracle(self._oracle), *one) != answer:
                    return False
            except NonFiniteRequest:
                return False
            found = [answer] if expected is expected_tokens else answer
            if any(NAN_TOKEN in tokens for tokens in found):
                return False
            self._answers[expected, *one] = answer
        return True

    def _prompt(self) -> tuple[int, ...]:
        stem = self._chance.choice(self._stems)[: self._chance.choice([0, 33, 40, 70])]
        return (*stem, *self._tokens(self._chance.randint(1, 8)))

    def _params(self) -> SamplingParams:
        pick = self._chance.choice
        return SamplingParams(
            max_new_tokens=pick([1, 5, 9]), temperature=pick([0.0, 0.0, 0.8]), seed=pick([0, 1]),
            repetition_penalty=pick([1.0, 1.0, 1.3]), n=pick([1, 1, 3]), priority=pick([-1, 0, 1]),
            stop_tokens=pick([(), self._tokens(20)]), logprobs=pick([None, None, 3]),
            streamed=pick([False, True]), namespace=pick(["", "a"]),
        )  # fmt: skip

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._chance.randrange(3, NAN_TOKEN) for _ in range(count))


class TrafficHarness(EngineHarness):
    """A harness whose answers come from a pool, and whose errors must have been asked for."""

    def __init__(self, pool: Pool, model: Any, preemption: str) -> None:
        sizes = PagedConfig(
            page_size=PAGE, max_tokens=18 * PAGE, max_sequences=5, chunk_tokens=CHUNK
        )
        runner = Runner.for_model(model, sizes)
        for call in DEVICE_CALLS:
            setattr(runner, call, self._faulty_call(getattr(runner, call)))
        self.device_fault: BaseException | None = None
        self.words = Words()
        self.cancelled: set[Request | Scoring] = set()
        self.pool = pool
        options = {"preemption": preemption, "tokenizer": self.words, "state_bytes": 20_000}
        super().__init__(None, options, runner)  # type: ignore[arg-type]  # the pool has answers
        self.faulty = True  # the errors are checked here

    def alone(self, expected: Callable[..., Any], *asked: Any) -> Any:
        return self.pool.alone(expected, *asked)

    def check(self) -> None:
        """Check the errors of requests that have finished, then everything else."""
        for one in self.open:
            if one.finished:
                self.check_errors(one)
                self.cancelled.discard(one)
        super().check()

    def check_errors(self, one: Request | Scoring) -> None:
        """Check that what ended a request early was done to it."""
        prompt = one.context if isinstance(one, Scoring) else one.prompt
        ends: Sequence[Any] = [one] if isinstance(one, Scoring) else one.outputs
        for end in ends:
            self.check_error(end.error, prompt, is_cancelled=one in self.cancelled)
            if isinstance(end, Output) and end.finish in ("stop", "length"):
                assert end.text == self.words.text(end.tokens), f"text of request {one.number}"

    def check_error(
        self, error: Exception | None, prompt: Sequence[int], *, is_cancelled: bool
    ) -> None:
        """Check that an error, or none, is right."""
        self.met["answers" if error is None else type(error).__name__] += 1
        if error is None:
            assert NAN_TOKEN not in prompt, "NaN was taken for an answer"
        elif isinstance(error, NonFiniteRequest):
            assert NAN_TOKEN in prompt, "a request of finite numbers was called not finite"
        elif isinstance(error, RequestCancelled):
            assert is_cancelled, f"not cancelled: {error}"
        elif isinstance(error, EngineClosed):
            assert self.engine.closed, f"the engine is open: {error}"
        else:
            assert isinstance(error.__cause__, Broken), f"not a fault of ours: {error!r}"

    def _faulty_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any) -> Any:
            fault, self.device_fault = self.device_fault, None
            if isinstance(fault, Interrupted):
                raise fault
            result = call(*args)
            if fault is not None:  # the device did its work, and then failed
                raise fault
            return result

        return faulty


class Traffic:
    """Does one random thing after the other to an engine.

    Args:
        met: counts of what was done.
        deck: what is still to be done before anything is done again; filled when it is empty.
    """

    def __init__(
        self, harness: TrafficHarness, chance: random.Random, met: Counter[str], deck: list[str]
    ) -> None:
        self._harness = harness
        self._engine = harness.engine
        self._pool = harness.pool
        self._chance = chance
        self._met = met
        self._deck = deck

    def run(self, acts: int = ACTS) -> None:
        """Do a number of things, with some steps after each."""
        for _ in range(acts):
            if not self._deck:
                self._deck += self._chance.sample(DECK, len(DECK))
            while len(self._harness.open) >= MOST_OPEN:
                self._harness.step()
            act = self._deck.pop()
            getattr(self, act)()
            self._met[act] += 1
            for _ in range(self._chance.randrange(6)):
                self._harness.step()

    # -- requests -------------------------------------------------------------------------------

    def sample(self) -> None:
        self._harness.submit(*self._sample())

    def text(self) -> None:
        prompt, params = self._sample()
        self._submit(self._harness.words.text(prompt), params)

    def unreadable_text(self) -> None:
        self._harness.words.fails["encode"] = Broken("encode")
        refused = self._harness.submit("w5 w6", SamplingParams())
        assert refused is None, "a prompt that cannot be encoded was accepted"

    def undecodable(self) -> None:
        prompt, params = self._sample()
        self._harness.words.fails["decode"] = Broken("decode")
        self._submit(prompt, params)

    def not_finite(self) -> None:
        prompt, params = self._sample()
        self._submit((*prompt, NAN_TOKEN, 5), replace(params, priority=self._chance.randint(-1, 1)))

    def search(self) -> None:
        self._harness.search(*self._chance.choice(self._pool.searches))

    def score(self) -> None:
        self._harness.score(*self._chance.choice(self._pool.scored))

    # -- user code and the device ---------------------------------------------------------------

    def callback(self) -> None:
        does = self._chance.choice(["raise", "interrupt", "step", "cancel", "submit"])
        at = self._chance.randint(1, 3)

        def on_token(output: Output, token: int, text: str) -> None:
            if len(output.tokens) == at:
                self._met[f"callback: {does}"] += 1
                self._call_back(does)

        self._harness.submit(*self._sample(), on_token)

    def _call_back(self, does: str) -> None:
        if does == "raise":
            raise Broken("callback")
        if does == "interrupt":
            raise Interrupted
        if does == "step":
            try:
                self._engine.step()
            except EngineBusy as refusal:
                raise Broken("busy") from refusal
            raise AssertionError("a callback ran a step")
        if does == "cancel":
            self.cancel()
        if does == "submit" and len(self._harness.open) < 2 * MOST_OPEN:
            self.sample()

    def device_fault(self) -> None:
        self._harness.device_fault = self._chance.choice([Broken("device"), Interrupted()])

    def cancel(self) -> None:
        if self._harness.open:
            asked = self._chance.choice(self._harness.open)
            self._harness.cancelled.add(asked)
            self._engine.cancel(asked)

    def evict(self) -> None:
        self._harness.evict()

    # -- calls that step by themselves ----------------------------------------------------------

    def generate(self) -> None:
        """Ask several things at once, one of them wrong."""
        asked = [self._sample() for _ in range(3)]
        prompts, params = zip(*asked, strict=True)
        with self._stepping():
            outputs = self._engine.generate([*prompts, [10**6]], [*params, None])
            self._check_outputs(asked, outputs[:-1])
            assert outputs[-1].refused == [10**6]

    def stream(self) -> None:
        """Read a stream, perhaps not to its end."""
        one, leave_at = self._sample(), self._chance.randint(1, 8)
        got = _Pieces(one)
        with self._stepping():
            for piece in self._engine.stream(*one):
                got.add(piece)
                if got.count == leave_at:
                    break
        got.check(self._pool.answers(one))

    def async_streams(self) -> None:
        """Read some streams at a time: to the end, or not, or until the task is cancelled."""
        with self._stepping():
            asyncio.run(self._read_all())

    async def _read_all(self) -> None:
        ends = ["end", "end", "leave", "drop", "cancel"]
        tasks = []
        for how in self._chance.sample(ends, len(ends)):
            task = asyncio.create_task(self._read(self._sample(), how, self._chance.randint(1, 5)))
            tasks.append((task, how))
        for task, how in tasks:
            if how == "cancel":
                await asyncio.sleep(self._chance.random() / 10)
                task.cancel()
        results = await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _read(self, one: Sample, how: str, leave_at: int) -> None:
        got = _Pieces(one)
        try:
            stream = self._engine.astream(*one)
            async for piece in stream:
                got.add(piece)
                if how != "end" and got.count >= leave_at and how != "cancel":
                    break
            else:
                assert got.is_all_of(self._pool.answers(one)), "a stream ended early"
                self._met["streams read"] += 1
            if how == "leave":
                await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
        except Interrupted:
            self._met["streams interrupted"] += 1
        except GranitePagedError as error:
            self._harness.check_error(error, one.prompt, is_cancelled=False)
        got.check(self._pool.answers(one))

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        """Let a call step the engine; an interrupt that a callback raised may end it."""
        try:
            yield
        except Interrupted:
            self._met["calls interrupted"] += 1
        except GranitePagedError as error:
            self._harness.check_error(error, (), is_cancelled=False)
        self._harness.restart_watch()
        self._harness.check()

    # -- details --------------------------------------------------------------------------------

    def _sample(self) -> Sample:
        return self._chance.choice(self._pool.samples)

    def _submit(self, prompt: Any, params: SamplingParams) -> None:
        self._harness.submit(prompt, params)

    def _check_outputs(self, asked: Sequence[Sample], outputs: Sequence[Output]) -> None:
        answers = [tokens for one in asked for tokens in self._pool.answers(one)]
        for output, tokens in zip(outputs, answers, strict=True):
            self._harness.check_error(output.error, output.prompt, is_cancelled=False)
            assert output.tokens == (tokens[: len(output.tokens)] if output.error else tokens)


class _Pieces:
    """What a stream brought."""

    def __init__(self, one: Sample) -> None:
        self.count = 0
        self._tokens: list[list[int]] = [[] for _ in range(one.params.n)]

    def add(self, piece: Any) -> None:
        self.count += 1
        self._tokens[piece.sample].append(piece.token)

    def is_all_of(self, answers: list[list[int]]) -> bool:
        return self._tokens == answers

    def check(self, answers: list[list[int]]) -> None:
        for got, answer in zip(self._tokens, answers, strict=True):
            assert got == answer[: len(got)], f"a stream brought {got} of {answer}"
