"""Several engines, one per device, and requests spread over them.

Each engine has the whole model and shares nothing with the others. A request stays in the engine
that it was submitted to.
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
    """Spreads requests over engines by the tokens that each has yet to compute.

    Args:
        engines: engines on different devices, with the same weights.

    Raises:
        InvalidArgument: if there is no engine.
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
        """Make one engine per device, each with a copy of the model unless it is there already.

        Args:
            options: passed to every `Engine`.

        Raises:
            DeviceError: if a device is absent.
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
        """Submit to the engine with the lowest load. Raises as `Engine.submit` does."""
        least = min(self.engines, key=lambda engine: engine.load)
        return least.submit(prompt, params, on_token=on_token)

    def step(self) -> bool:
        """Run one step of each engine. Return whether any had something to do."""
        busy = [engine.step() for engine in self.engines]
        return any(busy)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Answer as `Engine.generate` does. Each engine gets a share of the prompts."""
        listed = as_prompts(prompts)
        pairs = list(zip(listed, matched(params, len(listed)), strict=True))
        costs = [_size(prompt) + params.n * params.max_new_tokens for prompt, params in pairs]

        def answer(
            engine: Engine, share: list[tuple[Prompt, SamplingParams]]
        ) -> list[list[Output]]:
            outputs = iter(engine.generate([p for p, _ in share], [w for _, w in share]))
            return [[next(outputs) for _ in range(params.n)] for _, params in share]

        return [output for samples in self._spread(pairs, costs, answer) for output in samples]

    def score(self, items: Sequence[tuple[Prompt, Sequence[Prompt]]]) -> list[list[Score]]:
        """Score as `Engine.score` does. Each engine gets a share of the contexts."""
        costs = [_size(context) + sum(map(_size, each)) for context, each in items]
        return self._spread(list(items), costs, lambda engine, share: engine.score(share))

    def stats(self) -> list[EngineStats]:
        """Return the stats of each engine."""
        return [engine.stats() for engine in self.engines]

    def close(self) -> None:
        """Close every engine."""
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
        """Give every item to an engine, run the engines in threads, and return the results."""
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


def _size(prompt: Any) -> int:
    """Return about how many tokens a prompt has."""
    return len(prompt) if hasattr(prompt, "__len__") else 1
