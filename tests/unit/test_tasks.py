"""Evaluation tasks: prompts, choices, limits, and the prefixes that questions share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from granite_paged.checkpoints.recall import (
    ASK,
    FIRST_FILLER,
    FIRST_VALUE,
    PLAIN_VALUES,
    VALUES,
    recall_batch,
    usual_pairs,
)
from granite_paged.errors import DataError, InvalidArgument, TokenizerError
from granite_paged.evaluate.encoding import Encoder, TextQuestion, shared_prefix
from granite_paged.evaluate.scorer import ScoreRequest
from granite_paged.evaluate.tasks import (
    RECALL_LONGEST,
    TASKS,
    Question,
    Task,
    TaskOptions,
    _recall_choices,
    check_data,
    make_task,
    mmlu_prefix,
    mmlu_text,
    task_names,
    truthfulqa_text,
)
from granite_paged.models import EMBEDDED, LoadedModel
from tests.helpers.evaluation import MMLU, TARGETS, TRUTHFULQA, write
from tests.helpers.tiny_models import tiny_model


class Letters:
    """A tokenizer of words: the second of two spaces belongs to the next word, as in real ones."""

    def __init__(self, tokens: int = 97) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return self._tokens

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._encode(text) for text in texts]}

    def _encode(self, text: str) -> list[int]:
        words = text.replace("  ", " _").split(" ")
        return [sum(word.encode()) % 90 + 3 for word in words]


LOADED = LoadedModel("tiny", tiny_model(), None)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    rows = [
        {**MMLU, "subject": subject, "question": f"What of {i}?", "answer": i % 4}
        for subject in ("anatomy", "college_biology")
        for i in range(6)
    ]
    write(tmp_path, "mmlu_test", *rows)
    write(tmp_path, "mmlu_dev", *[{**row, "question": "Solved?"} for row in rows if row["answer"]])
    other = {"choices": ["maybe", "yes", "so"], "labels": [1, 1, 0]}
    rows = [{**TRUTHFULQA, "question": f"Q{i}?", "mc2_targets": other} for i in range(9)]
    return write(tmp_path, "truthfulqa_mc", *rows)


def made(name: str, folder: str, **options: Any) -> Any:
    return make_task(name, TaskOptions(data=folder, num_fewshot=2, **options), LOADED, Letters())


def test_mmlu_prompts_equal_those_of_lm_eval() -> None:
    text = "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert mmlu_text({**MMLU, "question": " Which? "}) == text
    assert mmlu_prefix("high_school_biology", [MMLU]) == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        f"{text} C\n\n"
    )


def test_truthfulqa_prompts_equal_those_of_lm_eval() -> None:
    text = truthfulqa_text(TRUTHFULQA)
    assert text.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert text.endswith("held in Barcelona, Spain.\n\nQ: Is it?\nA:")


def test_a_continuation_is_encoded_together_with_its_context() -> None:
    question = TextQuestion("1", "g", "one two", ("three", "four five"), (1, 0))
    (request,) = Encoder(Letters(), 97, "tiny").requests([question])
    whole = Letters()(["one two three", "one two four five", "one two"])["input_ids"]
    assert request.context == whole[2]
    assert [[*request.context, *tokens] for tokens in request.continuations] == whole[:2]


@pytest.mark.parametrize("tokens", [98, 87, 296])
def test_a_tokenizer_of_another_vocabulary_is_refused(tokens: int) -> None:
    with pytest.raises(TokenizerError, match=f"{tokens} tokens, tiny a vocabulary of 97"):
        Encoder(Letters(tokens), 97, "tiny")


def test_a_missing_tokenizer_is_refused_with_advice() -> None:
    with pytest.raises(TokenizerError, match="tiny has no tokenizer: pass --tokenizer"):
        Encoder(None, 97, "tiny")


def test_questions_of_a_subject_share_their_examples(folder: str) -> None:
    task = made("mmlu", folder)
    assert task.fewshot == 2
    assert [q.key for q in task.questions][::6] == ["anatomy/0", "college_biology/0"]
    for subject in ("anatomy", "college_biology"):
        shared = {q.shared for q in task.questions if q.group == subject}
        contexts = [q.request.context for q in task.questions if q.group == subject]
        assert shared == {shared_prefix(contexts)}
        assert min(shared) > 10


def test_zero_shot_needs_no_examples(folder: str) -> None:
    (Path(folder) / "mmlu_dev.jsonl").unlink()
    task = make_task("mmlu", TaskOptions(data=folder, num_fewshot=0), LOADED, Letters())
    assert len(task.questions) == 12


def test_too_many_examples_are_refused(folder: str) -> None:
    with pytest.raises(InvalidArgument, match="--num-fewshot must be at most 4 for anatomy, got 9"):
        make_task("mmlu", TaskOptions(data=folder, num_fewshot=9), LOADED, Letters())


def test_mmlu_has_five_examples_unless_told_otherwise(folder: str) -> None:
    with pytest.raises(InvalidArgument, match="at most 4 for anatomy, got 5"):
        make_task("mmlu", TaskOptions(data=folder), LOADED, Letters())


def test_the_right_letter_of_mmlu_is_labelled(folder: str) -> None:
    labels = [q.labels for q in made("mmlu", folder, subjects=("anatomy",)).questions]
    assert [label.index(1) for label in labels] == [0, 1, 2, 3, 0, 1]
    assert {sum(label) for label in labels} == {1}


def test_limit_draws_by_seed_and_keeps_the_order(folder: str) -> None:
    whole = [q.key for q in made("mmlu", folder).questions]
    drawn = [q.key for q in made("mmlu", folder, limit=5).questions]
    assert len(drawn) == 5
    assert drawn == [key for key in whole if key in drawn]
    assert drawn == [q.key for q in made("mmlu", folder, limit=5).questions]
    assert drawn != [q.key for q in made("mmlu", folder, limit=5, seed=1).questions]
    assert [q.key for q in made("mmlu", folder, limit=99).questions] == whole


def test_subjects_are_chosen_by_name(folder: str) -> None:
    task = made("mmlu", folder, subjects=("college_biology",))
    assert {q.group for q in task.questions} == {"college_biology"}
    with pytest.raises(InvalidArgument, match="unknown subject 'law': use one of anatomy, college"):
        made("mmlu", folder, subjects=("law", "anatomy", "art"))


def test_truthfulqa_mc1_has_one_right_choice_and_mc2_mass(folder: str) -> None:
    first, second = (made(f"truthfulqa_mc{i}", folder) for i in (1, 2))
    assert [q.labels for q in first.questions] == [tuple(TARGETS["labels"])] * 9
    assert [q.labels for q in second.questions] == [(1, 1, 0)] * 9
    assert not first.mass
    assert second.mass


def test_task_groups_are_resolved_once_and_in_order() -> None:
    assert task_names(["truthfulqa", "recall", "truthfulqa_mc1"]) == (
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "recall",
    )


@pytest.mark.parametrize("names", [["mlmu"], []])
def test_an_unknown_task_error_lists_the_known_ones(names: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="use one of recall, mmlu, truthfulqa_mc1, truth"):
        task_names(names)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["recall"], None),
        (["recall", "mmlu"], "mmlu_test"),
        (["truthfulqa_mc2"], "truthfulqa_mc"),
        (["truthfulqa_mc1", "truthfulqa_mc2", "mmlu"], "mmlu_test"),
    ],
    ids=str,
)
def test_only_the_data_of_the_named_tasks_is_checked(
    folder: str, names: list[str], missing: str | None
) -> None:
    check_data(names, folder)
    for path in Path(folder).glob("*.jsonl"):
        if path.stem != missing:
            path.rename(path.with_suffix(".kept"))
    if not missing:
        check_data(names, folder)
        return
    for path in Path(folder).glob("*.kept"):
        path.rename(path.with_suffix(".jsonl"))
    (Path(folder) / f"{missing}.jsonl").unlink()
    with pytest.raises(DataError, match=missing):
        check_data(names, folder)


def test_a_task_scores_the_top_choice_and_its_questions_share_nothing_by_default() -> None:
    question = Question("1", "g", ScoreRequest([1], [[2]]), (1,))
    task = Task("own", (question,))
    assert (question.shared, task.mass, task.fewshot) == (0, False, 0)
    assert "question" not in repr(task).lower(), "thousands of them"


# -- recall -------------------------------------------------------------------------------------


def recall(**options: Any) -> Any:
    return make_task(
        "recall", TaskOptions(**options), LoadedModel(EMBEDDED, tiny_model(), None), None
    )


def test_recall_contexts_span_one_page_to_4096_tokens() -> None:
    lengths = [len(q.request.context) for q in recall(smallest=16).questions]
    assert min(lengths) < 16
    assert RECALL_LONGEST - 30 < max(lengths) <= RECALL_LONGEST


def test_recall_asks_eight_questions_about_two_sequences_of_each_length() -> None:
    groups: dict[str, int] = {}
    for question in recall().questions:
        groups[question.group] = groups.get(question.group, 0) + 1
    lengths = [16 << i for i in range(9)]
    assert list(groups) == [f"{n}/{row}" for n in lengths for row in (0, 1)]
    assert {groups[f"{n}/{row}"] for n in lengths[4:] for row in (0, 1)} == {8}


def test_recall_has_no_context_beyond_its_longest() -> None:
    assert len(recall(smallest=RECALL_LONGEST).questions) == 16
    with pytest.raises(InvalidArgument, match="no question is left"):
        recall(smallest=4097)


def test_recall_draws_each_length_by_the_seed_and_the_length() -> None:
    for context in (16, 64):
        batch = recall_batch(context=context, pairs=usual_pairs(context), batch=2, seed=3 + context)
        asked = [q for q in recall(seed=3).questions if q.group == f"{context}/1"]
        for question in asked:
            read = question.request.context
            assert read == batch.input_ids[1, : len(read)].tolist()


def test_wrong_choices_are_stated_values_where_there_are_two() -> None:
    edges = [FIRST_VALUE, FIRST_VALUE + VALUES - 1]
    context = [FIRST_VALUE - 1, *edges, FIRST_FILLER, FIRST_VALUE + 5]
    partner = FIRST_VALUE + 5 + PLAIN_VALUES
    for seed in range(9):
        found = _recall_choices(FIRST_VALUE + 5, context, random.Random(seed))
        assert sorted(found) == sorted([FIRST_VALUE + 5, partner, *edges])
        one = _recall_choices(partner, edges[:1], random.Random(seed))
        assert {partner, FIRST_VALUE + 5, edges[0]} < set(one)
        assert all(FIRST_VALUE <= value < FIRST_FILLER for value in one)


def test_recall_has_one_right_choice_of_four() -> None:
    for question in recall().questions:
        values = [continuation[1] for continuation in question.request.continuations]
        assert sum(question.labels) == 1
        assert len(set(values)) == 4, "the choices repeat a value"
        assert {continuation[0] for continuation in question.request.continuations} == {ASK}


def test_recall_questions_share_the_prefix_of_their_sequence() -> None:
    groups: dict[str, list[Any]] = {}
    for question in recall().questions:
        groups.setdefault(question.group, []).append(question)
    for questions in groups.values():
        contexts = [question.request.context for question in questions]
        assert len(contexts) == 1 or questions[0].shared <= shared_prefix(contexts)


def test_recall_is_determined_by_its_seed() -> None:
    assert recall(seed=3) == recall(seed=3)
    assert recall(seed=3) != recall(seed=4)


def test_recall_needs_the_model_trained_on_it() -> None:
    with pytest.raises(InvalidArgument, match="tiny was not trained on"):
        make_task("recall", TaskOptions(), LOADED, None)


def test_every_task_has_a_maker_and_a_name() -> None:
    assert set(task_names(["recall", "mmlu", "truthfulqa"])) == set(TASKS)
