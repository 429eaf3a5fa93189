"""Every call that an engine makes in a step, found by running one, and faults at each of them."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

Site = tuple[Any, str]


class Broken(RuntimeError):
    """A deliberate fault."""


def methods_of(*owners: type) -> list[Site]:
    """Return the methods that classes define, properties and special methods apart."""
    return [
        (owner, name)
        for owner in owners
        for name, member in vars(owner).items()
        if isinstance(member, types.FunctionType) and not name.startswith("__")
    ]


def name_of(site: Site) -> str:
    """Return a site's name for a report."""
    owner, name = site
    return f"{getattr(owner, '__name__', type(owner).__name__).rpartition('.')[-1]}.{name}"


@contextlib.contextmanager
def wrapped(sites: Sequence[Site], before: Callable[[str], None]) -> Iterator[None]:
    """Call `before` with the site's name whenever one of these is called."""

    def noting(site: Site) -> Any:
        call, name = getattr(*site), name_of(site)

        @functools.wraps(call)
        def noted(*args: Any, **kwargs: Any) -> Any:
            before(name)
            return call(*args, **kwargs)

        return noted

    with contextlib.ExitStack() as stack:
        for owner, name in sites:
            stack.enter_context(mock.patch.object(owner, name, noting((owner, name))))
        yield


def count_calls(sites: Sequence[Site], run: Callable[[], None]) -> Counter[str]:
    """Run something, and return how often it calls each site."""
    counts: Counter[str] = Counter()
    with wrapped(sites, lambda name: counts.update([name])):
        run()
    return counts


@contextlib.contextmanager
def fault_at(
    site: Site, number: int, error: type[BaseException] = Broken
) -> Iterator[Counter[str]]:
    """Raise at the `number`-th call of a site, once. Yields the counts of its calls."""
    counts: Counter[str] = Counter()

    def fail(name: str) -> None:
        counts[name] += 1
        if counts[name] == number:
            raise error("once")

    with wrapped([site], fail):
        yield counts
