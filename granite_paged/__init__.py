"""Paged attention for IBM Granite-4 hybrid models in transformers, for inference.

Run transformers' own generate() on pages::

    from granite_paged import PagedConfig, load, paged

    loaded = load("ibm-granite/granite-4.0-h-1b")
    with paged(loaded.model, PagedConfig(page_size=128)):
        loaded.model.generate(**inputs, max_new_tokens=64)

Answer many prompts at once::

    from granite_paged import Engine, SamplingParams

    with Engine(loaded.model, tokenizer=loaded.tokenizer) as engine:
        for answer in engine.generate(prompts, SamplingParams(max_new_tokens=64)):
            print(answer.error or answer.text)

Names::

    paged, patch, unpatch    page the attention of a live model, and restore it
    is_patched               whether a model is paged now
    PagedConfig              page size, memory, number of sequences, backend
    PagedCache               the cache behind generate(), to pass to several calls
    Engine                   many requests at once: generate, chat, stream, score, search
    EngineGroup              several engines, one per device
    SamplingParams           how tokens are chosen, and when to stop
    Chat                     a conversation as a prompt, with arguments for its template
    Output, Score            what Engine.generate and Engine.score return
    load, LoadedModel        a checkpoint, or the embedded one, with its tokenizer
    GranitePagedError        base of every error, with four families below it by cause:
                             PagingError, RequestError, ModelError, FileError

Importing this package compiles, registers and patches nothing. It imports torch only when a name
that needs it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from granite_paged import errors as _errors

if TYPE_CHECKING:
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.group import EngineGroup
    from granite_paged.engine.prompts import Chat
    from granite_paged.engine.request import Output, SamplingParams, Score
    from granite_paged.errors import *  # noqa: F403
    from granite_paged.geometry import PagedConfig
    from granite_paged.hf.cache import PagedCache
    from granite_paged.hf.patching import is_patched, paged, patch, unpatch
    from granite_paged.models import LoadedModel, load

__version__ = "0.1.0"

_ERRORS = [
    name
    for name, value in vars(_errors).items()
    if isinstance(value, type) and issubclass(value, _errors.GranitePagedError)
]

__all__ = [  # noqa: PLE0604  # the errors are strings too
    "Chat",
    "Engine",
    "EngineGroup",
    "LoadedModel",
    "Output",
    "PagedCache",
    "PagedConfig",
    "SamplingParams",
    "Score",
    "__version__",
    "is_patched",
    "load",
    "paged",
    "patch",
    "unpatch",
    *_ERRORS,
]

_HOME = {
    "Chat": "engine.prompts",
    "Engine": "engine.engine",
    "EngineGroup": "engine.group",
    "LoadedModel": "models",
    "Output": "engine.request",
    "PagedCache": "hf.cache",
    "PagedConfig": "geometry",
    "SamplingParams": "engine.request",
    "Score": "engine.request",
    "is_patched": "hf.patching",
    "load": "models",
    "paged": "hf.patching",
    "patch": "hf.patching",
    "unpatch": "hf.patching",
    **dict.fromkeys(_ERRORS, "errors"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
