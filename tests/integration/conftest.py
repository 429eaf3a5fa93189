"""What all integration tests of one process share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def rates_are_measured_once() -> Iterator[None]:
    """Measure a device's rates once per process: they take most of a benchmark of small shapes."""
    from granite_paged.bench import session  # noqa: PLC0415  # once Triton's interpreter is chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "measure_rates", functools.cache(session.measure_rates))
        yield
