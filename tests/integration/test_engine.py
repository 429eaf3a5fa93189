"""The engine on live models: each answer equals that of the request alone in transformers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.engine.request import Output
from granite_paged.engine.stepwise import STATE_BYTES
from granite_paged.errors import (
    BrokenInvariant,
    CallbackFailed,
    EngineClosed,
    InvalidSampling,
    NonFiniteRequest,
    PromptError,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
    TokenizerError,
)
from granite_paged.models import load
from tests.helpers.engine_harness import expected_logprobs, expected_tokens
from tests.helpers.simulated_runner import ModelOracle
from tests.helpers.tiny_models import EOS, FLAVOURS, VOCABULARY, tiny_model

SIZES = PagedConfig(page_size=8, max_tokens=160, max_sequences=4, chunk_tokens=32)
PROMPTS = [
    [3 + (7 * i + 5 * n) % (VOCABULARY - 3) for i in range(length)]
    for n, length in enumerate((21, 16, 1, 40, 33, 8))
]
NEW = 24


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    with Engine(model, SIZES) as made:
        yield made
        while made.step():
            pass
        made.check_valid()
        made.forget_prefixes()
        assert made.inspect().allocator.held == 0, "pages leaked"


def by_transformers(model: Any, prompt: list[int], new: int) -> list[int]:
    with torch.inference_mode():
        done = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    return done[0, len(prompt) :].tolist()


def answer(output: Output) -> list[int]:
    if output.error is not None:
        raise output.error
    return output.tokens


# -- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_generate_gives_the_tokens_of_transformers(flavour: str, preemption: Any) -> None:
    model = tiny_model(flavour)
    with Engine(model, SIZES, preemption=preemption) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
        expected = [by_transformers(model, prompt, NEW) for prompt in PROMPTS]
        assert [output.tokens for output in outputs] == expected
        ended = ["stop" if tokens[-1] == EOS else "length" for tokens in expected]
        assert [output.finish for output in outputs] == ended
        assert engine.stats().preempted, (
            "no request was preempted, so the pool is too large for this test"
        )


def test_a_list_of_tokens_is_one_prompt(model: Any, engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=4)
    assert [answer(output) for output in engine.generate(PROMPTS[0], params)] == [
        by_transformers(model, PROMPTS[0], 4)
    ]
    assert engine.generate([]) == []


def test_params_may_be_given_per_prompt(engine: Engine) -> None:
    params = [SamplingParams(max_new_tokens=n, stop_tokens=()) for n in (1, 5)]
    outputs = engine.generate(PROMPTS[:2], params)
    assert [len(output.tokens) for output in outputs] == [1, 5]
    with pytest.raises(InvalidSampling, match="2 params for 3 prompts"):
        engine.generate(PROMPTS[:3], params)


def test_samples_equal_those_of_the_request_alone(model: Any, engine: Engine) -> None:
    params = SamplingParams(
        max_new_tokens=8, temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2,
        seed=11, n=3, stop_tokens=(), logprobs=2,
    )  # fmt: skip
    outputs = engine.generate(PROMPTS[:3], params)
    oracle = ModelOracle(model)
    expected = [expected_tokens(oracle, p, params, n) for p in PROMPTS[:3] for n in range(3)]
    assert [answer(output) for output in outputs] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "all samples must differ"


def test_logprobs_equal_those_of_sdpa(model: Any, engine: Engine) -> None:
    (output,) = engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=5, logprobs=3))
    expected = expected_logprobs(ModelOracle(model), PROMPTS[0], output.tokens)
    torch.testing.assert_close(
        [one.logprob for one in output.logprobs], expected, atol=1e-5, rtol=1e-5
    )
    assert [one.token for one in output.logprobs] == output.tokens
    assert all(one.top[0][0] == one.token and len(one.top) == 3 for one in output.logprobs)


def test_a_stop_token_is_the_last_token_of_the_answer(model: Any, engine: Engine) -> None:
    free = by_transformers(model, PROMPTS[0], NEW)
    stop = free[3]
    (output,) = engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=NEW, stop_tokens=(stop,)))
    assert output.tokens == free[: free.index(stop) + 1]
    assert output.finish == "stop"


# -- text ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Iterator[Engine]:
    loaded = load(device="cpu")
    sizes = PagedConfig(page_size=16, max_tokens=512, max_sequences=4)
    with Engine(loaded.model, sizes, tokenizer=loaded.tokenizer) as engine:
        yield engine


FACTS = "<bos> <plain> red-fox copper-bell and green-wolf iron-boat while red-fox <ask>"


def test_generate_accepts_and_returns_text(words: Engine) -> None:
    (output,) = words.generate(FACTS, SamplingParams(max_new_tokens=1))
    assert output.text == "copper-bell"


def test_text_ends_before_a_stop_string(words: Engine) -> None:
    whole = words.generate(FACTS, SamplingParams(max_new_tokens=8))[0].text
    stop = whole.split()[2]
    (output,) = words.generate(FACTS, SamplingParams(max_new_tokens=8, stop_strings=(stop,)))
    assert output.text == whole[: whole.index(stop)]
    assert output.finish == "stop"
    assert len(output.tokens) < 8


def test_a_stream_yields_the_answer_in_pieces(words: Engine) -> None:
    params = SamplingParams(max_new_tokens=6)
    (output,) = words.generate(FACTS, params)
    pieces = list(words.stream(FACTS, params))
    assert [piece.token for piece in pieces] == output.tokens
    assert "".join(piece.text for piece in pieces) == output.text


def test_asynchronous_streams_run_concurrently(words: Engine) -> None:
    params = SamplingParams(max_new_tokens=6)
    (output,) = words.generate(FACTS, params)

    async def tokens() -> list[int]:
        return [piece.token async for piece in words.astream(FACTS, params)]

    async def both() -> list[list[int]]:
        return await asyncio.gather(tokens(), tokens())

    assert asyncio.run(both()) == [output.tokens, output.tokens]


def test_leaving_a_stream_cancels_its_request(words: Engine) -> None:
    for _ in words.stream(FACTS, SamplingParams(max_new_tokens=200)):
        break
    while words.step():
        pass
    assert words.idle
    assert words.stats().running == 0


# -- score --------------------------------------------------------------------------------------


def test_a_one_token_context_is_scored(
    engine: Engine,
) -> None:
    scoring = engine.submit_scoring([3], [[3, 3]])
    while engine.step():
        pass
    assert scoring.finished
    assert scoring.error is None


def test_scores_equal_those_of_sdpa(model: Any, engine: Engine) -> None:
    items = [
        (PROMPTS[3], [[4, 5], [6, 7, 8], [9]]),
        (PROMPTS[2], [[4], [5, 6]]),
        (PROMPTS[0], [[4], [5], [6], [4]]),
        ([*PROMPTS[3], 50], [[3] * 40]),
        (PROMPTS[3], [[1, 2]]),
        (PROMPTS[4], []),
    ]
    oracle = ModelOracle(model)
    for (context, continuations), scores in zip(items, engine.score(items), strict=True):
        assert len(scores) == len(continuations)
        for continuation, score in zip(continuations, scores, strict=True):
            expected = expected_logprobs(oracle, context, continuation)
            torch.testing.assert_close(list(score.tokens), expected, atol=2e-5, rtol=2e-5)
            assert score.logprob == pytest.approx(sum(expected), abs=1e-4)


def test_a_score_is_greedy_if_every_token_is_the_argmax(model: Any, engine: Engine) -> None:
    best = by_transformers(model, PROMPTS[0], 3)
    other = [*best[:2], (best[2] + 1) % VOCABULARY]
    [[right, wrong]] = engine.score([(PROMPTS[0], [best, other])])
    assert (right.greedy, wrong.greedy) == (True, False)


# -- several callers ----------------------------------------------------------------------------


def test_threads_can_share_an_engine(model: Any, engine: Engine) -> None:
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = engine.generate(PROMPTS[number], SamplingParams(max_new_tokens=9))[0].tokens

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: by_transformers(model, PROMPTS[n], 9) for n in range(len(PROMPTS))}


# -- errors of one request -----------------------------------------------------------------------


def test_a_prompt_outside_the_vocabulary_fails_alone(model: Any, engine: Engine) -> None:
    outputs = engine.generate(
        [PROMPTS[0], [VOCABULARY], PROMPTS[1]], SamplingParams(max_new_tokens=3)
    )
    assert [output.finish for output in outputs] == ["length", "error", "length"]
    assert isinstance(outputs[1].error, PromptError)
    assert outputs[2].tokens == by_transformers(model, PROMPTS[1], 3)


def test_a_request_that_can_never_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestTooLarge, match="25 needed, 20 free; raise max_tokens"):
        engine.submit(PROMPTS[0], SamplingParams(max_new_tokens=180))


def test_a_full_queue_blocks_generate_and_refuses_submit(model: Any) -> None:
    with Engine(model, SIZES, queue=2) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=2))
        assert [o.tokens for o in outputs] == [by_transformers(model, p, 2) for p in PROMPTS]
        engine.submit(PROMPTS[0])
        with pytest.raises(QueueFull):
            engine.submit(PROMPTS[1], SamplingParams(n=2))
        (output, *_) = engine.generate(PROMPTS[0], SamplingParams(n=3))
        assert isinstance(output.error, InvalidSampling), (
            "three samples can never fit into a queue of two"
        )


def test_a_cancelled_request_keeps_its_tokens(engine: Engine) -> None:
    request = engine.submit(PROMPTS[0], SamplingParams(max_new_tokens=NEW))
    other = engine.submit(PROMPTS[1], SamplingParams(max_new_tokens=3))
    for _ in range(4):
        engine.step()
    engine.cancel(request)
    while engine.step():
        pass
    (output,) = request.outputs
    assert (output.finish, type(output.error)) == ("cancelled", RequestCancelled)
    assert 0 < len(output.tokens) < NEW
    assert other.outputs[0].finish == "length"


def test_a_callback_that_raises_ends_only_its_request(model: Any, engine: Engine) -> None:
    def broken(output: Output, token: int, text: str) -> None:
        raise ZeroDivisionError("in the callback")

    failing = engine.submit(PROMPTS[0], on_token=broken)
    other = engine.submit(PROMPTS[1], SamplingParams(max_new_tokens=6))
    while engine.step():
        pass
    error = failing.outputs[0].error
    assert isinstance(error, CallbackFailed)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert "in the callback" in str(error)
    assert other.outputs[0].tokens == by_transformers(model, PROMPTS[1], 6)


def test_a_callback_may_cancel_its_request(engine: Engine) -> None:
    request = engine.submit(
        PROMPTS[0],
        SamplingParams(max_new_tokens=NEW),
        on_token=lambda output, token, text: engine.cancel(request),
    )
    while engine.step():
        pass
    assert request.outputs[0].finish == "cancelled"
    assert len(request.outputs[0].tokens) == 1


def test_closing_an_engine_ends_its_requests(model: Any) -> None:
    engine = Engine(model, SIZES)
    request = engine.submit(PROMPTS[0])
    engine.step()
    engine.close()
    engine.close()
    assert isinstance(request.outputs[0].error, EngineClosed)
    assert engine.inspect().allocator.held == 0
    with pytest.raises(EngineClosed, match="make another"):
        engine.submit(PROMPTS[0])


def test_text_needs_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(TokenizerError, match="tokenizer"):
        engine.submit("some text")
    with pytest.raises(InvalidSampling, match="tokenizer"):
        engine.submit(PROMPTS[0], SamplingParams(stop_strings=("x",)))


@pytest.mark.parametrize("shared", [0, 16, 24])
def test_nan_of_one_request_never_reaches_another(shared: int) -> None:
    """A token with a NaN embedding stands in prompts whose prefix other prompts share."""
    model = tiny_model(tie_word_embeddings=False, vocab_size=400)
    expected = [by_transformers(model, prompt, NEW) for prompt in PROMPTS]
    used = {token for tokens in [*expected, *PROMPTS] for token in tokens}
    poison = next(token for token in range(EOS + 1, 400) if token not in used)
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    poisoned = [[*prompt[:shared], poison, 5, 6] for prompt in PROMPTS]
    mixed = [one for pair in zip(poisoned, PROMPTS, strict=True) for one in pair]

    with Engine(model, SIZES) as engine:
        for _ in range(2):  # the second time over pages and rows that held NaN
            outputs = engine.generate(mixed, SamplingParams(max_new_tokens=NEW))
            assert all(isinstance(o.error, NonFiniteRequest) for o in outputs[::2])
            assert [output.tokens for output in outputs[1::2]] == expected
        engine.check_valid()


# -- numbers ------------------------------------------------------------------------------------


def test_one_chunk_contexts_share_their_prefix(
    engine: Engine,
) -> None:
    """A context of one chunk is scored and released in the step after it was computed."""
    stem, several = PROMPTS[3][:32], [[5, 6, 7], [8, 9]]
    for last in (3, 4, 5):
        engine.score([([*stem, last], several)])
    # the second leaves a state where it diverged from the first, and the third uses it
    assert engine.stats().prefix_hits == 1
    assert engine.stats().tokens_hit == len(stem)


def test_prefixes_can_be_forgotten_while_requests_run(model: Any, engine: Engine) -> None:
    engine.generate([PROMPTS[3]] * 2, SamplingParams(max_new_tokens=2))
    params = SamplingParams(max_new_tokens=NEW, stop_tokens=())
    running = engine.submit(PROMPTS[3], params)
    engine.step()
    engine.forget_prefixes()
    assert engine.stats().pages_cached == engine.stats().state_bytes == 0
    engine.check_valid()
    while engine.step():
        engine.check_valid()
    assert running.outputs[0].tokens == expected_tokens(ModelOracle(model), PROMPTS[3], params)


def test_stats_count_what_was_done(engine: Engine) -> None:
    engine.generate([PROMPTS[3]] * 3, SamplingParams(max_new_tokens=4, stop_tokens=()))
    stats = engine.stats()
    assert stats.tokens == 12
    assert stats.tokens_per_second > 0
    assert stats.prefix_hits == 2
    assert (stats.rows, stats.rows_held, stats.waiting, stats.running) == (4, 0, 0, 0)
    assert stats.pages_held == stats.pages_cached > 0
    assert (
        stats.planned_bytes
        == engine.plan.total_bytes
        == engine.runner.plan.total_bytes + STATE_BYTES
    )
    assert set(stats.to_json()) == set(type(stats).__dataclass_fields__)


def test_check_valid_detects_a_lost_row(engine: Engine) -> None:
    row = engine.inspect().scheduler.running.rows.take()
    with pytest.raises(BrokenInvariant, match="a row is lost"):
        engine.check_valid()
    engine.inspect().scheduler.running.rows.give(row)
