"""Which changes of a live model are noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granite_paged.runner.watch import SAMPLES, Look, _is_plain, _samples


class Adapter(nn.Module):
    """A module of another package, with settings."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.scale: Any = {"first": (1.0, [2, "two"], None)}
        self.helper = object()  # no plain value


def make() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), Adapter(), nn.LayerNorm(6))
    model.register_buffer("table", torch.arange(300).view(20, 15))
    model.register_parameter("unset", None)
    return model


def linear(model: Any) -> nn.Linear:
    found: nn.Linear = model[0]
    return found


def assign(model: Any) -> None:
    linear(model).weight = nn.Parameter(linear(model).weight.detach().clone())


def point_elsewhere(model: Any) -> None:
    linear(model).weight.data = linear(model).weight.detach().clone()


def set_forward(model: Any) -> None:
    linear(model).forward = lambda x: x  # type: ignore[method-assign]


def add_module(model: Any) -> None:
    model.append(nn.Linear(2, 2))


def replace_module(model: Any) -> None:
    model[0] = nn.Linear(30, 40)


def set_parameter(model: Any) -> None:
    model.unset = nn.Parameter(torch.ones(1))


def replace_buffer(model: Any) -> None:
    model.table = model.table.clone()


def add_hook(model: Any) -> None:
    linear(model).register_forward_hook(lambda *_: None)


def add_pre_hook(model: Any) -> None:
    linear(model).register_forward_pre_hook(lambda *_: None)


def change_setting(model: Any) -> None:
    model[1].scale["first"] = (1.0, [3, "two"], None)


def switch_off(model: Any) -> None:
    model[1].disabled = True


MOVES: dict[str, Callable[[Any], None]] = {
    "another weight": assign,
    "another place": point_elsewhere,
    "another forward": set_forward,
    "one more module": add_module,
    "another module": replace_module,
    "a parameter that was unset": set_parameter,
    "another buffer": replace_buffer,
    "a hook": add_hook,
    "a hook before": add_pre_hook,
    "another setting of a foreign module": change_setting,
    "a new setting of a foreign module": switch_off,
}


def test_an_unchanged_model_has_not_moved_and_was_not_written() -> None:
    model = make()
    look = Look(model)
    assert not look.has_moved()
    assert not look.was_written(compare=True)
    assert not look.was_written(compare=False)


@pytest.mark.parametrize("move", MOVES)
def test_other_modules_weights_hooks_and_settings_are_noticed(move: str) -> None:
    model = make()
    look = Look(model)
    MOVES[move](model)
    assert look.has_moved()
    assert not Look(model).has_moved()


def test_settings_of_modules_of_torch_do_not_count() -> None:
    """Nothing reads them but their own forward, which an engine calls."""
    model = make()
    look = Look(model)
    model[2].remark = "written by the user"
    assert not look.has_moved()


def test_values_that_are_no_settings_do_not_count() -> None:
    model = make()
    look = Look(model)
    model[1].helper = object()
    model[1].train(mode=False)
    assert not look.has_moved()


def test_a_write_in_place_is_noticed_without_comparing() -> None:
    model = make()
    look = Look(model)
    with torch.no_grad():
        linear(model).weight.add_(1)
    assert not look.has_moved()
    assert look.was_written(compare=False)
    assert not Look(model).was_written(compare=True)


def test_a_write_through_data_is_noticed_by_comparing_numbers() -> None:
    model = make()
    look = Look(model)
    linear(model).weight.data.mul_(2)
    assert not look.was_written(compare=False)
    assert look.was_written(compare=True)


def test_numbers_of_every_dtype_are_compared() -> None:
    model = make()
    look = Look(model)
    model.table.data.add_(1)
    assert look.was_written(compare=True)


def test_weights_made_for_inference_have_no_versions_and_are_compared() -> None:
    with torch.inference_mode():
        model = make()
    look = Look(model)
    assert not look.was_written(compare=True)
    with torch.inference_mode():
        linear(model).weight.mul_(2)
    assert look.was_written(compare=True)


def test_nan_equals_itself() -> None:
    model = make()
    with torch.no_grad():
        linear(model).weight.fill_(torch.nan)
    assert not Look(model).was_written(compare=True)


# -- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "stride", "count"),
    [(1, 1, 1), (63, 1, 63), (64, 1, 64), (127, 1, 64), (128, 3, 43), (640, 11, 59), (705, 11, 64)],
)
def test_at_most_64_numbers_are_taken_at_odd_distances(
    elements: int, stride: int, count: int
) -> None:
    """At an even distance all would be of one column, in a matrix with an even number of them."""
    assert SAMPLES == 64
    ((sample,),) = _samples([torch.arange(elements)])
    assert sample.tolist() == list(range(0, elements, stride))[:count]
    assert len(sample) == count


def test_samples_of_a_matrix_see_later_writes() -> None:
    matrix = torch.zeros(9, 7)
    ((sample,),) = _samples([matrix])
    matrix.fill_(1)
    assert sample.unique().tolist() == [1]


def test_samples_are_grouped_by_dtype_and_leave_out_views_with_gaps() -> None:
    whole, half = torch.zeros(4, 4), torch.zeros(4, dtype=torch.float16)
    groups = _samples([whole, half, whole.T[:2], torch.ones(3)])
    assert [[len(each) for each in group] for group in groups] == [[16, 3], [4]]


@pytest.mark.parametrize(
    "value",
    [None, True, 1, 1.5, "text", [1, "a"], (None, 2.0), {7}, {"a": [{"b": (1,)}]}, []],
    ids=["None", "bool", "int", "float", "text", "list", "tuple", "set", "dict", "empty"],
)
def test_numbers_texts_and_what_holds_them_are_settings(value: Any) -> None:
    assert _is_plain(value)


@pytest.mark.parametrize(
    "value",
    [object(), len, b"bytes", Tensor(), [1, object()], (object(),), {"a": object()}, {len: 1}],
    ids=["object", "function", "bytes", "tensor", "list", "tuple", "dict", "key"],
)
def test_other_values_are_no_settings(value: Any) -> None:
    assert not _is_plain(value)
