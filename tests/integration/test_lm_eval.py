"""Comparison with EleutherAI's lm-eval: its prompts, its scores, and this package as its model.

These tests need lm-eval: `nox -s eval_parity` installs it and runs them on every question.
"""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from granite_paged import PagedConfig
from granite_paged.evaluate.encoding import shared_prefix
from granite_paged.evaluate.modes import make_scorer
from granite_paged.evaluate.scorer import Answer, Needs, ScoreRequest, choice
from granite_paged.evaluate.tasks import Task, TaskOptions, make_task
from granite_paged.models import LoadedModel, load_tokenizer
from tests.helpers.evaluation import data_folder, tiny_loaded

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: `nox -s eval_parity` installs it and runs these"
)

CLOSE = 1e-4
SLICE = 99
"""Number of questions over all tasks, unless GRANITE_PAGED_PARITY=all."""

EVERYTHING = os.environ.get("GRANITE_PAGED_PARITY") == "all"
TASKS = ("mmlu", "truthfulqa_mc1", "truthfulqa_mc2")
LIMIT = None if EVERYTHING else SLICE // len(TASKS) + 1
"""Number of questions of a task."""
PAGES = PagedConfig(page_size=16)


TOKENS = 4096
"""Size of the vocabulary: the most common tokens of cl100k, since logits of all would be slow."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    content = json.loads((Path(data_folder()) / "cl100k_tokenizer.json").read_text("utf-8"))
    model = content["model"]
    vocabulary = {token: i for token, i in model["vocab"].items() if i < TOKENS}
    model["merges"] = [
        pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()
    ]
    model["vocab"] = vocabulary
    content["added_tokens"] = []
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    tokens = load_tokenizer(str(path))
    tokens.add_special_tokens({"eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"})
    return tokens


@pytest.fixture(scope="module")
def loaded(tokenizer: Any) -> LoadedModel:
    """A model with random weights: which choice wins is chance, but both must choose the same.

    The weights keep the scale of activations, as trained ones do. With larger weights float32
    itself errs by 5e-5 of a log-likelihood (against float64), half of the tolerance.
    """
    return tiny_loaded(vocab_size=len(tokenizer), initializer_range=0.144)


@pytest.fixture(scope="module")
def tasks(loaded: LoadedModel, tokenizer: Any) -> dict[str, Task]:
    options = TaskOptions(num_fewshot=0, limit=LIMIT, data=data_folder())
    return {name: make_task(name, options, loaded, tokenizer) for name in TASKS}


@pytest.fixture(scope="module")
def hflm(loaded: LoadedModel, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    return HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=4, device="cpu")


def lm_eval_scores(hflm: Any, task: Task) -> list[list[float]]:
    pairs = [
        (("", ""), list(q.request.context), list(tokens))
        for q in task.questions
        for tokens in q.request.continuations
    ]
    found = iter(hflm._loglikelihood_tokens(pairs, disable_tqdm=True))
    return [[next(found)[0] for _ in q.labels] for q in task.questions]


def paged_answers(loaded: LoadedModel, requests: Sequence[ScoreRequest]) -> list[Answer]:
    """Answer one by one, as `granite-paged eval --mode paged` does."""
    scorer = make_scorer(
        "paged",
        loaded.model,
        PAGES,
        Needs.of(requests, shared_prefix([r.context for r in requests])),
    )
    try:
        return [scorer.score([request])[0] for request in requests]
    finally:
        scorer.close()


def choices(scores: Sequence[Sequence[float]]) -> list[int]:
    return [choice(logprobs) for logprobs in scores]


# -- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_log_likelihoods_and_choices_equal_those_of_hflm(
    name: str, tasks: dict[str, Task], loaded: LoadedModel, hflm: Any
) -> None:
    task = tasks[name]
    expected = lm_eval_scores(hflm, task)
    answers = paged_answers(loaded, [question.request for question in task.questions])
    ours = [list(answer.logprobs) for answer in answers]
    differences = [
        abs(a - b)
        for one, other in zip(ours, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    assert max(differences) <= CLOSE
    assert choices(ours) == choices(expected)
    assert len(task.questions) >= (817 if EVERYTHING else SLICE // len(TASKS))


def test_greedy_flags_equal_those_of_hflm(
    tasks: dict[str, Task], loaded: LoadedModel, hflm: Any
) -> None:
    """The continuations are one that greedy decoding writes, and one that it does not."""
    request = tasks["truthfulqa_mc1"].questions[0].request
    (first,) = paged_answers(loaded, [request])
    greedy = _greedy(loaded, request.context, 3)
    asked = request._replace(continuations=[greedy, [*greedy[:2], greedy[2] ^ 1]])
    pairs = [(("", ""), list(asked.context), list(tokens)) for tokens in asked.continuations]
    expected = [found[1] for found in hflm._loglikelihood_tokens(pairs, disable_tqdm=True)]
    (answer,) = paged_answers(loaded, [asked])
    assert list(answer.greedy) == expected == [True, False]
    assert not any(first.greedy)


def _greedy(loaded: LoadedModel, context: Sequence[int], count: int) -> list[int]:
    import torch  # noqa: PLC0415

    tokens = loaded.model.generate(
        torch.tensor([list(context)]), max_new_tokens=count, do_sample=False, use_cache=False
    )
    return tokens[0, -count:].tolist()


# -- prompts ------------------------------------------------------------------------------------

SUBJECTS = ("anatomy", "high_school_us_history", "us_foreign_policy")


@pytest.fixture(scope="module")
def offline_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which lm-eval's unchanged tasks find our files in place of the hub's."""
    hub = tmp_path_factory.mktemp("hub")
    mmlu = [
        {"config_name": subject, "data_files": [_file(hub, split, subject) for split in SPLITS]}
        for subject in SUBJECTS
    ]
    _card(hub / "cais" / "mmlu", mmlu)
    folder = hub / "truthfulqa" / "truthful_qa"
    folder.mkdir(parents=True)
    rows = (Path(data_folder()) / "truthfulqa_mc.jsonl").read_text(encoding="utf-8")
    (folder / "validation.jsonl").write_text(rows, encoding="utf-8")
    files = [{"split": "validation", "path": "validation.jsonl"}]
    _card(folder, [{"config_name": "multiple_choice", "data_files": files}])
    return hub


SPLITS = {"test": "mmlu_test", "dev": "mmlu_dev"}


def _file(hub: Path, split: str, subject: str) -> dict[str, str]:
    source = Path(data_folder()) / f"{SPLITS[split]}.jsonl"
    folder = hub / "cais" / "mmlu"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        line
        for line in source.read_text(encoding="utf-8").split("\n")
        if line and json.loads(line)["subject"] == subject
    ]
    path = f"{subject}-{split}.jsonl"
    (folder / path).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"split": split, "path": path}


def _card(folder: Path, configs: list[dict[str, Any]]) -> None:
    front = json.dumps({"configs": configs})  # YAML reads JSON
    (folder / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")


@pytest.fixture(scope="module")
def theirs(offline_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tasks of lm-eval, by name. To search the folders of all tasks takes seven seconds."""
    import lm_eval.tasks  # noqa: PLC0415

    folder = Path(lm_eval.tasks.__file__).parent
    searched = [str(folder / "mmlu"), str(folder / "truthfulqa")]
    manager = lm_eval.tasks.TaskManager(include_path=searched, include_defaults=False)
    names = [*(f"mmlu_{subject}" for subject in SUBJECTS), "truthfulqa_mc1", "truthfulqa_mc2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(offline_hub)
        patched.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patched.setattr("datasets.config.HF_HUB_OFFLINE", True)
        return dict(manager.load(names)["tasks"])


def instances(task: Any, fewshot: int) -> list[list[tuple[str, str]]]:
    """Return (context, continuation) of each choice of each of the first questions."""
    task.set_config("num_fewshot", fewshot)
    task.build_all_requests(limit=LIMIT, rank=0, world_size=1)
    by_document: dict[int, list[tuple[str, str]]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance.args)
    return [by_document[number] for number in sorted(by_document)]


@pytest.mark.parametrize("fewshot", [0, 5])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_mmlu_tokens_equal_those_of_lm_eval(
    subject: str,
    fewshot: int,
    theirs: dict[str, Any],
    loaded: LoadedModel,
    tokenizer: Any,
    hflm: Any,
) -> None:
    options = TaskOptions(num_fewshot=fewshot, subjects=(subject,), data=data_folder())
    ours = make_task("mmlu", options, loaded, tokenizer)
    assert_same_tokens(ours, theirs[f"mmlu_{subject}"], fewshot, hflm)


@pytest.mark.parametrize("name", ["truthfulqa_mc1", "truthfulqa_mc2"])
def test_truthfulqa_tokens_equal_those_of_lm_eval(
    name: str, theirs: dict[str, Any], loaded: LoadedModel, tokenizer: Any, hflm: Any
) -> None:
    ours = make_task(name, TaskOptions(data=data_folder()), loaded, tokenizer)
    assert_same_tokens(ours, theirs[name], 0, hflm)


def assert_same_tokens(ours: Task, task: Any, fewshot: int, hflm: Any) -> None:
    """Compare the prompts of the first questions, and the number of questions."""
    assert len(ours.questions) == len(task.eval_docs)
    asked = instances(task, fewshot)
    for question, pairs in zip(ours.questions[:LIMIT], asked, strict=True):
        encoded = [hflm._encode_pair(context, continuation) for context, continuation in pairs]
        advice = (
            f"our prompt of {question.key} is not that of lm-eval {version('lm-eval')}, which is "
            f"{pairs[0][0]!r}; change granite_paged/evaluate/tasks.py to it"
        )
        request = question.request
        same = [list(request.context)] * len(pairs) == [context for context, _ in encoded]
        assert same, advice
        assert [list(c) for c in request.continuations] == [c for _, c in encoded], advice


def test_accuracy_equals_that_of_lm_eval(
    theirs: dict[str, Any], loaded: LoadedModel, tokenizer: Any
) -> None:
    """lm-eval's own evaluator runs `granite_paged` as its model."""
    from granite_paged.evaluate.lm import GranitePagedLM  # noqa: PLC0415
    from granite_paged.evaluate.metrics import credit  # noqa: PLC0415

    model = GranitePagedLM(loaded.model, tokenizer=tokenizer, page_size=16)
    names = ["mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2"]
    for name in names:
        theirs[name].set_config("num_fewshot", 0)
    from lm_eval.evaluator import evaluate  # noqa: PLC0415

    results = evaluate(
        lm=model, task_dict={name: theirs[name] for name in names}, limit=12, bootstrap_iters=0
    )["results"]
    for name in names:
        ours = make_task(
            name.removesuffix("_anatomy"),
            TaskOptions(num_fewshot=0, subjects=("anatomy",), data=data_folder()),
            loaded,
            tokenizer,
        )
        answers = paged_answers(loaded, [q.request for q in ours.questions[:12]])
        right = [
            credit(q, list(a.logprobs), mass=ours.mass)
            for q, a in zip(ours.questions, answers, strict=False)
        ]
        assert results[name]["acc,none"] == pytest.approx(sum(right) / 12, abs=1e-4)


def test_lm_eval_runs_the_model_from_its_command_line(
    offline_hub: Path, theirs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run it as `python -m granite_paged.evaluate.lm` does. `theirs` has already read the data."""
    import lm_eval.tasks  # noqa: PLC0415

    from granite_paged.evaluate.lm import main  # noqa: PLC0415

    manager = lm_eval.tasks.TaskManager  # reads 14,000 files of tasks by default
    without_defaults = functools.partialmethod(manager.__init__, include_defaults=False)
    monkeypatch.setattr(manager, "__init__", without_defaults)
    monkeypatch.chdir(offline_hub)
    options = {
        "--model": "granite_paged",
        "--model_args": "page_size=16",
        "--device": "cpu",
        "--tasks": "mmlu_anatomy",
        "--include_path": str(Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"),
        "--limit": "2",
        "--output_path": str(tmp_path),
    }
    words = [word for option in options.items() for word in option]
    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    main()
    (written,) = tmp_path.rglob("results_*.json")
    result = json.loads(written.read_text())
    assert result["config"]["model"] == "granite_paged"
    assert result["n-samples"]["mmlu_anatomy"]["effective"] == 2


# -- the model ----------------------------------------------------------------------------------


def model_of(loaded: LoadedModel, tokenizer: Any, **options: Any) -> Any:
    from granite_paged.evaluate.lm import GranitePagedLM  # noqa: PLC0415

    return GranitePagedLM(loaded.model, tokenizer=tokenizer, page_size=16, **options)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance  # noqa: PLC0415

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_the_model_is_registered_by_name() -> None:
    from lm_eval.api.registry import get_model  # noqa: PLC0415

    from granite_paged.evaluate.lm import GranitePagedLM  # noqa: PLC0415

    assert get_model("granite_paged") is GranitePagedLM


@pytest.mark.parametrize("batch", [1, 6])
def test_requests_in_any_order_score_as_hflm(
    batch: int, loaded: LoadedModel, tokenizer: Any, hflm: Any
) -> None:
    draw = random.Random(0)
    start = "The capital of France is Paris. " * 8
    pairs = [(f"{start}{place} is in", f" {answer}") for place in ("Rome", "Bonn", "Oslo")
             for answer in ("Italy", "Germany", "Norway of course")]  # fmt: skip
    pairs += [("", "an empty context"), (start + "ends in a space ", "here")]
    draw.shuffle(pairs)
    requests = asked("loglikelihood", *pairs)
    ours = model_of(loaded, tokenizer, batch_size=batch).loglikelihood(requests, disable_tqdm=True)
    expected = hflm.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert [score for score, _ in ours] == pytest.approx(
        [score for score, _ in expected], abs=CLOSE
    )


def test_rolling_log_likelihoods_equal_those_of_hflm(
    loaded: LoadedModel, tokenizer: Any, hflm: Any
) -> None:
    requests = asked("loglikelihood_rolling", ("Paging keeps the answers.",), ("So it does.",))
    ours = model_of(loaded, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    expected = hflm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(expected, abs=CLOSE)


def test_generations_equal_those_of_hflm(loaded: LoadedModel, tokenizer: Any, hflm: Any) -> None:
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    requests = asked("generate_until", ("Paged attention is", options), ("One two", options))
    ours = model_of(loaded, tokenizer).generate_until(requests, disable_tqdm=True)
    assert ours == hflm.generate_until(requests, disable_tqdm=True)
    assert any(ours)
