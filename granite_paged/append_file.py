"""A file that grows by whole lines, and survives kills, crashes and full disks.

While it is open it holds a lock, where the platform and the file system have locks. A failed append
leaves the file as it was.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from granite_paged.errors import CannotWrite, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class AppendFile:
    """One file, opened for this process alone.

    Args:
        path: the file; it is made if it does not exist.
        option: what names such a file on the command line, for the advice in errors.

    Raises:
        CannotWrite: if the file cannot be written, or another run has it open.
    """

    def __init__(self, path: str, option: str) -> None:
        self.path = path
        with writing(path):
            Path(path).touch()
            if not Path(path).is_file():  # reading a device may never end
                raise CannotWrite(path, "not a regular file")
            self._file: BinaryIO = open(path, "r+b", buffering=0)  # noqa: SIM115
            try:
                self._lock(option)
                self._file.seek(0, os.SEEK_END)
            except BaseException:
                self.close()
                raise

    def content(self) -> bytes:
        """Return the whole content."""
        with writing(self.path):
            return Path(self.path).read_bytes()

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes. Raises CannotWrite."""
        with writing(self.path):
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)

    def append(self, content: bytes, *, kept: str, to_disk: bool = True) -> None:
        """Write at the end.

        Args:
            content: whole lines.
            kept: what remains if this fails, for the error.
            to_disk: wait until the disk has it. Without, a kill of the process loses nothing
                either, but a crash of the machine may.

        Raises:
            CannotWrite: if the disk fails; nothing of `content` is kept then.
        """
        end = self._file.tell()
        try:
            written = self._file.write(content)
            if written != len(content):  # a full disk may take only a part
                written += self._file.write(content[written:])
            if to_disk:
                os.fsync(self._file.fileno())
        except BaseException as error:  # an interrupt, too, leaves whole lines
            with contextlib.suppress(OSError):
                self.cut(end)
            if isinstance(error, OSError):
                raise CannotWrite(self.path, f"{error.strerror}; {kept}") from None
            raise

    def close(self) -> None:
        """Close the file, which releases its lock."""
        self._file.close()

    def _lock(self, option: str) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another run keeps its answers there; wait for it, or name another {option}"
            raise CannotWrite(self.path, problem) from None
        except OSError:  # a file system without locks
            return
