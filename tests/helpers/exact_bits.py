"""Compare bits of an engine under load with those of each request alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.engine import Engine
from granite_paged.engine.intake import SAMPLE_STRIDE
from granite_paged.engine.request import Output, Request, SamplingParams, Scoring
from granite_paged.geometry import PagedConfig
from granite_paged.hf.patching import paged
from granite_paged.runner.runner import Chunk, Runner, scores_of
from tests.helpers.driver import Driver
from tests.helpers.engine_harness import EngineHarness


def generated_logits(
    model: Any, ids: Tensor, mask: Tensor, config: PagedConfig, count: int
) -> Tensor:
    """Let `generate()` choose tokens under `paged()`; return their logits, [B, count, V]."""
    with paged(model, config):
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(found.logits, dim=1)


class Bits:
    """Logits by the tokens before them. Those found first are what all others must equal.

    A difference is kept until `check`, since the engine would take an error for a failed step.
    """

    def __init__(self) -> None:
        self.compared = 0
        self._differences: list[str] = []
        self._first: dict[tuple[int, ...], Tensor] = {}

    def note(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Compare the logits [V] after these tokens with those found before."""
        first = self._first.setdefault(tuple(tokens), logits)
        if first is not logits:
            self.compared += 1
            if differing := int((first != logits).sum()):
                what = f"{differing} logits after {len(tokens)} tokens have other bits"
                self._differences.append(what)

    def check(self) -> None:
        """Check that no bit differed."""
        assert not self._differences, self._differences[0]


class NotedRunner(Runner):
    """A runner that notes the logits of every call, and how large the calls are."""

    bits: Bits
    met: Counter[str]
    engine: Engine

    def decode(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        fed = self.tokens[list(rows)].tolist()
        logits = super().decode(rows, positions)
        self.met["decoded in company"] += len(rows) > 1
        self.met["decoded in company of five"] += len(rows) > 5
        jobs = self._jobs()
        for row, position, token, found in zip(rows, positions, fed, logits, strict=True):
            before = jobs[row].tokens[:position]
            assert len(before) == position, "a step was launched before the last but one was read"
            self.bits.note([*before, token], found.clone())
        return logits

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        logits = super().prefill(chunks)
        self.met["prefilled in company"] += len(chunks) > 1
        jobs = self._jobs()
        for chunk, found in zip(chunks, logits, strict=True):
            end = chunk.start + len(chunk.tokens)
            self.met["prompts continued"] += chunk.start > 0
            self.bits.note(jobs[chunk.row].tokens[:end], found.clone())
        return logits

    def _jobs(self) -> dict[int, Any]:
        running = self.engine.inspect().scheduler.running.jobs()
        return {job.placed.row: job for job in running}


def noted_engine(model: Any, config: PagedConfig, bits: Bits, **options: Any) -> Engine:
    """Return an engine whose runner notes its logits in `bits`."""
    runner = NotedRunner.for_model(model, config)
    runner.bits, runner.met = bits, Counter()
    runner.engine = Engine(None, runner=runner, **options)
    return runner.engine


class Alone:
    """Answers of requests that run by themselves, in an engine with ample memory and no cache."""

    def __init__(self, model: Any, *, exact: bool = True) -> None:
        self.vocabulary = model.config.vocab_size
        self.bits = Bits()
        config = PagedConfig(
            page_size=64, max_tokens=1024, max_sequences=8, chunk_tokens=256, exact=exact
        )
        self._exact = exact
        self._engine = noted_engine(model, config, self.bits, state_bytes=0)
        self._driver = Driver(model, config)
        self._answers: dict[Any, Any] = {}

    def sample(self, prompt: Sequence[int], params: SamplingParams, index: int) -> Any:
        """Return tokens and log-probabilities of one sample, computed as a request of its own."""
        seed = (params.seed + index * SAMPLE_STRIDE) % 2**63
        return self._answer(tuple(prompt), replace(params, n=1, seed=seed, priority=0))

    def search(self, prompt: Sequence[int], params: SamplingParams, beams: int) -> Any:
        """Return tokens and score of each beam."""
        asked = (tuple(prompt), params, beams)
        if asked not in self._answers:
            (outputs,) = self._engine.search([list(prompt)], params, beams=beams)
            self._answers[asked] = [(output.tokens, output.score) for output in outputs]
        return self._answers[asked]

    def scores(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, ...]:
        """Return the log-probability of each token of a continuation, by decoding it."""
        asked = (tuple(context), tuple(continuation))
        if asked not in self._answers:
            self._answers[asked] = tuple(self._decoded(*asked))
        found: tuple[float, ...] = self._answers[asked]
        return found

    # -- details --------------------------------------------------------------------------------

    def _answer(self, prompt: tuple[int, ...], params: SamplingParams) -> Any:
        if (prompt, params) not in self._answers:
            (output,) = self._engine.generate([list(prompt)], params)
            assert output.error is None
            self._answers[prompt, params] = (output.tokens, output.logprobs)
        return self._answers[prompt, params]

    def _decoded(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> list[float]:
        self._driver.open(1)
        logits = self._driver.prefill({1: context})
        found = []
        for place, token in enumerate(continuation):
            scores = scores_of(logits, torch.tensor([token]), exact=self._exact)
            found.append(float(scores.logprobs))
            if place + 1 < len(continuation):
                logits = self._driver.decode({1: token})
        self._driver.close(1)
        return found


class ExactHarness(EngineHarness):
    """A harness that compares bits: of logits, log-probabilities, scores and tokens."""

    def __init__(self, model: Any, alone: Alone, config: PagedConfig, **options: Any) -> None:
        self._alone = alone
        runner: Any = NotedRunner.for_model(model, config)
        super().__init__(None, options, runner)  # type: ignore[arg-type]  # `alone` has answers
        runner.bits, runner.met, runner.engine = alone.bits, self.met, self.engine

    def check(self) -> None:
        """Check the bits of all logits, then everything else."""
        self._alone.bits.check()
        super().check()

    def _check_output(self, request: Request, output: Output) -> None:
        if output.finish == "cancelled":
            return
        assert output.error is None
        expected = self._alone.sample(request.prompt, request.params, output.index)
        assert (output.tokens, output.logprobs) == expected, f"request {request.number}: other bits"
        self.met["answers"] += 1
        self.met["samples of one prompt"] += output.index > 0

    def _check_search(self, asked: BeamRequest) -> None:
        if any(output.finish == "cancelled" for output in asked.outputs):
            return
        params = replace(asked.params, logprobs=None)
        found = [(output.tokens, output.score) for output in asked.outputs]
        assert found == self._alone.search(asked.prompt, params, asked.width), "a beam's bits"
        self.met["searches"] += 1

    def _check_scores(self, asked: Scoring) -> None:
        for continuation, score in zip(asked.continuations, asked.scores, strict=True):
            assert score is not None
            expected = self._alone.scores(asked.context, continuation)
            assert score.tokens == expected, "scored and decoded log-probabilities differ"
            self.met["scored"] += 1
