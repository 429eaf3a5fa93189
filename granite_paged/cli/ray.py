"""Options of commands that run on a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from granite_paged.cli.options import POSITIVE, Command, ModelChoice, option, options

if TYPE_CHECKING:
    from granite_paged.ray.pipeline import Workers
    from granite_paged.ray.workers import ModelSpec

_AUTO = ""  # value of --ray without an address

_RAY_OPTIONS = options(
    click.option(
        "--ray",
        "address",
        is_flag=False,
        flag_value=_AUTO,
        metavar="[ADDRESS]",
        help="Run on this Ray cluster: host:port, auto, or local for a new one. Without ADDRESS: "
        "RAY_ADDRESS if that is set, else local. Put it last, or write --ray=ADDRESS.",
    ),
    option("--workers", "Run this many workers.  [default: one per GPU]", POSITIVE, metavar="N"),
    option(
        "--gpus-per-worker",
        "Give each worker this many GPUs, or a part of one.  [default: 1 if there are any]",
        click.FloatRange(min=0),
        metavar="X",
    ),
    option(
        "--cpus-per-worker",
        "Give each worker this many CPUs.  [default: 1]",
        click.FloatRange(min=0),
        metavar="X",
    ),
)


@dataclass(frozen=True, slots=True)
class RayChoice:
    """Values of the Ray options; see there."""

    address: str
    workers: int | None
    gpus: float | None
    cpus: float

    @contextmanager
    def connected(
        self, choice: ModelChoice, tokenizer: str | None
    ) -> Iterator[tuple[Any, ModelSpec, Workers]]:
        """Yield `ray`, connected; the model, on the device that workers get; and the workers."""
        from granite_paged.ray.cluster import connected, gpus_of

        with connected(self.address) as ray:  # a missing Ray is reported before torch loads
            from granite_paged.ray.pipeline import Workers
            from granite_paged.ray.workers import ModelSpec

            has, gpus = gpus_of(ray), self.gpus
            if gpus is None:
                gpus = 1.0 if has and choice.device != "cpu" else 0.0
            count = self.workers or (int(has / gpus) if gpus and has else 1)
            spec = ModelSpec(
                choice.model,
                choice.random_weights,
                "cuda" if gpus else "cpu",
                choice.dtype,
                choice.seed,
                tokenizer,
                choice.config,
                choice.revision,
            )
            yield ray, spec, Workers(count, gpus, self.cpus)


def ray_options(command: Command) -> Command:
    """Add the Ray options; they reach the command as `cluster`, None without `--ray`."""

    @_RAY_OPTIONS
    @functools.wraps(command)
    def with_cluster(
        *,
        address: str | None,
        workers: int | None,
        gpus_per_worker: float | None,
        cpus_per_worker: float | None,
        **others: Any,
    ) -> Any:
        cluster = None
        if address is not None:
            cpus = 1.0 if cpus_per_worker is None else cpus_per_worker
            cluster = RayChoice(address, workers, gpus_per_worker, cpus)
        elif (workers, gpus_per_worker, cpus_per_worker) != (None, None, None):
            names = "--workers, --gpus-per-worker and --cpus-per-worker"
            raise click.UsageError(f"{names} need --ray")
        return command(cluster=cluster, **others)

    return with_cluster
