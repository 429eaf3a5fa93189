"""Find the modules of a model that are not transformers' own: adapters, hooks, quantised weights.

A runner computes the frame of a decoder layer itself: the layer, its mixer and the convolution.
Whatever else a layer consists of (projections, norms, MLPs) `EagerModel` calls as a module, so
that a change to it counts. `TritonModel` reads the weights instead, so it needs unchanged parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GraniteMoeHybridForCausalLM

from granite_paged.errors import UnsupportedModel
from granite_paged.layers.one_token import ExactForward

_OWN = ("torch.nn.modules.", "transformers.")


def check_supported(model: Any) -> None:
    """Raise UnsupportedModel for another class, or for weights that are not on one device."""
    if not isinstance(model, GraniteMoeHybridForCausalLM):
        advice = "pass the transformers model itself (PEFT: model.get_base_model())"
        raise UnsupportedModel(type(model).__name__, advice)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise UnsupportedModel(f"a model on {', '.join(sorted(devices))} instead of one device")


def check_model(model: Any) -> None:
    """Raise UnsupportedModel for a model that a runner would compute wrongly.

    That is one that is not supported, or one with a changed frame of a decoder layer.
    """
    check_supported(model)
    for name, module in _frames(model):
        if change := _change(module):
            advice = "it would not run in an engine; use paged(model) and generate()"
            raise UnsupportedModel(f"{name}, which {change},", advice)


def changed_part(model: Any) -> str:
    """Say which part of a model is not transformers' own, and how; empty if there is none."""
    frames = {id(module) for _, module in _frames(model)}
    for name, module in model.named_modules():
        is_part = name and module is not model.base_model and id(module) not in frames
        if is_part and (change := _change(module)):
            return f"{name} {change}"
    return ""


def changed_operator(mixer: nn.Module) -> str:
    """Say how a Mamba layer's norm or activation is not transformers' own; empty if neither is.

    The Triton kernels compute both, and call neither.
    """
    for name in ("norm", "act"):
        if change := _change(getattr(mixer, name)):
            return f"{name} of a Mamba layer {change}"
    return ""


def is_own(module: nn.Module) -> bool:
    """Whether a module's class is torch's or transformers'."""
    return f"{type(module).__module__}.".startswith(_OWN)


def _frames(model: Any) -> Iterator[tuple[str, nn.Module]]:
    for index, layer in enumerate(model.base_model.layers):
        name = f"model.layers.{index}"
        yield name, layer
        if layer.mamba is None:
            yield f"{name}.self_attn", layer.self_attn
        else:
            yield f"{name}.mamba", layer.mamba
            yield f"{name}.mamba.conv1d", layer.mamba.conv1d


def _change(module: nn.Module) -> str:
    """Say how one module differs from transformers' own; empty if it does not."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a hook"
    if not isinstance(vars(module).get("forward", ExactForward()), ExactForward):
        return "has a forward of its own"
    if hasattr(module, "parametrizations"):
        return "is parametrized"
    if not is_own(module):
        return f"is a {type(module).__name__}"
    for parameter in module.parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"holds a {type(parameter).__name__}"
    return ""
