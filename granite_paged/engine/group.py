"""Several engines, one a device, and requests spread over them.

Each engine has the whole model: they share nothing but the caller. A request stays where it was
submitted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from granite_paged.device import resolve_device
from granite_paged.engine.engine import Engine
from granite_paged.engine.prompts import Prompt, as_prompts, matched
from granite_paged.engine.request import OnToken, Output, Request, SamplingParams, Score
from granite_paged.engine.stats import EngineStats
from granite_paged.errors import InvalidArgument
from granite_paged.geometry import PagedConfig

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EngineGroup:
    """Spreads requests over engines by what each has to do.

    Args:
        engines: on different devices, with the same weights.

    Raises:
        InvalidArgument: for no engine.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise InvalidArgument("a group needs at least one engine")
        self.engines = list(engines)

    @classmethod
    def replicas(
        cls,
        model: Any,
        devices: Sequence[str],
        config: PagedConfig | None = None,
        **options: Any,
    ) -> EngineGroup:
        """One engine a device, with a copy of the model on each but its own.

        Raises:
            DeviceError: for a device that is not there.
        """
        engines = []
        for name in devices:
            device = resolve_device(name)
            replica = model if device == model.device else copy.deepcopy(model).to(device)
            engines.append(Engine(replica, config, **options))
        return cls(engines)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> Request:
        """To the engine with least to do. Raises as `Engine.submit` does."""
        least = min(self.engines, key=lambda engine: engine.load)
        return least.submit(prompt, params, on_token=on_token)

    def step(self) -> bool:
        """One step of each. Whether any had something to do."""
        busy = [engine.step() for engine in self.engines]
        return any(busy)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """As `Engine.generate`, each engine its share."""
        listed = as_prompts(prompts)
        pairs = list(zip(listed, matched(params, len(listed)), strict=True))
        costs = [len(prompt) + params.n * params.max_new_tokens for prompt, params in pairs]

        def answer(
            engine: Engine, share: list[tuple[Prompt, SamplingParams]]
        ) -> list[list[Output]]:
            outputs = iter(engine.generate([p for p, _ in share], [w for _, w in share]))
            return [[next(outputs) for _ in range(params.n)] for _, params in share]

        return [output for samples in self._spread(pairs, costs, answer) for output in samples]

    def score(self, items: Sequence[tuple[Prompt, Sequence[Prompt]]]) -> list[list[Score]]:
        """As `Engine.score`, each engine its share."""
        costs = [len(context) + sum(map(len, continuations)) for context, continuations in items]
        return self._spread(list(items), costs, lambda engine, share: engine.score(share))

    def stats(self) -> list[EngineStats]:
        """Of each engine."""
        return [engine.stats() for engine in self.engines]

    def close(self) -> None:
        """Close them all."""
        for engine in self.engines:
            engine.close()

    def __enter__(self) -> EngineGroup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _spread(
        self,
        items: list[_Item],
        costs: Sequence[int],
        work: Callable[[Engine, list[_Item]], list[_Result]],
    ) -> list[_Result]:
        """Give every item to an engine, run them side by side, and put the results in order."""
        loads = [engine.load for engine in self.engines]
        shares: list[list[int]] = [[] for _ in self.engines]
        for number, cost in enumerate(costs):
            least = loads.index(min(loads))
            loads[least] += cost
            shares[least].append(number)
        with ThreadPoolExecutor(len(self.engines)) as pool:
            running = [
                pool.submit(work, engine, [items[number] for number in share])
                for engine, share in zip(self.engines, shares, strict=True)
            ]
            by_engine = [each.result() for each in running]
        found: dict[int, _Result] = {}
        for share, results in zip(shares, by_engine, strict=True):
            found.update(zip(share, results, strict=True))
        return [found[number] for number in range(len(items))]
