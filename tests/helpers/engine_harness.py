"""An engine under load, checked after each step against each request run by itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.engine import Engine
from granite_paged.engine.intake import SAMPLE_STRIDE
from granite_paged.engine.request import OnToken, Output, Request, SamplingParams, Scoring
from granite_paged.engine.sampling import Draw, draw, seen_tokens
from granite_paged.errors import CallbackFailed, EngineClosed, GranitePagedError
from tests.helpers.deep_states import DeepStates
from tests.helpers.fairness import FairnessWatch
from tests.helpers.simulated_runner import Oracle, SimulatedRunner


def expected_tokens(
    oracle: Oracle, prompt: Sequence[int], params: SamplingParams, sample: int = 0
) -> list[int]:
    """Return the tokens that one sample of a request gets when it runs by itself."""
    tokens = list(prompt)
    seed = (params.seed + sample * SAMPLE_STRIDE) % 2**63
    seen = seen_tokens(prompt, oracle.last(tuple(prompt)))
    for place in range(params.max_new_tokens):
        penalised = seen if params.repetition_penalty != 1 else None
        wanted = Draw(params, seed, place, penalised)
        tokens.append(int(draw(oracle.last(tuple(tokens))[None], [wanted]).tokens))
        if tokens[-1] in (params.stop_tokens or ()):
            break
    return tokens[len(prompt) :]


def expected_logprobs(
    oracle: Oracle, context: Sequence[int], continuation: Sequence[int]
) -> list[float]:
    """Return the log-probability of each token of a continuation, from the oracle."""
    logits = oracle.logits((*context, *continuation))[len(context) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return [float(one) for one in chosen[:, 0]]


def expected_beams(
    oracle: Oracle, prompt: Sequence[int], params: SamplingParams, beams: int
) -> list[list[int]]:
    """Return the answers of a beam search that runs by itself with ample memory."""
    runner: Any = SimulatedRunner(oracle, pages=400, rows=2 * beams)
    with Engine(None, runner=runner) as engine:
        (outputs,) = engine.search([prompt], params, beams=beams)
    return [output.tokens for output in outputs]


class Interrupted(KeyboardInterrupt):
    """Raised by a callback; `EngineHarness.step` goes on after it."""


class EngineHarness:
    """An engine with every invariant checked after each step, and every answer when it is done.

    Args:
        oracle: gives the expected answers.
        options: keyword arguments of `Engine`.
        runner: a runner to use in place of a `SimulatedRunner`.
        sizes: keyword arguments of the `SimulatedRunner`.
    """

    def __init__(
        self,
        oracle: Oracle,
        options: dict[str, Any] | None = None,
        runner: Any = None,
        **sizes: Any,
    ) -> None:
        self.oracle = oracle
        self.runner = runner or SimulatedRunner(oracle, **sizes)
        self.engine = Engine(None, runner=self.runner, **(options or {}))  # type: ignore[arg-type]
        self.open: list[Request | Scoring] = []
        self.met: Counter[str] = Counter()
        self.faulty = False  # whether a request may end with an error
        self.allowed: tuple[type[Exception], ...] = (CallbackFailed,)  # errors that may end one
        self._states = DeepStates(self.engine, self.met)
        self._fairness = FairnessWatch(self.engine, self.runner.rows)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, on_token: OnToken | None = None
    ) -> Request | None:
        """Submit a request. Return None, and count the error, if it is refused."""
        try:
            request = self.engine.submit(prompt, params, on_token=on_token)
        except GranitePagedError as refusal:
            self.met[type(refusal).__name__] += 1
            return None
        self.open.append(request)
        return request

    def search(self, prompt: Sequence[int], params: SamplingParams, beams: int) -> None:
        """Submit a beam search, and count the error if it is refused."""
        try:
            self.open.append(self.engine.submit_search(prompt, params, beams=beams))
        except GranitePagedError as refusal:
            self.met[type(refusal).__name__] += 1

    def score(
        self,
        context: Sequence[int],
        continuations: Sequence[Sequence[int]],
        namespace: str = "",
    ) -> None:
        """Submit continuations to score, and count the error if they are refused."""
        try:
            asked = self.engine.submit_scoring(context, continuations, namespace=namespace)
            self.open.append(asked)
        except GranitePagedError as refusal:
            self.met[type(refusal).__name__] += 1

    def cancel(self, pick: int) -> None:
        """Cancel the `pick`-th open request (modulo their number), if any is open."""
        if self.open:
            self.engine.cancel(self.open[pick % len(self.open)])
        self.check()

    def evict(self) -> None:
        """Empty the prefix cache."""
        self._states.note_eviction()
        self.engine.forget_prefixes()
        self.check()

    def step(self) -> bool:
        """Run one step of the engine and check it. Return whether work is left."""
        restarted = self.engine.stats().restarted
        self._fairness.before_step()
        try:
            busy = self.engine.step()
        except Interrupted:
            busy = True
        if self.engine.stats().restarted == restarted:
            self._fairness.after_step()
        else:
            self._fairness.restart()
        self._states.note_step()
        self.check()
        return busy

    def restart_watch(self) -> None:
        """Count the steps of requests again, after a step that raised."""
        self._fairness.restart()

    def close(self) -> None:
        """Close the engine, and check that each open request ends by name."""
        asked = [one for one in self.open if not one.finished]
        self.engine.close()
        for one in asked:
            errors = [one.error] if isinstance(one, Scoring) else [o.error for o in one.outputs]
            assert one.finished, f"request {one.number} is open in a closed engine"
            assert any(isinstance(error, EngineClosed) for error in errors)
        self.check()
        self.check_empty()

    def drain(self) -> None:
        """Step until no request is open, then check that nothing leaked."""
        while self.step():
            pass
        self.check_empty()

    def check_empty(self) -> None:
        """Check that nothing is open or held."""
        assert not self.open, "the engine says that it has no work, but a request is still open"
        self.evict()
        allocator, prefix, scheduler = self.engine.inspect()
        assert allocator.held == 0, "pages leaked"
        assert not allocator.sequences, "a sequence leaked"
        assert scheduler.running.rows.free == self.runner.rows, "a row leaked"
        stats = self.engine.stats()
        assert (stats.waiting, stats.swapped_bytes, stats.state_bytes) == (0, 0, 0)
        assert not prefix._root.children, "prefix nodes leaked"
        self.met.update(
            preempted=stats.preempted,
            swapped=stats.swapped,
            hits=stats.prefix_hits,
            forked=getattr(self.runner, "forked", 0),
        )

    def check(self) -> None:
        """Check every invariant, and the answers of requests that have finished."""
        self.engine.check_valid()
        mismatches = getattr(self.runner, "mismatches", None)
        assert not mismatches, f"the engine used a wrong page, state or row: {mismatches[0]}"
        for asked in [asked for asked in self.open if asked.finished]:
            self.open.remove(asked)
            if isinstance(asked, BeamRequest):
                self._check_search(asked)
            elif isinstance(asked, Request):
                for output in asked.outputs:
                    self._check_output(asked, output)
            elif asked.error is None:
                self._check_scores(asked)

    def alone(self, expected: Callable[..., Any], *asked: Any) -> Any:
        """Return what a request gets that runs alone. `expected` computes it."""
        return expected(self.oracle, *asked)

    def _check_output(self, request: Request, output: Output) -> None:
        self.met[f"finish {output.finish}"] += 1
        if output.finish == "error" and not (self.faulty or isinstance(output.error, self.allowed)):
            raise AssertionError(f"request {request.number} failed") from output.error
        expected = self.alone(expected_tokens, request.prompt, request.params, output.index)
        if output.finish in ("cancelled", "error"):
            expected = expected[: len(output.tokens)]
        assert output.tokens == expected, (
            f"request {request.number}: {output}, expected tokens {expected}"
        )

    def _check_search(self, asked: BeamRequest) -> None:
        found = [output.tokens for output in asked.outputs if output.error is None]
        if found:
            params = replace(asked.params, logprobs=None)
            assert found == self.alone(expected_beams, asked.prompt, params, asked.width)

    def _check_scores(self, asked: Scoring) -> None:
        for continuation, score in zip(asked.continuations, asked.scores, strict=True):
            assert score is not None
            expected = self.alone(expected_logprobs, asked.context, continuation)
            torch.testing.assert_close(list(score.tokens), expected, atol=1e-4, rtol=1e-4)
            self.met["scored"] += 1


def random_walk(harness: EngineHarness, steps: int, seed: int) -> None:
    """Submit requests of every kind in random order for `steps` steps, then drain.

    It does what the state machine of `test_engine_machine.py` does, faster and without shrinking.
    """
    chance = random.Random(seed)
    vocabulary = harness.oracle.vocabulary
    stems = [_tokens(chance, 24, vocabulary - 1) for _ in range(2)]
    stems.append([stems[0][0] ^ 1, *stems[0][1:]])  # differs in its first token only
    while harness.engine.stats().steps < steps:
        action = chance.random()
        if action < 0.10 and len(harness.open) < 12:
            harness.submit(_prompt(chance, stems, vocabulary), _params(chance, vocabulary))
        elif action < 0.13 and len(harness.open) < 12:
            context = _prompt(chance, stems, vocabulary)
            longest = chance.choice([1, 6])
            lengths = [chance.randint(1, longest) for _ in range(chance.randint(1, 4))]
            harness.score(context, [_tokens(chance, n, vocabulary) for n in lengths])
        elif action < 0.134 and len(harness.open) < 12:
            new, stops = chance.randint(1, 5), tuple(_tokens(chance, 3, vocabulary))
            searched = SamplingParams(max_new_tokens=new, stop_tokens=stops)
            harness.search(_prompt(chance, stems, vocabulary), searched, chance.randint(1, 3))
            harness.met["searches"] += 1
        elif action < 0.144:
            harness.cancel(chance.randrange(8))
        elif action < 0.146:
            harness.evict()
        else:
            harness.step()
    harness.drain()


def _prompt(chance: random.Random, stems: list[list[int]], vocabulary: int) -> list[int]:
    shared = chance.choice(stems)[: chance.randint(0, 24)]
    return shared + _tokens(chance, chance.randint(1, 10), vocabulary)


def _params(chance: random.Random, vocabulary: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=chance.randint(1, 16),
        temperature=chance.choice([0, 0, 0, 0.7]),
        seed=chance.randrange(99),
        stop_tokens=tuple(_tokens(chance, chance.choice([0, 10]), vocabulary)),
        n=chance.choice([1, 1, 1, 3]),
        priority=chance.choice([0, 0, 1]),
    )


def _tokens(chance: random.Random, count: int, vocabulary: int) -> list[int]:
    return [chance.randrange(vocabulary) for _ in range(count)]
