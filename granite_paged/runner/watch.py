"""Notices that a live model changed.

Each kind of change leaves another trace::

    in place        load_state_dict, copy_, add_           version counters
    another tensor  assign=True, .to(), .data = tensor     identity and address
    modules         adapters put on or off, hooks          the modules, and settings of foreign ones
    through .data   adapters that peft merges              none but the numbers: some are compared

Looking at the traces takes no device. Comparing numbers waits for it.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from granite_paged.layers.modules import is_own

SAMPLES = 64
"""Numbers of each tensor that are compared. A merged adapter changes nearly all of a tensor's."""

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


class Look:
    """A model as it was when this was made. Making it waits for the device.

    It keeps the dictionaries in which modules hold their parts, so that comparing walks no tree.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._holders: list[dict[Any, Any]] = [
            held
            for m in modules
            for held in (
                m._modules,
                m._parameters,
                m._buffers,
                m._forward_hooks,
                m._forward_pre_hooks,
            )
        ]
        self._names = [(held, name) for held in self._holders for name in held]
        self._parts = self._current_parts()
        self._sizes = list(map(len, self._holders))
        self._attributes = [vars(module) for module in modules]
        self._forwards = self._current_forwards()
        self._foreign = [module for module in modules if not is_own(module)]
        self._settings = list(map(_settings, self._foreign))
        plain = [part for part in self._parts if type(part) in (Tensor, nn.Parameter)]
        self._placed = [tensor for tensor in plain if tensor.numel()]
        self._places = [tensor.data_ptr() for tensor in self._placed]
        self._counted = [tensor for tensor in plain if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]
        self._samples = _samples(self._placed)
        self._numbers = list(map(torch.cat, self._samples))

    def has_moved(self) -> bool:
        """Return whether modules, or the places of weights, are others now."""
        return not (
            self._sizes == list(map(len, self._holders))
            and all(map(is_, self._parts, self._current_parts()))
            and all(map(is_, self._forwards, self._current_forwards()))
            and self._settings == list(map(_settings, self._foreign))
            and self._places == [tensor.data_ptr() for tensor in self._placed]
        )

    def was_written(self, *, compare: bool) -> bool:
        """Return whether weights in the same places were written.

        compare: whether to compare numbers as well, which waits for the device.
        """
        if self._versions != [tensor._version for tensor in self._counted]:
            return True
        pairs = zip(self._samples, self._numbers, strict=True)
        return compare and not all(_same(torch.cat(views), then) for views, then in pairs)

    def _current_parts(self) -> list[Any]:
        return [held.get(name) for held, name in self._names]

    def _current_forwards(self) -> list[Any]:
        """Return the `forward` of each module that has one of its own, else None."""
        return [attributes.get("forward") for attributes in self._attributes]


def _settings(module: nn.Module) -> str:
    """Describe what a foreign module, such as an adapter, was told to do."""
    own = vars(module).items()
    return repr({name: v for name, v in own if name not in _TORCH_ATTRIBUTES and _is_plain(v)})


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _samples(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return views of some numbers of each tensor, grouped by dtype. They see later writes."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_contiguous():
            stride = tensor.numel() // SAMPLES | 1  # odd: not one column of a matrix
            view = tensor.detach().view(-1)[::stride][:SAMPLES]
            groups.setdefault(tensor.dtype, []).append(view)
    return list(groups.values())


def _same(now: Tensor, then: Tensor) -> bool:
    """Return whether both hold the same bits; NaN equals itself."""
    return torch.equal(now.view(torch.uint8), then.view(torch.uint8))
