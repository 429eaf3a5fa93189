"""Memory that ran out has one error, however it is reported."""

from __future__ import annotations

import pytest
import torch

from granite_paged.device import is_out_of_memory, one_memory_error
from tests.helpers.memory_errors import MEMORY_ERRORS


@pytest.mark.parametrize("source", MEMORY_ERRORS)
def test_memory_that_ran_out_has_one_error(source: str) -> None:
    assert is_out_of_memory(MEMORY_ERRORS[source]) is (source not in ("cpu", "python"))
    with pytest.raises(torch.OutOfMemoryError) as error, one_memory_error():
        raise MEMORY_ERRORS[source]
    assert str(error.value) == str(MEMORY_ERRORS[source])


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(torch.OutOfMemoryError), one_memory_error():
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), ValueError("out of memory")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, one_memory_error():
        raise error
    assert raised.value is error
