"""Text as it is streamed: which piece is shown when, and where a stop string ends it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.engine.detokenizer import Detokenizer


class Bytes:
    """A tokenizer of bytes, in which a character may need several tokens."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(tokens).decode(errors="replace")


@given(st.text(max_size=20))
def test_streamed_pieces_add_up_to_the_text(text: str) -> None:
    stream = Detokenizer(Bytes())
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join([*pieces, stream.finish()]) == stream.text == text


def test_incomplete_characters_are_held_back() -> None:
    stream = Detokenizer(Bytes())
    assert [stream.push(token) for token in "é!".encode()] == ["", "é", "!"]


class Pieces:
    """A tokenizer of words: 0 and 1 are special tokens, which decoding skips with their space."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(f"w{token}" for token in tokens if token > 1)


def streamed(tokenizer: Any, tokens: list[int]) -> str:
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    return "".join([*pieces, stream.finish()])


@given(st.lists(st.integers(0, 4), max_size=40))
def test_a_skipped_special_token_leaves_the_text_as_decoded_at_once(tokens: list[int]) -> None:
    assert streamed(Pieces(), tokens) == Pieces().decode(tokens, skip_special_tokens=True)


@given(st.lists(st.sampled_from([0xE6, 0xB8, 0xAD, 0x41, 0xF0, 0xC3]), max_size=60))
def test_any_bytes_leave_the_text_as_decoded_at_once(tokens: list[int]) -> None:
    assert streamed(Bytes(), tokens) == Bytes().decode(tokens, skip_special_tokens=True)


def test_a_stop_string_across_a_skipped_token_is_found() -> None:
    stream = Detokenizer(Pieces(), ["w2 w3"])
    for token in (4, 2, 0, 1, 3):
        stream.push(token)
    assert stream.stopped
    assert stream.text == "w4 "


@pytest.mark.parametrize("token", [0xE6, 0xB8])
def test_an_endless_incomplete_character_is_shown_at_linear_cost(token: int) -> None:
    decoded = 0

    class Counted(Bytes):
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            nonlocal decoded
            decoded += len(tokens)
            return super().decode(tokens, skip_special_tokens=skip_special_tokens)

    stream = Detokenizer(Counted())
    for _ in range(1000):
        stream.push(token)
    assert decoded <= 32 * 1000
    assert len(stream.text) >= 1000 - 32


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream = Detokenizer(Bytes(), stops)
    shown = ""
    for token in text.encode():
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == stream.text
    # the stop string that is complete first; of several, the one that began first
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if ends:
        expected = min(text[: ends[0]].index(s) for s in stops if s in text[: ends[0]])
        assert shown == text[:expected]
    else:
        assert shown == text


# -- when text is shown -------------------------------------------------------------------------

CUT = 0xE6  # begins a character of three bytes


def lengths(stream: Detokenizer, token: int, times: int) -> list[int]:
    """Return the length of each piece while one token is repeated."""
    return [len(stream.push(token)) for _ in range(times)]


def test_sixteen_tokens_without_certain_text_are_shown_but_for_the_last() -> None:
    stream = Detokenizer(Bytes())
    first = [*[0] * 15, 15]
    later = [*[0] * 11, 12]  # four tokens stay, of which one is not shown
    assert lengths(stream, CUT, 40) == [*first, *later, *later]


def test_only_tokens_without_certain_text_are_counted() -> None:
    stream = Detokenizer(Bytes())
    assert stream.push(ord("a")) == "a"
    assert lengths(stream, CUT, 16) == [*[0] * 15, 15]


def test_endless_special_tokens_are_decoded_at_linear_cost() -> None:
    most = 0

    class Counted(Pieces):
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            nonlocal most
            most = max(most, len(tokens))
            return super().decode(tokens, skip_special_tokens=skip_special_tokens)

    stream = Detokenizer(Counted())
    pieces = [stream.push(token) for token in (2, *[0] * 40, 3)]
    assert [piece for piece in pieces if piece] == ["w2", " w3"]
    assert most == 17, "the token before them, and 16 of them"


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stream = Detokenizer(Bytes(), ["abc", "bd"])
    assert [stream.push(token) for token in b"xabxab"] == ["x", "", "", "abx", "", ""]
    assert stream.text == "xabx"
    assert stream.push(ord("d")) == "a"
    assert stream.stopped
    assert stream.text == "xabxa"
    assert stream.finish() == ""


def test_an_answer_that_ends_shows_what_was_held_back_for_a_stop_string() -> None:
    stream = Detokenizer(Bytes(), ["abc"])
    assert [stream.push(token) for token in b"ab"] == ["", ""]
    assert stream.finish() == stream.text == "ab"


def test_special_tokens_are_left_to_the_tokenizer_to_skip() -> None:
    class Special(Pieces):
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            assert skip_special_tokens is True
            return super().decode(tokens, skip_special_tokens=skip_special_tokens)

    assert streamed(Special(), [0, 2, 1, 3]) == "w2 w3"
