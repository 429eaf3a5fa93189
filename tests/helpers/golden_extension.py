"""Golden data at the repository root, as syrupy extensions: logits as numbers, tables as text.

::

    golden/logits/<test>.safetensors   SDPA's logits, and in the metadata what they were made from
    golden/tables/<test>.txt           text

A test compares once: `assert golden_logits == Measured(...)`, `assert golden_table == text`. Logits
are compared three ways (SDPA, paged, recorded), so that a failure says which side moved. Only
SDPA's are recorded, as the one reference. syrupy writes files only with `--snapshot-update`.

syrupy does not look for unused files here. With paths on its command line it overlooks orphans that
lie outside the test tree, and without them `--snapshot-update` deletes the file of a test that
failed before it compared. `claims` and `orphans` find them instead, and nothing is deleted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from syrupy.data import SnapshotCollection, SnapshotCollections
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from syrupy.location import PyTestLocation
from torch import Tensor

from tests.helpers.tolerance import LOGITS_FLOAT32

UPDATE = "python -m pytest tests/golden --snapshot-update"

Logits = Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class Measured:
    """What one golden test computed from the same inputs, by SDPA and by paged attention.

    Attributes:
        sdpa, paged: logits by name, with the same names, shapes and dtypes.
        origin: seed, dtype and fingerprints of what they were computed from.
    """

    sdpa: Logits
    paged: Logits
    origin: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Measured({', '.join(self.sdpa)})"


@dataclass(frozen=True, repr=False)
class Recorded:
    """The contents of a golden file."""

    sdpa: Logits
    origin: Mapping[str, str]
    versions: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Recorded({', '.join(self.sdpa)})"


def fingerprint(tensors: Mapping[str, Tensor], **settings: Any) -> str:
    """Return the SHA-256 of tensors (names, shapes, dtypes, bytes) and of their settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- which side moved ---------------------------------------------------------------------------

AGREE = "all agree"
INPUTS_CHANGED = "the inputs changed: weights or ids differ from the recorded ones"

# (SDPA off the record, paged off the record, paged off SDPA)
VERDICTS = {
    (False, False, False): AGREE,
    (True, True, False): "transformers' SDPA moved (we followed it)",
    (False, True, True): "paged moved, SDPA did not",
    (True, False, True): "transformers' SDPA moved, paged did not",
    (True, True, True): "both moved apart",
    (False, False, True): "paged and SDPA are apart, each within the bound of the record",
    (True, False, False): "both drifted together, SDPA past the bound of the record",
    (False, True, False): "both drifted together, paged past the bound of the record",
}


@dataclass(frozen=True)
class Difference:
    """The largest difference between two sets of logits.

    Attributes:
        ratio: difference over bound; infinite if the two cannot be compared or one is not finite.
        text: how large it is, where, and its ratio to the bound.
    """

    ratio: float
    text: str

    @property
    def off(self) -> bool:
        """Whether it exceeds the bound."""
        return self.ratio > 1


@dataclass(frozen=True)
class Comparison:
    """The three differences, and the verdict that follows from them."""

    verdict: str
    sdpa_recorded: Difference
    paged_recorded: Difference
    paged_sdpa: Difference
    changed_inputs: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing moved."""
        return self.verdict == AGREE

    def lines(self) -> list[str]:
        """Return the report, verdict first, since pytest cuts long explanations off."""
        changed = f" ({', '.join(self.changed_inputs)})" if self.changed_inputs else ""
        pairs = {
            "SDPA-recorded ": self.sdpa_recorded,
            "paged-recorded": self.paged_recorded,
            "paged-SDPA    ": self.paged_sdpa,
        }
        return [
            f"{self.verdict}{changed}",
            *(f"{'OFF' if d.off else 'ok '} {pair} {d.text}" for pair, d in pairs.items()),
        ]


def compare(measured: Measured, recorded: Recorded) -> Comparison:
    """Compare SDPA, paged and recorded logits, and say which side moved."""
    differences = (
        difference(measured.sdpa, recorded.sdpa),
        difference(measured.paged, recorded.sdpa),
        difference(measured.paged, measured.sdpa),
    )
    mine, theirs = measured.origin, recorded.origin
    changed = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    off = tuple(d.off for d in differences)
    return Comparison(INPUTS_CHANGED if changed else VERDICTS[off], *differences, tuple(changed))


def difference(actual: Logits, expected: Logits) -> Difference:
    """Return the largest difference over all tensors, in units of the bound.

    Names, shapes and dtypes must be equal.
    """
    form, wanted = _form(actual), _form(expected)
    if form != wanted:
        return Difference(
            math.inf, f"got {_only_in(form, wanted)}, expected {_only_in(wanted, form)}"
        )
    each = [_largest(name, actual[name], expected[name]) for name in expected]
    return max(each, key=lambda d: d.ratio, default=Difference(math.inf, "no logits to compare"))


def _form(logits: Logits) -> dict[str, str]:
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        for name, tensor in logits.items()
    }


def _only_in(form: dict[str, str], other: dict[str, str]) -> str:
    differing = [f"{name} {what}" for name, what in form.items() if other.get(name) != what]
    return ", ".join(differing) or "nothing"


def _largest(name: str, actual: Tensor, expected: Tensor) -> Difference:
    if expected.dtype != torch.float32:
        return Difference(math.inf, f"{name}: no bound is defined for {expected.dtype}")
    if not expected.numel():
        return Difference(math.inf, f"{name} is empty")
    gap = (actual.double() - expected.double()).abs().nan_to_num(nan=math.inf)
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    bound = LOGITS_FLOAT32 * float(expected.double().abs().max())
    largest, value, wanted = float(gap[at]), float(actual[at]), float(expected[at])
    within = largest <= bound < math.inf
    ratio = largest / bound if bound and math.isfinite(bound) else (0.0 if within else math.inf)
    return Difference(
        ratio,
        f"{ratio:.2g} x the bound: {largest:.1e} at {name}{list(at)}, "
        f"got {value:.6g}, expected {wanted:.6g}",
    )


# -- where a file lies --------------------------------------------------------------------------


class _GoldenFile(SingleFileSnapshotExtension):
    """One file per test, named after it, in a folder of `golden/` at the repository root."""

    folder: ClassVar[str]

    @classmethod
    def dirname(cls, *, test_location: PyTestLocation) -> str:
        return str(test_location.item.config.rootpath / "golden" / cls.folder)

    @classmethod
    def get_snapshot_name(cls, *, test_location: PyTestLocation, index: Any = 0) -> str:
        if index != 0:
            raise ValueError(
                "a test may compare with its golden file only once: parametrise it instead"
            )
        return re.sub(r"[^A-Za-z0-9_.]+", "-", test_location.snapshot_name).strip("-")

    @classmethod
    def matches_test_location(
        cls, *, test_location: PyTestLocation, snapshot_location: str
    ) -> bool:
        return cls.get_location(test_location=test_location, index=0) == snapshot_location

    def discover_snapshots(self, **_: Any) -> SnapshotCollections:
        """Return none, so that syrupy neither reports nor deletes any file as unused."""
        return SnapshotCollections()


class TableExtension(_GoldenFile):
    """Text, compared character by character."""

    folder = "tables"
    file_extension = "txt"
    _write_mode = WriteMode.TEXT

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterable[str]:
        if snapshot_data is None:
            yield f"record it: {UPDATE}"
            return
        yield f"if the change is intended: {UPDATE}"  # first, since pytest cuts long explanations
        yield from super().diff_lines(serialized_data, snapshot_data)


class LogitsExtension(_GoldenFile):
    """`Measured` logits, compared with the recorded ones within `LOGITS_FLOAT32`."""

    folder = "logits"
    file_extension = "safetensors"

    def serialize(self, data: Any, **_: Any) -> Any:
        if not isinstance(data, Measured):
            raise TypeError(f"golden logits compare with Measured(...), not {type(data).__name__}")
        return data

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return compare(serialized_data, snapshot_data).agrees

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterable[str]:
        if not isinstance(snapshot_data, Recorded):
            yield f"record it: {UPDATE}"
            return
        yield from compare(serialized_data, snapshot_data).lines()
        if snapshot_data.versions != _versions():
            yield f"recorded with {_named(snapshot_data.versions)}, now {_named(_versions())}"
        yield f"if the change is intended, and paged agrees with SDPA: {UPDATE}"

    def read_snapshot_data_from_location(self, *, snapshot_location: str, **_: Any) -> Any:
        if not Path(snapshot_location).is_file():
            return None
        with safe_open(snapshot_location, framework="pt") as file:
            metadata = json.loads(file.metadata()["golden"])
            logits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Recorded(logits, **metadata)

    @classmethod
    def write_snapshot_collection(
        cls, *, snapshot_collection: SnapshotCollection, **_: Any
    ) -> None:
        measured: Any = next(iter(snapshot_collection)).data
        apart = difference(measured.paged, measured.sdpa)
        if apart.off:
            raise ValueError(f"not recorded, paged and SDPA are apart: {apart.text}")
        # one key only: safetensors keeps several keys in no fixed order
        metadata = json.dumps(
            {"origin": dict(measured.origin), "versions": _versions()}, sort_keys=True
        )
        logits = {name: tensor.contiguous() for name, tensor in measured.sdpa.items()}
        content = save(logits, metadata={"golden": metadata})
        Path(snapshot_collection.location).write_bytes(content)


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers")}


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in sorted(versions.items()))


# -- which test owns a file ---------------------------------------------------------------------

FIXTURES: dict[str, type[_GoldenFile]] = {
    "golden_logits": LogitsExtension,
    "golden_table": TableExtension,
}


def claims(items: Iterable[pytest.Item]) -> dict[Path, list[str]]:
    """Map each golden file to the ids of the tests that compare with it."""
    claimed: defaultdict[Path, list[str]] = defaultdict(list)
    for item in items:
        for fixture in FIXTURES.keys() & set(getattr(item, "fixturenames", ())):
            location = PyTestLocation(item)
            path = FIXTURES[fixture].get_location(test_location=location, index=0)
            claimed[Path(path)].append(item.nodeid)
    return dict(claimed)


def orphans(root: Path, claimed: Iterable[Path]) -> list[str]:
    """Return the files of golden data that no test claims, relative to `root`."""
    folders = [root / "golden" / extension.folder for extension in FIXTURES.values()]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return sorted(path.relative_to(root).as_posix() for path in files - set(claimed))


def contested(claimed: Mapping[Path, list[str]]) -> list[list[str]]:
    """Return groups of tests that would share a file, also on file systems that ignore case."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for path, tests in claimed.items():
        by_name[str(path).lower()].extend(tests)
    return [tests for tests in by_name.values() if len(tests) > 1]
