"""Exact mode on a cluster: every worker of a job must give the same bits."""

from __future__ import annotations

import json

import torch

from granite_paged.environment import bits_place
from granite_paged.errors import CannotBeExact

_NAMESPACE = b"granite_paged"


def join(device: torch.device) -> None:
    """Compare the device and versions of this worker with those of the job's first worker.

    Outside Ray there are no others.

    Raises:
        CannotBeExact: if they differ, since bits are equal on one GPU model and with the same
            versions only.
    """
    try:
        import ray
        from ray.experimental import internal_kv  # lives as long as the cluster, unlike an actor
    except ImportError:
        return
    if not ray.is_initialized():
        return
    key = f"exact place of job {ray.get_runtime_context().get_job_id()}".encode()
    own = json.dumps(bits_place(device), sort_keys=True)
    internal_kv._internal_kv_put(key, own.encode(), overwrite=False, namespace=_NAMESPACE)
    first = internal_kv._internal_kv_get(key, namespace=_NAMESPACE).decode()
    if own != first:
        theirs, ours = json.loads(first), json.loads(own)
        differing = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
        found = " and ".join(f"{theirs.get(name)} and {ours.get(name)}" for name in differing)
        raise CannotBeExact(f"workers of one job have different bits ({found})")
