"""Result files: strict JSON and text, each written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from granite_paged.errors import CannotWrite, writing


def write_json(path: str | Path, data: Any) -> None:
    """Write strict JSON with `write_file`. Raises CannotWrite, for NaN and infinity too."""
    write_file(path, json_text(data, path))


def json_text(data: Any, path: object) -> str:
    """Return strict JSON for the file `path`. Raises CannotWrite if a number is not finite."""
    try:
        return json.dumps(data, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise CannotWrite(str(path), f"{error}") from None


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file so that, after a crash or on a full disk, the old or the new one is there.

    The content goes to a temporary file in the same folder, which then takes the place of the old
    one and its permissions. A link stays a link; a device or a pipe is written directly.
    Raises CannotWrite.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        target = Path(path).resolve()
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                temporary.chmod(target.stat().st_mode & 0o7777)
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
