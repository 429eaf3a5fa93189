"""Several engines, one per device, and requests spread over them.

Each engine has the whole model and shares nothing with the others. A request stays in the engine
that it was submitted to.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from granite_paged.arguments import instance
from granite_paged.device import resolve_device
from granite_paged.engine.engine import Engine
from granite_paged.engine.prompts import (
    Prompt,
    as_prompts,
    context_and_continuations,
    matched,
    samples_of,
    scoring_items,
)
from granite_paged.engine.request import OnToken, Output, Request, SamplingParams, Score
from granite_paged.engine.stats import EngineStats
from granite_paged.environment import bits_place
from granite_paged.errors import (
    BrokenInvariant,
    CannotBeExact,
    EngineClosed,
    EngineLost,
    GranitePagedError,
    InvalidArgument,
    InvalidRequest,
)
from granite_paged.geometry import PagedConfig

_Item = TypeVar("_Item")
_Work = Callable[[Engine, "list[Any]"], "list[Any]"]


class EngineGroup:
    """Spreads requests over engines by the tokens that each has yet to compute.

    Args:
        engines: engines on different devices, with the same weights.

    Raises:
        InvalidArgument: if there is no engine, one is listed twice, or one is something else.
        CannotBeExact: if an engine is in exact mode, and another would give other bits.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = [instance("each of engines", each, Engine) for each in _listed(engines)]
        if not self.engines:
            raise InvalidArgument("engines must hold at least one Engine, got []")
        if len(set(self.engines)) < len(self.engines):
            raise InvalidArgument("an engine is in the group twice: list each once")
        _check_exact(self.engines)

    @classmethod
    def replicas(
        cls,
        model: Any,
        devices: Sequence[str],
        config: PagedConfig | None = None,
        **options: Any,
    ) -> EngineGroup:
        """Make one engine per device, each with a copy of the model unless it is there already.

        Args:
            options: passed to every `Engine`.

        Raises:
            DeviceError: if a device is absent.
            InvalidArgument: if `devices` is not a list of names.
        """
        if isinstance(devices, str) or not isinstance(devices, Sequence):
            raise InvalidArgument(f"devices must be a list of names, got {devices!r}")
        with contextlib.ExitStack() as made:  # those that are made close if a later one fails
            engines = []
            for device in map(resolve_device, devices):
                replica = model if device == model.device else copy.deepcopy(model).to(device)
                engines.append(made.enter_context(Engine(replica, config, **options)))
            group = cls(engines)
            made.pop_all()
            return group

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> Request:
        """Submit to the open engine with the lowest load. Raises as `Engine.submit` does."""
        least = min(self._open(), key=lambda engine: engine.load)
        return least.submit(prompt, params, on_token=on_token)

    def step(self) -> bool:
        """Run one step of each open engine. Return whether any had something to do.

        What one engine raises is raised when the others have made their step.
        """
        busy, failure = False, None
        for engine in self.engines:
            try:
                busy |= not engine.closed and engine.step()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return busy

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
    ) -> list[Output]:
        """Answer as `Engine.generate` does. Each engine gets a share of the prompts.

        What an engine that fails or is closed leaves unanswered is answered by another one. If that
        fails too, those outputs have an `EngineLost` as their error.
        """
        listed = [_materialised(prompt) for prompt in as_prompts(prompts)]
        pairs = list(zip(listed, matched(params, len(listed)), strict=True))
        costs = [_size(prompt) + _most_tokens(params) for prompt, params in pairs]

        def answer(
            engine: Engine, share: list[tuple[Prompt, SamplingParams | None]]
        ) -> list[list[Output] | EngineLost]:
            outputs = iter(engine.generate_pairs(share))
            samples = [[next(outputs) for _ in range(samples_of(params))] for _, params in share]
            return [_unless_closed(each) for each in samples]

        outputs: list[Output] = []
        answers = self._spread(pairs, costs, answer)
        for (prompt, params), samples in zip(pairs, answers, strict=True):
            lost = isinstance(samples, EngineLost)
            outputs += _lost(prompt, params, samples) if lost else samples
        return outputs

    def score(self, items: Sequence[tuple[Prompt, Sequence[Prompt]]]) -> list[list[Score]]:
        """Score as `Engine.score` does. Each engine gets a share of the contexts.

        Raises:
            EngineLost: if an engine failed and another one failed at the same share.
        """
        items = [_materialised_item(item) for item in scoring_items(items)]
        costs = list(map(_item_size, items))
        found = self._spread(items, costs, lambda engine, share: engine.score(share))
        for scores in found:
            if isinstance(scores, EngineLost):
                raise scores
        return [scores for scores in found if not isinstance(scores, EngineLost)]

    def stats(self) -> list[EngineStats]:
        """Return the stats of each engine."""
        return [engine.stats() for engine in self.engines]

    def close(self) -> None:
        """Close every engine, whatever closing another one raises."""
        with contextlib.ExitStack() as engines:
            for engine in self.engines:
                engines.callback(engine.close)

    def __enter__(self) -> EngineGroup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> list[Engine]:
        engines = [engine for engine in self.engines if not engine.closed]
        if not engines:
            raise EngineClosed("every engine of the group is closed: make another group")
        return engines

    def _spread(self, items: list[_Item], costs: Sequence[int], work: _Work) -> list[Any]:
        """Give every item to an engine, and return the results in order.

        An item gets an EngineLost if the engine that it was given to failed, and another one did.
        """
        found: dict[int, Any] = {}
        engines, left = self._open(), list(range(len(items)))
        for _ in range(2):
            lost: list[Engine] = []
            for engine, share, result in self._run(engines, items, costs, left, work):
                if not isinstance(result, BaseException):
                    found.update(zip(share, result, strict=True))
                elif not _is_failure(result):
                    raise result  # a refusal of the work or an interrupt, not the engine's fault
                else:
                    lost.append(engine)
                    found.update(dict.fromkeys(share, EngineLost(result)))
            left = [number for number in left if isinstance(found[number], EngineLost)]
            sound = [engine for engine in engines if not (engine in lost or engine.closed)]
            engines = sound or engines
            if not left:
                break
        return [found[number] for number in range(len(items))]

    def _run(
        self,
        engines: Sequence[Engine],
        items: list[_Item],
        costs: Sequence[int],
        numbers: Sequence[int],
        work: _Work,
    ) -> list[tuple[Engine, list[int], Any]]:
        """Run a share of the numbered items in each engine's thread.

        Returns:
            For each engine, the numbers of its items, and their results or what it raised.
        """
        loads = [engine.load for engine in engines]
        shares: list[list[int]] = [[] for _ in engines]
        for number in numbers:
            least = loads.index(min(loads))
            loads[least] += costs[number]
            shares[least].append(number)
        with ThreadPoolExecutor(len(engines)) as pool:
            running = [
                pool.submit(work, engine, [items[number] for number in share])
                for engine, share in zip(engines, shares, strict=True)
            ]
            try:
                wait(running)
            except BaseException:  # an interrupt of the caller stops every engine
                while wait(running, timeout=0.05).not_done:
                    for engine in engines:
                        engine.cancel_all()
                raise
        results = [each.exception() or each.result() for each in running]
        return list(zip(engines, shares, results, strict=True))


def _check_exact(engines: Sequence[Engine]) -> None:
    """Refuse a group in which the bits of an answer depend on the engine that gives it."""
    runners = [engine.runner for engine in engines]
    if not any(runner.config.exact for runner in runners):
        return
    if len({(runner.config.exact, str(bits_place(runner.device))) for runner in runners}) > 1:
        raise CannotBeExact("the engines of this group differ in exact mode or in their device")


def _listed(engines: Any) -> list[Any]:
    if isinstance(engines, str) or not isinstance(engines, Iterable):
        raise InvalidArgument(f"engines must be a list of Engine, got {engines!r:.80}")
    return list(engines)


def _materialised(value: Any) -> Any:
    """Return the list that an iterator yields: more than one engine may read it."""
    return list(value) if isinstance(value, Iterator) else value


def _materialised_item(item: Any) -> Any:
    """Return an item to score whose parts more than one engine may read.

    One of another form is left to the engine that refuses it.
    """
    try:
        context, continuations = context_and_continuations(item)
    except InvalidRequest:
        return item
    continuations = _materialised(continuations)
    if isinstance(continuations, list | tuple):
        continuations = [_materialised(each) for each in continuations]
    return _materialised(context), continuations


def _unless_closed(samples: list[Output]) -> list[Output] | EngineLost:
    """Return the outputs of a prompt, or the error if its engine was closed under it."""
    for output in samples:
        if isinstance(output.error, EngineClosed):
            return EngineLost(output.error)
    return samples


def _lost(prompt: Prompt, params: SamplingParams | None, error: EngineLost) -> list[Output]:
    """Return the outputs of a prompt that no engine answered. It has no number."""
    lost = partial(Output, -1, prompt=(), finish="error", error=error, refused=prompt)
    return [lost(index=index) for index in range(samples_of(params))]


def _is_failure(error: BaseException) -> bool:
    """Whether an error is about the engine, and not about a request or the whole process."""
    if isinstance(error, GranitePagedError):
        return isinstance(error, (BrokenInvariant, EngineClosed))
    return isinstance(error, Exception)


def _most_tokens(params: SamplingParams | None) -> int:
    """Return how many tokens an answer may have, about: a model's own limit is not looked up."""
    params = params or SamplingParams()
    return params.n * params.max_new_tokens


def _size(prompt: Any) -> int:
    """Return about how many tokens a prompt has. One that an engine refuses counts as one."""
    try:
        return len(prompt)
    except TypeError:
        return 1


def _item_size(item: Any) -> int:
    """Return about how many tokens an item to score has, as `_size` counts them."""
    try:
        context, continuations = context_and_continuations(item)
    except InvalidRequest:
        return 1
    return _size(context) + sum(map(_size, as_prompts(continuations)))
