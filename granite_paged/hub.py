"""The Hugging Face hub: whether it answers is found out within seconds, before a download.

Libraries that download ask a silent hub again for half a minute. Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from granite_paged.errors import CheckpointError

TIMEOUT = 3.0
"""Seconds within which the hub must answer."""

_SERVER_ERROR = 500  # this HTTP status and higher ones


def why_silent(repository: str, kind: str = "model", **options: Any) -> str:
    """Ask the hub about a repository. Return why there is no answer, or an empty text.

    Args:
        repository: `owner/name`.
        kind: `model` or `dataset`.
        options: `revision` and `token`, as `huggingface_hub` takes them.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answered: list[bool] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repository, repo_type=kind, timeout=TIMEOUT, **options)
        except HfHubHTTPError as error:
            answered.append(error.response.status_code < _SERVER_ERROR)
        except (ValueError, LocalTokenNotFoundError):
            answered.append(True)  # not the hub's fault: the download will say what is wrong
        except Exception:  # the network's errors differ between versions of huggingface_hub
            answered.append(False)
        else:
            answered.append(True)

    asking = Thread(target=ask, daemon=True)  # a timeout does not end the search for an address
    asking.start()
    asking.join(TIMEOUT)
    return "" if answered == [True] else "the hub does not answer"


def is_cached(repository: str, file: str, revision: str | None = None) -> bool:
    """Whether the hub's cache on this machine has this file of a model."""
    try:
        found = try_to_load_from_cache(repository, file, revision=revision)
    except ValueError:  # not a name of a repository
        return False
    return isinstance(found, str) and Path(found).is_file()


def looks_like_a_folder(name: str) -> bool:
    """Whether a name cannot be that of a repository, `owner/name`."""
    return name.startswith((".", "~", os.sep)) or name.count("/") != 1


def reading_options(
    path: str, file: str, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Return the options with which transformers reads a folder, the hub or the hub's cache.

    Raises CheckpointError if the hub is silent and its cache lacks this file.
    """
    if Path(path).is_dir():
        return {}
    given = {"revision": revision, "token": token}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not (silent := why_silent(path, **options)):
        return options
    if is_cached(path, file, revision):
        return {**options, "local_files_only": True}
    which = f" --revision {revision}" if revision else ""
    raise CheckpointError(
        f"cannot load {path}: {silent}, and the hub's cache lacks it: pass a folder, or run "
        f"hf download {path}{which} with a network"
    )
