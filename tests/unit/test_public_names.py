"""The public names of `granite_paged`."""

from __future__ import annotations

import pydoc

import pytest

import granite_paged
from granite_paged import errors


def test_dir_lists_only_public_names() -> None:
    assert dir(granite_paged) == sorted(granite_paged.__all__)


@pytest.mark.parametrize("name", granite_paged.__all__)
def test_a_public_name_loads(name: str) -> None:
    assert getattr(granite_paged, name) is not None


def test_every_error_is_exported() -> None:
    def family(kind: type) -> set[str]:
        return {kind.__name__}.union(*map(family, kind.__subclasses__()))

    ours = {name for name in family(errors.GranitePagedError) if hasattr(errors, name)}
    assert ours <= set(granite_paged.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        granite_paged.Engin  # noqa: B018


def test_help_names_the_main_classes_and_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(granite_paged))
    for name in ("Engine", "SamplingParams", "PagedConfig", "paged", "load", "OutOfPages"):
        assert name in text
