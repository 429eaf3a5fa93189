"""What runs in a worker of Ray: an engine, and the batches that it answers.

This module does not import Ray: a worker is a plain callable class.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from granite_paged.batch.answering import Answering, batch_engine
from granite_paged.batch.lines import Line
from granite_paged.batch.request import FIELDS, Defaults
from granite_paged.errors import ClusterError, InvalidArgument
from granite_paged.geometry import PagedConfig
from granite_paged.models import LoadedModel, load, load_tokenizer
from granite_paged.ray import exact
from granite_paged.ray.groups import Columns, unpacked
from granite_paged.ray.rows import COUNTS, line_of, objects, row_of


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model that each worker loads for itself. `models.load` has the fields' meaning."""

    model: str | None = None
    random_weights: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    tokenizer: str | None = None
    config: PagedConfig | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)

    def load(self) -> LoadedModel:
        """Load the model, and the tokenizer if one is named."""
        loaded = load(
            self.model,
            random_weights=self.random_weights,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
            revision=self.revision,
            token=self.token,
        )
        if self.tokenizer is None:
            return loaded
        return replace(loaded, tokenizer=load_tokenizer(self.tokenizer, token=self.token))


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker answers.

    Attributes:
        rows: most sequences at once. None: 256, or 32 on a CPU.
        max_new_tokens: see `Defaults`.
        aliases: see `Answering`.
    """

    rows: int | None = None
    max_new_tokens: int | None = None
    aliases: Sequence[str] = ()


class Worker:
    """An engine of its own, and what it answers lines with. Its calls may run at once."""

    def __init__(self, spec: ModelSpec, options: WorkerOptions) -> None:
        loaded = spec.load()
        config = share_of_gpu(spec.config or PagedConfig())
        if config.exact:
            exact.join(loaded.model.device)
        engine = batch_engine(loaded, config, options.rows)
        defaults = Defaults(loaded.model.generation_config, options.max_new_tokens, spec.seed)
        self._answering = Answering(engine, loaded, defaults, options.aliases)


class LineWorker(Worker):
    """Answers groups of lines for `granite-paged batch --ray`; a row is a group.

    Attributes:
        most_deaths: workers that may die with the same group. Ray itself would try forever.
    """

    most_deaths = 5

    def __call__(self, batch: Columns) -> Columns:
        """Answer each group. Return the answers, and the digest of the run."""
        packs = [self._answered(unpacked(content)) for content in batch["lines"]]
        return {"answers": objects(packs), "run": objects([self._answering.run] * len(packs))}

    def _answered(self, group: Sequence[tuple[int, Line]]) -> bytes:
        if attempts() >= self.most_deaths:
            numbers = [line.number for _, line in group]
            raise ClusterError(
                f"workers died {self.most_deaths} times while they answered lines between "
                f"{min(numbers)} and {max(numbers)}: see Ray's logs"
            )
        answers = self._answering.answer_all([line for _, line in group])
        rows = zip(group, answers, strict=True)
        return pickle.dumps([(index, line.end, answer) for (index, line), answer in rows])


class Answers(Worker):
    """Answers rows of a dataset: a callable class for `Dataset.map_batches`.

    ::

        dataset.map_batches(
            Answers,
            fn_constructor_kwargs={"model": "ibm-granite/granite-4.0-h-1b"},
            compute=ray.data.ActorPoolStrategy(
                size=2, max_concurrent_calls_per_actor=8, enable_true_multi_threading=True
            ),
            batch_size=64,
            num_gpus=1,
        )

    A row has a column `prompt` (text or token ids) or `messages`, and may have `max_tokens`,
    `temperature` and the other fields of a line of `granite-paged batch`. Columns with other names
    stay as they are. Added columns: `text` of the first sample, `finish_reason`, `prompt_tokens`,
    `completion_tokens`, `error` ("" if there is none), and `response`: the body in OpenAI's format
    as JSON, with every sample.

    Args:
        model, random_weights, device, dtype, seed, revision, token: see `granite_paged.load`.
        tokenizer: a tokenizer for a model that has none.
        config: page size and pools. On a part of a GPU, `memory_fraction` counts for that part.
        options: fields of `WorkerOptions`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        random_weights: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        tokenizer: str | None = None,
        config: PagedConfig | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> None:
        own = (model, random_weights, device, dtype, seed, tokenizer, config)
        spec = ModelSpec(*own, revision, token)
        super().__init__(spec, WorkerOptions(**options))

    def __call__(self, batch: Columns) -> Columns:
        """Answer a batch of rows; an error concerns its row only."""
        if not {"prompt", "messages"} & set(batch):
            raise InvalidArgument(f"rows need a column prompt or messages, got {sorted(batch)}")
        fields = [name for name in batch if name in FIELDS]
        rows = zip(*(batch[name] for name in fields), strict=True)
        lines = [line_of(dict(zip(fields, row, strict=True))) for row in rows]
        found = [row_of(answer) for answer in self._answering.answer_all(lines)]
        added = {name: objects([row[name] for row in found]) for name in row_of(None)}
        counts = {name: added[name].astype(np.int64) for name in COUNTS}
        return {**batch, **added, **counts}


def attempts() -> int:
    """Return how many workers died with the task that runs now; 0 outside Ray."""
    try:
        from ray._private.worker import global_worker

        return int(global_worker.core_worker.get_current_task_attempt_number())
    except Exception:  # not connected, or a version of Ray without it
        return 0


def share_of_gpu(config: PagedConfig) -> PagedConfig:
    """Return the config for the part of a GPU that Ray gave this worker."""
    try:
        import ray

        part = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    except Exception:  # outside Ray, or before it is connected
        return config
    if not 0 < part < 1:
        return config
    return replace(config, memory_fraction=config.memory_fraction * part)
