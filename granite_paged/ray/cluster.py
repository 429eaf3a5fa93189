"""Connect to a Ray cluster, and report its failures in one line."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol

from granite_paged.errors import ClusterError, MissingExtra

LOCAL = "local"
"""Address of a new cluster on this machine, for as long as the program runs."""

_TIMEOUT = 10.0  # seconds for a connection; Ray itself tries for minutes


class Kept(Protocol):
    """Work that says what is kept of it."""

    @property
    def kept(self) -> str:
        """What is kept, and how to resume."""
        ...


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module `ray`, connected to a cluster. One that is connected already is used as is.

    Args:
        address: `host:port`, `auto` for the cluster that runs on this machine, or `local`. "":
            the address in RAY_ADDRESS, else `local`.

    Raises:
        MissingExtra: if Ray is not installed.
        ClusterError: if there is no cluster at the address.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors are reported once, by us
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtra("ray", extra="ray") from None
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # Ray prints messages there
        yield from _connected(ray, address)


def _connected(ray: Any, address: str) -> Iterator[Any]:
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS", LOCAL)
    _check_reachable(address)
    try:
        with _quiet():
            ray.init(address=address, logging_level="CRITICAL", log_to_driver=False)
    except Exception as error:  # Ray raises a plain one where a machine is too busy
        ray.shutdown()
        advice = "start one with ray start --head, or pass --ray local"
        raise ClusterError(f"no Ray cluster at {address}: {_first_line(error)}; {advice}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what Ray's C++ code prints on standard error; Python's exceptions still pass."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_reachable(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return  # auto or local
    try:
        socket.create_connection((host, int(port)), timeout=_TIMEOUT).close()
    except (OSError, ValueError, OverflowError) as error:
        advice = "give the host:port that ray start --head printed"
        raise ClusterError(f"no Ray cluster at {address}: {_first_line(error)}; {advice}") from None


def check_resources(ray: Any, workers: int, gpus: float, cpus: float) -> None:
    """Raise ClusterError if the cluster cannot run the workers; Ray itself would wait forever."""
    total = ray.cluster_resources()
    for name, each in (("GPU", gpus), ("CPU", cpus)):
        has = total.get(name, 0.0)
        if workers * each > has:
            raise ClusterError(
                f"the cluster has {has:g} {name}s, the workers need {workers * each:g}: "
                f"lower --workers or --{name.lower()}s-per-worker"
            )


def gpus_of(ray: Any) -> int:
    """Return the number of GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


@contextmanager
def failures_named(work: Kept) -> Iterator[None]:
    """Raise ClusterError, in one line, where the block fails with an error of Ray."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise ClusterError(f"{described(error)}; {work.kept}") from None


def described(error: BaseException) -> str:
    """Return the innermost reason of an error of Ray: what our own code raised, or its summary."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    ours = re.findall(r"^granite_paged\.errors\.\w+: (.+)$", text, flags=re.MULTILINE)
    return f"a worker failed: {ours[-1] if ours else _first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
