"""Sampling: exact where it can be, correctly distributed, and independent of other rows."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from granite_paged.engine import sampling
from granite_paged.engine.request import SamplingParams
from granite_paged.engine.sampling import Draw, draw, gumbel, penalised, seen_tokens, truncated

VOCABULARY = 50


def logits(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)


def wanted(place: int = 0, seed: int = 0, seen: Tensor | None = None, **params: Any) -> Draw:
    return Draw(SamplingParams(**params), seed, place, seen)


KINDS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, VOCABULARY, 99]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@given(
    st.lists(st.tuples(KINDS, st.integers(0, 2**62), st.integers(0, 999)), min_size=1, max_size=6)
)
def test_a_draw_does_not_depend_on_its_neighbours(
    rows: list[tuple[SamplingParams, int, int]],
) -> None:
    batch = logits(len(rows))
    draws = [Draw(params, seed, place) for params, seed, place in rows]
    together = draw(batch, draws).tokens
    alone = [draw(batch[row : row + 1], [one]).tokens for row, one in enumerate(draws)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_greedy_takes_the_first_argmax() -> None:
    batch = torch.zeros(2, VOCABULARY)
    batch[1, [4, 9]] = 1.0
    assert draw(batch, [wanted(), wanted()]).tokens.tolist() == [0, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_greedy_row_among_sampled_rows_takes_the_argmax(dtype: torch.dtype) -> None:
    batch = logits(2, dtype=dtype)
    tokens = draw(batch, [wanted(), wanted(temperature=1.0)]).tokens
    assert tokens[0] == batch[0].argmax()


@pytest.mark.parametrize("temperature", [1e-9, 1e-30, 1e-38, 1e-40, 1e-46, 1e-300])
def test_a_temperature_too_small_for_float32_takes_the_argmax(temperature: float) -> None:
    batch = logits(3)
    tokens = draw(batch, [wanted(temperature=temperature)] * 3).tokens
    assert tokens.tolist() == batch.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("most", [1, 3, 9])
def test_top_tokens_are_independent_of_other_rows(most: int, dtype: torch.dtype) -> None:
    batch = (2 * logits(4, dtype=dtype)).round() / 2  # many ties
    together = draw(batch, [wanted(logprobs=k) for k in (most, 30, 0, 5)]).top_tokens
    alone = draw(batch[:1], [wanted(logprobs=most)]).top_tokens
    assert together is not None
    assert alone is not None
    assert together[0, :most].tolist() == alone[0].tolist()


def test_tied_tokens_are_ordered_by_their_id() -> None:
    batch = torch.zeros(2, VOCABULARY)
    batch[0, [31, 7, 19]] = 1.0
    batch[1] = -1.0
    top = draw(batch, [wanted(logprobs=5)] * 2).top_tokens
    assert top is not None
    assert top.tolist() == [[7, 19, 31, 0, 1], [0, 1, 2, 3, 4]]


def test_sample_frequencies_match_probabilities() -> None:
    one = logits(1)[:, :8] / 3
    count = 4000
    draws = [wanted(place, seed=7, temperature=1.0) for place in range(count)]
    tokens = draw(one.expand(count, -1), draws).tokens
    chances = one[0].softmax(-1)
    seen = torch.bincount(tokens, minlength=8) / count
    spread = (chances * (1 - chances) / count).sqrt()
    assert ((seen - chances).abs() <= 4.5 * spread).all(), (
        "frequencies differ by more than 4.5 standard deviations"
    )


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    noise = gumbel(range(400), [0] * 400, torch.zeros(1, 500))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert noise.isfinite().all()


def test_a_seed_gives_the_same_noise_in_every_version() -> None:
    noise = gumbel([5, 2**62, 4], [0, 9, 0], torch.zeros(3, 4))
    expected = [[3.52242899, 2.14760256, 1.04713106, 1.63097918]]
    expected += [[-0.96836734, -0.08756146, 2.41244030, 0.20414476]]
    expected += [[4.43283319, 0.27797586, 2.55321717, -0.00315549]]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-5, atol=0)


def test_the_extremes_of_the_noise_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_mix_bits", lambda words: torch.tensor([[0, 2**32 - 1]]))
    noise = gumbel([0], [0], torch.zeros(1, 2))
    half = 2.0**-24  # of the 2**23 intervals of the uniform number that the noise comes from
    assert noise[0, 0].item() == pytest.approx(-math.log(-math.log(half)))
    assert noise[0, 1].item() == pytest.approx(-math.log(half), rel=1e-3)


def test_noise_differs_by_seed_place_and_token() -> None:
    noise = gumbel([1, 1, 2], [0, 1, 0], torch.zeros(1, 1000))
    correlation = torch.corrcoef(noise)
    off = correlation[~torch.eye(3, dtype=torch.bool)]
    assert off.abs().max() < 0.15
    assert len(noise.unique()) > 2900


def test_top_k_keeps_what_transformers_keeps() -> None:
    scores = logits(4)
    kept = truncated(scores, [wanted(top_k=5)] * 4)
    expected = TopKLogitsWarper(5)(torch.zeros(4, 1), scores.clone())
    assert torch.equal(kept.isfinite(), expected.isfinite())


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    scores = logits(16, seed=3)
    kept = truncated(scores, [wanted(top_p=top_p)] * 16)
    expected = TopPLogitsWarper(top_p)(torch.zeros(16, 1), scores.clone())
    assert torch.equal(kept.isfinite(), expected.isfinite())


def test_each_row_is_truncated_by_its_own_parameters() -> None:
    kept = truncated(logits(3), [wanted(top_k=2), wanted(), wanted(top_p=1e-6)])
    assert kept.isfinite().sum(dim=1).tolist() == [2, VOCABULARY, 1]


def test_the_repetition_penalty_equals_transformers() -> None:
    prompt = [3, 7, 7, 11]
    scores = logits(2)
    seen = seen_tokens(prompt, scores)
    mine = penalised(scores, [wanted(), wanted(repetition_penalty=1.7, seen=seen)])
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), scores[1:].clone())
    assert torch.equal(mine[0], scores[0])
    torch.testing.assert_close(mine[1:], theirs)


def test_a_drawn_token_is_added_to_seen_tokens() -> None:
    scores = logits(1)
    seen = seen_tokens([1], scores)
    token = int(draw(scores, [wanted(repetition_penalty=2.0, seen=seen)]).tokens)
    assert seen.nonzero()[:, 0].tolist() == sorted({1, token})


def test_logprobs_are_computed_before_truncation() -> None:
    scores = logits(2)
    drawn = draw(scores, [wanted(temperature=2.0, top_k=1, logprobs=3), wanted()])
    assert drawn.logprobs is not None
    assert drawn.top_logprobs is not None
    expected = scores.log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs, expected.gather(1, drawn.tokens[:, None])[:, 0])
    torch.testing.assert_close(drawn.top_logprobs, expected.topk(3).values)


def test_the_penalty_divides_positive_logits_and_multiplies_others() -> None:
    scores = torch.tensor([[0.5, -0.5, 0.0, 2.0, -2.0, 0.5]])
    seen = torch.tensor([True, True, True, True, True, False])
    found = penalised(scores, [wanted(seen=seen, repetition_penalty=2.0)])
    assert found.tolist() == [[0.25, -1.0, 0.0, 1.0, -4.0, 0.5]]


def test_a_row_remembers_its_own_token_only() -> None:
    seen = [torch.zeros(4, dtype=torch.bool) for _ in range(2)]
    scores = torch.eye(4)[[1, 3]]
    draw(scores, [wanted(seen=tokens, repetition_penalty=2.0) for tokens in seen])
    assert [tokens.nonzero().flatten().tolist() for tokens in seen] == [[1], [3]]


@pytest.mark.parametrize("top_k", [0, VOCABULARY])
def test_nothing_is_sorted_where_nothing_is_truncated(top_k: int) -> None:
    scores = logits(2)
    assert truncated(scores, [wanted(top_k=top_k)] * 2) is scores


def test_a_token_that_begins_at_top_p_is_excluded() -> None:
    kept = truncated(torch.zeros(1, 2), [wanted(top_p=0.5)]).isfinite()
    assert kept.tolist() == [[True, False]]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-46}])
def test_the_top_token_is_never_excluded(params: dict[str, Any]) -> None:
    scores = logits(3)
    kept = truncated(scores, [wanted(**params)] * 3) > -math.inf
    assert kept.sum(dim=1).tolist() == [1, 1, 1]
    assert kept.float().argmax(dim=1).tolist() == scores.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    ("low", "high"),
    [(1e-8, 2e-8), (-2e-8, -1e-8), (-1.0000001, -1.0), (-1.0, 0.0), (0.0, 1e-45), (-1e-45, 0.0)],
)
def test_top_tokens_are_ordered_to_the_last_bit(low: float, high: float) -> None:
    found = draw(torch.tensor([[low, high]]), [wanted(logprobs=2)])
    assert found.top_tokens is not None
    assert found.top_tokens.tolist() == [[1, 0]]


def test_zeros_of_either_sign_are_ordered_by_their_id() -> None:
    found = draw(torch.tensor([[-0.0, 0.0, -0.0]]), [wanted(logprobs=3)])
    assert found.top_tokens is not None
    assert found.top_tokens.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_logits_are_divided_by_the_temperature(temperature: float) -> None:
    scores = logits(64)
    warm = draw(scores, [wanted(n, temperature=temperature) for n in range(64)]).tokens
    scaled = draw(scores / temperature, [wanted(n, temperature=1.0) for n in range(64)]).tokens
    assert warm.tolist() == scaled.tolist()


@pytest.mark.parametrize(("above", "kept"), [(2**-40, 2), (2**-41, 1)])
def test_top_p_counts_in_units_of_two_to_the_minus_40(above: float, kept: int) -> None:
    wanted = Draw(SamplingParams(temperature=1.0, top_p=0.5 + above), 0, 0)
    found = truncated(torch.zeros(1, 2), [wanted], exact=False)
    assert int(found.isfinite().sum()) == kept


def test_top_p_of_1_drops_no_token_whatever_its_neighbours_are() -> None:
    """The first token has all of the mass, and each of the others less than one unit more."""
    scores = torch.full((2, 10), math.log(0.6 * 2**-40))
    scores[:, 0] = 0
    found = truncated(scores, [wanted(temperature=1.0), wanted(temperature=1.0, top_k=1)])
    assert torch.equal(found[0], scores[0])
    assert int(found[1].isfinite().sum()) == 1


def test_top_p_counts_the_tokens_of_top_k_as_all_there_are() -> None:
    scores = torch.tensor([[0.3, 0.25, 0.45]]).log()  # without the last: 0.6 and 0.4
    found = truncated(scores, [wanted(temperature=1.0, top_k=2, top_p=0.59)])
    assert found.isfinite().tolist() == [[False, False, True]]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_only_an_exact_draw_computes_each_row_by_itself(rows: int, exact: bool) -> None:
    draws = [wanted(row, temperature=1.0, top_p=0.9, logprobs=1) for row in range(rows)]
    with (
        mock.patch.object(sampling, "_sampled", wraps=sampling._sampled) as sampled,
        mock.patch.object(sampling, "by_row", wraps=sampling.by_row) as by_row,
    ):
        found = draw(logits(rows), draws, exact=exact)
    asked = {call.kwargs["exact"] for call in (*sampled.call_args_list, *by_row.call_args_list)}
    assert asked == {exact}
    assert sampled.call_count == (1 + rows if exact and rows > 1 else 1)
    assert found.tokens.tolist() == draw(logits(rows), draws).tokens.tolist()


def test_a_draw_is_not_exact_unless_asked() -> None:
    draws = [wanted(row, temperature=1.0, top_p=0.9) for row in range(2)]
    with mock.patch.object(sampling, "by_row", wraps=sampling.by_row) as by_row:
        draw(logits(2), draws)
        truncated(logits(2), draws)
    assert [call.kwargs["exact"] for call in by_row.call_args_list] == [False, False]
